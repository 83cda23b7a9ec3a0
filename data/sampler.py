"""In which order an epoch visits the rows of several sources; any place of it is found without those before it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

BLOCK = 4096  # places that a plain iteration computes at once
ROUNDS = 16  # of the Feistel network; with 8, sets of five or six show some of their orders too often
ORDER, STREAM = 0, 1  # what a key is for


class MixtureSampler(Sampler[int]):
    """Visits the rows of each source `weight` times an epoch, all sources shuffled together.

    Every source has an endless stream of shuffled passes over its rows, and an epoch takes the next
    `weight` × rows of it: 2.0 gives every row twice, 0.5 one half of the rows in one epoch and the other half in the
    next. The order depends on (seed, epoch) alone.

    Nothing is drawn ahead or kept: `rows` computes any stretch of an epoch, and what that costs depends on its length
    alone.

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
        self._row_starts = np.cumsum([0, *self.lengths])
        self._visit_starts = np.cumsum([0, *self.visits])
        self._stream_keys = np.concatenate([_key(seed, STREAM, source) for source in range(len(lengths))])

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.visits)

    def __iter__(self) -> Iterator[int]:
        for first in range(0, len(self), BLOCK):
            yield from self.rows(first, min(first + BLOCK, len(self)))

    def rows(self, first: int, last: int) -> list[int]:
        """The rows at the places [first, last) of the epoch's order."""
        visits = permute(np.arange(first, last), np.int64(len(self)), _key(self.seed, ORDER, self.epoch))
        sources = np.searchsorted(self._visit_starts, visits, side="right") - 1
        lengths = np.array(self.lengths)[sources]
        places = self.epoch * np.array(self.visits)[sources] + visits - self._visit_starts[sources]  # in the streams
        keys = _mix(self._stream_keys[sources] + (places // lengths).astype(np.uint64))
        return (self._row_starts[sources] + permute(places % lengths, lengths, keys)).tolist()

    def identity(self) -> dict[str, Any]:
        """What the order follows from, besides the epoch."""
        return {"lengths": self.lengths, "visits": self.visits, "seed": self.seed}


class MixtureBatches(Sampler[list[int]]):
    """This process's share of each joined batch; it can begin in the middle of an epoch.

    The joined batch of all processes is a stretch of the epoch's order, and each process takes an equal part of it.
    The last one of an epoch may be smaller: then the parts differ by one row at most, and nothing is visited twice to
    fill them up.

    Args:
        sampler: the order of the rows.
        batch_size: rows of one process.
        rank: number of this process.
        processes: how many there are.
        drop_last: whether an epoch leaves out the rows that do not fill a joined batch.
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
        """Rows of a joined batch."""
        return self.batch_size * self.processes

    def __len__(self) -> int:
        """Batches of an epoch that begins at its first row."""
        return self._count(len(self.sampler))

    def _count(self, rows: int) -> int:
        return rows // self.joined if self.drop_last else -(-rows // self.joined)

    def start_at(self, epoch: int, row: int, accumulation: int = 1) -> None:
        """Lets `epoch` begin after `row` rows of its order; epochs before and after it are whole.

        Args:
            epoch: the epoch.
            row: rows of it that were visited.
            accumulation: batches of one update; the rows visited count as so many whole updates of this run.
        """
        self._start = (epoch, row, row // (self.joined * accumulation) * accumulation)

    def begin(self, epoch: int) -> tuple[int, int, int]:
        """Row at which an epoch begins, how many batches the rows before it count as, and batches of the epoch."""
        at, row, before = self._start
        if epoch != at:
            row, before = 0, 0
        return row, before, before + self._count(len(self.sampler) - row)

    def position(self, epoch: int, batches: int) -> tuple[int, int]:
        """Epoch and row at which a run goes on that has taken `batches` batches since `epoch` began here."""
        row = self.begin(epoch)[0] + batches * self.joined
        rest = len(self.sampler) - row
        return (epoch + 1, 0) if rest <= 0 or self._count(rest) == 0 else (epoch, row)

    def __iter__(self) -> Iterator[list[int]]:
        """An empty list for each batch before the beginning: the stock loop discards as many, and counts them."""
        start, before, total = self.begin(self.sampler.epoch)
        for _ in range(before):
            yield []
        for first in range(start, start + (total - before) * self.joined, self.joined):
            rows = min(self.joined, len(self.sampler) - first)
            part = [first + rows * rank // self.processes for rank in (self.rank, self.rank + 1)]
            yield self.sampler.rows(*part)


def permute(index: np.ndarray, length: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The places of elements in keyed pseudo-random orders of the numbers [0, length).

    A Feistel network over ⌈√length⌉ × ⌈length / ⌈√length⌉⌉ cells; what falls outside of [0, length) is permuted again
    until it falls inside (Black and Rogaway 2002, generalised Feistel cipher with cycle walking).

    Args:
        index: int64 in [0, length).
        length: int64, how many numbers are ordered; one or one for each index.
        key: uint64, one or one for each index: which order.

    Returns:
        int64 in [0, length), of the shape of `index`.
    """
    index, length, key = np.broadcast_arrays(index.astype(np.uint64), length.astype(np.uint64), key)
    width = np.ceil(np.sqrt(length)).astype(np.uint64)
    height = (length + width - np.uint64(1)) // width
    placed = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        placed[outside] = _feistel(placed[outside], width[outside], height[outside], key[outside])
        outside = placed >= length
    return placed.astype(np.int64)


def _feistel(index: np.ndarray, width: np.ndarray, height: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, width · height), all uint64: the halves are shifted by turns."""
    left, right = index % width, index // width
    for number in range(0, ROUNDS, 2):
        left = (left + _mix(_mix(key + np.uint64(number)) + right) % width) % width
        right = (right + _mix(_mix(key + np.uint64(number + 1)) + left) % height) % height
    return right * width + left


def _mix(x: np.ndarray) -> np.ndarray:
    """Steele et al.'s SplitMix64: a bijection of uint64 whose every output bit depends on all input bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*numbers: int) -> np.ndarray:
    """A key that follows from non-negative numbers, (1,) uint64."""
    return np.random.SeedSequence(numbers).generate_state(1, np.uint64)
