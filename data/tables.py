"""Opens Parquet and Arrow files, saved folders and Hub datasets as batches of records."""

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import table_cast

from .archives import open_archive
from .files import TEXTS, cache_folder, content_digest, suffix_of
from .records import Numbered, check_names
from .schema import RowError
from .source_config import SourceConfig

BATCH = 1000  # records converted at once
MEDIA_COLUMNS = ("images_a", "audio_a", "images_b", "audio_b", "negatives", "negative_images", "negative_audio")

INDEXED = b"ARROW1"  # how an Arrow file with an index begins, unlike a stream
BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


@dataclass(frozen=True)
class Table:
    """A table with the columns that a source uses.

    Attributes:
        file: its file, folder or Hub id.
        existing: names of all columns, also of those not used.
        digest: changes with the content.
        rows: the rows by number if they may hold media themselves, otherwise `None`.
        labels: column -> names of its classes, of nested columns as `{name: …}`.
        opened: the file or table that `records` reads.
        used: names of the used columns.
    """

    file: str
    existing: list[str]
    digest: str
    rows: datasets.Dataset | None
    labels: Mapping[str, Any]
    opened: pq.ParquetFile | datasets.Dataset
    used: list[str]

    def records(self) -> Numbered:
        """Yields the number of each row, from 1, and its record, classes by name, or its fault.

        Raises:
            ValueError: the file is damaged.
        """
        number = 0
        try:
            for batch in self._batches():
                for record in _converted(batch):
                    number += 1
                    yield number, self.named(record) if isinstance(record, dict) else self._fault(number, record)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.file, error) from error

    def _fault(self, number: int, error: Exception) -> RowError:
        problem = f"{self.file}, row {number}: a value cannot be read: {error}. Repair or drop the row."
        return RowError(problem, "invalid value", row=number)

    def row(self, number: int) -> dict[str, Any]:
        """Returns the record of row `number`, from 1, of a table that may hold media."""
        return self.named(self.rows[number - 1].to_pylist()[0])

    def named(self, record: dict[str, Any]) -> dict[str, Any]:
        """Replaces numbers of classes by their names."""
        return name_classes(record, self.labels)

    def _batches(self) -> Iterator[Any]:
        if isinstance(self.opened, pq.ParquetFile):
            yield from self.opened.iter_batches(BATCH, columns=self.used)
        else:
            for first in range(0, len(self.opened), BATCH):
                yield self.opened[first : first + BATCH]


def _converted(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | Exception]:
    """Yields the records of a batch; of one with a value that Python cannot hold, such as a text, the error."""
    try:
        records = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for row in range(batch.num_rows):
                yield from _converted(batch.slice(row, 1))
        else:
            yield error
        return
    yield from records


def unreadable(file: str, error: Exception) -> ValueError:
    """Returns the error of a file that is damaged or of another format."""
    return ValueError(f"{file}: not readable as a table: {error}. Write the file again.")


def no_rows(file: str) -> ValueError:
    """Returns the error of a file without rows."""
    return ValueError(f"{file} has no rows; add rows or drop the source.")


def open_table(file: str, source: SourceConfig) -> Table:
    """Opens a Parquet or Arrow file, a saved folder or a Hub dataset.

    Raises:
        ValueError: it cannot be read, or has no rows.
    """
    try:
        return _open_parquet(file, source) if suffix_of(file) == ".parquet" else _open_dataset(file, source)
    except pa.ArrowException as error:
        raise unreadable(file, error) from error


def _open_parquet(file: str, source: SourceConfig) -> Table:
    opened = pq.ParquetFile(file)
    schema, digest = opened.schema_arrow, content_digest(file)
    check_names(schema.names, file)
    if opened.metadata.num_rows == 0:  # `datasets` cannot load it
        raise no_rows(file)
    used = source.used_columns(schema.names)
    rows = None
    if any(_holds_media(schema.field(name).type) for name in _media_columns(schema.names, source)):
        rows = datasets.load_dataset(
            "parquet",
            data_files=glob.escape(file),
            split="train",
            columns=used,
            cache_dir=str(cache_folder() / digest),
        ).with_format("arrow")
    labels = class_labels(_features(schema, used), used)
    return Table(file, schema.names, digest, rows, labels, opened if rows is None else rows, used)


def _open_dataset(file: str, source: SourceConfig) -> Table:
    if suffix_of(file) == ".arrow":
        table = _open_arrow(file)
    elif suffix_of(file) == ".tar":
        table = open_archive(file)
    else:
        table = load_saved(file, source) if os.path.isdir(file) else load_from_hub(source)
    if len(table) == 0:
        raise no_rows(file)
    digests = [content_digest(each["filename"]) for each in table.cache_files]
    used = source.used_columns(table.column_names)
    labels = class_labels(table.features, used)
    schema = table.features.arrow_schema
    has_media = any(_holds_media(schema.field(name).type) for name in _media_columns(table.column_names, source))
    opened = table.select_columns(used).with_format("arrow")
    digest = repr((digests or table._fingerprint, table._indices is not None and table._fingerprint))
    return Table(file, table.column_names, digest, opened if has_media else None, labels, opened, used)


