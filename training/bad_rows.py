"""Counts the rows that turned bad during training and were replaced."""

from collections import Counter
from collections.abc import Sequence

from accelerate.utils import gather_object
from transformers.utils import logging

from ..data.checks import SKIP
from ..data.sources import BadRow, PairDataset, check_bad_rows
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
        self.seen = 0  # rows of all ranks
        self.found = {(row.file, row.row, row.id): row for row in left_out}
        self.new: list[BadRow] = []

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

    def summary(self) -> dict[str, float]:
        """Returns the bad rows of all ranks so far, by cause, for the log; every rank has to call it.

        Raises:
            ValueError: they are more than `max_bad_rows`; on every rank.
        """
        for row in gather_object(self.new):
            if (row.file, row.row, row.id) not in self.found:
                self.found[row.file, row.row, row.id] = row
                logger.warning(f"Row {row.id or row.row} was replaced by another: {row.problem}")
        self.new = []
        rows = max(FIRST, self.seen + len(self.found)) if self.rows is None else self.rows
        check_bad_rows(list(self.found.values()), rows, self.max_bad_rows)
        causes = Counter(row.cause for row in self.found.values())
        return {"bad_rows": len(self.found), **{f"bad_rows/{cause}": count for cause, count in sorted(causes.items())}}
