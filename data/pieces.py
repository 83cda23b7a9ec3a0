"""Holds the checked rows of one file, with the entries of lists among which an epoch draws."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from .permutation import key_of, mix
from .readers import RowReader
from .sampler import CHOICE, EpochRows
from .shapes import RANDOM
from .stored_rows import RECORD


@dataclass(frozen=True)
class Choices:
    """The stored rows of which each row of a piece is one.

    Attributes:
        table: all of them, `stored_rows.SCHEMA`, in arrow format.
        first: number of the first choice of each row, (rows,) int64.
        count: its choices, which follow each other, likewise.
    """

    table: datasets.Dataset
    first: np.ndarray
    count: np.ndarray

    @cached_property
    def records(self) -> datasets.Dataset:
        """Returns the columns of which a row is made."""
        return self.table.select_columns(list(RECORD))

    def drawn(self, rows: np.ndarray, indices: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        """Returns the stored row of each row, (n,) int64, uniform over its choices.

        Args:
            rows: numbers of the rows in this piece, (n,).
            indices: their numbers in the dataset, by which is drawn, (n,).
            epoch: the epoch, in which a row is the same each time.
            seed: seed of the shuffling.
        """
        keys = mix(key_of(seed, CHOICE, epoch) + indices.astype(np.uint64))
        return self.first[rows] + (keys % self.count[rows].astype(np.uint64)).astype(np.int64)

    def every(self) -> np.ndarray:
        """Returns the numbers of the stored rows of all rows, (choices,) int64."""
        before = np.cumsum(self.count) - self.count
        return np.repeat(self.first - before, self.count) + np.arange(self.count.sum())


@dataclass
class Piece:
    """The checked rows of one file."""

    table: datasets.Dataset  # `stored_rows.SCHEMA`, in arrow format
    reader: RowReader
    task_ids: np.ndarray  # (rows,) int16, to save memory with millions of rows
    modalities: np.ndarray  # (rows,) int8: bits 0 to 2 `MODALITIES` of side a, 3 to 5 of b, 6 audio in a negative
    choices: Choices | None = None  # where lists are `random`; `table` has the first of each

    @classmethod
    def of(cls, table: datasets.Dataset, reader: RowReader) -> "Piece":
        """Returns the piece of stored rows, among which those of one pair become one row."""
        piece = cls._of_all(table, reader)
        if RANDOM not in reader.source.lists.values():
            return piece
        line, pair = piece.column("line"), piece.column("pair")
        first = np.flatnonzero(np.append(True, (np.diff(line) != 0) | (np.diff(pair) != 0)))
        count = np.diff(np.append(first, len(table)))
        return Piece(table, reader, piece.task_ids, piece.modalities).only(first, Choices(table, first, count))

    @classmethod
    def _of_all(cls, table: datasets.Dataset, reader: RowReader) -> "Piece":
        columns = table.select_columns(["task_id", "modalities"])[:]
        types = {"task_id": np.int16, "modalities": np.int8}
        return cls(table, reader, *(columns[name].to_numpy().astype(kind) for name, kind in types.items()))

    @cached_property
    def records(self) -> datasets.Dataset:
        """Returns the columns of which a row is made."""
        return self.table.select_columns(list(RECORD))

    def read(self, rows: list[int], indices: list[int], drawn: EpochRows) -> list[dict[str, Any]]:
        """Returns the stored records of some rows.

        Args:
            rows: their numbers in this piece.
            indices: their numbers in the dataset.
            drawn: the batch to which they belong, with its epoch and seed.
        """
        if self.choices is None:
            return self.records[rows].to_pylist()
        chosen = self.choices.drawn(np.array(rows), np.array(indices), drawn.epoch, drawn.seed)
        return self.choices.records[chosen.tolist()].to_pylist()

    def only(self, kept: np.ndarray, choices: Choices | None = None) -> "Piece":
        """Returns the piece of the rows with the given numbers."""
        if choices is None and self.choices is not None:
            choices = Choices(self.choices.table, self.choices.first[kept], self.choices.count[kept])
        return Piece(self.table.select(kept), self.reader, self.task_ids[kept], self.modalities[kept], choices)

    def unfolded(self) -> "Piece":
        """Returns the piece with a row for each choice."""
        if self.choices is None:
            return self
        return self._of_all(self.choices.table.select(self.choices.every()), self.reader)

    def column(self, name: str) -> np.ndarray:
        """Returns a column of numbers of the stored rows, (rows,); a missing score is NaN."""
        return self.table.select_columns(name)[:][name].to_numpy(zero_copy_only=False)
