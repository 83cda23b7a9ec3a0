"""Reads one entry of a recipe's data: finds its files and converts their records to rows of the schema."""

import csv
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError

from .names import did_you_mean, rename_old_keys
from .schema import COLUMNS, OLD_COLUMNS, Content, Place, Row, RowError, Task, canonical_task, clean_row, row_id

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
SPLIT_WORDS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}, "test": {"test", "eval"}}
# Part of every cache key: results of an earlier version of the reading or checking code are not reused.
CODE = hashlib.blake2b(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("schema.py", "readers.py", "sources.py")),
    digest_size=16,
).hexdigest()

FORMER_COLUMNS = {"task": "data_type"} | {new: old for old, new in OLD_COLUMNS.items()}
IMAGES = datasets.List(datasets.Value("string"))
AUDIO = {
    "path": datasets.Value("string"),
    "array": datasets.List(datasets.Value("float32")),
    "sampling_rate": datasets.Value("int64"),
}
TEXT_FEATURES = datasets.Features(
    {
        **{name: datasets.Value("string") for name in ("id", "task", "a", "b", "group")},
        **{"images_a": IMAGES, "audio_a": AUDIO, "images_b": IMAGES, "audio_b": AUDIO},
        "negatives": datasets.List({"text": datasets.Value("string"), "images": IMAGES, "audio": AUDIO}),
        "score": datasets.Value("float64"),
        "teacher_a": datasets.List(datasets.Value("float32")),
        "teacher_b": datasets.List(datasets.Value("float32")),
        "line": datasets.Value("int64"),
        "named": datasets.List(datasets.Value("string")),  # the columns that have a former name, as the file has them
    }
)


