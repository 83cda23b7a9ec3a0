"""Defines tasks and rows of pairs, and checks rows."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..download_vipolyqwen import is_url, show_url
from ..tasks_vipolyqwen import PREFIX_SIDES, TASK_PREFIXES

COLUMNS = ("id", "task", "a", "b", "images_a", "audio_a", "images_b", "audio_b", "score", "group")
COLUMNS += ("negatives", "negative_images", "negative_audio", "teacher_a", "teacher_b")
OLD_COLUMNS = {"images": "images_a", "audio": "audio_a"}
MODALITIES = ("text", "image", "audio")
PRESENT = {  # whether a side has text, images, audio -> their names
    given: tuple(itertools.compress(MODALITIES, given)) for given in itertools.product((False, True), repeat=3)
}
# Of the two sides of a pair, whichever is a. A side of several modalities counts by audio, else by image.
MODALITY_PAIRS = ("text-text", "image-text", "audio-text", "image-image", "audio-image", "audio-audio")
TASK_ALIASES = {"contrastive_with_score": "text_pair", "instruction": "instr"}
# Tasks that a recipe uses by name alone, and the columns that their rows may have beside those of the schema.
READY_TASKS = {
    "retrieval": {"prefix": "<retrieval>", "loss": {"nce": 1.0}},
    "image_caption": {"prefix": "<image_caption>", "loss": {"nce": 1.0}, "needs_image": True},
}
READY_COLUMNS = {
    "retrieval": {"a": "query", "b": "document"},
    "image_caption": {"images_a": "image", "b": "caption"},
}
ENCODER_RATE = 16_000  # Hz, of the speech encoder
SIDE_NEEDS = {  # side -> column -> the field of `Task` that says whether a row needs it
    "a": {"images_a": "needs_image", "audio_a": "needs_audio"},
    "b": {"images_b": "needs_image_b", "audio_b": "needs_audio_b"},
}
TEXT_ONLY = ("text_only_a", "text_only_b")
PREFIX_PATTERN = re.compile(r"<\w+>")
TASK_NAME = re.compile(r"\w[\w. -]*")
SIDES_OF_TASKS = "task"  # in a recipe: each task keeps its sides


def canonical_task(name: str) -> str:
    """Returns the name of a task as this repository writes it; the STW paper's names (§3.1.1) are aliases."""
    return TASK_ALIASES.get(name, name)


@dataclass(frozen=True)
class Task:
    """A task: its prefix token, what its rows need besides text, and the sides that hold nothing but text.

    Attributes:
        name: its name.
        prefix: its prefix token.
        needs_score: whether each row needs a score.
        needs_image: whether side a needs an image.
        needs_audio: whether side a needs audio.
        needs_image_b: whether side b needs an image.
        needs_audio_b: whether side b needs audio.
        text_only_a: whether images and audio on side a are an error.
        text_only_b: whether images and audio on side b and in hard negatives are an error.
        prefix_sides: the sides that carry the prefix, of `PREFIX_SIDES`.
    """

    name: str
    prefix: str
    needs_score: bool = False
    needs_image: bool = False
    needs_audio: bool = False
    needs_image_b: bool = False
    needs_audio_b: bool = False
    text_only_a: bool = False
    text_only_b: bool = False
    prefix_sides: str = "a"

    def __post_init__(self) -> None:
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(
                f"tasks: the name {self.name!r} is part of file names and metrics; write letters and "
                "digits, then also '_', '-', '.' and spaces."
            )
        if not isinstance(self.prefix, str) or not PREFIX_PATTERN.fullmatch(self.prefix):
            raise ValueError(
                f"tasks.{self.name}: the prefix is {self.prefix!r}; write one word in angle brackets, "
                f"such as '<{self.name}>'."
            )
        for name in ("needs_score", *(need for needs in SIDE_NEEDS.values() for need in needs.values()), *TEXT_ONLY):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"tasks.{self.name}.{name} is {getattr(self, name)!r}; write true or false.")
        if self.prefix_sides not in PREFIX_SIDES:
            raise ValueError(
                f"tasks.{self.name}.prefix_sides is {self.prefix_sides!r}; write one of {', '.join(PREFIX_SIDES)}."
            )
        for only, (side, needs) in zip(TEXT_ONLY, SIDE_NEEDS.items(), strict=True):
            for need in needs.values():
                if getattr(self, only) and getattr(self, need):
                    raise ValueError(
                        f"tasks.{self.name}: {only} and {need} are both true; drop one, side {side} cannot be both."
                    )

    def needed(self) -> list[str]:
        """Returns the columns that every row of the task fills, besides texts."""
        columns = ["score"] if self.needs_score else []
        return columns + [
            column for needs in SIDE_NEEDS.values() for column, need in needs.items() if getattr(self, need)
        ]


