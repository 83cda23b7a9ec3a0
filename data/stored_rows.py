"""Stores cleaned rows as a table on disk, and restores them; media stay where they are."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..waveforms_vipolyqwen import load_audio
from .cleaning import is_missing, listed
from .media_paths import below
from .row_keys import KEYS
from .schema import Content, Place, Row, row_id

IMAGES = pa.list_(pa.string())  # a path; null for bytes that stand in the table of origin
AUDIO = pa.struct({"path": pa.string(), "array": pa.list_(pa.float32()), "sampling_rate": pa.int64()})
SCHEMA = pa.schema(
    {
        **{name: pa.string() for name in ("id", "task", "a", "b", "group")},
        **{"images_a": IMAGES, "audio_a": AUDIO, "images_b": IMAGES, "audio_b": AUDIO},
        "negatives": pa.list_(pa.struct({"text": pa.string(), "images": IMAGES, "audio": AUDIO})),
        "score": pa.float64(),
        "teacher_a": pa.list_(pa.float32()),
        "teacher_b": pa.list_(pa.float32()),
        "line": pa.int64(),  # number of the record
        "part": pa.int32(),  # number of the row among those of the record
        "named": pa.list_(pa.string()),  # the columns of the record that have a former name
        "inline": pa.bool_(),  # true if the table of origin holds media of the row, else null
        "task_id": pa.int16(),
        "modalities": pa.int16(),
        "pair": pa.int32(),  # number of the pair among those of the record: of its rows, an epoch draws one
        **{name: pa.int64() for name in KEYS},
        "problem": pa.string(),  # of a row that cannot be used
        "cause": pa.string(),
    }
)
RECORD = SCHEMA.names[: SCHEMA.names.index("task_id")]  # the columns that `restored` reads


def stored(row: Row, root: str, by_reference: bool) -> dict[str, Any]:
    """Returns a row as `SCHEMA`, without its origin.

    Args:
        row: a cleaned row.
        root: folder to which paths are stored relative.
        by_reference: whether bytes and samples stay in the table of origin.
    """
    images = {name: _stored_images(getattr(row, name), root) for name in ("images_a", "images_b")}
    audio = {name: _stored_audio(getattr(row, name), root, by_reference) for name in ("audio_a", "audio_b")}
    negatives = [
        {
            "text": each.text,
            "images": _stored_images(each.images, root),
            "audio": _stored_audio(each.audio, root, by_reference),
        }
        for each in row.negatives
    ]
    return {
        **vars(row),
        **images,
        **audio,
        "negatives": negatives,
        "inline": (by_reference and _is_inline(row)) or None,
    }


def _is_inline(row: Row) -> bool:
    """Returns whether a row holds bytes or samples."""
    contents = [row.side("a"), row.side("b"), *row.negatives]
    media = [each for content in contents for each in (*content.images, content.audio) if each is not None]
    return not all(isinstance(each, str) for each in media)


def _stored_images(images: list[str | bytes], root: str) -> list[str | None]:
    return images and [_relative(image, root) if isinstance(image, str) else None for image in images]


def _stored_audio(audio: Any, root: str, by_reference: bool) -> dict[str, Any] | None:
    if audio is None:
        return None
    empty = {"path": None, "array": None, "sampling_rate": None}
    if isinstance(audio, str):
        return {**empty, "path": _relative(audio, root)}
    return empty if by_reference else {**empty, **audio}


def _relative(path: str, root: str) -> str:
    inside = root + os.sep
    return path[len(inside) :] if path.startswith(inside) else path


def restored(record: Mapping[str, Any], place: Place, root: str, media: Iterator[Any]) -> Row:
    """Returns a row of `stored`; `media` yields those of its origin, in the order of `media_slots`."""
    sides = {
        side: (_images(record[f"images_{side}"], root, media), _audio(record[f"audio_{side}"], root, media))
        for side in ("a", "b")
    }
    negatives = [
        Content(each["text"], _images(each["images"], root, media), _audio(each["audio"], root, media))
        for each in record["negatives"]
    ]
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


def media_slots(values: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the images and audio of a record as it was read: side a, side b, hard negatives."""
    for side in ("a", "b"):
        yield from listed(values.get(f"images_{side}"))
        audio = values.get(f"audio_{side}")
        yield from [] if is_missing(audio) else [audio]
    for entry in listed(values.get("negatives")):
        if isinstance(entry, dict):
            yield from listed(entry.get("images"))
            yield from [] if is_missing(entry.get("audio")) else [entry["audio"]]
    for entry in listed(values.get("negative_images")):
        yield from listed(entry)
    yield from (each for each in listed(values.get("negative_audio")) if not is_missing(each))


def _images(paths: list[str | None], root: str, media: Iterator[Any]) -> list[str | bytes]:
    images = []
    for path in paths:
        given = next(media, None)
        images.append(_bytes(given) if path is None else below(root, path))
    return images


def _audio(audio: Mapping[str, Any] | None, root: str, media: Iterator[Any]) -> str | bytes | dict[str, Any] | None:
    if audio is None:
        return None
    given = next(media, None)
    if audio["path"] is not None:
        return below(root, audio["path"])
    if audio["array"] is not None:
        return {"array": np.array(audio["array"], np.float32), "sampling_rate": audio["sampling_rate"]}
    if isinstance(given, dict) and given.get("array") is not None:
        samples, rate = load_audio({"array": given["array"], "sampling_rate": given.get("sampling_rate")})
        return {"array": samples, "sampling_rate": rate}
    return _bytes(given)


def _bytes(given: Any) -> bytes:
    return given["bytes"] if isinstance(given, dict) else given
