"""A lock on a folder that one process at a time writes: a file that names host, process and start."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import lock_descriptor
from transformers.utils import logging

logger = logging.get_logger(__name__)

LOCK = "_run.lock"  # the stock upload and readers of folders ignore names that begin with _
held: set[int] = set()  # descriptors of this process with a lock on them


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


@contextmanager
def lock_folder(folder: Path, command: str, name: str = LOCK) -> Iterator[None]:
    """Holds the lock of a folder inside the context.

    The system's lock on the file decides between two processes that start at the same time; the content names the
    holder, also where a file system has no such locks. The lock of a process that has ended on this host is taken over
    with a warning. A forked child, such as a data worker, neither holds the lock nor gives it up.

    Args:
        folder: the folder; created if it does not exist.
        command: name of what writes to it, for the message to others.
        name: name of the lock file; ranks that write to one folder together have one each.

    Raises:
        FolderInUseError: a running process, or one of another host, holds the lock.
        OSError: the lock file cannot be written.
    """
    path, process = folder / name, os.getpid()
    descriptor = _open_locked(path)
    try:
        holder = _read_holder(descriptor)
        if holder is not None:
            if not _has_ended(holder):
                raise FolderInUseError(_describe(path, holder))
            logger.warning(f"{path} is the lock of {_who(holder)}, which has ended; this process takes it over.")
        content = json.dumps({"command": command, **_this_process()}, indent=2) + "\n"
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f" {content}".encode())  # Windows lets nobody else read the first byte
    except BaseException:
        os.close(descriptor)
        raise
    held.add(descriptor)
    try:
        yield
    finally:
        if os.getpid() == process:
            held.discard(descriptor)
            _delete(path, descriptor)


def _open_locked(path: Path) -> int:
    """Opens the lock file with the system's lock on it; opens again where its holder deleted the file."""
    while True:
        descriptor = _open(path)
        try:
            is_ours = lock_descriptor(descriptor, blocking=False)
        except OSError:
            is_ours = True  # a file system without locks: the content decides
        if not is_ours:
            holder = _read_holder(descriptor) or {}
            os.close(descriptor)
            raise FolderInUseError(_describe(path, holder))
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    """Opens the lock file, which is made if it does not exist, as its folder is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path.parent} cannot be written: {error.strerror}. Choose another folder, or make it writable",
        ) from error


def _delete(path: Path, descriptor: int) -> None:
    """Deletes the lock file and gives the lock up, in the order that lets no second process come in between.

    Windows deletes no open file, so that one that another process has opened by then stays, with that process's lock.
    """
    if sys.platform == "win32":
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError, *([PermissionError] if sys.platform == "win32" else [])):
        path.unlink()  # the folder may have been deleted in the meantime
    if sys.platform != "win32":
        os.close(descriptor)


def _close_in_child() -> None:
    """Closes the locked files in a forked child, whose copies would keep the lock after the end of their parent."""
    while held:
        os.close(held.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_in_child)


def _read_holder(descriptor: int) -> dict[str, Any] | None:
    """Returns what the lock file says; `None` if it is new, or was cut off while it was written."""
    try:
        holder = json.loads(_read(descriptor))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _read(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        return os.read(descriptor, 10_000)
    except PermissionError:  # Windows: the first byte is locked
        os.lseek(descriptor, 1, os.SEEK_SET)
        return os.read(descriptor, 10_000)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": pid, "ticks": _start_ticks(pid), "started": started}


def _start_ticks(pid: int) -> str | None:
    """Returns when a process started, in ticks since the machine did, which no set clock moves; `None` off Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _has_ended(holder: dict[str, Any]) -> bool:
    """Returns whether a holder ran on this host and has ended, also if another process has its number by now."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    if sys.platform == "win32":
        return True  # whoever gets the system's lock there; signal 0 would stop the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as another user
    return holder.get("ticks") is not None and holder["ticks"] != _start_ticks(pid)


def _who(holder: dict[str, Any]) -> str:
    started = f", started {holder['started']}" if "started" in holder else ""
    return f"{holder.get('command', 'a process')} (process {holder.get('pid')} on {holder.get('host')}{started})"


def _describe(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"{path.parent} is in use by {_who(holder)}. Wait for its end, or choose another folder; if that process does "
        f"not run any more, delete {path}."
    )
