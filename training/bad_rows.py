"""Counts the rows that turned bad during training and were replaced."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate.utils import gather_object
from transformers.utils import logging

from ..data.checks import SKIP
from ..data.sources import SHOWN, BadRow, PairDataset, check_bad_rows
from ..data.streamed_pairs import StreamedPairs

logger = logging.get_logger(__name__)

FIRST = 1000  # rows of streamed data to which the share of bad rows is limited at first


class ReplacedRows:
    """Collects replaced rows, counts them by cause, and stops the run when there are too many.

    Args:
        max_bad_rows: largest share of rows.
        rows: number of rows of the training data; `None` if it is streamed: those seen, `FIRST` at least.
        left_out: rows that the check has left out already.
    """

    def __init__(self, max_bad_rows: float, rows: int | None, left_out: Sequence[BadRow]) -> None:
        self.max_bad_rows = max_bad_rows
        self.rows = None if rows is None else rows + len(left_out)
        self.left_out = {_key(row): row for row in left_out}
        self.restore({})

    @classmethod
    def of(cls, pairs: PairDataset | StreamedPairs | None, max_bad_rows: float) -> "ReplacedRows | None":
        """Returns the collection of a training data set; `None` if it replaces no rows."""
        if pairs is None or pairs.on_bad_row != SKIP:
            return None
        if isinstance(pairs, StreamedPairs):
            return cls(max_bad_rows, None, ())
        return cls(max_bad_rows, len(pairs), pairs.bad_rows)

    def add(self, rows: Sequence[BadRow], seen: int = 0) -> None:
        """Adds the rows that were replaced in a batch of this rank, and the number of rows of that of all ranks."""
        self.new += rows
        self.seen += seen

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Sets what a run had found when it wrote a checkpoint, see `state`; nothing for a new run."""
        self.seen: int = saved.get("seen", 0)  # rows of all ranks
        self.found = {_key(row): row for row in (BadRow(**each) for each in saved.get("rows", ()))}
        self.new: list[BadRow] = []

    def state(self) -> dict[str, Any]:
        """Returns what all ranks have found so far, in values of JSON; every rank has to call it.

        The problems are those of the first rows alone, since no more are shown.
        """
        self._gather()
        rows = [asdict(row) | ({} if place < SHOWN else {"problem": ""}) for place, row in enumerate(self._turned())]
        return {"seen": self.seen, "rows": rows}

    def summary(self) -> dict[str, float]:
        """Returns the bad rows of all ranks so far, by cause, for the log; every rank has to call it.

        Raises:
            ValueError: they are more than `max_bad_rows`; on every rank.
        """
        self._gather()
        bad = [*self.left_out.values(), *self._turned()]
        rows = max(FIRST, self.seen + len(bad)) if self.rows is None else self.rows
        check_bad_rows(bad, rows, self.max_bad_rows)
        causes = Counter(row.cause for row in bad)
        return {"bad_rows": len(bad), **{f"bad_rows/{cause}": count for cause, count in sorted(causes.items())}}

    def _turned(self) -> list[BadRow]:
        """Returns the rows that turned bad in training, those that the check leaves out by now not among them."""
        return [row for key, row in self.found.items() if key not in self.left_out]

    def _gather(self) -> None:
        """Adds the new rows of all ranks to those found, and names each once."""
        for row in gather_object(self.new):
            if _key(row) not in self.found:
                self.found[_key(row)] = row
                logger.warning(f"Row {row.id or row.row} was replaced by another: {row.problem}")
        self.new = []


def _key(row: BadRow) -> tuple[str, int, str | None]:
    """Returns by which a row is known, in whatever epoch it comes."""
    return row.file, row.row, row.id
