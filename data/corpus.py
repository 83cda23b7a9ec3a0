"""Rows to be embedded one by one, from the same files as pairs, in units that are embedded, stored and skipped."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .collator import message_parts
from .readers import FORMER_COLUMNS, TEXT_READERS, SourceConfig, find_files, load_from_hub, load_saved, parse_object
from .schema import Place, RowError, clean_row

CONTENT = {"a": ("a", "images_a", "audio_a"), "b": ("b", "images_b", "audio_b")}  # columns of each side
OTHER_NAMES = {"a": "text", "images_a": "image"}  # read where a file has no column of the schema's name
UNIT_ROWS = 4096


@dataclass(frozen=True)
class CorpusRow:
    """One input, its media not opened yet.

    Attributes:
        id: the row's id; without one, `FILE:ROW`.
        text: text, empty if the row has none.
        images: paths, or the bytes of files.
        audio: a path, the bytes of a file, or `{"array", "sampling_rate"}`.
        place: where it was read, for errors.
        image_placeholder: marks the place of an image in the text.
    """

    id: str
    text: str
    images: list[str | bytes]
    audio: str | bytes | dict[str, Any] | None
    place: Place
    image_placeholder: str

    def cost(self) -> tuple[int, int, int]:
        """Returns a sort key: rows of similar cost, and so of little padding, are neighbours."""
        media = [*self.images, *([] if self.audio is None else [self.audio])]
        return self.audio is not None, len(self.images), len(self.text) + sum(map(_size, media))

    def message(self) -> list[dict[str, Any]]:
        """Returns the row as a conversation of one message: images (or where the text has them), text, audio.

        Raises:
            ValueError: an image or the audio cannot be read; the message names the row.
        """
        try:
            images = [load_image(image if isinstance(image, bytes) else Path(image)) for image in self.images]
            audio = None
            if self.audio is not None:
                samples, rate = load_audio(self.audio)
                audio = {"array": samples, "sampling_rate": rate}
            content = message_parts(self.text, images, audio, self.image_placeholder)
        except (ValueError, OSError) as error:
            raise RowError(f"{self.place.file}, row {self.place.row} (id {self.id!r}): {error}") from error
        return [{"role": "user", "content": content, "keep_order": True}]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be an input, and why."""

    id: str
    file: str
    row: int
    error: str


@dataclass(frozen=True)
class Unit:
    """Rows that are embedded and stored together; of a Parquet file, they lie in one row group.

    Attributes:
        name: the same in every run; other files and places have other names.
        key: changes with the content of the rows (not with that of media files that they name).
        rows: number of rows.
        read: returns the rows.
    """

    name: str
    key: str
    rows: int
    read: Callable[[], list[CorpusRow | BadRow]]


