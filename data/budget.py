"""Batches that are filled to a budget of tokens and pixels, in place of a fixed number of rows."""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from .sampler import MixtureBatches, MixtureSampler

PLANNED = 2**20  # rows of the order that are held at once


class BudgetBatches(MixtureBatches):
    """Yields this rank's share of each global batch, of as many rows as fit its budgets.

    A rank's part is a stretch of the epoch's order that ends before the row which would exceed a budget; a row that
    exceeds it by itself is a part alone. The parts of all ranks follow each other and make a global batch, so all
    ranks have as many. In `homogeneous` order a global batch ends with the stretch of one source, where the last ranks
    may have no row, as in the last global batch of an epoch.

    Args:
        sampler: the order of the rows.
        batch_size: most rows of one rank.
        costs: of each row, (rows, kinds).
        budgets: most of each kind that a rank's part may have, (kinds,).
        rank: number of this rank.
        processes: number of ranks.
        drop_last: whether to leave out the last global batch, if it has no part for some rank.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        batch_size: int,
        costs: np.ndarray,
        budgets: Sequence[float],
        rank: int = 0,
        processes: int = 1,
        drop_last: bool = False,
    ) -> None:
        super().__init__(sampler, batch_size, rank, processes, drop_last)
        self.costs = costs
        self.budgets = budgets
        self._plans: dict[tuple[int, int], np.ndarray] = {}  # of the last places that were asked for

    def _batches_from(self, epoch: int, row: int) -> int:
        return len(self.plan(epoch, row))

    def largest(self) -> int:
        """Returns the rows of the largest global batch of the first epoch."""
        plan = self.plan(0)
        return int((plan[:, -1] - plan[:, 0]).max(initial=0))

    def start_at(self, epoch: int, row: int, accumulation: int = 1) -> None:
        """Starts `epoch` after `row` rows of its order; the visited rows count as complete updates."""
        before = int(np.searchsorted(self.plan(epoch)[:, -1], row, side="right"))
        self._start = (epoch, row, before // accumulation * accumulation)

    def position(self, epoch: int, batches: int) -> tuple[int, int]:
        """Returns the epoch and row at which to resume after `batches` batches since the start of `epoch`."""
        row = self.begin(epoch)[0]
        plan = self.plan(epoch, row)
        if batches >= len(plan):
            return epoch + 1, 0
        return epoch, int(plan[batches, 0])

    def parts(self) -> Iterable[tuple[int, int]]:
        """Yields this rank's stretches of the epoch's order, from where it starts."""
        plan = self.plan(self.sampler.epoch, self.begin(self.sampler.epoch)[0])
        yield from plan[:, self.rank : self.rank + 2].tolist()

    def plan(self, epoch: int, row: int = 0) -> np.ndarray:
        """Returns where the parts of all ranks begin and end in each global batch, (batches, ranks + 1) int64.

        Args:
            epoch: the epoch.
            row: rows of its order that were visited before.
        """
        if (epoch, row) not in self._plans:
            while len(self._plans) > 2:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch, row] = self._planned(epoch, row)
        return self._plans[epoch, row]

    def _planned(self, epoch: int, row: int) -> np.ndarray:
        ends, ranks = self._part_ends(epoch, row), self.processes
        plan = array("q")
        start, part = row, 0
        while part < len(ends):
            last = self._last_of_stretch(start)
            of_batch = [end for end in ends[part : part + ranks].tolist() if end <= last]
            full = [start, *of_batch, *[of_batch[-1]] * (ranks - len(of_batch))]
            part, start = part + len(of_batch), full[-1]
            if not self.drop_last or part < len(ends) or len(of_batch) == ranks:
                plan.extend(full)
        return np.array(plan, np.int64).reshape(-1, ranks + 1)

    def _last_of_stretch(self, row: int) -> int:
        """Returns the row before which the stretch of one source ends that a row belongs to; else the last row."""
        rows = len(self.sampler)
        if self.sampler.batching != "homogeneous":
            return rows
        size = self.sampler.batch_rows
        return min((row // size + 1) * size, rows)

    def _part_ends(self, epoch: int, row: int) -> np.ndarray:
        """Returns where the parts end from a row of an epoch's order on, (parts,) int64."""
        found, held = array("q"), max(PLANNED, self.batch_size)
        while row < len(self.sampler):
            last = min(row + held, len(self.sampler))
            costs = self.costs[self.sampler.visited(row, last, epoch)].astype(np.int64)
            for end in self._filled(np.cumsum(costs, axis=0), row, last == len(self.sampler)):
                found.append(end)
            row = found[-1]
        return np.array(found, np.int64)

    def _filled(self, sums: np.ndarray, first: int, is_last: bool) -> Sequence[int]:
        """Returns where parts end among rows of these cumulated costs, without one that may continue after them."""
        ends, start, rows = array("q"), 0, len(sums)
        columns = list(sums.T)
        while start < rows:
            before = sums[start - 1] if start else np.zeros_like(sums[0])
            fits = [
                int(np.searchsorted(column, spent + budget, side="right"))
                for column, spent, budget in zip(columns, before, self.budgets, strict=True)
            ]
            limit = min(start + self.batch_size, self._last_of_stretch(first + start) - first)
            end = max(start + 1, min(*fits, limit))
            if end >= rows and not is_last and ends:
                break
            ends.append(first + min(end, rows))
            start = end
        return ends
