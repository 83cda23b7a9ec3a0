"""Loads pairs from JSONL, CSV, Parquet, Arrow and Hub datasets, and checks them before training."""

import bisect
import hashlib
import math
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .readers import CODE, RowReader, SourceConfig, read_source
from .schema import (
    MODALITIES,
    Content,
    Place,
    Row,
    Task,
    canonical_task,
    check_media,
    check_row,
    media_contents,
    show_media,
)
from .vector_cache import VectorCache

AUDIO_BITS = 0b1_100_100  # in the modalities of a row, see `Piece`


@dataclass(frozen=True)
class RowChecker:
    """Checks a batch of records; `Dataset.map` caches the result under a hash of these fields."""

    reader: RowReader
    tasks: dict[str, Task]
    min_audio_samples: int
    check_media: bool
    max_audio_seconds: float = math.inf
    code: str = CODE

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, list[int]]:
        """Returns the task ids and the modalities of the rows, see `Piece`.

        Raises:
            RowError: a row is unusable.
        """
        task_ids = list(self.tasks)
        checked, modalities = [], []
        for index, record in zip(indices, table.to_pylist(), strict=True):
            row, place = self.reader.read(record, index)
            check_row(row, self.tasks, place, self.reader.source.image_placeholder)
            check_media(row, place, self.min_audio_samples, self.check_media, self.max_audio_seconds)
            checked.append(task_ids.index(row.task))
            modalities.append(_modality_bits(row))
        return {"task": checked, "modalities": modalities}


@dataclass
class Piece:
    """The checked rows of one file."""

    table: datasets.Dataset  # in arrow format, which does not decode media
    reader: RowReader
    task_ids: np.ndarray  # (rows,) int16, to save memory with millions of rows
    modalities: np.ndarray  # (rows,) int8: bits 0 to 2 `MODALITIES` of side a, 3 to 5 of b, 6 audio in a negative
    records: np.ndarray | None = None  # (rows,) int64, numbers in the file if rows were left out

    def only(self, kept: np.ndarray) -> "Piece":
        """Returns the piece of the rows with the given numbers."""
        return Piece(self.table.select(kept), self.reader, self.task_ids[kept], self.modalities[kept], kept)


