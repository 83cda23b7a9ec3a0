"""One process at a time writes to a folder: locks of this process, of ended and running ones, of other hosts."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vipolyqwen.data import folder_lock
from vipolyqwen.data.folder_lock import LOCK, FolderInUseError, lock_folder


def write_lock(folder: Path, **holder: object) -> Path:
    """Leaves a lock file, as a killed process does."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"host": socket.gethostname(), "started": "then", **holder}))
    return folder / LOCK


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_its_holder_and_disappears_with_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new" / "folder", "a command"):
        holder = json.loads((tmp_path / "new" / "folder" / LOCK).read_text())
        assert (holder["host"], holder["pid"], holder["command"]) == (socket.gethostname(), os.getpid(), "a command")
        with pytest.raises(FolderInUseError, match=rf"a command \(process {os.getpid()} on .*another folder"):
            with lock_folder(tmp_path / "new" / "folder", "another"):
                pass
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_the_lock_of_an_ended_process_is_taken_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid = ended_process()
    path = write_lock(tmp_path, pid=pid, ticks="1")
    with lock_folder(tmp_path, "a command"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert f"process {pid}" in caplog.text and "takes it over" in caplog.text


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=os.getppid(), ticks="1")  # another start than the parent's
    with lock_folder(tmp_path, "a command"):
        pass


@pytest.mark.parametrize("holder", [{"host": "elsewhere", "pid": 1}, {"pid": os.getppid()}, {}])
def test_a_running_process_and_one_of_another_host_keep_their_lock(tmp_path: Path, holder: dict) -> None:
    path = write_lock(tmp_path, **holder)
    with pytest.raises(FolderInUseError, match=f"process {holder.get('pid')} on .*delete {path}"):
        with lock_folder(tmp_path, "a command"):
            pass
    assert path.exists()


@pytest.mark.parametrize("content", ["", '{"host": "m', "[1]"])
def test_a_lock_that_was_cut_off_while_it_was_written_does_not_count(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with lock_folder(tmp_path, "a command"):
        pass


def test_a_process_that_is_killed_leaves_a_lock_that_is_free(tmp_path: Path) -> None:
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
    code += "from vipolyqwen.data.folder_lock import lock_folder\n"
    code += "with lock_folder(pathlib.Path(sys.argv[1]), 'a run'):\n    print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path), "."]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(FolderInUseError, match=rf"a run \(process {process.pid} on "):
            with lock_folder(tmp_path, "a command"):
                pass
        process.kill()
    with lock_folder(tmp_path, "a command"):
        pass


def test_the_ranks_of_one_launch_have_a_lock_each(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "rank 0", "_rank0.lock"), lock_folder(tmp_path, "rank 1", "_rank1.lock"):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_second_attempt_leaves_the_lock_with_its_holder(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "a run"):
        with pytest.raises(FolderInUseError), lock_folder(tmp_path, "another"):
            pass
        (tmp_path / LOCK).write_text("")  # only the system's lock is left
        with pytest.raises(FolderInUseError), lock_folder(tmp_path, "a third"):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_a_forked_worker_neither_gives_the_lock_up_nor_keeps_it(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "a run"):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
        worker.start()
    assert not (tmp_path / LOCK).exists() and worker.is_alive()
    with lock_folder(tmp_path, "the next"):  # while the worker of the first lives
        worker.kill()
        worker.join()
        with pytest.raises(FolderInUseError, match="the next"), lock_folder(tmp_path, "another"):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_a_killed_process_with_living_workers_leaves_a_lock_that_is_free(tmp_path: Path) -> None:
    code = "import os, sys, time, pathlib; sys.path.insert(0, sys.argv[2])\n"
    code += "from vipolyqwen.data.folder_lock import lock_folder\n"
    code += "with lock_folder(pathlib.Path(sys.argv[1]), 'a run'):\n    worker = os.fork()\n"
    code += "    worker or print(os.getpid(), flush=True)  # the worker, once it lives\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "."], stdout=subprocess.PIPE) as process:
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with lock_folder(tmp_path, "a command"):
                os.kill(worker, 0)
        finally:
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be written: .*Choose another folder") as raised:
        with lock_folder(tmp_path, "a command"):
            pass
    assert raised.value.errno == number


def test_where_the_first_byte_is_locked_the_holder_is_still_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.read

    def of_windows(descriptor: int, count: int) -> bytes:
        if os.lseek(descriptor, 0, os.SEEK_CUR) == 0:
            raise PermissionError(errno.EACCES, "the first byte is locked")
        return read(descriptor, count)

    with lock_folder(tmp_path, "a run"):
        monkeypatch.setattr(os, "read", of_windows)
        with pytest.raises(FolderInUseError, match=rf"a run \(process {os.getpid()} on "):
            with lock_folder(tmp_path, "another"):
                pass


def test_a_file_system_without_locks_leaves_the_decision_to_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock, "lock_descriptor", refuse)
    with lock_folder(tmp_path, "a run"):
        with pytest.raises(FolderInUseError, match="a run"), lock_folder(tmp_path, "another"):
            pass
    write_lock(tmp_path, pid=ended_process(), ticks="1")
    with lock_folder(tmp_path, "a command"):
        pass
