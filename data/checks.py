"""Checks rows: their task, score and sides, and their media files."""

import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..conversations_vipolyqwen import clean_text
from ..download_vipolyqwen import is_url, show_url
from ..images_vipolyqwen import ImageScaler, image_size, load_image, loaded_size
from ..media_vipolyqwen import LIMITS
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..waveforms_vipolyqwen import audio_length, load_audio
from .schema import ENCODER_RATE, SIDE_NEEDS, Content, Place, Row, RowError, Task, media_contents, show_media
from .source_config import SourceConfig

NONE, HEADER, FULL = "none", "header", "full"  # how far the check of media reads the files
MEDIA_WORDS = (("an image", "one"), ("audio", "a file"))  # what a task needs, and what to name
ERROR, SKIP = "error", "skip"  # what happens to a row that cannot be used


@dataclass(frozen=True)
class TokenRoom:
    """Counts the tokens that images need at least, against the tokens of an input.

    Attributes:
        processor: the model's processor.
    """

    processor: ViPolyQwenProcessor

    @property
    def limit(self) -> int:
        """Returns the tokens that an input may have."""
        return self.processor.tokenizer.model_max_length

    def tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Returns the tokens of a prefix, images of these (height, width) at the fewest pixels, and the end."""
        scaler = ImageScaler(self.processor.image_processor, {})
        return 2 + 2 * len(sizes) + scaler.count_tokens(sizes, scaler.pixel_range[0])

    def __repr__(self) -> str:
        scaler = ImageScaler(self.processor.image_processor, {})
        patch = self.processor.image_processor.patch_size
        return f"TokenRoom({self.limit}, {scaler.pixel_range[0]}, {patch}, {scaler.merge_size})"


@dataclass(frozen=True)
class Checker:
    """Checks rows before training.

    Attributes:
        tasks: the tasks in the order of their task ids.
        min_audio_samples: shortest audio that the speech encoder accepts, in samples at 16 kHz.
        media: none (files have to exist), header, or full (files are decoded as in training).
        max_audio_seconds: longest audio that the processor accepts.
        room: counts the tokens of images; `None`: no limit.
        on_bad_row: error, or skip.
    """

    tasks: Mapping[str, Task]
    min_audio_samples: int = 1
    media: str = HEADER
    max_audio_seconds: float = math.inf
    room: TokenRoom | None = None
    on_bad_row: str = ERROR
    task_ids: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choice = (
            {True: HEADER, False: NONE}.get(self.media, self.media) if isinstance(self.media, bool) else self.media
        )
        object.__setattr__(self, "media", choice)
        for name, choices in (("media", (NONE, HEADER, FULL)), ("on_bad_row", (ERROR, SKIP))):
            if getattr(self, name) not in choices:
                option = "check_media" if name == "media" else name
                raise ValueError(f"`{option}` is {getattr(self, name)!r}; write one of {', '.join(choices)}.")
        object.__setattr__(self, "task_ids", {name: number for number, name in enumerate(self.tasks)})

    def check(self, row: Row, place: Place, source: SourceConfig, root: str) -> None:
        """Checks a row and its media.

        Raises:
            RowError: the first fault found.
        """
        check_row(row, self.tasks, place, source.image_placeholder)
        check_media(row, place, self, source, root)

    def refuse(self, error: RowError) -> None:
        """Raises the error of a row, unless such rows are skipped."""
        if self.on_bad_row == ERROR:
            raise error

    def key(self) -> tuple[Any, ...]:
        """Returns what the result of a check depends on."""
        return dict(self.tasks), self.min_audio_samples, self.media, self.max_audio_seconds, self.room


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
    _check_text("a", row.a, place)
    _check_text("b", row.b, place)
    sides = {side: row.side(side) for side in SIDE_NEEDS}
    if not any(content.modalities for content in sides.values()):
        raise place.error("a", row.a, "side a and side b are both empty; fill them in or drop the row.")
    for side, content in sides.items():
        _check_side(content, side, task, place)
        _check_placeholders(side, content, place, image_placeholder)
    for negative in row.negatives:
        if not negative.modalities or negative.equals(sides["b"]):
            shown = [each.shown() for each in row.negatives]
            raise place.error("negatives", shown, "a negative is empty or equals side b; drop it.")
        if task.text_only_b and negative.modalities != ("text",):
            problem = f"{row.task} has text_only_b, so its negatives are texts; write texts or drop text_only_b."
            raise place.error("negatives", negative.shown(), problem)
        _check_text("negatives", negative.text, place)
        _check_placeholders("negatives", negative, place, image_placeholder)


def _check_text(column: str, text: str, place: Place) -> None:
    """Checks a text as the processor does: its length, and runs of combining marks."""
    if len(text) > LIMITS.combining_marks:  # shorter texts are within all limits
        try:
            clean_text(text)
        except ValueError as error:
            raise place.error(column, text, str(error)) from error


def _check_side(content: Content, side: str, task: Task, place: Place) -> None:
    """Checks that a side holds what its task needs, nothing that it excludes, and anything at all."""
    needs, only = (
        (task.needs_image, task.needs_audio) if side == "a" else (task.needs_image_b, task.needs_audio_b),
        task.text_only_a if side == "a" else task.text_only_b,
    )
    values = content.images, content.audio
    for column, value, need, what in zip(SIDE_NEEDS[side], values, needs, MEDIA_WORDS, strict=True):
        if need and not value:
            problem = f"{task.name} needs {what[0]} on side {side}; name {what[1]} or change the task."
            raise place.error(column, value, problem)
        if only and value:
            shown = [show_media(image) for image in value] if isinstance(value, list) else show_media(value)
            raise place.error(
                column,
                shown,
                f"side {side} of {task.name} is text only (text_only_{side}); leave the column out, move it to the "
                "other side or change the task.",
            )
    if not content.modalities:
        problem = f"side {side} has no text, image or audio; fill it in or drop the row."
        raise place.error(side, content.text, problem)


def _check_placeholders(column: str, content: Content, place: Place, image_placeholder: str) -> None:
    images = len(content.images)
    if images and (markers := content.text.count(image_placeholder)) not in (0, images):
        raise place.error(
            column,
            content.text,
            f"{markers} placeholders {image_placeholder} for {images} images; write one for each image, or none to "
            "have the images first.",
        )


def check_media(row: Row, place: Place, checker: "Checker", source: SourceConfig, root: str) -> None:
    """Checks that media files exist inside `root` and, unless `checker.media` is none, that they can be read.

    Raises:
        RowError: the first fault found.
    """
    for images, audio, content in media_contents(row):
        for column, file in [*((images, image) for image in content.images), (audio, content.audio)]:
            if isinstance(file, str):
                if is_url(file):
                    _check_url(column, file, place, source)
                else:
                    _check_path(column, file, place, "" if source.outside_media_root else root)
        if any(isinstance(file, str) and is_url(file) for file in (*content.images, content.audio)):
            continue  # fetched when the row is read
        if checker.media != NONE:
            sizes = [_check_image(images, image, place, checker.media == FULL) for image in content.images]
            _check_room(images, content, sizes, place, checker.room)
        if content.audio is not None and (checker.media != NONE or isinstance(content.audio, dict)):
            longest = checker.max_audio_seconds
            _check_audio_length(audio, content.audio, place, max(1, checker.min_audio_samples), longest)
            if checker.media == FULL:
                _check_audio(audio, content.audio, place)


def _check_url(column: str, url: str, place: Place, source: SourceConfig) -> None:
    if not source.allow_urls:
        problem = "URLs are not fetched; download the file and name its path, or set `allow_urls: true`."
        raise place.error(column, show_url(url), problem, f"URL in {column}")


def _check_path(column: str, path: str, place: Place, root: str) -> None:
    """Checks that a file exists and, unless `root` is empty, that it lies inside of it."""
    if _is_plain_file_inside(path, root):
        return
    if not os.path.isfile(path):
        kind = "is a folder; name a file" if os.path.isdir(path) else "no such file; correct the path or `media_root`"
        raise place.error(column, path, f"{kind}.", f"missing {column}")
    if root and not _is_inside(os.path.realpath(path), _real(root)):
        problem = (
            f"it leads out of `media_root` ({root}) by '..', an absolute path or a symbolic link; set `media_root` to "
            "a folder around all media, or `outside_media_root: true`."
        )
        raise place.error(column, path, problem, f"{column} outside media_root")


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_plain_file_inside(path: str, root: str) -> bool:
    """Returns whether a path is a regular file in a folder of `root`: one look at the disk where that is so."""
    folder, name = os.path.split(path)
    try:
        plain = name not in ("", "..") and stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False
    return plain and (not root or _is_inside(os.path.join(_real(folder), name), _real(root)))


@lru_cache(maxsize=2**16)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _check_image(column: str, source: str | bytes, place: Place, decode: bool) -> tuple[int, int]:
    """Checks an image by its header, or decodes it; returns its (height, width)."""
    try:
        if decode:
            return loaded_size(load_image(source))
        width, height = image_size(source)
        return height, width
    except ValueError as error:
        raise place.error(column, show_media(source), f"{error} Repair or drop it.", f"unreadable {column}") from error


def _check_room(
    column: str, content: Content, sizes: list[tuple[int, int]], place: Place, room: "TokenRoom | None"
) -> None:
    """Checks that the images of an input leave room for its prefix and for text, as the processor requires it."""
    if not sizes or room is None:
        return
    tokens = room.tokens(sizes)
    if tokens + bool(content.text) > room.limit:
        raise place.error(
            column,
            [show_media(image) for image in content.images],
            f"the {len(sizes)} images, prefix and end take {tokens} tokens at `min_pixels`; the limit `max_length` is "
            f"{room.limit}. Take fewer images, lower `min_pixels` or raise `max_length`.",
            f"too many tokens in {column}",
        )


def _check_audio(column: str, audio: str | bytes | dict[str, Any], place: Place) -> None:
    try:
        load_audio(audio)
    except ValueError as error:
        raise place.error(column, show_media(audio), f"{error} Repair or drop it.", f"unreadable {column}") from error


def _check_score(row: Row, task: Task, place: Place) -> None:
    if row.score is not None and math.isnan(row.score) and not task.needs_score:
        row.score = None  # a column of several tasks has gaps
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
            f"too short {column}",
        )
    if frames > longest * rate:
        raise place.error(
            column,
            show_media(audio),
            f"the audio has {frames / rate:.1f} s; the limit is {longest:g} s. Split it, raise `max_audio_windows` or "
            "drop the row.",
            f"too long {column}",
        )


def _audio_header(column: str, source: str | bytes | dict[str, Any], place: Place) -> tuple[int, int]:
    """Returns the number of samples of a channel and the sampling rate in Hz."""
    if isinstance(source, dict):
        return len(source["array"]), source["sampling_rate"]
    try:
        return audio_length(source)
    except ValueError as error:
        raise place.error(column, show_media(source), f"{error} Repair or drop it.", f"unreadable {column}") from error
