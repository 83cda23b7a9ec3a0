"""Holds the checked rows of one file, with the entries of lists among which an epoch draws."""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from .permutation import key_of, mix
from .readers import RowReader
from .sampler import CHOICE, EpochRows
from .shapes import RANDOM
from .stored_file import StoredFile


@dataclass(frozen=True)
class Choices:
    """The stored rows of which each row of a piece is one.

    Attributes:
        numbers: all choices, as numbers of rows in the file, (choices,) int64.
        first: place in `numbers` of the first choice of each row, (rows,) int64.
        count: its choices, which follow each other, likewise.
    """

    numbers: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def only(self, kept: np.ndarray) -> "Choices":
        """Returns the choices of the rows with the given numbers."""
        return Choices(self.numbers, self.first[kept], self.count[kept])

    def drawn(self, rows: np.ndarray, indices: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        """Returns the stored row of each row, (n,) int64, uniform over its choices.

        Args:
            rows: numbers of the rows in this piece, (n,).
            indices: their numbers in the dataset, by which is drawn, (n,).
            epoch: the epoch, in which a row is the same each time.
            seed: seed of the shuffling.
        """
        keys = mix(key_of(seed, CHOICE, epoch) + indices.astype(np.uint64))
        return self.numbers[self.first[rows] + (keys % self.count[rows].astype(np.uint64)).astype(np.int64)]

    def every(self) -> np.ndarray:
        """Returns the numbers in the file of the choices of all rows, (choices,) int64."""
        before = np.cumsum(self.count) - self.count
        return self.numbers[np.repeat(self.first - before, self.count) + np.arange(self.count.sum())]


@dataclass
class Piece:
    """The checked rows of one file."""

    file: StoredFile
    reader: RowReader
    task_ids: np.ndarray  # (rows,) int16, to save memory with millions of rows
    modalities: np.ndarray  # (rows,) int8: bits 0 to 2 `MODALITIES` of side a, 3 to 5 of b, 6 audio in a negative
    numbers: np.ndarray | None = None  # of the rows in the file, (rows,) int64; `None`: all
    choices: Choices | None = None  # where lists are `random`; `numbers` has the first of each

    @classmethod
    def of(cls, table: datasets.Dataset, good: np.ndarray, reader: RowReader) -> "Piece":
        """Returns the piece of the usable ones of stored rows, among which those of one pair become one row.

        Args:
            table: the stored rows of a file, in arrow format.
            good: the numbers of those that can be used.
            reader: reads them.
        """
        file = StoredFile(table)
        piece = cls._of_numbers(file, None if len(good) == len(table) else good, reader)
        if RANDOM not in reader.source.lists.values() or not len(good):
            return piece
        line, pair = piece.column("line"), piece.column("pair")
        first = np.flatnonzero(np.append(True, (np.diff(line) != 0) | (np.diff(pair) != 0)))
        count = np.diff(np.append(first, len(piece)))
        return piece.only(first, Choices(good, first, count))

    @classmethod
    def _of_numbers(cls, file: StoredFile, numbers: np.ndarray | None, reader: RowReader) -> "Piece":
        types = {"task_id": np.int16, "modalities": np.int8}
        columns = [file.column(name).fill_null(0).to_numpy().astype(kind) for name, kind in types.items()]
        return cls(file, reader, *(column if numbers is None else column[numbers] for column in columns), numbers)

    def __len__(self) -> int:
        return len(self.task_ids)

    @property
    def table(self) -> datasets.Dataset:
        """Returns the stored rows, those of which a row is drawn by the first of them."""
        return self.file.rows if self.numbers is None else self.file.rows.select(self.numbers)

    def read(self, rows: list[int], indices: list[int], drawn: EpochRows) -> list[dict[str, Any]]:
        """Returns the stored records of some rows.

        Args:
            rows: their numbers in this piece.
            indices: their numbers in the dataset.
            drawn: the batch to which they belong, with its epoch and seed.
        """
        if self.choices is not None:
            rows = self.choices.drawn(np.array(rows), np.array(indices), drawn.epoch, drawn.seed).tolist()
        elif self.numbers is not None:
            rows = self.numbers[rows].tolist()
        return self.file.records(rows)

    def only(self, kept: np.ndarray, choices: Choices | None = None) -> "Piece":
        """Returns the piece of the rows with the given numbers."""
        if choices is None and self.choices is not None:
            choices = self.choices.only(kept)
        numbers = kept if self.numbers is None else self.numbers[kept]
        return Piece(self.file, self.reader, self.task_ids[kept], self.modalities[kept], numbers, choices)

    def unfolded(self) -> "Piece":
        """Returns the piece with a row for each choice."""
        return self if self.choices is None else self._of_numbers(self.file, self.choices.every(), self.reader)

    def choice_counts(self) -> np.ndarray:
        """Returns the number of stored rows of which each row is one, (rows,) int64."""
        return np.ones(len(self), np.int64) if self.choices is None else self.choices.count

    def values(self, name: str) -> pa.ChunkedArray:
        """Returns a column of the stored rows."""
        column = self.file.column(name)
        return column if self.numbers is None else column.take(pa.array(self.numbers))

    def column(self, name: str) -> np.ndarray:
        """Returns a column of numbers of the stored rows, (rows,); a missing score is NaN."""
        return self.values(name).to_numpy()
