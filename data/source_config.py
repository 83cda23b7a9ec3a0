"""Settings of one entry of a recipe's data: where its rows are and how its columns become those of the schema."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .names import did_you_mean, rename_old_keys
from .schema import COLUMNS, OLD_COLUMNS, READY_COLUMNS, Place, Task, canonical_task
from .shapes import PICKS, TURNS, ConversationShape

FORMER_COLUMNS = {"task": "data_type"} | {new: old for old, new in OLD_COLUMNS.items()}
NUMBERED_NEGATIVE = re.compile(r"negative(_?\d+)?")


@dataclass(frozen=True)
class SourceConfig:
    """One entry of a recipe's `train_data` or `eval_data`.

    Attributes:
        path: a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .tar (WebDataset) file, also of text with .gz, .zst or
            .bz2 after it, a glob or a folder of them, a folder written by `save_to_disk`, or the id of a Hub dataset.
        task: the task of all rows; or
        task_column: the column that holds each row's (`task`, or `data_type`, if neither is given).
        map: value of that column -> task; names of tasks need no entry.
        columns: a, b, images_a, images_b, audio_a, audio_b, score, id, group, negatives, negative_images,
            negative_audio, teacher_a, teacher_b -> the user's column (default: the same name, or `images` and `audio`
            for side a's; null: none). Rows of one group are not negatives of each other; negatives are wrong answers;
            teacher_a and teacher_b are a teacher's vectors of the sides, for distillation. `answers.text` is a column
            inside another; a list of names or a pattern such as `negative_*` joins several columns.
        lists: column -> all (a pair for each entry of a list), first, random (one entry, drawn by row, epoch and seed)
            or join (the entries as one text, a line each).
        conversation: the column with turns, or `{column, pairs: all | first | last, system: false}`; each answer
            becomes a pair with the dialogue before it.
        media_root: folder of relative media paths (default: the folder of the file that names them).
        allow_urls: whether images and audio may be `http(s)://` URLs of public addresses, fetched each time that a row
            is read; `prepare` fetches each once.
        outside_media_root: whether absolute paths, `..` and symbolic links may leave that folder.
        weight: visits of each row in an epoch.
        max_visits: most visits of all rows together in an epoch (default: no limit).
        enabled: whether training reads the source; `false` keeps its entry in the recipe.
        default_score: score, from 0 to 1, of the rows that have none, such as 1 for translations.
        language: of the rows, shown by `python -m vipolyqwen.data check`; likewise
        licence: of the rows, and
        gated: whether the Hub asks for consent before the first download.
        split: split of a Hub dataset or a folder.
        name: configuration of a Hub dataset, or a folder inside the path.
        revision: branch, tag or commit of a Hub dataset.
        delimiter: of a CSV file (default: the one of its first line).
        quotes: whether quotes in a CSV or TSV file enclose a cell; if not, they are characters of the text.
        encoding: of a text file (default: UTF-8, or UTF-16 or UTF-32 by its byte order mark).
        image_placeholder: marks the position of an image in the text of a side.
        score_range: lowest and highest score of the column; scores are mapped from it to [0, 1].
        streaming: read the rows in training as they come, without an index; see docs/data.md.
        shuffle_buffer: records of a streamed source that are shuffled together; each worker holds them in memory.
    """

    path: str
    task: str | None = None
    task_column: str | None = None
    map: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str | tuple[str, ...] | None] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)
    conversation: ConversationShape | None = None
    media_root: str | None = None
    allow_urls: bool = False
    outside_media_root: bool = False
    weight: float = 1.0
    max_visits: int | None = None
    enabled: bool = True
    default_score: float | None = None
    language: str | None = None
    licence: str | None = None
    gated: bool = False
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    delimiter: str | None = None
    quotes: bool = True
    encoding: str | None = None
    image_placeholder: str = "<image>"
    score_range: tuple[float, float] = (0.0, 1.0)
    streaming: bool = False
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        if self.task is not None and (self.task_column is not None or self.map):
            raise ValueError(
                f"{self.path}: `task: {self.task}` fixes the task of all rows; drop it, or `task_column` and `map`."
            )
        for name in ("map", "columns", "lists"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{self.path}: `{name}` is {getattr(self, name)!r}; write {{NAME: NAME, …}}.")
        columns = rename_old_keys(self.columns, f"{self.path}: columns", OLD_COLUMNS)
        columns = {name: tuple(of) if isinstance(of, list) else of for name, of in columns.items()}
        object.__setattr__(self, "columns", columns)
        _check_keys(columns, [name for name in COLUMNS if name != "task"], f"{self.path}: columns")
        self._check_columns()
        object.__setattr__(self, "conversation", _conversation(self.conversation, self.path))
        self._check_reading()
        if not _is_number(self.weight) or not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: the weight is {self.weight!r}; it must be above 0 (or drop the source).")
        if self.max_visits is not None and (type(self.max_visits) is not int or self.max_visits < 1):
            raise ValueError(f"{self.path}: max_visits is {self.max_visits!r}; write a whole number of at least 1.")
        if self.default_score is not None and not (_is_number(self.default_score) and 0 <= self.default_score <= 1):
            raise ValueError(f"{self.path}: default_score is {self.default_score!r}; write a number in [0, 1].")
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

    def refuse_streaming(self) -> None:
        """Raises ValueError for a source that is streamed, where rows are looked up by number."""
        if self.streaming:
            raise ValueError(
                f"{self.path}: `streaming: true` is for `train_data` whose sources are all streamed; here rows are "
                "read by number. Leave it out, or write the rows to shards with `python -m vipolyqwen.data prepare`."
            )

    def scale(self, score: float, place: Place) -> float:
        """Maps a score from `score_range` to [0, 1]; in the default range unchanged, `check_row` checks it."""
        low, high = self.score_range
        if (low, high) == (0, 1) or math.isnan(score):
            return score
        if not low <= score <= high:
            limit = f"it must be in score_range, [{low:g}, {high:g}]; correct the row or the range."
            raise place.error("score", score, limit)
        return (score - low) / (high - low)

    def _check_reading(self) -> None:
        for name in ("allow_urls", "outside_media_root", "quotes", "enabled", "gated", "streaming"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{self.path}: {name} is {getattr(self, name)!r}; write true or false.")
        if type(self.shuffle_buffer) is not int or self.shuffle_buffer < 1:
            raise ValueError(f"{self.path}: shuffle_buffer is {self.shuffle_buffer!r}; write a number of rows >= 1.")
        if self.delimiter is not None and (not isinstance(self.delimiter, str) or len(self.delimiter) != 1):
            raise ValueError(f"{self.path}: delimiter is {self.delimiter!r}; write one character, such as ';'.")
        try:
            "".encode(self.encoding or "utf-8")
        except (LookupError, TypeError) as error:  # unknown, or one of bytes, such as hex
            raise ValueError(f"{self.path}: encoding is {self.encoding!r}; write one that Python knows.") from error

    def _check_columns(self) -> None:
        for name, of in self.columns.items():
            if not isinstance(of, (str, tuple, type(None))) or not all(isinstance(each, str) for each in of or ()):
                raise ValueError(f"{self.path}: columns.{name} is {of!r}; write a column, a list of columns or null.")
        _check_keys(self.lists, [name for name in COLUMNS if name != "task"], f"{self.path}: lists")
        for name, pick in self.lists.items():
            if pick not in PICKS:
                raise ValueError(f"{self.path}: lists.{name} is {pick!r}; write one of {', '.join(PICKS)}.")

    def column_names(self, existing: Iterable[str] = ()) -> dict[str, str | tuple[str, ...]]:
        """Maps each column of the schema to the user's, in a file (or record) with the `existing` columns."""
        existing = list(existing)
        given = self.columns if self.task_column is None else {**self.columns, "task": self.task_column}
        names = {name: given.get(name, name) for name in COLUMNS if name != "task" or self.task is None}
        for name in names:
            if name not in given:
                names[name] = self._default_columns(name, existing)
        return {name: _matching(of, existing) for name, of in names.items() if of is not None}

    def _default_columns(self, name: str, existing: Sequence[str]) -> str | tuple[str, ...]:
        """Returns the column, or the columns, of a name of the schema for which the recipe names none."""
        if name == "negatives" and name not in existing:
            numbered = [column for column in existing if NUMBERED_NEGATIVE.fullmatch(column)]
            return tuple(sorted(numbered, key=_natural)) or name
        if name in FORMER_COLUMNS:
            found = self.default_column(name, existing)
            if found in existing:
                return found
        ready = READY_COLUMNS.get(canonical_task(self.task or ""), {}).get(name)
        if self.conversation is not None and name == "images_a":
            ready = "image"
        return ready if ready in existing and name not in existing else name

    def used_columns(self, existing: Iterable[str]) -> list[str]:
        """Returns the columns of a table that are read."""
        existing = list(existing)
        names = [each for of in self.column_names(existing).values() for each in _several(of)]
        names += [] if self.conversation is None else [self.conversation.column]
        used = {name if name in existing else name.partition(".")[0] for name in names}
        return [name for name in existing if name in used]

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
        if self.conversation is None:
            required |= self._needed(names, existing, tasks)
        elif not _exists(self.conversation.column, existing):
            raise _missing(file, self.conversation.column, existing, "conversation: NAME")
        for name in sorted(required):
            of = names.get(name, name)
            if not all(_exists(each, existing) for each in _several(of)):
                remedy = "task_column: NAME" if name == "task" else f"columns: {{{name}: NAME}}"
                raise _missing(file, ", ".join(_several(of)), existing, remedy)

    def _needed(
        self, names: Mapping[str, str | tuple[str, ...]], existing: set[str], tasks: Mapping[str, Task]
    ) -> set[str]:
        """Returns the columns of the schema that the tasks of the source need."""
        required = {"task"} if self.task is None else set(tasks[canonical_task(self.task)].needed())
        if self.default_score is not None:
            required.discard("score")
        for side in ("a", "b"):
            media = [each for name in ("images", "audio") for each in _several(names.get(f"{name}_{side}", ()))]
            if not any(_exists(each, existing) for each in media):
                required.add(side)
        return required