def _open_arrow(file: str) -> datasets.Dataset:
    """Opens an Arrow stream; a file with an index at its end, as Feather and polars write it, is converted once.

    Raises:
        ValueError: `datasets` does not know the type of a column, or two columns have one name.
    """
    with pa.memory_map(file) as content:
        is_stream = content.read(len(INDEXED)) != INDEXED
        content.seek(0)
        schema = (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(content).schema
    check_names(schema.names, file)
    try:
        if is_stream:
            return datasets.Dataset.from_file(file)
        cache = str(cache_folder() / content_digest(file))
        return datasets.load_dataset("arrow", data_files=glob.escape(file), split="train", cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        raise unreadable(file, error.__cause__ or error) from error
    except ValueError as error:
        raise ValueError(f"{file}: {error} Leave that column out, or write it in another type.") from error


def class_names(file: str, source: SourceConfig) -> dict[str, Any]:
    """Returns the names of the classes of each used column that has classes; none in text files."""
    if suffix_of(file) in TEXTS:
        return {}
    if suffix_of(file) == ".parquet":
        schema = pq.read_schema(file)
        used = source.used_columns(schema.names)
        return class_labels(_features(schema, used), used)
    return dict(_open_dataset(file, source).labels)


def name_classes(record: dict[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numbers of classes in a record by their names."""
    return {**record, **{column: _label(record[column], names) for column, names in labels.items()}}


def load_saved(folder: str, source: SourceConfig) -> datasets.Dataset:
    """Loads the source's split of a folder written by `save_to_disk`; a missing one is a ValueError."""
    loaded = datasets.load_from_disk(folder)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if source.split not in loaded:
        raise ValueError(f"{folder}: unknown split {source.split!r}; known: {list(loaded)}.")
    return loaded[source.split]


def load_from_hub(source: SourceConfig) -> datasets.Dataset:
    """Loads a dataset of the Hub; if that fails, a ValueError says so."""
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.path}: not a local file or folder, and loading from the Hub failed (name "
            f"{source.name!r}, split {source.split!r}, revision {source.revision!r}): {error}"
        ) from error


def _media_columns(existing: list[str], source: SourceConfig) -> list[str]:
    """Returns the columns of a table that may hold media or name their files."""
    names = source.column_names(existing)
    of = [names[name] for name in MEDIA_COLUMNS if name in names]
    of += [] if source.conversation is None else [source.conversation.column]
    columns = [each for entry in of for each in ([entry] if isinstance(entry, str) else entry)]
    roots = {each if each in existing else each.partition(".")[0] for each in columns}
    return [name for name in existing if name in roots]


def _holds_media(kind: pa.DataType) -> bool:
    """Returns whether values of a type may contain the bytes of files or samples."""
    if any(test(kind) for test in BINARY) or pa.types.is_floating(kind) or isinstance(kind, pa.ExtensionType):
        return True
    if pa.types.is_dictionary(kind):  # a type without fields
        return _holds_media(kind.value_type)
    return any(_holds_media(kind.field(number).type) for number in range(kind.num_fields))


def _features(schema: pa.Schema, used: list[str]) -> datasets.Features:
    """Returns the features of the used columns; `datasets` knows no maps, which have no classes."""
    known = [schema.field(name) for name in used if not pa.types.is_map(schema.field(name).type)]
    return datasets.Features.from_arrow_schema(pa.schema(known, schema.metadata))


def cast_shard(source: SourceConfig, features: datasets.Features, table: pa.Table) -> pa.Table:
    """Casts a table of a shard to the columns and types of the first, where that changes no value.

    Columns that are not read are dropped, absent ones are null, numbers widen.

    Raises:
        ValueError: a column has texts, and numbers in the first shard, or the other way round, or cannot be cast.
    """
    used = source.used_columns(table.column_names)
    table = table.select([name for name in table.column_names if name in features or name in used])
    wanted = features.arrow_schema
    for name in [name for name in used if name in features]:
        found, first = table.schema.field(name).type, wanted.field(name).type
        lost = pa.types.is_null(first) and not pa.types.is_null(found)
        if lost or len({_kind(found), _kind(first)} - {None}) > 1:
            raise ValueError(f"the column {name!r} has the type {found}, and {first} in the first shard")
    return table_cast(table, wanted)


def _kind(kind: pa.DataType) -> str | None:
    """Returns text, number, truth or time, of lists that of their values; `None` for other types."""
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = {
        "text": (pa.types.is_string, pa.types.is_large_string),
        "number": (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
        "truth": (pa.types.is_boolean,),
        "time": (pa.types.is_temporal,),
    }
    return next((name for name, of in tests.items() if any(test(kind) for test in of)), None)


def class_labels(features: datasets.Features, used: list[str]) -> dict[str, Any]:
    """Returns the names of the classes of each used column that has classes."""
    found = {column: _names_in(features[column]) for column in used if column in features}
    return {column: names for column, names in found.items() if names is not None}


def _names_in(feature: Any) -> Any:
    """Returns the names of a feature's classes, of nested features as `{name: …}`; `None` without classes."""
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return _names_in(feature.feature)
    inner = {name: _names_in(each) for name, each in feature.items()} if isinstance(feature, dict) else {}
    return {name: names for name, names in inner.items() if names is not None} or None


def _label(value: Any, names: Any) -> Any:
    """Returns a class by its name; -1, which is no class, as `None`, other unknown numbers unchanged."""
    if isinstance(value, list):
        return [_label(each, names) for each in value]
    if isinstance(names, dict):
        return {**value, **{name: _label(value.get(name), of) for name, of in names.items()}} if value else value
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None
