"""Loads pairs from JSONL, CSV, Parquet, Arrow and Hub datasets, and checks them before training."""

import bisect
import hashlib
import math
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .checks import ERROR, Checker, TokenRoom
from .files import cache_folder
from .media_paths import read_media
from .pieces import Piece
from .readers import SourceConfig, bad_rows, good_rows, read_source, store_files
from .resident import release_mapped
from .row_keys import hash_parts
from .sampler import EpochRows
from .schema import (
    MODALITIES,
    Content,
    Place,
    Row,
    RowError,
    Task,
    canonical_task,
    media_contents,
    show_media,
)
from .vector_cache import VectorCache

AUDIO_BITS = 0b1_100_100  # in the modalities of a row, see `Piece`
OTHERS = 32  # rows that are tried in place of one that cannot be read
CHUNK = 1024  # rows that are read together where all are
LARGE = 2**21  # rows, of about 400 bytes each, from which on the pages of the index that were read are given back
RELEASED = 1024  # rows after which they are
SHOWN = 20  # bad rows that an error lists


@dataclass(frozen=True)
class BadRow:
    """A row that was left out or replaced.

    Attributes:
        file: file of the row.
        row: its number in the file.
        id: its id, `None` without one.
        cause: name of the fault, the same for all rows with it.
        problem: value, limit and remedy.
    """

    file: str
    row: int
    id: str | None
    cause: str
    problem: str


