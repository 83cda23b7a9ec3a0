"""Defines tasks and rows of pairs, and checks rows."""

import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import soundfile
from PIL import Image

from ..media_vipolyqwen import MAX_ASPECT_RATIO, MAX_IMAGE_PIXELS, check_wav_is_complete, load_audio
from ..processing_vipolyqwen import PREFIX_SIDES, TASK_PREFIXES

COLUMNS = ("id", "task", "a", "b", "images", "audio", "score", "group", "negatives")
MODALITY_PAIRS = ("text-text", "image-text", "audio-text")  # of side a and side b; audio beside other parts counts
TASK_ALIASES = {"contrastive_with_score": "text_pair", "instruction": "instr"}
ENCODER_RATE = 16_000  # Hz, of the speech encoder
PREFIX_PATTERN = re.compile(r"<\w+>")
SIDES_OF_TASKS = "task"  # in a recipe: each task keeps its sides


def canonical_task(name: str) -> str:
    """Returns the name of a task as this repository writes it; the STW paper's names (§3.1.1) are aliases."""
    return TASK_ALIASES.get(name, name)


@dataclass(frozen=True)
class Task:
    """A task: its prefix token, the sides that carry it (`PREFIX_SIDES`), and what its rows need besides text."""

    name: str
    prefix: str
    needs_score: bool = False
    needs_image: bool = False
    needs_audio: bool = False
    prefix_sides: str = "a"

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not PREFIX_PATTERN.fullmatch(self.prefix):
            raise ValueError(
                f"tasks.{self.name}: the prefix is {self.prefix!r}; write one word in angle brackets, "
                f"such as '<{self.name}>'."
            )
        for need in ("needs_score", "needs_image", "needs_audio"):
            if not isinstance(getattr(self, need), bool):
                raise ValueError(f"tasks.{self.name}.{need} is {getattr(self, need)!r}; write true or false.")
        if self.prefix_sides not in PREFIX_SIDES:
            raise ValueError(
                f"tasks.{self.name}.prefix_sides is {self.prefix_sides!r}; write one of {', '.join(PREFIX_SIDES)}."
            )


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
        declared: name -> `{prefix, prefix_sides, needs_score, needs_image, needs_audio, loss}`; `loss` is for the loss
            to read.
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
class Row:
    """One pair. An image is a path or the bytes of a file; audio also samples as `{"array", "sampling_rate"}`."""

    id: str
    task: str
    a: str
    b: str
    images: list[str | bytes]
    audio: str | bytes | dict[str, Any] | None
    score: float | None
    group: str | None
    negatives: list[str]


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
        images=_clean_images(record.get("images"), place, root),
        audio=_clean_audio(record.get("audio"), place, root),
        score=_clean_score(record.get("score"), place),
        group=None if group is None else str(group),
        negatives=_clean_texts("negatives", record.get("negatives"), place),
    )


