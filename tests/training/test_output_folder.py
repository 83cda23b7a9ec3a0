"""A run replaces no other run, repository or running run."""

import json
import os
import socket
from pathlib import Path

import pytest
from helpers import PLAIN, train_run

from vipolyqwen.data.folder_lock import LOCK
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.checkpoints import UNFINISHED
from vipolyqwen.training.output_folder import make_room, occupy

HELD = ["checkpoint-40/model.safetensors", "checkpoint-40/manifest.json"]
REPOSITORY = ["config.json", "model.safetensors", "fingerprint.json", "README.md"]


def lay_out(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("content")
    return folder


def arguments(folder: Path, *flags: str) -> tuple:
    return read_arguments(["--model", "x", "--output_dir", str(folder), "--use_cpu", "true", *flags])


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (HELD, "another run .checkpoint-40"),
        (REPOSITORY, "a published repository .config.json"),
        (["model-00001-of-00002.safetensors"], "another run .model-00001"),
        (["adapter_config.json"], "another run .adapter_config.json"),
        (["trainer_state.json"], "another run .trainer_state.json"),
        (["adapter/adapter_config.json"], "another run .adapter"),
    ],
)
def test_a_folder_that_holds_a_run_or_a_repository_is_refused_and_left_alone(
    tmp_path: Path, names: list[str], named: str
) -> None:
    lay_out(tmp_path, names)
    with pytest.raises(ValueError, match=rf"`output_dir` is .*{named}.*--overwrite_output_dir"):
        with occupy(arguments(tmp_path)[-1], []):
            pass
    assert all((tmp_path / name).read_text() == "content" for name in names)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("names", [[], ["recipe.yaml", "train.log"], ["training.json"], [f"{UNFINISHED}/x"]])
def test_a_folder_without_results_is_free(tmp_path: Path, names: list[str]) -> None:
    make_room(arguments(lay_out(tmp_path, names))[-1], [])


def test_resuming_enters_the_folder_of_its_checkpoint_only(tmp_path: Path) -> None:
    run, other = lay_out(tmp_path / "run", [*HELD, *REPOSITORY]), lay_out(tmp_path / "other", REPOSITORY)
    spelled = f"{tmp_path}/other/../run/checkpoint-40"
    make_room(arguments(run, "--resume_from_checkpoint", "true")[-1], [])
    make_room(arguments(run, "--resume_from_checkpoint", spelled)[-1], [])
    for resume in ("true", spelled):  # without a checkpoint of its own, it would start anew
        with pytest.raises(ValueError, match="a published repository"):
            make_room(arguments(other, "--resume_from_checkpoint", resume)[-1], [])


def test_overwriting_deletes_the_other_run_and_nothing_else(tmp_path: Path) -> None:
    kept = ["recipe.yaml", "notes/README.md"]
    lay_out(tmp_path, [*HELD, *REPOSITORY, *kept, "checkpoint-2/x", "base/config.json", "modules.json"])
    make_room(arguments(tmp_path, "--overwrite_output_dir")[-1], [])
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)


@pytest.mark.parametrize("read", [".", "checkpoint-40", "base"])
def test_overwriting_never_deletes_what_the_run_reads(tmp_path: Path, read: str) -> None:
    lay_out(tmp_path, [*HELD, "base/config.json"])
    with pytest.raises(ValueError, match="`overwrite_output_dir` would delete .*which this run reads"):
        make_room(arguments(tmp_path, "--overwrite_output_dir")[-1], [str(tmp_path / read)])
    make_room(arguments(tmp_path, "--overwrite_output_dir")[-1], ["Hub/name", str(tmp_path / "pairs.jsonl")])


def test_a_second_run_neither_enters_a_finished_nor_a_running_one(world: Path, tmp_path: Path) -> None:
    flags = [*PLAIN, "--max_steps", "1", "--save_steps", "1"]
    train_run(world, tmp_path, *flags)
    state = (tmp_path / "trainer_state.json").read_bytes()
    with pytest.raises(ValueError, match="holds another run .checkpoint-1"):
        train_run(world, tmp_path, *flags, "--seed", "1")
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))
    for flag in ("--overwrite_output_dir", "--resume_from_checkpoint"):
        with pytest.raises(ValueError, match=f"in use by .*process {os.getppid()} on "):
            train_run(world, tmp_path, *flags, flag, "true")
    assert (tmp_path / "trainer_state.json").read_bytes() == state
    (tmp_path / LOCK).unlink()
    train_run(world, tmp_path, *flags, "--seed", "1", "--overwrite_output_dir")
    assert json.loads((tmp_path / "training.json").read_text())["settings"]["seed"] == 1
    assert not (tmp_path / LOCK).exists()
