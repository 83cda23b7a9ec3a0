"""Keys of the content of rows, without opening media: fingerprints of data sets, and rows without any negative."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from .schema import Content, Row

KEYS = ("row_key", "a_key", "b_key", "group_key")  # columns of the stored rows, see `row_keys`


COPIED = 4096  # bytes, up to which one copy costs less than one more call


def hash_parts(parts: Iterable[bytes]) -> int:
    """Returns a hash in [−2⁶³, 2⁶³) of byte strings, which tells where one ends and the next begins."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if len(part) < COPIED:
            found.update(len(part).to_bytes(8) + part)
        else:
            found.update(len(part).to_bytes(8))
            found.update(part)
    return int.from_bytes(found.digest(), signed=True)


def side_key(content: Content, root: str) -> int:
    """Returns a key of a side: equal for equal text (NFC) and equal media, files by their path below `root`."""
    return _key_of(content, os.path.join(root, ""))


def _key_of(content: Content, below: str) -> int:
    """Returns `side_key`; `below` is the folder with its separator."""
    parts = [unicodedata.normalize("NFC", content.text).encode()]
    if content.images:
        parts += [_medium(image, below) for image in content.images]
    if content.audio is not None:
        parts += _audio(content.audio, below)
    return hash_parts(parts)


def row_keys(row: Row, root: str) -> tuple[int, int, int, int]:
    """Returns the keys of all that training sees of a row, of side a, of side b and of its group (0: none).

    Args:
        row: the row; its id does not count.
        root: folder of relative media paths, which may move.
    """
    below = os.path.join(root, "")
    a, b = _key_of(row.side("a"), below), _key_of(row.side("b"), below)
    group = 0 if row.group is None else hash_parts([row.group.encode()])
    negatives = [_key_of(each, below) for each in row.negatives]
    teacher = [b"" if vector is None else np.asarray(vector).tobytes() for vector in (row.teacher_a, row.teacher_b)]
    facts = repr((row.task, a, b, row.score, row.group, negatives)).encode()
    return hash_parts([facts, *teacher]), a, b, group


def _medium(medium: str | bytes, below: str) -> bytes:
    if isinstance(medium, bytes):
        return medium
    return medium.removeprefix(below).encode("utf-8", "surrogatepass")


def _audio(audio: Any, below: str) -> list[bytes]:
    if isinstance(audio, dict):
        return [np.asarray(audio["array"], np.float32).tobytes(), str(audio["sampling_rate"]).encode()]
    return [_medium(audio, below)]
