"""Rows to be embedded one by one, from the same files as pairs, in units that are embedded, stored and skipped."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .cleaning import clean_content
from .collator import message_parts
from .schema import Place, RowError, row_id
from .source_config import FORMER_COLUMNS, SourceConfig
from .units import UNIT_ROWS, Unit, UnitReader, source_files

CONTENT = {"a": ("a", "images_a", "audio_a"), "b": ("b", "images_b", "audio_b")}  # columns of each side
OTHER_NAMES = {"a": "text", "images_a": "image"}  # read where a file has no column of the schema's name


@dataclass(frozen=True)
class CorpusRow:
    """One input, its media not opened yet.

    Attributes:
        id: the row's id; without one, `FILE:ROW`.
        text: text, empty if the row has none.
        images: paths, or the bytes of files.
        audio: a path, the bytes of a file, or `{"array", "sampling_rate"}`.
        place: where it was read, for errors.
        image_placeholder: marks the place of an image in the text.
    """

    id: str
    text: str
    images: list[str | bytes]
    audio: str | bytes | dict[str, Any] | None
    place: Place
    image_placeholder: str

    def cost(self) -> tuple[int, int, int]:
        """Returns a sort key: rows of similar cost, and so of little padding, are neighbours."""
        media = [*self.images, *([] if self.audio is None else [self.audio])]
        return self.audio is not None, len(self.images), len(self.text) + sum(map(_size, media))

    def message(self) -> list[dict[str, Any]]:
        """Returns the row as a conversation of one message: images (or where the text has them), text, audio.

        Raises:
            ValueError: an image or the audio cannot be read; the message names the row.
        """
        try:
            images = [load_image(image if isinstance(image, bytes) else Path(image)) for image in self.images]
            audio = None
            if self.audio is not None:
                samples, rate = load_audio(self.audio)
                audio = {"array": samples, "sampling_rate": rate}
            content = message_parts(self.text, images, audio, self.image_placeholder)
        except (ValueError, OSError) as error:
            raise RowError(f"{self.place.file}, row {self.place.row} (id {self.id!r}): {error}") from error
        return [{"role": "user", "content": content, "keep_order": True}]


@dataclass(frozen=True)
class CorpusReader(UnitReader):
    """Reads the records of one file as rows to embed.

    Attributes:
        side: which side of a pair is the input; "a" also for rows that are not pairs.
    """

    side: str = "a"

    def columns(self, existing: Sequence[str]) -> dict[str, str]:
        """Returns the schema's columns that are read -> those of the file."""
        given = {name: column for name, column in self.source.columns.items() if column is not None}
        if missing := sorted(set(given.values()) - set(existing)):
            raise ValueError(
                f"{self.file}: the columns {missing} are missing; the file has {sorted(existing)}. Correct `columns`."
            )
        wanted = CONTENT[self.side]
        names = {name: self.source.columns.get(name, name) for name in ("id", *wanted)}
        for name in names:
            if name in FORMER_COLUMNS and name not in self.source.columns:
                names[name] = self.source.default_column(name, existing)
            if name in OTHER_NAMES and names[name] == name and name not in existing:
                names[name] = OTHER_NAMES[name]
        columns = {name: column for name, column in names.items() if column in existing}
        if not set(wanted) & set(columns):
            hint = f"`columns: {{{self.side}: NAME}}` (or {', '.join(wanted[1:])})"
            raise ValueError(
                f"{self.file}: no column holds the inputs; the file has {sorted(existing)}. Name it with {hint}."
            )
        return columns

    def convert(self, values: Mapping[str, Any], place: Place) -> CorpusRow:
        """Returns the input of a record; see `UnitReader.convert`."""
        content = clean_content(values, CONTENT[self.side], place, self.media_root)
        if not content.modalities:
            raise place.error(self.side, content.text, "the row is empty; fill it in or drop it.")
        return CorpusRow(
            row_id(place), content.text, content.images, content.audio, place, self.source.image_placeholder
        )


def read_corpus(
    source: Mapping[str, Any], side: str = "a", unit_rows: int = UNIT_ROWS
) -> tuple[list[str], Callable[[], Iterator[Unit]]]:
    """Finds the files of a source of rows to embed.

    Args:
        source: keys of an entry of a recipe's data, see `SourceConfig`. `columns` names those of the content and `id`;
            by default, of side a, `a` or `text`, `images_a`, `images` or `image`, `audio_a` or `audio`.
        side: "a", or "b" to embed the other side of pairs.
        unit_rows: rows of a unit at most; a row group of a Parquet file begins a new one.

    Returns:
        The files, and a function that iterates over all units in their order. Iterating reads text files once.

    Raises:
        ValueError: a setting is wrong, or a file cannot be read.
        OSError: a file does not exist.
    """
    if side not in CONTENT:
        raise ValueError(f"side is {side!r}; choose one of {', '.join(CONTENT)}.")
    config = SourceConfig.from_dict(source)
    files = source_files(config, unit_rows)

    def units() -> Iterator[Unit]:
        for file, label in files.items():
            yield from CorpusReader(config, file, label, unit_rows, side).units()

    return list(files), units


def _size(source: str | bytes | dict[str, Any]) -> int:
    """Returns the bytes of an image or audio file, or the number of samples; 0 if the file does not exist."""
    if isinstance(source, str):
        return os.path.getsize(source) if os.path.isfile(source) else 0
    return len(source["array"] if isinstance(source, dict) else source)