class PairDataset(torch.utils.data.Dataset):
    """Concatenates the rows of all sources.

    Args:
        sources: the recipe's entries.
        pieces: the checked files of each source.
        tasks: the tasks in the order of their task ids.
    """

    def __init__(self, sources: list[SourceConfig], pieces: list[list[Piece]], tasks: Mapping[str, Task]) -> None:
        self.sources = sources
        self.tasks = dict(tasks)
        self.pieces = [piece for of_source in pieces for piece in of_source]
        self.piece_sources = [index for index, of_source in enumerate(pieces) for _ in of_source]
        self.source_lengths = [sum(len(piece.table) for piece in of_source) for of_source in pieces]
        self.source_weights = [float(source.weight) for source in sources]
        self.ends = np.cumsum([len(piece.table) for piece in self.pieces]).tolist()
        self.task_ids = np.concatenate([piece.task_ids for piece in self.pieces])  # (rows,) int16
        self.modalities = np.concatenate([piece.modalities for piece in self.pieces])  # (rows,) int8, see `Piece`
        self.teacher: VectorCache | None = None  # vectors of the text-only sides of `taught_tasks`, for distillation
        self.taught_tasks: Collection[str] = ()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one pair with decoded media.

        Returns:
            `id`, `task`, `a`, `b` (texts), `images_a`, `images_b` (lists of RGB PIL images), `audio_a`, `audio_b`
            (`{"array": (samples,) float32 mono in [-1, 1], "sampling_rate"}` or `None`), `a_key`, `b_key`
            (`content_key` of each side), `negatives` (list of `{"text", "images", "audio", "key"}`),
            `teacher_a`, `teacher_b` ((W,) float32 or `None`),
            `image_placeholder`, `score` (or `None`), `group` (or `None`), `source` (index of the recipe's entry).

        Raises:
            RowError: an image or audio file cannot be decoded.
        """
        number, row, place = self._read(index)
        a, b = (_decoded(row.side(side), f"images_{side}", f"audio_{side}", place) for side in ("a", "b"))
        return {
            "id": row.id,
            "task": row.task,
            "a": row.a,
            "b": row.b,
            "images_a": a["images"],
            "images_b": b["images"],
            "audio_a": a["audio"],
            "audio_b": b["audio"],
            "a_key": a["key"],
            "b_key": b["key"],
            "negatives": [_decoded(each, "negatives", "negatives", place) for each in row.negatives],
            "image_placeholder": self.sources[self.piece_sources[number]].image_placeholder,
            "score": row.score,
            "group": row.group,
            "teacher_a": self._teacher_vector(row, "a", row.teacher_a),
            "teacher_b": self._teacher_vector(row, "b", row.teacher_b),
            "source": self.piece_sources[number],
        }

    def task_counts(self, first: int = 0, last: int | None = None) -> dict[str, int]:
        """Counts the rows of each task that occurs in the rows [first, last)."""
        task_ids = self.task_ids[first:last]
        counts = {name: int(np.count_nonzero(task_ids == number)) for number, name in enumerate(self.tasks)}
        return {name: count for name, count in counts.items() if count}

    def modality_counts(self, first: int = 0, last: int | None = None) -> dict[str, int]:
        """Counts the rows [first, last) by the modalities of both sides, such as `image + text – text`."""
        values, counts = np.unique(self.modalities[first:last] & 63, return_counts=True)
        return {
            f"{modality_name(value & 7)} – {modality_name(value >> 3)}": count
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        }

    def refuse_audio(self) -> None:
        """Raises RowError for the first row with audio: a model without a speech encoder cannot embed it."""
        found = np.flatnonzero(self.modalities & AUDIO_BITS)
        if len(found):
            _, row, place = self._read(int(found[0]))
            column, content = next(
                (column, content) for _, column, content in media_contents(row) if content.audio is not None
            )
            raise place.error(
                column,
                show_media(content.audio),
                "the model has no speech encoder. Leave the rows with audio out, or build a model with `audio`.",
            )

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the texts of both sides of every row, empty where a side has none, without decoding media."""
        for index in range(len(self)):
            _, row, _ = self._read(index)
            yield row.a, row.b

    def groups(self) -> list[str | None]:
        """Returns the `group` of every row, without decoding media."""
        groups: list[str | None] = []
        for piece in self.pieces:
            column = piece.reader.columns.get("group")
            values = [None] * len(piece.table)
            if column is not None:
                values = piece.table.select_columns(column)[:][column].to_pylist()
            groups.extend(None if value is None else str(value) for value in values)
        return groups

    def row(self, index: int) -> Row:
        """Returns row `index` without opening media."""
        return self._read(index)[1]

    def place(self, index: int) -> Place:
        """Returns the origin of row `index`, for error messages."""
        return self._read(index)[2]

    def _teacher_vector(self, row: Row, side: str, given: np.ndarray | None) -> np.ndarray | None:
        """Returns the teacher's vector of a side, (W,) float32: that of its column, or the computed one."""
        if given is not None or self.teacher is None or row.task not in self.taught_tasks:
            return given
        text = row.only_text(side)
        return None if text is None else self.teacher.find(content_key(text))

    def _read(self, index: int) -> tuple[int, Row, Place]:
        """Returns the number of the piece of row `index`, the row and its origin."""
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)}.")
        number = bisect.bisect_right(self.ends, index)
        piece = self.pieces[number]
        local = int(index) - (self.ends[number] - len(piece.table))
        record = local if piece.records is None else int(piece.records[local])
        row, place = piece.reader.read(piece.table[local].to_pylist()[0], record)
        return number, row, place


def load_pairs(
    configs: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Task],
    min_audio_samples: int,
    check_media: bool = True,
    without_tasks: Collection[str] = (),
    max_audio_seconds: float = math.inf,
) -> PairDataset:
    """Loads a recipe's `train_data` or `eval_data` and checks every row.

    `datasets` caches converted files and results of checks, so a second run with the same files and settings starts at
    once. The cache does not cover media: an image that is deleted later raises an error when it is read.

    Args:
        configs: the recipe's entries, see `SourceConfig`.
        tasks: the tasks in the order of their task ids, from `declare_data_types`.
        min_audio_samples: shortest audio that the speech encoder accepts, in samples at 16 kHz.
        check_media: whether to read the header of every image and audio file.
        without_tasks: tasks whose rows are checked, then left out.
        max_audio_seconds: longest audio that the processor accepts, with `check_media`.

    Raises:
        RowError: a row is unusable.
        ValueError: a setting, file or column is wrong, or no row is left.
    """
    if not configs:
        raise ValueError("No data source; list at least one, such as `train_data: [{path: pairs.jsonl}]`.")
    sources = [SourceConfig.from_dict(config) for config in configs]
    pieces = []
    for source in sources:
        _check_tasks(source, tasks)
        pieces.append([])
        for table, reader in read_source(source, tasks):
            checker = RowChecker(reader, dict(tasks), min_audio_samples, check_media, max_audio_seconds)
            pieces[-1].append(Piece(table, reader, *_check_rows(table, checker)))
    if without_tasks:
        sources, pieces = _leave_out(without_tasks, sources, pieces, tasks)
    return PairDataset(sources, pieces, tasks)