@dataclass(frozen=True)
class SourceConfig:
    """One entry of a recipe's `train_data` or `eval_data`.

    Attributes:
        path: a .jsonl, .json, .csv, .parquet or .arrow file, a glob or a folder of them, a folder written by
            `save_to_disk`, or the id of a Hub dataset.
        task: the task of all rows; or
        task_column: the column that holds each row's (`task`, or `data_type`, if neither is given).
        map: value of that column -> task; names of tasks need no entry.
        columns: a, b, images_a, images_b, audio_a, audio_b, score, id, group, negatives, negative_images,
            negative_audio, teacher_a, teacher_b -> the user's column (default: the same name, or `images` and `audio`
            for side a's; null: none). Rows of one group are not negatives of each other; negatives are wrong answers;
            teacher_a and teacher_b are a teacher's vectors of the sides, for distillation.
        media_root: folder of relative media paths (default: the folder of the file that names them).
        weight: visits of each row in an epoch.
        split: split of a Hub dataset or a folder.
        name: configuration of a Hub dataset.
        image_placeholder: marks the position of an image in the text of a side.
        score_range: lowest and highest score of the column; scores are mapped from it to [0, 1].
    """

    path: str
    task: str | None = None
    task_column: str | None = None
    map: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str | None] = field(default_factory=dict)
    media_root: str | None = None
    weight: float = 1.0
    split: str = "train"
    name: str | None = None
    image_placeholder: str = "<image>"
    score_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.task is not None and (self.task_column is not None or self.map):
            raise ValueError(
                f"{self.path}: `task: {self.task}` fixes the task of all rows; drop it, or `task_column` and `map`."
            )
        for name in ("map", "columns"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{self.path}: `{name}` is {getattr(self, name)!r}; write {{NAME: NAME, …}}.")
        columns = rename_old_keys(self.columns, f"{self.path}: columns", OLD_COLUMNS)
        object.__setattr__(self, "columns", columns)
        _check_keys(columns, [name for name in COLUMNS if name != "task"], f"{self.path}: columns")
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: the weight is {self.weight!r}; it must be above 0 (or drop the source).")
        if not _is_range(self.score_range):
            raise ValueError(
                f"{self.path}: score_range is {self.score_range!r}; write [LOWEST, HIGHEST], such as [0, 5]."
            )
        if not self.image_placeholder:
            raise ValueError(f"{self.path}: image_placeholder is empty; write a marker such as '<image>'.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SourceConfig":
        """Reads an entry of a recipe; the error for an unknown key suggests the nearest known one."""
        where = str(values.get("path", "a data source"))
        values = rename_old_keys(values, where)
        _check_keys(values, [field.name for field in fields(cls)], where)
        if "path" not in values:
            raise ValueError(f"A data source has no `path`: {dict(values)}; name a file, a folder or a Hub dataset.")
        given = {key: value for key, value in values.items() if value is not None}
        if isinstance(given.get("map"), Mapping):
            given["map"] = {str(key): value for key, value in given["map"].items()}  # YAML reads 1 as a number
        return cls(**given)

    def scale(self, score: float, place: Place) -> float:
        """Maps a score from `score_range` to [0, 1]; in the default range unchanged, `check_row` checks it."""
        low, high = self.score_range
        if (low, high) == (0, 1):
            return score
        if not low <= score <= high:
            limit = f"it must be in score_range, [{low:g}, {high:g}]; correct the row or the range."
            raise place.error("score", score, limit)
        return (score - low) / (high - low)

    def column_names(self, existing: Iterable[str] = ()) -> dict[str, str]:
        """Maps each column of the schema to the user's, in a file (or record) with the `existing` columns."""
        given = self.columns if self.task_column is None else {**self.columns, "task": self.task_column}
        names = {name: given.get(name, name) for name in COLUMNS if name != "task" or self.task is None}
        for name in FORMER_COLUMNS:
            if name in names and name not in given:
                names[name] = self.default_column(name, existing)
        return {name: column for name, column in names.items() if column is not None}

    def default_column(self, name: str, existing: Iterable[str]) -> str:
        """Returns a column under its name or its former name, whichever exists."""
        former = FORMER_COLUMNS[name]
        found = {name, former} & set(existing) - set(self.columns.values())
        if len(found) == 2:
            remedy = "task_column: NAME" if name == "task" else f"columns: {{{name}: NAME}}"
            raise ValueError(
                f"{self.path}: the columns {name!r} and {former!r} can both hold {name}; choose one with `{remedy}`."
            )
        return found.pop() if found else name

    def check_columns(self, existing: Iterable[str], tasks: Mapping[str, Task], file: str) -> None:
        """Checks that a file has the columns that the source names and those that its tasks need."""
        existing = set(existing)
        names = self.column_names(existing)
        required = {name for name, column in self.columns.items() if column is not None}
        required.update(["task"] if self.task is None else tasks[canonical_task(self.task)].needed())
        for side in ("a", "b"):
            if not existing & {names.get(f"images_{side}"), names.get(f"audio_{side}")}:
                required.add(side)
        for name in sorted(required):
            if names.get(name) not in existing:
                remedy = "task_column: NAME" if name == "task" else f"columns: {{{name}: NAME}}"
                raise ValueError(
                    f"{file}: the column {names.get(name, name)!r} is missing; the file has {sorted(existing)}. "
                    f"Name it with `{remedy}`."
                )


@dataclass(frozen=True)
class RowReader:
    """Converts the records of one file to rows."""

    source: SourceConfig
    file: str  # name of the file in errors
    columns: dict[str, str]  # column of the schema -> column of the table
    root: str  # folder of relative media paths
    cleaned: bool = False  # whether the table holds rows that were cleaned when a text file was converted

    def read(self, record: Mapping[str, Any], index: int) -> tuple[Row, Place]:
        """Returns the row of `record`, number `index` of the table, and its origin for errors."""
        if self.cleaned:
            place = _place(self.source, self.file, record["line"], record["id"], record["named"])
            row = _restore_row(record, place, self.root)
        else:
            values = {name: record[column] for name, column in self.columns.items()}
            place = _place(self.source, self.file, index + 1, values.get("id"), record)
            row = clean_row(values, place, self.root)
        task = self.source.task or row.task
        row.task = canonical_task(self.source.map.get(task, task))
        if row.score is not None:
            row.score = self.source.scale(row.score, place)
        return row, place


def read_source(source: SourceConfig, tasks: Mapping[str, Task]) -> Iterator[tuple[datasets.Dataset, RowReader]]:
    """Yields the table and the reader of each file of a source."""
    for file in find_files(source) or [source.path]:
        is_text = Path(file).suffix in TEXT_READERS
        if is_text:
            table = _convert_text_file(file, source, tasks)
            columns = {name: name for name in COLUMNS}
        else:
            try:
                table = _open_table(file, source, tasks)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{file}: not readable as a table: {error}. Write the file again.") from error
            columns = {
                name: column
                for name, column in source.column_names(table.column_names).items()
                if column in table.column_names
            }
        if len(table) == 0:
            raise _no_rows(file)
        root = source.media_root or (os.path.dirname(file) if os.path.isfile(file) else "")
        root = os.path.abspath(os.path.expanduser(root))
        yield table.with_format("arrow"), RowReader(source, file, columns, root, is_text)


def _no_rows(file: str) -> ValueError:
    return ValueError(f"{file} has no rows; add rows or drop the source.")


def _is_range(value: Any) -> bool:
    """Returns whether a value is two finite numbers in ascending order."""
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return (
        is_pair and all(isinstance(end, (int, float)) and math.isfinite(end) for end in value) and value[0] < value[1]
    )


def _check_keys(given: Iterable[str], known: list[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}")


def find_files(source: SourceConfig) -> list[str]:
    """Returns the local files of a source, or a folder written by `save_to_disk`; empty for a Hub dataset."""
    path = os.path.expanduser(source.path)
    is_folder = os.path.isdir(path)
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        return [path]
    files = sorted(glob.glob(os.path.join(glob.escape(path), "*") if is_folder else path, recursive=True))
    if os.path.isfile(path):
        files = [path]
    if is_folder:
        files = _of_split([file for file in files if Path(file).suffix in FORMATS], source)
    elif files and source.split != "train":
        raise ValueError(f"{source.path}: `split: {source.split}` is for folders and Hub datasets; name its files.")
    if files and source.name is not None:
        raise ValueError(f"{source.path}: `name: {source.name}` is for Hub datasets; drop it.")
    if not files and (is_folder or glob.has_magic(path) or os.path.isabs(path) or Path(path).suffix in FORMATS):
        raise FileNotFoundError(
            f"{source.path}: no such file or folder with {', '.join(FORMATS)} files; correct the path."
        )
    for file in files:
        if Path(file).suffix not in FORMATS:
            raise ValueError(f"{file}: the format is unknown; known: {', '.join(FORMATS)}.")
    return files


def _of_split(files: list[str], source: SourceConfig) -> list[str]:
    """Returns the files of a folder that belong to the split; all, if no file name contains a split."""
    words = {file: set(re.split(r"[\W_]", Path(file).stem.lower())) for file in files}
    if source.split == "train" and not any(words[file] & set().union(*SPLIT_WORDS.values()) for file in files):
        return files
    chosen = [file for file in files if words[file] & SPLIT_WORDS.get(source.split, {source.split})]
    if files and not chosen:
        names = [os.path.basename(file) for file in files]
        raise ValueError(
            f"{source.path}: no file name contains the split {source.split!r}; found {names}. Correct `split`."
        )
    return chosen


def _open_table(file: str, source: SourceConfig, tasks: Mapping[str, Task]) -> datasets.Dataset:
    """Opens a Parquet or Arrow file, a saved folder or a Hub dataset, with the used columns only."""
    suffix = Path(file).suffix
    if suffix == ".parquet":  # converts only the used columns
        with pyarrow.parquet.ParquetFile(file) as opened:
            existing, rows = opened.schema_arrow.names, opened.metadata.num_rows
        source.check_columns(existing, tasks, file)
        if rows == 0:  # `datasets` cannot load it
            raise _no_rows(file)
        used = source.column_names(existing).values()
        columns = [name for name in existing if name in used]
        return datasets.load_dataset("parquet", data_files=glob.escape(file), split="train", columns=columns)
    if suffix == ".arrow":
        table = datasets.Dataset.from_file(file)
    elif os.path.isdir(file):
        table = load_saved(file, source)
    else:
        table = load_from_hub(source)
    source.check_columns(table.column_names, tasks, file)
    used = source.column_names(table.column_names).values()
    return table.select_columns([name for name in table.column_names if name in used])


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
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.path}: not a local file or folder, and loading from the Hub failed (name "
            f"{source.name!r}, split {source.split!r}): {error}"
        ) from error


def _convert_text_file(file: str, source: SourceConfig, tasks: Mapping[str, Task]) -> datasets.Dataset:
    """Converts JSONL, JSON or CSV to a table of the schema; cached until the file changes.

    The stock readers infer a type for every column and fail if an unused one has mixed types.
    """
    state = os.stat(file)
    used = (os.path.abspath(file), state.st_size, state.st_mtime_ns, source.column_names(), source.task)
    fingerprint = hashlib.blake2b(repr((*used, dict(tasks), CODE)).encode(), digest_size=16).hexdigest()
    try:
        return datasets.Dataset.from_generator(
            _text_rows,
            features=TEXT_FEATURES,
            gen_kwargs={"file": file, "source": source, "tasks": tasks},
            fingerprint=fingerprint,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _text_rows(file: str, source: SourceConfig, tasks: Mapping[str, Task]) -> Iterator[dict[str, Any]]:
    """Yields the cleaned rows of a text file as `TEXT_FEATURES`, with tasks and paths as written."""
    existing: dict[str, None] = {}
    for line, record in TEXT_READERS[Path(file).suffix](file):
        existing.update(dict.fromkeys(record))
        names = source.column_names(record)
        values = {name: record.get(column) for name, column in names.items()}
        row = clean_row(values, _place(source, file, line, values.get("id"), record))
        yield {
            **vars(row),
            "id": None if values.get("id") is None else str(values["id"]),
            "audio_a": _stored_audio(row.audio_a),
            "audio_b": _stored_audio(row.audio_b),
            "negatives": [{**vars(each), "audio": _stored_audio(each.audio)} for each in row.negatives],
            "line": line,
            "named": [names[name] for name in FORMER_COLUMNS if name in names],
        }
    if existing:
        source.check_columns(existing, tasks, file)
    else:
        raise _no_rows(file)


def _restore_row(record: Mapping[str, Any], place: Place, root: str) -> Row:
    """Returns a row that `_text_rows` has cleaned, with media paths relative to `root` resolved."""
    sides = {side: _restored(record, f"images_{side}", f"audio_{side}", root) for side in ("a", "b")}
    negatives = [Content(each["text"], *_restored(each, "images", "audio", root)) for each in record["negatives"]]
    return Row(
        row_id(place),
        record["task"],
        record["a"],
        record["b"],
        *sides["a"],
        *sides["b"],
        record["score"],
        record["group"],
        negatives,
        *(None if record[name] is None else np.array(record[name], np.float32) for name in ("teacher_a", "teacher_b")),
    )


def _restored(record: Mapping[str, Any], images: str, audio: str, root: str) -> tuple[list[str], Any]:
    """Returns the images and the audio that a record has in these two columns, with paths relative to `root`."""
    stored = record[audio]
    if stored is not None and stored["path"] is not None:
        stored = os.path.join(root, stored["path"])
    elif stored is not None:
        stored = {"array": np.array(stored["array"], np.float32), "sampling_rate": stored["sampling_rate"]}
    return [os.path.join(root, path) for path in record[images]], stored


def _stored_audio(audio: Any) -> dict[str, Any] | None:
    """Returns audio of a row as `AUDIO`."""
    if audio is None:
        return None
    given = audio if isinstance(audio, dict) else {"path": audio}
    return {"path": None, "array": None, "sampling_rate": None, **given}


def _place(source: SourceConfig, file: str, row: int, row_id: Any, existing: Iterable[str]) -> Place:
    return Place(file, row, None if row_id is None else str(row_id), source.column_names(existing))


def _json_lines(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, parse_object(line, file, number)


def parse_object(line: bytes, file: str, number: int) -> dict[str, Any]:
    """Parses a line of JSON; anything but an object is a `RowError` that names file and line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RowError(f"{file}, line {number}: invalid JSON: {error}. Repair or drop the line.") from error
    if not isinstance(record, dict):
        raise RowError(f"{file}, line {number}: {record!r:.100} is not a JSON object; write {{column: value, …}}.")
    return record


def _json_records(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSON array or of JSON lines."""
    content = Path(file).read_bytes()
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(file)
        return
    try:
        records = json.loads(content)
    except ValueError as error:
        raise RowError(f"{file}: invalid JSON: {error}. Repair it.") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise RowError(f"{file}, row {number}: {record!r:.100} is not a JSON object; write {{column: value, …}}.")
        yield number, record


def _csv_records(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for record in reader:
                if None in record:
                    raise RowError(
                        f"{file}, line {reader.line_num}: {record[None]!r:.100} is beyond the last column; "
                        "quote fields that hold commas."
                    )
                yield reader.line_num, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise RowError(f"{file}, line {reader.line_num}: invalid CSV in UTF-8: {error}. Repair it.") from error


TEXT_READERS = {".jsonl": _json_lines, ".json": _json_records, ".csv": _csv_records}