class PairDataset(torch.utils.data.Dataset):
    """Concatenates the rows of all sources.

    Args:
        sources: the recipe's entries.
        pieces: the checked files of each source.
        tasks: the tasks in the order of their task ids.
        bad_rows: rows that the check left out.
        on_bad_row: error, or skip: a row that cannot be read any more is replaced by another one of its source.
    """

    def __init__(
        self,
        sources: list[SourceConfig],
        pieces: list[list[Piece]],
        tasks: Mapping[str, Task],
        bad_rows: Sequence[BadRow] = (),
        on_bad_row: str = ERROR,
    ) -> None:
        self.bad_rows = list(bad_rows)
        self.on_bad_row = on_bad_row
        self.sources = sources
        self.tasks = dict(tasks)
        self.pieces = [piece for of_source in pieces for piece in of_source]
        self.piece_sources = [index for index, of_source in enumerate(pieces) for _ in of_source]
        self.source_lengths = [sum(map(len, of_source)) for of_source in pieces]
        self.source_weights = [float(source.weight) for source in sources]
        self.source_caps = [source.max_visits for source in sources]
        self.ends = np.cumsum([len(piece) for piece in self.pieces]).tolist()
        self.task_ids = np.concatenate([piece.task_ids for piece in self.pieces])  # (rows,) int16
        self.modalities = np.concatenate([piece.modalities for piece in self.pieces])  # (rows,) int8, see `Piece`
        self.teacher: VectorCache | None = None  # vectors of the text-only sides of `taught_tasks`, for distillation
        self.taught_tasks: Collection[str] = ()
        self._rows_read = 0  # since pages were given back

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one pair with decoded media.

        Returns:
            `id`, `task`, `a`, `b` (texts), `images_a`, `images_b` (lists of RGB PIL images), `audio_a`, `audio_b`
            (`{"array": (samples,) float32 mono in [-1, 1], "sampling_rate"}` or `None`), `a_key`, `b_key`
            (`content_key` of each side), `negatives` (list of `{"text", "images", "audio", "key"}`),
            `teacher_a`, `teacher_b` ((W,) float32 or `None`),
            `image_placeholder`, `score` (or `None`), `group` (or `None`), `source` (index of the recipe's entry),
            `replaces` (the `BadRow` in whose place it stands, or `None`).

        Raises:
            RowError: an image or audio file cannot be decoded, and such rows are not skipped.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several pairs, as `__getitem__`, those of an `EpochRows` with its `epoch`.

        The records of one file are read together. Of lists that are `random`, the epoch and the seed draw an entry.
        """
        drawn = indices if isinstance(indices, EpochRows) else EpochRows(indices)
        epoch = {"epoch": indices.epoch} if isinstance(indices, EpochRows) else {}
        read = zip(indices, self._read(drawn), strict=True)
        return [{**self._pair(index, row, drawn), **epoch} for index, row in read]

    def _pair(self, index: int, read: tuple[int, Row, Place], drawn: EpochRows) -> dict[str, Any]:
        """Returns a row that was read with decoded media, or another one in its place."""
        try:
            return self._decoded(*read)
        except RowError as error:
            if self.on_bad_row == ERROR:
                raise
            return self._another(index, error, drawn)

    def _another(self, index: int, error: RowError, drawn: EpochRows) -> dict[str, Any]:
        """Returns a row in place of one that cannot be read: which one depends on `index` alone."""
        ends = np.cumsum(self.source_lengths)
        source = int(np.searchsorted(ends, index, side="right"))
        length = self.source_lengths[source]
        others = np.random.default_rng(index).permutation(length) if length <= OTHERS else None
        tried = others if others is not None else np.random.default_rng(index).integers(length, size=OTHERS)
        place = self.place(index)
        for other in (int(ends[source]) - length + tried).tolist():
            if other != index and self.task_ids[other] == self.task_ids[index]:
                try:
                    row = self._decoded(*self._read(EpochRows([other], drawn.epoch, drawn.seed))[0])
                except RowError:
                    continue  # it is counted in its turn
                return {**row, "replaces": BadRow(place.file, place.row, place.id, error.cause, str(error))}
        raise error

    def _decoded(self, number: int, row: Row, place: Place) -> dict[str, Any]:
        """Returns a row of piece `number` with decoded media."""
        source = self.piece_sources[number]
        vectors = {f"teacher_{side}": self._teacher_vector(row, side) for side in ("a", "b")}
        return {**decoded_row(row, place, self.sources[source], source), **vectors}

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
            ((_, row, place),) = self._read([int(found[0])])
            refuse_audio(row, place)

    def fingerprints(self) -> list[str]:
        """Returns a hash of the content of each source, in the order of its rows; media count by their paths."""
        digests = [hashlib.blake2b(digest_size=16) for _ in self.sources]
        for number, piece in zip(self.piece_sources, self.pieces, strict=True):
            digests[number].update(piece.unfolded().column("row_key").tobytes())
        return [digest.hexdigest() for digest in digests]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the texts of both sides of every row, empty where a side has none, without decoding media."""
        for rows in self.unfolded().chunks():
            yield from ((row.a, row.b) for row in rows)

    def chunks(self) -> Iterator[list[Row]]:
        """Yields all rows in their order, up to `CHUNK` together, without opening media."""
        for _, rows in self.chunks_of_sources():
            yield rows

    def chunks_of_sources(self) -> Iterator[tuple[SourceConfig, list[Row]]]:
        """Yields all rows as `chunks`, those of one file together, with their source."""
        for piece, end in zip(self.pieces, self.ends, strict=True):
            for first in range(end - len(piece), end, CHUNK):
                yield piece.reader.source, [row for _, row, _ in self._read(range(first, min(first + CHUNK, end)))]

    def unfolded(self) -> "PairDataset":
        """Returns the pairs with a row for each entry of the lists that are `random`."""
        if all(piece.choices is None for piece in self.pieces):
            return self
        pieces: list[list[Piece]] = [[] for _ in self.sources]
        for number, piece in zip(self.piece_sources, self.pieces, strict=True):
            pieces[number].append(piece.unfolded())
        return PairDataset(self.sources, pieces, self.tasks, self.bad_rows, self.on_bad_row)

    def groups(self) -> list[str | None]:
        """Returns the `group` of every row, without decoding media."""
        groups: list[str | None] = []
        for piece in self.pieces:
            groups.extend(piece.values("group").to_pylist())
        return groups

    def row(self, index: int) -> Row:
        """Returns row `index` without opening media."""
        return self._read([index])[0][1]

    def place(self, index: int) -> Place:
        """Returns the origin of row `index`, for error messages."""
        return self._read([index])[0][2]

    def _teacher_vector(self, row: Row, side: str) -> np.ndarray | None:
        """Returns the teacher's vector of a side, (W,) float32: that of its column, or the computed one."""
        given = row.teacher_a if side == "a" else row.teacher_b
        if given is not None or self.teacher is None or row.task not in self.taught_tasks:
            return given
        text = row.only_text(side)
        return None if text is None else self.teacher.find(content_key(text))

    def _read(self, indices: Sequence[int]) -> list[tuple[int, Row, Place]]:
        """Returns the number of the piece of each row, the row and its origin."""
        drawn = indices if isinstance(indices, EpochRows) else EpochRows()
        places: dict[int, list[int]] = defaultdict(list)  # piece -> places in `indices`
        for place, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"Row {index} of {len(self)}.")
            places[bisect.bisect_right(self.ends, index)].append(place)
        found: dict[int, tuple[int, Row, Place]] = {}
        for number, of_piece in places.items():
            piece = self.pieces[number]
            first = self.ends[number] - len(piece)
            chosen = [int(indices[place]) for place in of_piece]
            records = piece.read([index - first for index in chosen], chosen, drawn)
            for place, record in zip(of_piece, records, strict=True):
                found[place] = (number, *piece.reader.read(record))
        self._rows_read += len(indices)
        if self._rows_read >= RELEASED and len(self) >= LARGE:
            self._rows_read = 0
            release_mapped(os.path.realpath(cache_folder()))
        return [found[place] for place in range(len(indices))]