def _several(of: str | Sequence[str]) -> Sequence[str]:
    return (of,) if isinstance(of, str) else of


def _exists(column: str, existing: set[str]) -> bool:
    """Returns whether a column, or the one that it is in, exists."""
    return column in existing or ("." in column and column.partition(".")[0] in existing)


def _missing(file: str, column: str, existing: Iterable[str], remedy: str) -> ValueError:
    return ValueError(
        f"{file}: the column {column!r} is missing; the file has {sorted(existing)}. Name it with `{remedy}`."
    )


def _matching(of: str | tuple[str, ...], existing: Sequence[str]) -> str | tuple[str, ...]:
    """Returns the columns that patterns stand for, 2 before 10; other names unchanged."""
    if not any("*" in each and each not in existing for each in _several(of)):
        return of
    found = [
        column
        for each in _several(of)
        for column in (sorted(fnmatch.filter(existing, each), key=_natural) if "*" in each else [each])
    ]
    return tuple(dict.fromkeys(found)) or of


def _natural(name: str) -> list[Any]:
    """Returns a sort key by which numbers in a name count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _conversation(given: Any, path: str) -> ConversationShape | None:
    if given is None or isinstance(given, ConversationShape):
        return given
    values = {"column": given} if isinstance(given, str) else given
    if not isinstance(values, Mapping) or "column" not in values:
        raise ValueError(f"{path}: conversation is {given!r}; write the column of the turns, or {{column: NAME, …}}.")
    _check_keys(values, [each.name for each in fields(ConversationShape)], f"{path}: conversation")
    shape = ConversationShape(**values)
    if shape.pairs not in TURNS or not isinstance(shape.system, bool):
        raise ValueError(
            f"{path}: conversation is {given!r}; `pairs` is one of {', '.join(TURNS)}, `system` true or false."
        )
    return shape


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
