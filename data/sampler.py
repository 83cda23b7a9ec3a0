"""In which order an epoch visits the rows of several sources."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class MixtureSampler(Sampler[int]):
    """Visits the rows of each source `weight` times an epoch, all sources shuffled together.

    Every source has an endless stream of shuffled passes over its rows, and an epoch takes the next
    `weight` × rows of it: 2.0 gives every row twice, 0.5 one half of the rows in one epoch and the other half in the
    next. The order depends on (seed, epoch) alone.

    Args:
        lengths: number of rows of each source; the sources stand one after the other.
        weights: how many times an epoch visits the rows of each source.
        seed: seed of all shuffling.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int = 0) -> None:
        if len(lengths) != len(weights):
            raise ValueError(f"There are {len(lengths)} sources and {len(weights)} weights; give each source one.")
        self.lengths = list(lengths)
        self.visits = [max(1, round(weight * length)) for length, weight in zip(lengths, weights, strict=True)]
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.visits)

    def __iter__(self) -> Iterator[int]:
        starts = np.cumsum([0, *self.lengths])
        rows = np.concatenate([start + self._take(source) for source, start in enumerate(starts[:-1])])
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(rows).tolist()

    def _take(self, source: int) -> np.ndarray:
        """The epoch's part of a source's stream, (visits,) int64 within the source."""
        length, visits = self.lengths[source], self.visits[source]
        first, last = self.epoch * visits, (self.epoch + 1) * visits
        passes = [
            np.random.default_rng([self.seed, source, number]).permutation(length)
            for number in range(first // length, -(-last // length))
        ]
        offset = first // length * length
        return np.concatenate(passes)[first - offset : last - offset]
