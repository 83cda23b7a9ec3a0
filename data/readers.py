"""Reads one entry of a recipe's data: its records become checked rows, stored once as a table on disk."""

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock

from .atomic import write_atomically
from .checks import Checker
from .cleaning import clean_name, clean_row
from .files import cache_folder, content_digest, find_files, suffix_of
from .records import TEXT_READERS, Numbered
from .row_keys import KEYS, row_keys
from .schema import MODALITIES, PRESENT, Place, Row, RowError, canonical_task, row_id
from .shapes import ShapeError, conversation_pairs, pick_lists, pick_one, take
from .source_config import FORMER_COLUMNS, SourceConfig
from .stored_rows import SCHEMA, media_slots, restored, stored
from .tables import BATCH, Table, no_rows, open_table

# Part of every cache key: results of an earlier version of the reading or checking code are not reused.
CODE_FILES = (
    "schema cleaning checks json_arrays readers records row_keys shapes source_config sources stored_rows tables"
)
CODE = hashlib.blake2b(
    b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in CODE_FILES.split()),
    digest_size=16,
).hexdigest()

PARALLEL_BYTES = 2**26  # of all files of a recipe, from which on they are stored in several processes


@dataclass(frozen=True)
class RecordReader:
    """Takes the pairs of one file's records.

    Attributes:
        source: the entry of the recipe.
        file: name of the file in errors.
        root: folder of relative media paths.
    """

    source: SourceConfig
    file: str
    root: str
    _names: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _named: dict[tuple[str, ...], list[str]] = field(default_factory=dict, repr=False, compare=False)

    def place(self, number: int, part: int, given_id: Any, existing: Iterable[str]) -> Place:
        """Returns the origin of pair `part` of record `number` with the `existing` columns."""
        name = clean_name(given_id)
        if part:
            name = f"{name or row_id(Place(self.file, number))}#{part + 1}"
        return Place(self.file, number, name, self.names(existing))

    def names(self, existing: Iterable[str]) -> dict[str, str | tuple[str, ...]]:
        """Maps each column of the schema to those of a record, as `SourceConfig.column_names`."""
        key = tuple(existing)
        if key not in self._names:
            self._names[key] = self.source.column_names(key)
        return self._names[key]

    def named(self, existing: Iterable[str]) -> list[str]:
        """Returns the columns of a record that are read and told apart from those of other records by their names."""
        key = tuple(existing)
        if key not in self._named:
            read = self.names(key).values()
            self._named[key] = [name for name in read if isinstance(name, str) and name in NAMED and name in key]
        return self._named[key]

    def seen(self) -> set[str]:
        """Returns the columns of the records so far."""
        return set().union(*self._names)

    def pairs(self, record: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """Returns the values of each pair of a record, as `choices`, with one choice of each.

        Raises:
            RowError: its shape gives no pair.
        """
        return [pick_one(choices) for choices in self.choices(record, number)]

    def choices(self, record: Mapping[str, Any], number: int) -> list[list[dict[str, Any]]]:
        """Returns the values of each pair of a record by the columns of the schema: those of which one is drawn.

        Raises:
            RowError: its shape gives no pair.
        """
        source = self.source
        names = self.names(record)
        values = {
            name: record[column] if isinstance(column, str) and column in record else take(record, column)
            for name, column in names.items()
            if not isinstance(column, str) or column in record or "." in column
        }
        found = [values]
        try:
            if source.conversation is not None:
                turns = take(record, source.conversation.column)
                found = conversation_pairs(turns, values, source.conversation, source.image_placeholder)
            if not source.lists:
                return [[pair] for pair in found]
            return [choices for pair in found for choices in pick_lists(pair, source.lists)]
        except ShapeError as error:
            place = self.place(number, 0, values.get("id"), record)
            raise place.error(error.column, error.value, error.problem, error.cause) from error

    def row(self, values: Mapping[str, Any], place: Place) -> Row:
        """Returns the cleaned row of a pair, with its task and its score from 0 to 1.

        Raises:
            RowError: a value cannot be converted.
        """
        row = clean_row(values, place, self.root)
        task = self.source.task or row.task
        row.task = canonical_task(self.source.map.get(task, task))
        row.score = self.source.default_score if row.score is None else self.source.scale(row.score, place)
        return row


@dataclass(frozen=True)
class RowReader:
    """Reads the stored rows of one file.

    Attributes:
        records: how the file was read.
        table: the file, if it holds media of its rows.
    """

    records: RecordReader
    table: Table | None

    @property
    def source(self) -> SourceConfig:
        """Returns the entry of the recipe."""
        return self.records.source

    @property
    def file(self) -> str:
        """Returns the name of the file in errors."""
        return self.records.file

    def read(self, record: Mapping[str, Any]) -> tuple[Row, Place]:
        """Returns the row of a stored record, and its origin for errors."""
        source = self.records
        place = Place(source.file, record["line"], record["id"], source.names(record["named"]))
        media: Iterator[Any] = iter(())
        if record["inline"]:
            pairs = source.choices(self.table.row(record["line"]), record["line"])
            values = next(islice(chain.from_iterable(pairs), record["part"], None))
            media = media_slots(values)
        return restored(record, place, source.root, media), place


def read_source(source: SourceConfig, checker: Checker) -> Iterator[tuple[datasets.Dataset, RowReader]]:
    """Yields the stored rows of each file of a source, `SCHEMA` in arrow format, and their reader."""
    for file in find_files(source) or [source.path]:
        key, rows, reader = _file_rows(file, source, checker)
        yield _opened(key, rows, file), reader


def store_files(sources: Sequence[SourceConfig], checker: Checker, workers: int) -> None:
    """Stores the rows of the local files that are not stored yet, in several processes if they are large.

    Raises:
        ValueError: a file or a row is wrong, as `read_source`.
    """
    files = [(file, source) for source in sources for file in find_files(source) if os.path.isfile(file)]
    if min(workers, len(files)) < 2 or sum(os.path.getsize(file) for file, _ in files) < PARALLEL_BYTES:
        return
    missing = [given for given in files if not _path_of(_file_rows(*given, checker)[0]).is_file()]
    missing.sort(key=lambda given: os.path.getsize(given[0]), reverse=True)
    if len(missing) < 2:
        return
    context = get_context("fork") if "fork" in get_all_start_methods() else None
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context, initializer=_collect_rarely) as pool:
        futures = [pool.submit(_store_file, *given, checker) for given in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except ValueError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect_rarely() -> None:
    """Lets a process that stores rows look for cyclic garbage rarely: rows leave none, and each look takes time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


def _store_file(file: str, source: SourceConfig, checker: Checker) -> None:
    key, rows, _ = _file_rows(file, source, checker)
    _opened(key, rows, file)


def _file_rows(
    file: str, source: SourceConfig, checker: Checker
) -> tuple[str, Callable[[], Iterator[dict[str, Any]]], RowReader]:
    """Returns the key of a file's stored rows, what yields them for storing, and their reader."""
    table = None if suffix_of(file) in TEXT_READERS else open_table(file, source)
    records = RecordReader(source, file, _root(file, source))
    if table is not None:
        source.check_columns(table.existing, checker.tasks, file)
    digest = content_digest(file) if table is None else table.digest
    key = _digest((os.path.abspath(file), digest, source, records.root, checker.key(), CODE))
    reader = RowReader(records, table if table is not None and table.rows else None)
    return key, partial(_stored_rows, records, checker, table), reader


def _root(file: str, source: SourceConfig) -> str:
    """Returns the folder of relative media paths."""
    root = source.media_root
    if root is None:
        root = os.path.dirname(file) if os.path.isfile(file) else file if os.path.isdir(file) else ""
    return os.path.abspath(os.path.expanduser(root))


def _digest(parts: tuple[Any, ...]) -> str:
    return hashlib.blake2b(repr(parts).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


def _opened(key: str, rows: Callable[[], Iterator[dict[str, Any]]], file: str) -> datasets.Dataset:
    """Opens the stored rows of a key; the first rank of a machine that asks for them writes them."""
    path = _path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            write_atomically(path, partial(_write, rows=rows, file=file))
    table = datasets.Dataset.from_file(str(path))
    table._fingerprint = key
    return table.with_format("arrow")


def _path_of(key: str) -> Path:
    return cache_folder() / f"rows-{key}.arrow"


def _write(path: Path, rows: Callable[[], Iterator[dict[str, Any]]], file: str) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        # `iter` once: a second iterator of tqdm would begin with a closed generator, and the file would end there
        progress = iter(datasets.utils.tqdm(rows(), desc=f"Checking {file}", unit=" rows"))
        while batch := list(islice(progress, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=SCHEMA))


def _stored_rows(records: RecordReader, checker: Checker, table: Table | None) -> Iterator[dict[str, Any]]:
    """Yields the pairs of a file as `SCHEMA`, those that cannot be used with their problem."""
    try:
        yield from _pairs_of_records(records, checker, table)
    except RowError:
        if table is None:  # a column that no record has explains more than the first row without it
            found = {name for _, each in _records(records, None) if isinstance(each, dict) for name in each}
            if found:
                _check_columns(records, checker, found)
        raise
    if table is None:
        _check_columns(records, checker, records.seen())


def _check_columns(records: RecordReader, checker: Checker, existing: set[str]) -> None:
    """Checks the columns that occur in a text file.

    Raises:
        ValueError: a column is missing, or the file has no rows.
    """
    if not existing:
        raise no_rows(records.file)
    records.source.check_columns(existing, checker.tasks, records.file)


def _pairs_of_records(records: RecordReader, checker: Checker, table: Table | None) -> Iterator[dict[str, Any]]:
    for number, record in _records(records, table):
        if isinstance(record, RowError):
            checker.refuse(record)
            yield _problem(record, number)
            continue
        try:
            pairs = records.choices(record, number)
        except RowError as error:
            checker.refuse(error)
            yield _problem(error, number)
            continue
        parts = count()
        for pair, choices in enumerate(pairs):
            for values in choices:
                origin = (number, next(parts), pair)
                yield _stored_pair(records, checker, values, origin, record, table is not None)


def _records(records: RecordReader, table: Table | None) -> Numbered:
    if table is not None:
        return table.records()
    return TEXT_READERS[suffix_of(records.file)](records.file, records.source)


def _stored_pair(
    records: RecordReader,
    checker: Checker,
    values: Mapping[str, Any],
    origin: tuple[int, int, int],
    record: Mapping[str, Any],
    by_reference: bool,
) -> dict[str, Any]:
    number, part, pair = origin
    place = records.place(number, pair, values.get("id"), record)
    try:
        row = records.row(values, place)
        checker.check(row, place, records.source, records.root)
    except RowError as error:
        checker.refuse(error)
        return _problem(error, number, part, place.id)
    return {
        **stored(row, records.root, by_reference),
        "id": place.id,
        "line": number,
        "part": part,
        "pair": pair,
        "named": records.named(record),
        "task_id": checker.task_ids[row.task],
        "modalities": _modality_bits(row),
        **dict(zip(KEYS, row_keys(row, records.root), strict=True)),
    }


# Names by which the columns of a record may be told apart from those of other records, see `Place.columns`.
NAMED = {*FORMER_COLUMNS, *FORMER_COLUMNS.values()}


def _problem(error: RowError, number: int, part: int = 0, name: str | None = None) -> dict[str, Any]:
    return {"problem": str(error), "cause": error.cause, "line": number, "part": part, "id": name}


def _modality_bits(row: Row) -> int:
    """Returns the modalities of a row: bits 0 to 2 `MODALITIES` of side a, 3 to 5 of b, 6 audio in a negative."""
    negatives = any(negative.audio is not None for negative in row.negatives) if row.negatives else False
    return BITS[row.side("a").modalities] + 8 * BITS[row.side("b").modalities] + 64 * negatives


BITS = {names: sum(1 << MODALITIES.index(name) for name in names) for names in PRESENT.values()}


def bad_rows(table: datasets.Dataset) -> list[dict[str, Any]]:
    """Returns id, line, cause and problem of the stored rows that cannot be used."""
    return table.select_columns(["id", "line", "cause", "problem"])[good_rows(table, False)].to_pylist()


def good_rows(table: datasets.Dataset, good: bool = True) -> np.ndarray:
    """Returns the numbers of the stored rows that can be used, or of the others, (rows,) int64."""
    problems = table.select_columns(["problem"])[:]["problem"]
    return np.flatnonzero(np.asarray(problems.is_null()) == good)
