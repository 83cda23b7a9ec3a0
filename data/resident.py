"""Gives the mapped pages of the index back: a process that reads rows in random order would hold all of them."""

import ctypes
import sys
from functools import lru_cache

DONT_NEED = 4  # MADV_DONTNEED of Linux: pages leave the process and stay in the cache of the system


def release_mapped(folder: str) -> None:
    """Takes the pages of the files below a folder that this process has mapped out of its resident memory.

    They are read again from the cache of the system when they are needed. Without Linux nothing happens.

    Raises:
        OSError: the system refuses.
    """
    if sys.platform != "linux":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if folder in line:
                start, _, end = line.split(maxsplit=1)[0].partition("-")
                first = int(start, 16)
                if _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(int(end, 16) - first), DONT_NEED):
                    raise OSError(ctypes.get_errno(), "madvise failed", line.rstrip())


@lru_cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
