"""Batches that are filled to a budget of tokens and pixels, in place of a fixed number of rows."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

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

    def _last_of_stretch(self, rows: Any) -> Any:
        """Returns the row before which the stretch of one source ends that a row belongs to, else the last row.

        Args:
            rows: a number, or numbers (n,) int64.
        """
        count = len(self.sampler)
        if self.sampler.batching != "homogeneous":
            return count
        size = self.sampler.batch_rows
        return np.minimum((rows // size + 1) * size, count)

    def _part_ends(self, epoch: int, row: int) -> np.ndarray:
        """Returns where the parts end from a row of an epoch's order on, (parts,) int64."""
        found, held = array("q"), max(PLANNED, self.batch_size)
        while row < len(self.sampler):
            last = min(row + held, len(self.sampler))
            ends = self._ends(self.costs[self.sampler.visited(row, last, epoch)], row)
            start, place = row, 0
            while place < len(ends):
                if ends[place] >= len(ends) and last < len(self.sampler) and place:
                    break  # the part may go on in the next rows
                place = ends[place]
                found.append(start + place)
            row = found[-1]
        return np.array(found, np.int64)

    def _ends(self, costs: np.ndarray, first: int) -> list[int]:
        """Returns where a part would end that began at each row, as numbers among these rows.

        All of them are found at once: a search for each part would read the sums of the other rows again.

        Args:
            costs: of rows that follow each other, (rows, kinds).
            first: place of the first of them in the epoch's order.
        """
        starts = np.arange(len(costs))
        ends = np.minimum(starts + self.batch_size, self._last_of_stretch(first + starts) - first)
        for column, budget in zip(costs.T, self.budgets, strict=True):
            sums = np.cumsum(column, dtype=np.int64)
            most = min(budget, sums[-1])  # beyond which a budget of any size bounds nothing
            ends = np.minimum(ends, np.searchsorted(sums, np.append(0, sums[:-1]) + int(most), side="right"))
        return np.clip(ends, starts + 1, len(costs)).tolist()