def _leave_out(
    left_out: Collection[str],
    sources: list[SourceConfig],
    pieces: list[list[Piece]],
    tasks: Mapping[str, Task],
) -> tuple[list[SourceConfig], list[list[Piece]]]:
    """Drops the rows of some tasks, and sources and pieces that are empty afterwards."""
    names = list(tasks)
    for task in left_out:
        if task not in names:
            raise ValueError(f"without_tasks: unknown task {task!r}; known: {', '.join(names)}.")
    numbers = [names.index(task) for task in left_out]
    kept = [
        [piece.only(rows) for piece in of_source if len(rows := np.flatnonzero(~np.isin(piece.task_ids, numbers)))]
        for of_source in pieces
    ]
    if not any(kept):
        raise ValueError(f"without_tasks: no row is left without {', '.join(left_out)}; leave fewer out.")
    left = [number for number, of_source in enumerate(kept) if of_source]
    return [sources[number] for number in left], [kept[number] for number in left]


def content_key(text: str, media: Sequence[bytes] = ()) -> int:
    """Returns a hash in [−2⁶³, 2⁶³) of a side: equal for equal text (NFC) and equal bytes of media."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (unicodedata.normalize("NFC", text).encode(), *media):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return int.from_bytes(digest.digest(), signed=True)


def _check_tasks(source: SourceConfig, tasks: Mapping[str, Task]) -> None:
    for name in [*source.map.values()] if source.task is None else [source.task]:
        if canonical_task(name) not in tasks:
            raise ValueError(
                f"{source.path}: unknown task {name!r}; known: {', '.join(tasks)}. "
                "Correct it, or declare it in `tasks`."
            )


def _check_rows(table: datasets.Dataset, checker: RowChecker) -> tuple[np.ndarray, np.ndarray]:
    """Checks every row; returns the task ids, (rows,) int16, and the modalities, (rows,) int8, see `Piece`."""
    checked = table.map(
        checker,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=table.column_names,
        features=datasets.Features({"task": datasets.Value("int16"), "modalities": datasets.Value("int8")}),
        desc=f"Checking {checker.reader.file}",
    )
    columns = checked.with_format("arrow")[:]  # the numpy format would widen them to int64
    return columns["task"].to_numpy(), columns["modalities"].to_numpy()


def modality_name(bits: int) -> str:
    """Returns the modalities of a side as one name, from its three bits, see `Piece`: image before text, as shown."""
    return " + ".join(name for name in ("image", "audio", "text") if bits >> MODALITIES.index(name) & 1)


def _modality_bits(row: Row) -> int:
    """Returns the modalities of a row, see `Piece`."""
    sides = [sum(1 << MODALITIES.index(name) for name in row.side(side).modalities) for side in ("a", "b")]
    return sides[0] + 8 * sides[1] + 64 * any(negative.audio is not None for negative in row.negatives)


def _decoded(content: Content, images_column: str, audio_column: str, place: Place) -> dict[str, Any]:
    """Returns `text`, `images` and `audio` of a side with decoded media, and its `key`."""
    images = [_read_file(image, images_column, place) for image in content.images]
    is_path = isinstance(content.audio, str)
    audio = _read_file(content.audio, audio_column, place) if is_path else content.audio
    return {
        "text": content.text,
        "images": [
            _decode(load_image, image, images_column, source, place)
            for image, source in zip(images, content.images, strict=True)
        ],
        "audio": None if audio is None else _decode(_load_audio, audio, audio_column, content.audio, place),
        "key": content_key(content.text, [*images, *_audio_bytes(audio)]),
    }


def _read_file(source: str | bytes, column: str, place: Place) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise place.error(column, source, f"it cannot be read: {error}. Restore it or drop the row.") from error


def _decode(decoder: Callable[[Any], Any], content: Any, column: str, source: Any, place: Place) -> Any:
    try:
        return decoder(content)
    except ValueError as error:
        raise place.error(column, show_media(source), f"{error} Repair it or drop the row.") from error


def _load_audio(content: bytes | dict[str, Any]) -> dict[str, Any]:
    samples, rate = load_audio(content)
    return {"array": samples, "sampling_rate": rate}


def _audio_bytes(audio: bytes | dict[str, Any] | None) -> list[bytes]:
    if isinstance(audio, dict):
        return [audio["array"].tobytes(), str(audio["sampling_rate"]).encode()]
    return [] if audio is None else [audio]