def load_pairs(
    configs: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Task],
    min_audio_samples: int,
    check_media: bool | str = True,
    without_tasks: Collection[str] = (),
    max_audio_seconds: float = math.inf,
    room: TokenRoom | None = None,
    on_bad_row: str = ERROR,
    max_bad_rows: float = 0.01,
    workers: int | None = None,
) -> PairDataset:
    """Loads a recipe's `train_data` or `eval_data` and checks every row.

    Converted files and results of checks are cached under the content of the files and the settings, so a second run
    starts at once. The cache does not cover media: an image that is deleted later raises an error when it is read.

    Args:
        configs: the recipe's entries, see `SourceConfig`.
        tasks: the tasks in the order of their task ids, from `declare_tasks`.
        min_audio_samples: shortest audio that the speech encoder accepts, in samples at 16 kHz.
        check_media: header (or true): read the header of every image and audio file; full: decode it; none (or false).
        without_tasks: tasks whose rows are checked, then left out.
        max_audio_seconds: longest audio that the processor accepts, with `check_media`.
        room: counts the tokens of images against the limit of an input, with `check_media`.
        on_bad_row: error, or skip: unusable rows are left out and listed in `bad_rows`.
        max_bad_rows: largest share of rows to skip.
        workers: processes that check large files (default: one a core, shared by the ranks of this machine).

    Raises:
        RowError: a row is unusable.
        ValueError: a setting, file or column is wrong, too many rows are unusable, or no row is left.
    """
    check_bad_rows([], 0, max_bad_rows)
    checker = Checker(dict(tasks), min_audio_samples, check_media, max_audio_seconds, room, on_bad_row)
    sources = enabled_sources(configs)
    pieces: list[list[Piece]] = []
    bad: list[BadRow] = []
    for source in sources:
        source.refuse_streaming()
        check_task_names(source, tasks)
    store_files(sources, checker, _cores() if workers is None else workers)
    for source in sources:
        pieces.append([])
        for table, reader in read_source(source, checker):
            good = good_rows(table)
            if len(good) < len(table):
                bad += [
                    BadRow(reader.file, each["line"], each["id"], each["cause"], each["problem"])
                    for each in bad_rows(table)
                ]
                if on_bad_row == ERROR:  # another run skipped it and left the rows in the cache
                    raise RowError(bad[-1].problem, bad[-1].cause, bad[-1].id, bad[-1].row)
            if len(good):
                pieces[-1].append(Piece.of(table, good, reader))
            release_mapped(os.path.realpath(cache_folder()))  # which were looked through for bad rows and tasks
    check_bad_rows(bad, len(bad) + sum(len(piece) for of_source in pieces for piece in of_source), max_bad_rows)
    sources, pieces = _without_empty(sources, pieces)
    if without_tasks:
        sources, pieces = _leave_out(without_tasks, sources, pieces, tasks)
    return PairDataset(sources, pieces, tasks, bad, on_bad_row)


def enabled_sources(configs: Sequence[Mapping[str, Any]]) -> list[SourceConfig]:
    """Returns the entries of a recipe's data that are enabled; none is a ValueError."""
    if not configs:
        raise ValueError("No data source; list at least one, such as `train_data: [{path: pairs.jsonl}]`.")
    sources = [source for source in map(SourceConfig.from_dict, configs) if source.enabled]
    if not sources:
        raise ValueError("Every data source has `enabled: false`; enable at least one.")
    return sources


