"""Reads how long audio files say that they are, so that a truncated one is refused instead of half heard."""

import os
import re
import struct
from typing import BinaryIO

ENDLESS = (2**31, 2**32)  # bytes; writers to a pipe state about as many
SLACK = 2**16  # bytes around them
MOST_CHUNKS = 1000  # before the samples
MP3_FRAME = 1441  # bytes at most
MP3_SHARE = 0.99  # of the stated bytes; some encoders count one frame more
XING = re.compile(rb"Xing|Info")


def check_is_complete(file: BinaryIO) -> None:
    """Refuses a file that is shorter than its header states, because libsndfile would silently read the rest.

    Args:
        file: a binary file; it is left at its beginning.

    Raises:
        ValueError: it is truncated.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    stated = _stated_end(file, file.read(16))
    file.seek(0)
    if stated is not None and size < stated and not any(abs(stated - end) < SLACK for end in ENDLESS):
        raise ValueError(f"the file is truncated: {size} of {stated} bytes")


def _stated_end(file: BinaryIO, head: bytes) -> int | None:
    """Returns where the samples end by the header; `None`: it does not say."""
    if len(head) < 16:
        return None
    kind, form = head[:4], head[8:12]
    if kind == b"RIFF" and form == b"WAVE":
        return _chunk_end(file, 12, "<4sI", b"data") or struct.unpack("<I", head[4:8])[0] + 8
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _chunk_end(file, 12, ">4sI", b"SSND")
    if kind == b"caff":
        return _chunk_end(file, 8, ">4sq", b"data")
    if kind == b"RF64":
        file.seek(20)
        return _number(file.read(8), "<q", 8)
    if head == b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00":  # Wave64
        return _number(file.read(8), "<q", 0)
    if kind == b".snd":
        return _number(head[8:12], ">I", struct.unpack(">I", head[4:8])[0])
    if head[:7] == b"NIST_1A":
        return _nist_end(file)
    return _mp3_end(file, head)


def _number(data: bytes, form: str, above: int) -> int | None:
    """Returns a number of a header plus `above`; `None` for one that states nothing."""
    if len(data) < struct.calcsize(form):
        return None
    (value,) = struct.unpack(form, data)
    return value + above if value > 0 else None


def _chunk_end(file: BinaryIO, start: int, form: str, wanted: bytes) -> int | None:
    """Returns the end of the first chunk called `wanted`, by the sizes that the chunks state."""
    size = struct.calcsize(form)
    for _ in range(MOST_CHUNKS):
        file.seek(start)
        header = file.read(size)
        if len(header) < size:
            return None
        name, length = struct.unpack(form, header)
        if name == wanted or length < 0:
            return start + size + length if length > 0 else None
        start += size + length + (length % 2 if form.endswith("I") else 0)
    return None


def _nist_end(file: BinaryIO) -> int | None:
    file.seek(0)
    fields = dict(re.findall(rb"(\w+) -i (\d{1,12})", file.read(1024)))
    names = (b"sample_count", b"sample_n_bytes", b"channel_count")
    if not all(name in fields for name in names):
        return None
    count, width, channels = (int(fields[name]) for name in names)
    return 1024 + count * width * channels


def states_mp3_frames(file: BinaryIO) -> bool:
    """Returns whether an MP3 states its frames in the first of them, so that its length is exact."""
    file.seek(0)
    _, table = _mp3_table(file, file.read(16))
    return table is not None and bool((_number(table[4:8], ">I", 0) or 0) & 1)


def _mp3_table(file: BinaryIO, head: bytes) -> tuple[int, bytes | None]:
    """Returns where the first frame begins, and the table that encoders write into it."""
    start = 0
    if head[:3] == b"ID3":
        start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(start)
    frame = file.read(MP3_FRAME)
    found = XING.search(frame) if frame[:1] == b"\xff" else None
    return start, None if found is None else frame[found.start() :]


def _mp3_end(file: BinaryIO, head: bytes) -> int | None:
    """Returns the end by the bytes in the table of the first frame."""
    start, table = _mp3_table(file, head)
    if table is None:
        return None
    flags = _number(table[4:8], ">I", 0) or 0
    place = 12 if flags & 1 else 8
    stated = _number(table[place : place + 4], ">I", 0) if flags & 2 else None
    return start + int(MP3_SHARE * stated) if stated else None


__all__ = ["MP3_SHARE", "check_is_complete", "states_mp3_frames"]
