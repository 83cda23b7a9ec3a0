"""Defines tasks and rows of pairs, and checks rows."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..images_vipolyqwen import image_size
from ..processing_vipolyqwen import PREFIX_SIDES, TASK_PREFIXES
from ..waveforms_vipolyqwen import audio_length, load_audio

COLUMNS = ("id", "task", "a", "b", "images_a", "audio_a", "images_b", "audio_b", "score", "group")
COLUMNS += ("negatives", "negative_images", "negative_audio", "teacher_a", "teacher_b")
OLD_COLUMNS = {"images": "images_a", "audio": "audio_a"}
MODALITIES = ("text", "image", "audio")
# Of the two sides of a pair, whichever is a. A side of several modalities counts by audio, else by image.
MODALITY_PAIRS = ("text-text", "image-text", "audio-text", "image-image", "audio-image", "audio-audio")
TASK_ALIASES = {"contrastive_with_score": "text_pair", "instruction": "instr"}
ENCODER_RATE = 16_000  # Hz, of the speech encoder
SIDE_NEEDS = {  # side -> column -> the field of `Task` that says whether a row needs it
    "a": {"images_a": "needs_image", "audio_a": "needs_audio"},
    "b": {"images_b": "needs_image_b", "audio_b": "needs_audio_b"},
}
TEXT_ONLY = ("text_only_a", "text_only_b")
PREFIX_PATTERN = re.compile(r"<\w+>")
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
    """Raised for an unusable row; the message names file, row, column, value and remedy."""


@dataclass(frozen=True)
class Place:
    """The origin of a row, for error messages."""

    file: str
    row: int  # counted from 1; in a JSONL or CSV file the line
    id: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # column of the schema -> the user's

    def error(self, column: str, value: Any, problem: str) -> RowError:
        """Returns the error for `value` in `column`; `problem` gives limit and remedy."""
        shown = repr(value) if len(repr(value)) <= 100 else repr(value)[:100] + "…"
        row = f"row {self.row}" + (f" (id {self.id!r})" if self.id else "")
        return RowError(f"{self.file}, {row}, column {self.columns.get(column, column)!r} is {shown}: {problem}")


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
    given = (text.strip(), len(images), audio is not None)
    return tuple(name for name, is_given in zip(MODALITIES, given, strict=True) if is_given)


def modality_pair(a: Sequence[str], b: Sequence[str]) -> str:
    """Returns the entry of `MODALITY_PAIRS` for the modalities of two sides."""
    return "-".join(sorted("audio" if "audio" in side else "image" if "image" in side else "text" for side in (a, b)))


def row_id(place: Place) -> str:
    """Returns the id of a row; without one, file and row number."""
    return place.id or f"{os.path.basename(place.file)}:{place.row}"


def clean_row(record: Mapping[str, Any], place: Place, root: str = "") -> Row:
    """Converts one record to a `Row`.

    Args:
        record: column (of `COLUMNS`) -> value; an absent column is empty.
        place: origin of the record.
        root: folder to which paths are relative.

    Raises:
        RowError: a value cannot be converted.
    """
    task, group = record.get("task"), record.get("group")
    return Row(
        id=row_id(place),
        task="" if task is None else str(task),
        a=_clean_text("a", record.get("a"), place),
        b=_clean_text("b", record.get("b"), place),
        images_a=_clean_images("images_a", record.get("images_a"), place, root),
        audio_a=_clean_audio("audio_a", record.get("audio_a"), place, root),
        images_b=_clean_images("images_b", record.get("images_b"), place, root),
        audio_b=_clean_audio("audio_b", record.get("audio_b"), place, root),
        score=_clean_score(record.get("score"), place),
        group=None if group is None else str(group),
        negatives=_clean_negatives(record, place, root),
        teacher_a=_clean_vector("teacher_a", record.get("teacher_a"), place),
        teacher_b=_clean_vector("teacher_b", record.get("teacher_b"), place),
    )


def check_row(row: Row, tasks: Mapping[str, Task], place: Place, image_placeholder: str) -> None:
    """Checks task, score, both sides against the task, and hard negatives, without opening a file.

    Raises:
        RowError: the first fault found.
    """
    if row.task not in tasks:
        raise place.error(
            "task",
            row.task,
            f"the task is unknown; known: {', '.join(tasks)}. Translate it with `map`, or declare it in `tasks`.",
        )
    task = tasks[row.task]
    _check_score(row, task, place)
    if not row.side("a").modalities and not row.side("b").modalities:
        raise place.error("a", row.a, "side a and side b are both empty; fill them in or drop the row.")
    for side in SIDE_NEEDS:
        _check_side(row, side, task, place)
        _check_placeholders(side, row.side(side), place, image_placeholder)
    for negative in row.negatives:
        if not negative.modalities or negative.equals(row.side("b")):
            shown = [each.shown() for each in row.negatives]
            raise place.error("negatives", shown, "a negative is empty or equals side b; drop it.")
        if task.text_only_b and negative.modalities != ("text",):
            problem = f"{row.task} has text_only_b, so its negatives are texts; write texts or drop text_only_b."
            raise place.error("negatives", negative.shown(), problem)
        _check_placeholders("negatives", negative, place, image_placeholder)


def _check_side(row: Row, side: str, task: Task, place: Place) -> None:
    """Checks that a side holds what its task needs, nothing that it excludes, and anything at all."""
    values = {column: getattr(row, column) for column in SIDE_NEEDS[side]}
    for (column, value), (what, file) in zip(values.items(), (("an image", "one"), ("audio", "a file")), strict=True):
        if getattr(task, SIDE_NEEDS[side][column]) and not value:
            problem = f"{row.task} needs {what} on side {side}; name {file} or change the task."
            raise place.error(column, value, problem)
        if getattr(task, f"text_only_{side}") and value:
            shown = [show_media(image) for image in value] if isinstance(value, list) else show_media(value)
            raise place.error(
                column,
                shown,
                f"side {side} of {row.task} is text only (text_only_{side}); leave the column out, move it to the "
                "other side or change the task.",
            )
    if not row.side(side).modalities:
        text = getattr(row, side)
        raise place.error(side, text, f"side {side} has no text, image or audio; fill it in or drop the row.")


def _check_placeholders(column: str, content: Content, place: Place, image_placeholder: str) -> None:
    markers, images = content.text.count(image_placeholder), len(content.images)
    if images and markers not in (0, images):
        raise place.error(
            column,
            content.text,
            f"{markers} placeholders {image_placeholder} for {images} images; write one for each image, or none to "
            "have the images first.",
        )


def check_media(
    row: Row, place: Place, min_audio_samples: int, headers: bool = True, max_audio_seconds: float = math.inf
) -> None:
    """Checks that media files exist and, by their headers, that they are readable and within the size limits.

    Args:
        row: the row.
        place: origin of the row.
        min_audio_samples: shortest audio that the speech encoder accepts, in samples at 16 kHz.
        headers: whether to open the files; otherwise they only have to exist.
        max_audio_seconds: longest audio that the processor accepts.

    Raises:
        RowError: the first fault found.
    """
    for images, audio, content in media_contents(row):
        for column, source in [*((images, image) for image in content.images), (audio, content.audio)]:
            if isinstance(source, str) and not os.path.isfile(source):
                problem = "no such file; correct the path or `media_root` (URLs are not fetched)."
                raise place.error(column, source, problem)
        if headers:
            for image in content.images:
                _check_image_header(images, image, place)
        if content.audio is not None and (headers or isinstance(content.audio, dict)):
            _check_audio_length(audio, content.audio, place, max(1, min_audio_samples), max_audio_seconds)


def media_contents(row: Row) -> Iterator[tuple[str, str, Content]]:
    """Yields the sides and hard negatives that hold media, with the columns of their images and of their audio."""
    named = [("images_a", "audio_a", row.side("a")), ("images_b", "audio_b", row.side("b"))]
    named += [("negatives", "negatives", negative) for negative in row.negatives]
    yield from (entry for entry in named if entry[2].images or entry[2].audio is not None)


def show_media(source: str | bytes | dict[str, Any]) -> str:
    """Returns a short form of an image or audio source for an error message."""
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return source if isinstance(source, str) else f"<{len(source['array'])} samples>"


def _clean_text(column: str, value: Any, place: Place) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise place.error(column, value, f"a text is expected, not {type(value).__name__}; quote it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise place.error(
            column, value, f"a lone surrogate at position {error.start}; encode the file as UTF-8."
        ) from error
    return value


def _listed(value: Any) -> list[Any]:
    """Returns a list as it is, and one value as a list of it; empty without a value."""
    if value is None or (isinstance(value, str) and not value):
        return []
    return value if isinstance(value, list) else [value]


def _clean_negatives(record: Mapping[str, Any], place: Place, root: str) -> list[Content]:
    """Returns the hard negatives of three columns; each entry of a column is one negative."""
    images, audio = record.get("negative_images"), record.get("negative_audio")
    return [
        *(_clean_negative(entry, place, root) for entry in _listed(record.get("negatives"))),
        *(Content(images=_clean_images("negative_images", entry, place, root)) for entry in _listed(images)),
        *(Content(audio=_clean_audio("negative_audio", entry, place, root)) for entry in _listed(audio)),
    ]


def _clean_negative(entry: Any, place: Place, root: str) -> Content:
    if not isinstance(entry, dict):
        return Content(_clean_text("negatives", entry, place))
    known = [item.name for item in fields(Content)]
    if unknown := sorted(set(entry) - set(known)):
        raise place.error("negatives", entry, f"unknown keys {unknown}; a negative is a text or has {known}.")
    return Content(
        _clean_text("negatives", entry.get("text"), place),
        _clean_images("negatives", entry.get("images"), place, root),
        _clean_audio("negatives", entry.get("audio"), place, root),
    )


def _clean_images(column: str, value: Any, place: Place, root: str) -> list[str | bytes]:
    return [_clean_file(column, entry, place, root) for entry in _listed(value)]


def _clean_file(column: str, value: Any, place: Place, root: str) -> str | bytes:
    if isinstance(value, dict):  # as `datasets` stores media
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return os.path.join(root, value)
    if not isinstance(value, bytes) or not value:
        raise place.error(column, value, "a path or the bytes of a file are expected; correct or drop it.")
    return value


def _clean_audio(column: str, value: Any, place: Place, root: str) -> str | bytes | dict[str, Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, list):
        value = {"array": value}
    if not isinstance(value, dict) or value.get("array") is None:
        return _clean_file(column, value, place, root)
    array = value["array"]
    if isinstance(array, list) and array and all(isinstance(sample, int) for sample in array):
        raise place.error(column, array, "integer samples; scale them to [-1, 1].")
    try:
        samples, rate = load_audio({"array": array, "sampling_rate": value.get("sampling_rate")})
    except (ValueError, TypeError) as error:
        raise place.error(column, array, str(error)) from error
    return {"array": samples, "sampling_rate": rate}


def _clean_vector(column: str, value: Any, place: Place) -> np.ndarray | None:
    """Converts a teacher's vector, (W,) float32, finite and not 0."""
    if value is None or value == "":
        return None
    is_list = isinstance(value, list) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) for number in value
    )
    if not is_list or not value:
        raise place.error(column, value, "a list of numbers is expected; correct it or leave the vector out.")
    with np.errstate(over="ignore"):
        vector = np.array(value, np.float32)
    if not np.isfinite(vector).all():
        position = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise place.error(
            column,
            value[position],
            f"position {position} of the vector is not a finite float32; embed the row again or leave the vector out.",
        )
    if not vector.any():
        raise place.error(column, value, "the vector is 0 and has no direction; embed the row again or leave it out.")
    return vector


