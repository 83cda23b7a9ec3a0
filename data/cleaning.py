"""Converts the values of a record to a row: missing values, numbers, paths, hard negatives."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal
from typing import Any

import numpy as np

from ..waveforms_vipolyqwen import load_audio
from .media_paths import below, find_media
from .schema import Content, Place, Row, row_id

DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
MISSING_WORDS = {
    "nan",
    "-nan",
    "none",
    "null",
    "<na>",
    "n/a",
    "#n/a",
    "nat",
}  # how pandas and others write a missing value as text
MEDIA_PARTS = {"bytes", "path", "array", "sampling_rate"}  # as `datasets` stores media
WHOLE_NUMBER = re.compile(r"[+-]?\d+\.0+")  # as text


def clean_row(record: Mapping[str, Any], place: Place, root: str = "") -> Row:
    """Converts one record to a `Row`.

    Args:
        record: column (of `COLUMNS`) -> value; an absent column is empty.
        place: origin of the record.
        root: folder to which paths are relative.

    Raises:
        RowError: a value cannot be converted.
    """
    record = _present(record)
    return Row(
        id=row_id(place),
        task=clean_name(record.get("task")) or "",
        a=_clean_text("a", record.get("a"), place),
        b=_clean_text("b", record.get("b"), place),
        images_a=_clean_images("images_a", record.get("images_a"), place, root),
        audio_a=_clean_audio("audio_a", record.get("audio_a"), place, root),
        images_b=_clean_images("images_b", record.get("images_b"), place, root),
        audio_b=_clean_audio("audio_b", record.get("audio_b"), place, root),
        score=_clean_score(record.get("score"), place),
        group=_clean_group(record.get("group"), place),
        negatives=_clean_negatives(record, place, root),
        teacher_a=_clean_vector("teacher_a", record.get("teacher_a"), place),
        teacher_b=_clean_vector("teacher_b", record.get("teacher_b"), place),
    )


def clean_content(record: Mapping[str, Any], columns: tuple[str, str, str], place: Place, root: str = "") -> Content:
    """Converts the text, images and audio of a record and nothing else, for inputs that are not pairs.

    Args:
        record: as of `clean_row`.
        columns: those of text, images and audio.
        place: origin of the record.
        root: folder to which paths are relative.

    Raises:
        RowError: a value cannot be converted.
    """
    record = _present(record)
    text, images, audio = columns
    return Content(
        _clean_text(text, record.get(text), place),
        _clean_images(images, record.get(images), place, root),
        _clean_audio(audio, record.get(audio), place, root),
    )


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a record that are not missing."""
    return {
        column: value
        for column, value in record.items()
        if value is not None and (type(value) is str or column == "score" or not _is_nan(value))
    }


def clean_name(value: Any) -> str | None:
    """Returns an id, a task or a group as text: 7.0 as 7, because a column with gaps turns whole numbers to floats.

    Returns:
        `None` for a missing value: `None`, NaN or blank.
    """
    if value is None or _is_nan(value):
        return None
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))
    text = str(value).strip().encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be stored
    return (text.partition(".")[0] if WHOLE_NUMBER.fullmatch(text) else text) or None


def _is_nan(value: Any) -> bool:
    return isinstance(value, (float, Decimal)) and math.isnan(value)


def _clean_group(value: Any, place: Place) -> str | None:
    """Returns a group; `None` for a missing one, also one that was written as the word for it."""
    if isinstance(value, (list, dict, bytes)):
        raise place.error("group", value, "a group is a text or a number; correct it or leave the column out.")
    group = clean_name(value)
    return None if group is None or group.lower() in MISSING_WORDS else group


def _clean_text(column: str, value: Any, place: Place) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        remedies = {
            list: f"choose with `lists: {{{column}: all}}` (or first, random)",
            dict: f"name the column in it, `columns: {{{column}: COLUMN.KEY}}`",
            bytes: "store it as a string",
        }
        remedy = remedies.get(type(value), "quote it")
        raise place.error(column, value, f"a text is expected, not {type(value).__name__}; {remedy}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise place.error(
            column, value, f"a lone surrogate at position {error.start}; encode the file as UTF-8."
        ) from error
    return value


def listed(value: Any) -> list[Any]:
    """Returns a list as it is, and one value as a list of it; empty without a value."""
    if is_missing(value):
        return []
    if isinstance(value, str):
        return json_list(value) or [value]
    return value if isinstance(value, list) else [value]


def is_missing(value: Any) -> bool:
    """Returns whether there is no value: `None`, `""`, NaN, or media that hold neither bytes nor a path."""
    if isinstance(value, dict):
        parts = value.values() if MEDIA_PARTS.issuperset(value) else [value]
        return bool(value) and not any(each or not isinstance(each, (str, bytes, type(None))) for each in parts)
    return value is None or value == "" or _is_nan(value)


def json_list(text: str) -> list[Any] | None:
    """Returns the list of texts or objects that a cell holds as JSON, as CSV files have them; `None` for other texts.

    A text of that form that is not meant as a list cannot be told apart.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if found and all(isinstance(each, (str, dict)) for each in found) else None


def _clean_negatives(record: Mapping[str, Any], place: Place, root: str) -> list[Content]:
    """Returns the hard negatives of three columns; each entry of a column is one negative."""
    images, audio = record.get("negative_images"), record.get("negative_audio")
    return [
        *(_clean_negative(entry, place, root) for entry in listed(record.get("negatives")) if entry is not None),
        *(Content(images=_clean_images("negative_images", entry, place, root)) for entry in listed(images)),
        *(Content(audio=_clean_audio("negative_audio", entry, place, root)) for entry in listed(audio)),
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
    return [_clean_file(column, entry, place, root) for entry in listed(value)]


def _clean_file(column: str, value: Any, place: Place, root: str) -> str | bytes:
    if isinstance(value, dict):  # as `datasets` stores media
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        problem = "the file stands in the text; write it to the disk and name its path, or keep its bytes in Parquet."
        raise place.error(column, value, problem)
    if isinstance(value, str) and value:
        return find_media(below(root, _clean_text(column, value, place)))
    if not isinstance(value, bytes) or not value:
        raise place.error(column, value, "a path or the bytes of a file are expected; correct or drop it.")
    return value


def _clean_audio(column: str, value: Any, place: Place, root: str) -> str | bytes | dict[str, Any] | None:
    if is_missing(value):
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
    except (ValueError, TypeError, OverflowError) as error:
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
        vector = np.array([_as_float(number) for number in value], np.float32)
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


def _as_float(number: float) -> float:
    """Returns a number as Python's float; infinity for an integer beyond it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _clean_score(value: Any, place: Place) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and DECIMAL_COMMA.fullmatch(value.strip()):
        value = value.replace(",", ".")
    try:
        if isinstance(value, str) and "_" in value:  # Python alone reads 0_5 as 5
            raise ValueError(value)
        return float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise place.error("score", value, "a number in [0, 1] is expected; correct it or drop the row.") from error