def check_row(row: Row, tasks: Mapping[str, Task], place: Place, image_placeholder: str) -> None:
    """Checks task, score, texts and the needs of the task, without opening a file.

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
    has_a = bool(row.a.strip() or row.images or row.audio is not None)
    if not has_a and not row.b.strip():
        raise place.error("a", row.a, "the text is empty on both sides; fill it in or drop the row.")
    if not row.b.strip():
        raise place.error("b", row.b, "side b has no text; fill it in or drop the row.")
    if task.needs_image and not row.images:
        raise place.error("images", row.images, f"{row.task} needs an image; name one or change the task.")
    if task.needs_audio and row.audio is None:
        raise place.error("audio", row.audio, f"{row.task} needs audio; name a file or change the task.")
    if not has_a:
        raise place.error("a", row.a, "side a has no text, image or audio; fill it in or drop the row.")
    if any(not text.strip() or text == row.b for text in row.negatives):
        raise place.error("negatives", row.negatives, "a negative is empty or equals side b; drop it.")
    markers = row.a.count(image_placeholder) if row.images else 0
    if markers not in (0, len(row.images)):
        raise place.error(
            "a",
            row.a,
            f"{markers} placeholders {image_placeholder} for {len(row.images)} images; write one for each image, or "
            "none to have the images first.",
        )


def check_media(row: Row, place: Place, min_audio_samples: int, headers: bool = True) -> None:
    """Checks that media files exist and, by their headers, that they are readable and within the size limits.

    Args:
        row: the row.
        place: origin of the row.
        min_audio_samples: shortest audio that the speech encoder accepts, in samples at 16 kHz.
        headers: whether to open the files; otherwise they only have to exist.

    Raises:
        RowError: the first fault found.
    """
    files = [("images", image) for image in row.images] + [("audio", row.audio)]
    for column, path in files:
        if isinstance(path, str) and not os.path.isfile(path):
            raise place.error(column, path, "no such file; correct the path or `media_root` (URLs are not fetched).")
    if headers:
        for image in row.images:
            _check_image_header(image, place)
    if row.audio is not None and (headers or isinstance(row.audio, dict)):
        frames, rate = _audio_header(row.audio, place)
        samples = math.ceil(frames * ENCODER_RATE / rate)
        if samples < max(1, min_audio_samples):
            raise place.error(
                "audio",
                show_media(row.audio),
                f"the audio has {frames} samples at {rate} Hz, {samples} at {ENCODER_RATE} Hz; the speech encoder "
                f"needs at least {max(1, min_audio_samples)}. Pad it with silence or drop the row.",
            )


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


def _clean_texts(column: str, value: Any, place: Place) -> list[str]:
    if value is None or value == "":
        return []
    return [_clean_text(column, entry, place) for entry in (value if isinstance(value, list) else [value])]


def _clean_images(value: Any, place: Place, root: str) -> list[str | bytes]:
    if value is None or value == "":
        return []
    return [_clean_file("images", entry, place, root) for entry in (value if isinstance(value, list) else [value])]


def _clean_file(column: str, value: Any, place: Place, root: str) -> str | bytes:
    if isinstance(value, dict):  # as `datasets` stores media
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return os.path.join(root, value)
    if not isinstance(value, bytes) or not value:
        raise place.error(column, value, "a path or the bytes of a file are expected; correct or drop it.")
    return value


def _clean_audio(value: Any, place: Place, root: str) -> str | bytes | dict[str, Any] | None:
    if value is None or value == "":
        return None
    if isinstance(value, list):
        value = {"array": value}
    if not isinstance(value, dict) or value.get("array") is None:
        return _clean_file("audio", value, place, root)
    array = value["array"]
    if isinstance(array, list) and array and all(isinstance(sample, int) for sample in array):
        raise place.error("audio", array, "integer samples; scale them to [-1, 1].")
    try:
        samples, rate = load_audio({"array": array, "sampling_rate": value.get("sampling_rate")})
    except (ValueError, TypeError) as error:
        raise place.error("audio", array, str(error)) from error
    return {"array": samples, "sampling_rate": rate}


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
            "a score is in [0, 1]; rescale it, or leave the column out with `columns: {score: null}`.",
        )


def _check_image_header(source: str | bytes, place: Place) -> None:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise place.error("images", show_media(source), f"it cannot be read: {error}. Repair or drop it.") from error
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise place.error(
            "images",
            show_media(source),
            f"it is {width}×{height}; the limits are {MAX_IMAGE_PIXELS} pixels and an aspect ratio of "
            f"{MAX_ASPECT_RATIO}. Scale or crop it.",
        )


def _audio_header(source: str | bytes | dict[str, Any], place: Place) -> tuple[int, int]:
    """Returns the number of samples of a channel and the sampling rate in Hz."""
    if isinstance(source, dict):
        return len(source["array"]), source["sampling_rate"]
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            check_wav_is_complete(file)
            info = soundfile.info(file)
    except (OSError, ValueError, soundfile.SoundFileError) as error:
        raise place.error("audio", show_media(source), f"it cannot be read: {error}. Repair or drop it.") from error
    return info.frames, info.samplerate