def _clean_score(value: Any, place: Place) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (ValueError, TypeError) as error:
        raise place.error("score", value, "a number in [0, 1] is expected; correct it or drop the row.") from error


def _check_score(row: Row, task: Task, place: Place) -> None:
    if row.score is None:
        if task.needs_score:
            raise place.error("score", None, f"{row.task} needs a score in [0, 1]; fill it in or drop the row.")
    elif not 0.0 <= row.score <= 1.0:
        raise place.error(
            "score",
            row.score,
            "a score is in [0, 1]; rescale it with `score_range: [LOWEST, HIGHEST]`, or leave the column out with "
            "`columns: {score: null}`.",
        )


def _check_image_header(column: str, source: str | bytes, place: Place) -> None:
    try:
        image_size(source)
    except ValueError as error:
        raise place.error(column, show_media(source), f"{error} Repair or drop it.") from error


def _check_audio_length(
    column: str, audio: str | bytes | dict[str, Any], place: Place, shortest: int, longest: float
) -> None:
    """Checks a length between `shortest` samples at 16 kHz and `longest` seconds."""
    frames, rate = _audio_header(column, audio, place)
    samples = math.ceil(frames * ENCODER_RATE / rate)
    if samples < shortest:
        raise place.error(
            column,
            show_media(audio),
            f"the audio has {frames} samples at {rate} Hz, {samples} at {ENCODER_RATE} Hz; the speech encoder needs "
            f"at least {shortest}. Pad it with silence or drop the row.",
        )
    if frames > longest * rate:
        raise place.error(
            column,
            show_media(audio),
            f"the audio has {frames / rate:.1f} s; the limit is {longest:g} s. Split it, raise `max_audio_windows` or "
            "drop the row.",
        )


def _audio_header(column: str, source: str | bytes | dict[str, Any], place: Place) -> tuple[int, int]:
    """Returns the number of samples of a channel and the sampling rate in Hz."""
    if isinstance(source, dict):
        return len(source["array"]), source["sampling_rate"]
    try:
        return audio_length(source)
    except ValueError as error:
        raise place.error(column, show_media(source), f"{error} Repair or drop it.") from error
