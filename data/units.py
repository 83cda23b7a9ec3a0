"""The records of files in units of rows that are processed, stored and skipped together."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .archives import open_archive
from .files import find_files, suffix_of
from .records import TEXT_READERS
from .schema import Place, RowError
from .source_config import SourceConfig
from .tables import load_from_hub, load_saved

UNIT_ROWS = 4096


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be an input, and why."""

    id: str
    file: str
    row: int
    error: str


@dataclass(frozen=True)
class Unit:
    """Rows that are processed and stored together; of a Parquet file, they lie in one row group.

    Attributes:
        name: the same in every run; other files and places have other names.
        content: returns a text that changes with the content of the rows (not with that of media files they name).
        rows: number of rows.
        read: returns the rows.
    """

    name: str
    content: Callable[[], str]
    rows: int
    read: Callable[[], list[Any]]

    @cached_property
    def key(self) -> str:
        """Returns a hash of the content; computed when it is asked for, since planning a new folder needs none."""
        return digest(self.content())


@dataclass(frozen=True)
class UnitReader:
    """Reads the records of one file in units; a subclass says which columns it reads and what a record becomes.

    Attributes:
        source: entry of a recipe's data.
        file: the file, the folder of `save_to_disk` or the Hub dataset.
        label: what the names of its units begin with.
        unit_rows: rows of a unit at most.
    """

    source: SourceConfig
    file: str
    label: str
    unit_rows: int

    def units(self) -> Iterator[Unit]:
        """Returns the units in their order; only text files are read for it.

        Raises:
            ValueError: a column is missing, or the file cannot be read.
        """
        suffix = suffix_of(self.file)
        if suffix == ".parquet":
            yield from self._parquet_units()
        elif suffix in TEXT_READERS:
            yield from self._text_units(suffix)
        else:
            yield from self._table_units(self._open_table())

    def _parquet_units(self) -> Iterator[Unit]:
        try:
            metadata = pq.read_metadata(self.file)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.file}: this cannot be read as Parquet: {error}. Write it anew.") from error
        columns = self.columns(metadata.schema.to_arrow_schema().names)
        start = number = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            content = json.dumps(group.to_dict(), sort_keys=True, default=str)
            slices = _RowGroup(self.file, index, sorted(set(columns.values())), self.unit_rows)
            for piece, first in enumerate(range(0, group.num_rows, self.unit_rows)):

                def read(slices: _RowGroup = slices, piece: int = piece, first: int = start + first + 1) -> list[Any]:
                    return self.rows(enumerate(slices.read(piece), start=first), columns)

                rows = min(self.unit_rows, group.num_rows - first)
                yield Unit(self._name(number), f"{content} {first}".__str__, rows, read)
                number += 1
            start += group.num_rows

    def _text_units(self, suffix: str) -> Iterator[Unit]:
        records = TEXT_READERS[suffix](self.file, self.source)
        for number, chunk in enumerate(_chunks(records, self.unit_rows)):
            existing = list(dict.fromkeys(name for _, record in chunk if isinstance(record, dict) for name in record))
            columns = self.columns(existing) if existing else {}

            def read(chunk: list[tuple[int, Any]] = chunk, columns: dict[str, str] = columns) -> list[Any]:
                return self.rows(chunk, columns)

            content = partial(json.dumps, chunk, sort_keys=True, default=str)
            yield Unit(self._name(number), content, len(chunk), read)

    def _table_units(self, table: datasets.Dataset) -> Iterator[Unit]:
        columns = self.columns(table.column_names)
        table = table.select_columns(sorted(set(columns.values()))).with_format("arrow")
        for number, first in enumerate(range(0, len(table), self.unit_rows)):
            last = min(first + self.unit_rows, len(table))

            def read(first: int = first, last: int = last) -> list[Any]:
                return self.rows(enumerate(table[first:last].to_pylist(), start=first + 1), columns)

            yield Unit(self._name(number), f"{table._fingerprint} {first} {last}".__str__, last - first, read)

    def _open_table(self) -> datasets.Dataset:
        if suffix_of(self.file) == ".arrow":
            return datasets.Dataset.from_file(self.file)
        if suffix_of(self.file) == ".tar":
            return open_archive(self.file)
        return load_saved(self.file, self.source) if os.path.isdir(self.file) else load_from_hub(self.source)

    def columns(self, existing: Sequence[str]) -> dict[str, str]:
        """Returns the schema's columns that are read -> those of a file that has the columns `existing`.

        Raises:
            ValueError: a column is missing.
        """
        raise NotImplementedError

    def convert(self, values: Mapping[str, Any], place: Place) -> Any:
        """Returns what a record becomes: column of the schema -> value.

        Raises:
            RowError: the record is unusable.
        """
        raise NotImplementedError

    @cached_property
    def media_root(self) -> str:
        """Folder to which paths are relative; found once, since asking the disk for every row takes longer."""
        root = self.source.media_root or (os.path.dirname(self.file) if os.path.isfile(self.file) else "")
        return os.path.abspath(os.path.expanduser(root))

    def rows(self, records: Iterable[tuple[int, Any]], columns: Mapping[str, str]) -> list[Any]:
        """Returns what numbered records become, an unusable one a `BadRow`."""
        return [self._row(number, record, columns) for number, record in records]

    def _row(self, number: int, record: Any, columns: Mapping[str, str]) -> Any:
        row_id = f"{os.path.basename(self.file)}:{number}"
        if isinstance(record, RowError):
            return BadRow(row_id, self.file, number, str(record))
        values = {name: record.get(column) for name, column in columns.items()}
        place = Place(self.file, number, None if values.get("id") is None else str(values["id"]), columns)
        try:
            return self.convert(values, place)
        except RowError as error:
            return BadRow(place.id or row_id, self.file, number, str(error))

    def _name(self, number: int) -> str:
        stem = "".join(letter if letter.isalnum() else "-" for letter in Path(self.label).stem)[:40]
        return f"{stem}-{digest(self.label)[:6]}-{number:06d}"


class _RowGroup:
    """Reads a row group in pieces of equal size, in order, so that one piece is in memory at a time."""

    def __init__(self, file: str, group: int, columns: list[str], rows: int) -> None:
        self.file, self.group, self.columns, self.rows = file, group, columns, rows
        self._pieces: Iterator[pa.RecordBatch] = iter(())
        self._next = 0

    def read(self, piece: int) -> list[dict[str, Any]]:
        """Returns the records of a piece."""
        if self._next == 0 or piece < self._next:
            opened = pq.ParquetFile(self.file)
            self._pieces = opened.iter_batches(self.rows, row_groups=[self.group], columns=self.columns)
            self._next = 0
        for batch in self._pieces:
            self._next += 1
            if self._next > piece:
                return batch.to_pylist()
        raise ValueError(f"{self.file}: row group {self.group} has no piece {piece}; it changed while it was read.")


def source_files(source: SourceConfig, unit_rows: int) -> dict[str, str]:
    """Returns the files of a source -> what the names of their units begin with.

    Raises:
        ValueError: a setting is wrong.
        OSError: a file does not exist.
    """
    if unit_rows < 1:
        raise ValueError(f"unit_rows is {unit_rows}; a unit has at least 1 row.")
    files = find_files(source) or [source.path]
    folder = os.path.commonpath([os.path.dirname(file) for file in files])
    return {file: os.path.relpath(file, folder or ".") for file in files}


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk


def digest(text: str) -> str:
    """Returns a short hash of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
