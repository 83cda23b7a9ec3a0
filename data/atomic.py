"""Atomic writes: a file appears under its name complete and flushed to disk, or not at all."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

# Folder beside the final names, for what is being written or deleted. Readers of folders of Parquet files and the
# stock upload ignore names that begin with _.
UNFINISHED = "_unfinished"


def write_atomically(path: Path, write: Callable[[Path], object], writer: str = "") -> None:
    """Writes a file under a temporary name, flushes it and renames it.

    Args:
        path: the final name; an existing file is replaced, its folder is created.
        write: writes the content to the path that it is given.
        writer: tells the temporary files of several processes apart that may write `path` at the same time.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; `path` is then as before.
    """
    unfinished = path.parent / UNFINISHED / f"{writer}{path.name}"
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(unfinished)
        flush_file(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    with path.open("r+b" if sys.platform == "win32" else "rb") as file:  # Windows flushes what may be written
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk; Windows opens no folder, its journal keeps them."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
