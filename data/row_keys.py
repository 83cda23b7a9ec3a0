"""Keys of the content of rows, without opening media: fingerprints of data sets, and rows without any negative."""

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

from .schema import Content, Row

KEYS = ("row_key", "a_key", "b_key", "group_key")  # columns of the stored rows, see `row_keys`


def hash_parts(parts: Iterable[bytes]) -> int:
    """Returns a hash in [−2⁶³, 2⁶³) of byte strings, which tells where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return int.from_bytes(digest.digest(), signed=True)


def side_key(content: Content, root: str) -> int:
    """Returns a key of a side: equal for equal text (NFC) and equal media, files by their path below `root`."""
    text = unicodedata.normalize("NFC", content.text).encode()
    return hash_parts([text, *(_medium(image, root) for image in content.images), *_audio(content.audio, root)])


def row_keys(row: Row, root: str) -> tuple[int, int, int, int]:
    """Returns the keys of all that training sees of a row, of side a, of side b and of its group (0: none).

    Args:
        row: the row; its id does not count.
        root: folder of relative media paths, which may move.
    """
    a, b = (side_key(row.side(side), root) for side in ("a", "b"))
    group = 0 if row.group is None else hash_parts([row.group.encode()])
    negatives = [side_key(each, root) for each in row.negatives]
    teacher = [b"" if vector is None else np.asarray(vector).tobytes() for vector in (row.teacher_a, row.teacher_b)]
    facts = repr((row.task, a, b, row.score, row.group, negatives)).encode()
    return hash_parts([facts, *teacher]), a, b, group


def _medium(medium: str | bytes, root: str) -> bytes:
    if isinstance(medium, bytes):
        return medium
    below = os.path.join(root, "")
    return medium.removeprefix(below).encode("utf-8", "surrogatepass")


def _audio(audio: Any, root: str) -> list[bytes]:
    if audio is None:
        return []
    if isinstance(audio, dict):
        return [np.asarray(audio["array"], np.float32).tobytes(), str(audio["sampling_rate"]).encode()]
    return [_medium(audio, root)]