TASKS = {
    name: Task(
        name,
        prefix,
        needs_score=name == "text_pair",
        needs_image=name in ("ocr", "vqa_single", "vqa_multi"),
        needs_audio=name == "audio",
        prefix_sides="both" if name == "text_pair" else "a",  # both sides of a scored pair are alike
    )
    for name, prefix in TASK_PREFIXES.items()
}


def with_ready_tasks(
    declared: Mapping[str, Mapping[str, Any]] | None, sources: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns the tasks that a recipe declares, and those of `READY_TASKS` that its sources or declarations name.

    Args:
        declared: name -> fields; of a task of `READY_TASKS` those that differ.
        sources: entries of the recipe's data.
    """
    named = {}
    for source in sources:
        of = source.get("map")
        named |= dict.fromkeys([source.get("task"), *(of.values() if isinstance(of, Mapping) else ())])
    tasks = {name: dict(fields or {}) for name, fields in (declared or {}).items()}
    ready = {name: fields for name, fields in READY_TASKS.items() if name in tasks or name in named}
    return {**tasks, **{name: {**fields, **tasks.get(name, {})} for name, fields in ready.items()}}


def declare_tasks(
    declared: Mapping[str, Mapping[str, Any]] | None = None, prefix_sides: str = SIDES_OF_TASKS
) -> dict[str, Task]:
    """Returns the six tasks and those that a recipe declares; a task's place in the result is its task id.

    Args:
        declared: name -> the fields of `Task`, and `loss` for the loss to read.
        prefix_sides: `a`, `both` or `none` for all tasks, or `task` for those of each task.
    """
    tasks = dict(TASKS)
    known = [field.name for field in fields(Task) if field.name != "name"]
    for name, settings in (declared or {}).items():
        if canonical_task(name) in tasks:
            raise ValueError(f"tasks.{name}: a task of this name exists already; choose another name.")
        if unknown := sorted(set(settings) - {*known, "loss"}):
            raise ValueError(f"tasks.{name} has unknown keys {unknown}; known: {[*known, 'loss']}.")
        if "prefix" not in settings:
            raise ValueError(f"tasks.{name} has no prefix; add one, such as prefix: '<{name}>'.")
        task = Task(name, **{key: value for key, value in settings.items() if key != "loss"})
        for other in tasks.values():
            if other.prefix == task.prefix:
                raise ValueError(
                    f"tasks.{name}: the prefix {task.prefix!r} is that of {other.name}; choose another one."
                )
        tasks[name] = task
    if prefix_sides == SIDES_OF_TASKS:
        return tasks
    if prefix_sides not in PREFIX_SIDES:
        known = ", ".join((*PREFIX_SIDES, SIDES_OF_TASKS))
        raise ValueError(f"prefix_sides is {prefix_sides!r}; choose one of {known}.")
    return with_prefix_sides(tasks, dict.fromkeys(tasks, prefix_sides))


def with_prefix_sides(tasks: Mapping[str, Task], prefix_sides: Mapping[str, str]) -> dict[str, Task]:
    """Returns the tasks in their order, those named in `prefix_sides` with the sides that it gives."""
    return {
        name: replace(task, prefix_sides=prefix_sides.get(name, task.prefix_sides)) for name, task in tasks.items()
    }


class RowError(ValueError):
    """Raised for an unusable row; the message names file, row, column, value and remedy.

    Attributes:
        cause: a name of the fault that is the same for all rows with it.
        id: the row's id, `None` without one.
        row: its number in the file.
    """

    def __init__(self, message: str, cause: str = "invalid record", id: str | None = None, row: int = 0) -> None:
        super().__init__(message, cause, id, row)
        self.cause, self.id, self.row = cause, id, row

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Place:
    """The origin of a row, for error messages."""

    file: str
    row: int  # counted from 1; in a JSONL or CSV file the line
    id: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # column of the schema -> the user's, or several

    def error(self, column: str, value: Any, problem: str, cause: str | None = None) -> RowError:
        """Returns the error for `value` in `column`; `problem` gives limit and remedy, `cause` a name to count by."""
        shown = repr(value) if len(repr(value)) <= 100 else repr(value)[:100] + "…"
        row = f"row {self.row}" + (f" (id {self.id!r})" if self.id else "")
        of = self.columns.get(column, column)
        named = of if isinstance(of, str) else ", ".join(of)
        return RowError(
            f"{self.file}, {row}, column {named!r} is {shown}: {problem}",
            cause or f"invalid {column}",
            self.id,
            self.row,
        )


@dataclass
class Content:
    """What a side of a pair or a hard negative holds: text, images, audio or any mix.

    Attributes:
        text: with one placeholder per image, or without any.
        images: paths or contents of files.
        audio: path or content of a file, or `{"array": (samples,) float32, "sampling_rate"}`.
    """

    text: str = ""
    images: list[str | bytes] = field(default_factory=list)
    audio: str | bytes | dict[str, Any] | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Returns the modalities present, in the order of `MODALITIES`; empty if nothing is."""
        return present_modalities(self.text, self.images, self.audio)

    def equals(self, other: "Content") -> bool:
        """Returns whether text and sources are the same, without opening a file."""
        if isinstance(self.audio, dict) and isinstance(other.audio, dict):
            same = np.array_equal(self.audio["array"], other.audio["array"])
        else:
            same = type(self.audio) is type(other.audio) and self.audio == other.audio
        return same and (self.text, self.images) == (other.text, other.images)

    def shown(self) -> str | dict[str, Any]:
        """Returns a short form for an error message: the text, or a dict of the parts."""
        if not self.images and self.audio is None:
            return self.text
        images = [show_media(image) for image in self.images]
        parts = {"text": self.text, "images": images, "audio": None if self.audio is None else show_media(self.audio)}
        return {name: part for name, part in parts.items() if part}


@dataclass
class Row:
    """One pair. An image is a path or the bytes of a file; audio also samples as `{"array", "sampling_rate"}`."""

    id: str
    task: str
    a: str
    b: str
    images_a: list[str | bytes]
    audio_a: str | bytes | dict[str, Any] | None
    images_b: list[str | bytes]
    audio_b: str | bytes | dict[str, Any] | None
    score: float | None
    group: str | None
    negatives: list[Content]
    teacher_a: np.ndarray | None = None  # (W,) float32, a teacher's vector of side a, for distillation
    teacher_b: np.ndarray | None = None

    def side(self, name: str) -> Content:
        """Returns side `"a"` or `"b"`."""
        if name == "a":
            return Content(self.a, self.images_a, self.audio_a)
        return Content(self.b, self.images_b, self.audio_b)

    def only_text(self, name: str) -> str | None:
        """Returns the text of side `"a"` or `"b"` if it holds nothing else, otherwise `None`."""
        side = self.side(name)
        return side.text if side.modalities == ("text",) else None


def present_modalities(text: str, images: Sequence[Any], audio: Any) -> tuple[str, ...]:
    """Returns the modalities present on a side, in the order of `MODALITIES`; blank text does not count."""
    return PRESENT[bool(text) and not text.isspace(), len(images) > 0, audio is not None]


def modality_pair(a: Sequence[str], b: Sequence[str]) -> str:
    """Returns the entry of `MODALITY_PAIRS` for the modalities of two sides."""
    return "-".join(sorted("audio" if "audio" in side else "image" if "image" in side else "text" for side in (a, b)))


def row_id(place: Place) -> str:
    """Returns the id of a row; without one, file and row number."""
    return place.id or f"{os.path.basename(place.file)}:{place.row}"


def media_contents(row: Row) -> Iterator[tuple[str, str, Content]]:
    """Yields the sides and hard negatives that hold media, with the columns of their images and of their audio."""
    named = [("images_a", "audio_a", row.side("a")), ("images_b", "audio_b", row.side("b"))]
    named += [("negatives", "negatives", negative) for negative in row.negatives]
    yield from (entry for entry in named if entry[2].images or entry[2].audio is not None)


def show_media(source: str | bytes | dict[str, Any]) -> str:
    """Returns a short form of an image or audio source for an error message."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, str):
        return show_url(source) if is_url(source) else source
    return f"<{len(source['array'])} samples>"