def _cores() -> int:
    """Returns the cores of this process, shared by the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def check_bad_rows(bad: Sequence[BadRow], rows: int, max_bad_rows: float) -> None:
    """Checks the share of unusable rows.

    Raises:
        ValueError: it is above `max_bad_rows`; the message counts them by cause and lists the first.
    """
    if not 0 <= max_bad_rows <= 1:
        raise ValueError(f"`max_bad_rows` is {max_bad_rows!r}; it is a share of the rows in [0, 1].")
    if len(bad) > max_bad_rows * rows:
        causes = ", ".join(f"{count} {cause}" for cause, count in Counter(row.cause for row in bad).most_common())
        listed = "\n".join(f"  {row.problem}" for row in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {rows} rows cannot be used ({causes}); the limit `max_bad_rows` is {max_bad_rows:g}. "
            f"Repair them or raise the limit:\n{listed}{more}"
        )


def _without_empty(
    sources: list[SourceConfig], pieces: list[list[Piece]]
) -> tuple[list[SourceConfig], list[list[Piece]]]:
    """Drops sources without rows."""
    left = [number for number, of_source in enumerate(pieces) if of_source]
    if not left:
        raise ValueError("No row of the data can be used; repair the rows that `max_bad_rows` let pass.")
    return [sources[number] for number in left], [pieces[number] for number in left]


def _leave_out(
    left_out: Collection[str],
    sources: list[SourceConfig],
    pieces: list[list[Piece]],
    tasks: Mapping[str, Task],
) -> tuple[list[SourceConfig], list[list[Piece]]]:
    """Drops the rows of some tasks, and sources and pieces that are empty afterwards."""
    names = list(tasks)
    for task in left_out:
        check_left_out(task, tasks)
    numbers = [names.index(task) for task in left_out]
    kept = [
        [piece.only(rows) for piece in of_source if len(rows := np.flatnonzero(~np.isin(piece.task_ids, numbers)))]
        for of_source in pieces
    ]
    if not any(kept):
        raise ValueError(f"without_tasks: no row is left without {', '.join(left_out)}; leave fewer out.")
    return _without_empty(sources, kept)


def check_left_out(task: str, tasks: Mapping[str, Task]) -> None:
    """Raises ValueError for an unknown task in `without_tasks`."""
    if task not in tasks:
        raise ValueError(f"without_tasks: unknown task {task!r}; known: {', '.join(tasks)}.")


def content_key(text: str, media: Sequence[bytes] = ()) -> int:
    """Returns a hash in [−2⁶³, 2⁶³) of a side: equal for equal text (NFC) and equal bytes of media."""
    return hash_parts([unicodedata.normalize("NFC", text).encode(), *media])


def check_task_names(source: SourceConfig, tasks: Mapping[str, Task]) -> None:
    """Raises ValueError if a source names a task that is not declared."""
    for name in [*source.map.values()] if source.task is None else [source.task]:
        if canonical_task(name) not in tasks:
            raise ValueError(
                f"{source.path}: unknown task {name!r}; known: {', '.join(tasks)}. "
                "Correct it, or declare it in `tasks`."
            )


def modality_name(bits: int) -> str:
    """Returns the modalities of a side as one name, from its three bits, see `Piece`: image before text, as shown."""
    return " + ".join(name for name in ("image", "audio", "text") if bits >> MODALITIES.index(name) & 1)


def refuse_audio(row: Row, place: Place) -> None:
    """Raises RowError for a row with audio: a model without a speech encoder cannot embed it."""
    for _, column, content in media_contents(row):
        if content.audio is not None:
            raise place.error(
                column,
                show_media(content.audio),
                "the model has no speech encoder. Leave the rows with audio out, or build a model with `audio`.",
            )


def decoded_row(row: Row, place: Place, source: SourceConfig, number: int) -> dict[str, Any]:
    """Returns a pair with decoded media, as `PairDataset.__getitem__`; `number` is that of its source.

    Raises:
        RowError: an image or audio file cannot be decoded.
    """
    a, b = (_decode_side(row.side(side), f"images_{side}", f"audio_{side}", place) for side in ("a", "b"))
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
        "negatives": [_decode_side(each, "negatives", "negatives", place) for each in row.negatives],
        "image_placeholder": source.image_placeholder,
        "score": row.score,
        "group": row.group,
        "teacher_a": row.teacher_a,
        "teacher_b": row.teacher_b,
        "source": number,
        "replaces": None,
    }


def _decode_side(content: Content, images_column: str, audio_column: str, place: Place) -> dict[str, Any]:
    """Returns `text`, `images` and `audio` of a side with decoded media, and its `key`."""
    if not content.images and content.audio is None:
        return {"text": content.text, "images": [], "audio": None, "key": content_key(content.text)}
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
        return read_media(source)
    except (OSError, ValueError) as error:
        problem = f"it cannot be read: {error}. Restore it or drop the row."
        raise place.error(column, show_media(source), problem, f"missing {column}") from error


def _decode(decoder: Callable[[Any], Any], content: Any, column: str, source: Any, place: Place) -> Any:
    try:
        return decoder(content)
    except ValueError as error:
        problem = f"{error} Repair it or drop the row."
        raise place.error(column, show_media(source), problem, f"unreadable {column}") from error


def _load_audio(content: bytes | dict[str, Any]) -> dict[str, Any]:
    samples, rate = load_audio(content)
    return {"array": samples, "sampling_rate": rate}


def _audio_bytes(audio: bytes | dict[str, Any] | None) -> list[bytes]:
    if isinstance(audio, dict):
        return [audio["array"].tobytes(), str(audio["sampling_rate"]).encode()]
    return [] if audio is None else [audio]
