"""Shuffles the rows of several sources with random access: any stretch of an epoch is computed directly."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .mixing import BATCHING, Order, homogeneous_order, mixed_order, mixture_visits, stratified_order
from .permutation import key_of, mix, permute

BLOCK = 4096  # positions computed at once by iteration
ORDER, STREAM, CHOICE = 0, 1, 2  # purpose of a key


class MixtureSampler(Sampler[int]):
    """Shuffles all sources together; an epoch visits each row `weight` times.

    Every source is an endless stream of shuffled passes over its rows, of which an epoch takes the next `weight` ×
    rows: 2.0 gives every row twice, 0.5 one half of the rows in one epoch and the other half in the next. The order
    depends on (seed, epoch) alone.

    The sampler holds no permutation: `rows` computes any stretch of an epoch at a cost proportional to its length.

    Args:
        lengths: number of rows of each source, in the order of the dataset.
        weights: visits of each row of a source in an epoch.
        seed: seed of all shuffling.
        temperature: flattens the sizes of the sources, see `mixture_visits`.
        caps: most visits of each source in an epoch, `None` for no limit.
        batching: `mixed` shuffles all sources together; in `homogeneous` order a batch is of one source, in
            `stratified` order it has the share of each source.
        batch_rows: rows of a batch of all ranks, for `homogeneous`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        seed: int = 0,
        temperature: float = 1.0,
        caps: Sequence[int | None] | None = None,
        batching: str = "mixed",
        batch_rows: int = 1,
    ) -> None:
        if len(lengths) != len(weights):
            raise ValueError(f"{len(lengths)} sources and {len(weights)} weights; give each source one weight.")
        if batching not in BATCHING:
            raise ValueError(f"batching is {batching!r}; choose one of {', '.join(BATCHING)}.")
        self.lengths = list(lengths)
        self.visits = mixture_visits(lengths, weights, temperature, caps)
        self.batching = batching
        self.batch_rows = batch_rows
        self.seed = seed
        self.epoch = 0
        self._row_starts = np.cumsum([0, *self.lengths])
        self._visit_starts = np.cumsum([0, *self.visits])
        self._stream_keys = np.concatenate([key_of(seed, STREAM, source) for source in range(len(lengths))])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.visits)

    def __iter__(self) -> Iterator[int]:
        for first in range(0, len(self), BLOCK):
            yield from self.rows(first, min(first + BLOCK, len(self)))

    def rows(self, first: int, last: int) -> list[int]:
        """Returns the rows at positions [first, last) of the epoch's order."""
        return self.visited(first, last, self.epoch).tolist()

    def visited(self, first: int, last: int, epoch: int) -> np.ndarray:
        """Returns the rows at positions [first, last) of the order of an epoch, (last - first,) int64."""
        visits = self._order(epoch)(first, last)
        sources = np.searchsorted(self._visit_starts, visits, side="right") - 1
        lengths = np.array(self.lengths)[sources]
        places = epoch * np.array(self.visits)[sources] + visits - self._visit_starts[sources]  # in the streams
        keys = mix(self._stream_keys[sources] + (places // lengths).astype(np.uint64))
        return self._row_starts[sources] + permute(places % lengths, lengths, keys)

    def _order(self, epoch: int) -> Order:
        key = key_of(self.seed, ORDER, epoch)
        if self.batching == "homogeneous":
            return homogeneous_order(self.visits, key, self.batch_rows)
        return (stratified_order if self.batching == "stratified" else mixed_order)(self.visits, key)

    def identity(self) -> dict[str, Any]:
        """Returns what determines the order, besides the epoch."""
        identity = {"lengths": self.lengths, "visits": self.visits, "seed": self.seed}
        if self.batching == "mixed":
            return identity  # as checkpoints of earlier versions have it
        rows = {"batch_rows": self.batch_rows} if self.batching == "homogeneous" else {}
        return {**identity, "batching": self.batching, **rows}


class EpochRows(list[int]):
    """The rows of a batch, with the epoch for which they were drawn.

    Args:
        rows: their numbers.
        epoch: the epoch.
        seed: seed of the shuffling.
    """

    def __init__(self, rows: Iterable[int] = (), epoch: int = 0, seed: int = 0) -> None:
        super().__init__(rows)
        self.epoch = epoch
        self.seed = seed


class MixtureBatches(Sampler[list[int]]):
    """Yields this rank's share of each global batch; it can start in the middle of an epoch.

    The global batch is a stretch of the epoch's order, of which each rank takes an equal part. The last one of an
    epoch may be smaller: its parts then differ by one row at most, without padding by repeated rows.

    Args:
        sampler: the order of the rows.
        batch_size: rows of one rank.
        rank: number of this rank.
        processes: number of ranks.
        drop_last: whether to leave out the rows that do not fill a global batch.
    """

    def __init__(
        self, sampler: MixtureSampler, batch_size: int, rank: int = 0, processes: int = 1, drop_last: bool = False
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes
        self.drop_last = drop_last
        self._start = (0, 0, 0)

    @property
    def joined(self) -> int:
        """Returns the number of rows of a global batch."""
        return self.batch_size * self.processes

    def __len__(self) -> int:
        """Returns the number of batches of the first epoch, complete; filled to a budget, others may differ."""
        return self._batches_from(0, 0)

    def _batches_from(self, epoch: int, row: int) -> int:
        """Returns the number of batches of an epoch after `row` rows of its order."""
        return self._count(len(self.sampler) - row)

    def _count(self, rows: int) -> int:
        return rows // self.joined if self.drop_last else -(-rows // self.joined)

    def start_at(self, epoch: int, row: int, accumulation: int = 1) -> None:
        """Starts `epoch` after `row` rows of its order; all other epochs are complete.

        Args:
            epoch: the epoch.
            row: number of its rows already visited.
            accumulation: batches of an update; the visited rows count as complete updates of this run.
        """
        self._start = (epoch, row, row // (self.joined * accumulation) * accumulation)

    def begin(self, epoch: int) -> tuple[int, int, int]:
        """Returns the first row of an epoch, the batches that earlier rows count as, and the batches in total."""
        at, row, before = self._start
        if epoch != at:
            row, before = 0, 0
        return row, before, before + self._batches_from(epoch, row)

    def position(self, epoch: int, batches: int) -> tuple[int, int]:
        """Returns the epoch and row at which to resume after `batches` batches since the start of `epoch`."""
        row = self.begin(epoch)[0] + batches * self.joined
        rest = len(self.sampler) - row
        return (epoch + 1, 0) if rest <= 0 or self._count(rest) == 0 else (epoch, row)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields an empty list for each earlier batch, which the stock loop counts and discards."""
        for _ in range(self.begin(self.sampler.epoch)[1]):
            yield []
        for first, last in self.parts():
            yield EpochRows(self.sampler.rows(first, last), self.sampler.epoch, self.sampler.seed)

    def parts(self) -> Iterable[tuple[int, int]]:
        """Yields this rank's stretches of the epoch's order, from where it starts."""
        start, before, total = self.begin(self.sampler.epoch)
        for first in range(start, start + (total - before) * self.joined, self.joined):
            rows = min(self.joined, len(self.sampler) - first)
            yield first + rows * self.rank // self.processes, first + rows * (self.rank + 1) // self.processes