@dataclass(frozen=True)
class CorpusReader:
    """Reads the records of one file as rows.

    Attributes:
        source: entry of a recipe's data.
        file: the file, the folder of `save_to_disk` or the Hub dataset.
        label: what the names of its units begin with.
        side: which side of a pair is the input; "a" also for rows that are not pairs.
        unit_rows: rows of a unit at most.
    """

    source: SourceConfig
    file: str
    label: str
    side: str
    unit_rows: int

    def units(self) -> Iterator[Unit]:
        """Returns the units in their order; only text files are read for it.

        Raises:
            ValueError: a column is missing, or the file cannot be read.
        """
        suffix = Path(self.file).suffix
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
        columns = self._columns(metadata.schema.to_arrow_schema().names)
        start = number = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            content = json.dumps(group.to_dict(), sort_keys=True, default=str)
            slices = _RowGroup(self.file, index, sorted(set(columns.values())), self.unit_rows)
            for piece, first in enumerate(range(0, group.num_rows, self.unit_rows)):

                def read(
                    slices: _RowGroup = slices, piece: int = piece, first: int = start + first + 1
                ) -> list[CorpusRow | BadRow]:
                    return self._rows(enumerate(slices.read(piece), start=first), columns)

                rows = min(self.unit_rows, group.num_rows - first)
                yield Unit(self._name(number), _digest(f"{content} {first}"), rows, read)
                number += 1
            start += group.num_rows

    def _text_units(self, suffix: str) -> Iterator[Unit]:
        records = _json_lines(self.file) if suffix == ".jsonl" else TEXT_READERS[suffix](self.file)
        for number, chunk in enumerate(_chunks(records, self.unit_rows)):
            existing = list(dict.fromkeys(name for _, record in chunk if isinstance(record, dict) for name in record))
            columns = self._columns(existing) if existing else {}

            def read(
                chunk: list[tuple[int, Any]] = chunk, columns: dict[str, str] = columns
            ) -> list[CorpusRow | BadRow]:
                return self._rows(chunk, columns)

            key = _digest(json.dumps(chunk, sort_keys=True, default=str))
            yield Unit(self._name(number), key, len(chunk), read)

    def _table_units(self, table: datasets.Dataset) -> Iterator[Unit]:
        columns = self._columns(table.column_names)
        table = table.select_columns(sorted(set(columns.values()))).with_format("arrow")
        for number, first in enumerate(range(0, len(table), self.unit_rows)):
            last = min(first + self.unit_rows, len(table))

            def read(first: int = first, last: int = last) -> list[CorpusRow | BadRow]:
                return self._rows(enumerate(table[first:last].to_pylist(), start=first + 1), columns)

            yield Unit(self._name(number), _digest(f"{table._fingerprint} {first} {last}"), last - first, read)

    def _open_table(self) -> datasets.Dataset:
        if Path(self.file).suffix == ".arrow":
            return datasets.Dataset.from_file(self.file)
        return load_saved(self.file, self.source) if os.path.isdir(self.file) else load_from_hub(self.source)

    def _columns(self, existing: Sequence[str]) -> dict[str, str]:
        """Returns the schema's columns that are read -> those of the file."""
        given = {name: column for name, column in self.source.columns.items() if column is not None}
        if missing := sorted(set(given.values()) - set(existing)):
            raise ValueError(
                f"{self.file}: the columns {missing} are missing; the file has {sorted(existing)}. Correct `columns`."
            )
        wanted = CONTENT[self.side]
        names = {name: self.source.columns.get(name, name) for name in ("id", *wanted)}
        for name in names:
            if name in FORMER_COLUMNS and name not in self.source.columns:
                names[name] = self.source.default_column(name, existing)
            if name in OTHER_NAMES and names[name] == name and name not in existing:
                names[name] = OTHER_NAMES[name]
        columns = {name: column for name, column in names.items() if column in existing}
        if not set(wanted) & set(columns):
            hint = f"`columns: {{{self.side}: NAME}}` (or {', '.join(wanted[1:])})"
            raise ValueError(
                f"{self.file}: no column holds the inputs; the file has {sorted(existing)}. Name it with {hint}."
            )
        return columns

    def _rows(self, records: Iterable[tuple[int, Any]], columns: Mapping[str, str]) -> list[CorpusRow | BadRow]:
        return [self._row(number, record, columns) for number, record in records]

    def _row(self, number: int, record: Any, columns: Mapping[str, str]) -> CorpusRow | BadRow:
        row_id = f"{os.path.basename(self.file)}:{number}"
        if isinstance(record, RowError):
            return BadRow(row_id, self.file, number, str(record))
        values = {name: record.get(column) for name, column in columns.items()}
        place = Place(self.file, number, None if values.get("id") is None else str(values["id"]), columns)
        try:
            row = clean_row(values, place, self._media_root())
            content = row.side(self.side)
            if not content.modalities:
                raise place.error(self.side, content.text, "the row is empty; fill it in or drop it.")
        except RowError as error:
            return BadRow(place.id or row_id, self.file, number, str(error))
        return CorpusRow(row.id, **vars(content), place=place, image_placeholder=self.source.image_placeholder)

    def _media_root(self) -> str:
        root = self.source.media_root or (os.path.dirname(self.file) if os.path.isfile(self.file) else "")
        return os.path.abspath(os.path.expanduser(root))

    def _name(self, number: int) -> str:
        stem = "".join(letter if letter.isalnum() else "-" for letter in Path(self.label).stem)[:40]
        return f"{stem}-{_digest(self.label)[:6]}-{number:06d}"


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


def read_corpus(
    source: Mapping[str, Any], side: str = "a", unit_rows: int = UNIT_ROWS
) -> tuple[list[str], Callable[[], Iterator[Unit]]]:
    """Finds the files of a source of rows to embed.

    Args:
        source: keys of an entry of a recipe's data, see `SourceConfig`. `columns` names those of the content and `id`;
            by default, of side a, `a` or `text`, `images_a`, `images` or `image`, `audio_a` or `audio`.
        side: "a", or "b" to embed the other side of pairs.
        unit_rows: rows of a unit at most; a row group of a Parquet file begins a new one.

    Returns:
        The files, and a function that iterates over all units in their order. Iterating reads text files once.

    Raises:
        ValueError: a setting is wrong, or a file cannot be read.
        OSError: a file does not exist.
    """
    if side not in CONTENT:
        raise ValueError(f"side is {side!r}; choose one of {', '.join(CONTENT)}.")
    if unit_rows < 1:
        raise ValueError(f"unit_rows is {unit_rows}; a unit has at least 1 row.")
    config = SourceConfig.from_dict(source)
    files = find_files(config) or [config.path]

    folder = os.path.commonpath([os.path.dirname(file) for file in files])

    def units() -> Iterator[Unit]:
        for file in files:
            yield from CorpusReader(config, file, os.path.relpath(file, folder or "."), side, unit_rows).units()

    return files, units


def _json_lines(file: str) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Returns line numbers and records; a broken line is an error of that row, not of the file."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_object(line, file, number)
            except RowError as error:
                yield number, error


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _size(source: str | bytes | dict[str, Any]) -> int:
    """Returns the bytes of an image or audio file, or the number of samples; 0 if the file does not exist."""
    if isinstance(source, str):
        return os.path.getsize(source) if os.path.isfile(source) else 0
    return len(source["array"] if isinstance(source, dict) else source)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
