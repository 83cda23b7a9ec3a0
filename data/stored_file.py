"""Reads the stored rows of one file at random places, with as few pages of the mapped file as possible."""

import bisect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .stored_rows import RECORD

ABSENT: dict[str, Any] = {  # values of the columns that are left out
    **dict.fromkeys(RECORD),
    **{name: [] for name in ("images_a", "images_b", "negatives", "named")},
    "part": 0,
}


class StoredFile:
    """The stored rows of one file, those that cannot be used among them.

    Args:
        rows: `stored_rows.SCHEMA`, in arrow format.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": self.rows}  # a worker maps the file itself

    @cached_property
    def _mapped(self) -> "_Mapped":
        return _Mapped(self.rows.data.to_batches())

    def records(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the records of some rows, the columns of `RECORD`."""
        return [self._mapped.record(number) for number in numbers]

    def column(self, name: str) -> pa.ChunkedArray:
        """Returns a column of all rows."""
        return self.rows.select_columns(name)[:][name]


class _Mapped:
    """Reads records value by value, which for rows of many files costs less than gathering columns of each.

    Columns without any value in the file are not read: few files have hard negatives, media on both sides and a
    teacher's vectors, and each column of a row lies on another page.

    Args:
        batches: the record batches of the file.
    """

    def __init__(self, batches: list[pa.RecordBatch]) -> None:
        self._names = [name for name in RECORD if any(_has_values(batch.column(name)) for batch in batches)]
        if "inline" not in self._names:
            self._names = [name for name in self._names if name != "part"]  # which finds media in the table of origin
        self._batches = batches
        self._columns: list[list[pa.Array] | None] = [None] * len(batches)
        self._starts = np.cumsum([0, *map(len, batches)]).tolist()

    def record(self, number: int) -> dict[str, Any]:
        """Returns the record of a row."""
        place = bisect.bisect_right(self._starts, number) - 1
        columns = self._columns[place]
        if columns is None:
            columns = self._columns[place] = [self._batches[place].column(name) for name in self._names]
        row = number - self._starts[place]
        return ABSENT | {name: column[row].as_py() for name, column in zip(self._names, columns, strict=True)}


def _has_values(column: pa.Array) -> bool:
    """Returns whether a column has any value, or its lists any entry, from sizes alone: no page is read."""
    return column.null_count < len(column) and not (pa.types.is_list(column.type) and len(column.values) == 0)
