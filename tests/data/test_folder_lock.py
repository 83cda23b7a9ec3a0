"""One process at a time writes to a folder: locks of this process, of ended and running ones, of other hosts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
