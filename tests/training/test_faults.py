"""Faults from outside: SIGTERM, no room, read-only, damage, killed workers, too little memory, NaN, a wrong clock."""

import copy
import errno
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, assert_same_gradients, build_trainer, gradients_of, train_run, training_step
from killing import same_weights
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from vipolyqwen.training import faults
from vipolyqwen.training import trainer as trainer_module
from vipolyqwen.training.checkpoints import (
    MANIFEST,
    UNFINISHED,
    DamagedCheckpointError,
    check_checkpoint,
    find_faults,
    newest_intact_checkpoint,
    publish_checkpoint,
)
from vipolyqwen.training.faults import explained_workers, saving
from vipolyqwen.training.trainer import ViPolyQwenTrainer

RUN = [*PLAIN, "--save_steps", "3", "--max_steps", "4"]
RESUME = ["--resume_from_checkpoint", "true"]


# --- a run


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, fault: Any) -> None:
    """Has the step after `step` steps begin with a fault."""
    original = ViPolyQwenTrainer.training_step

    def faulty(self: ViPolyQwenTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            fault()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ViPolyQwenTrainer, "training_step", faulty)


def test_a_run_meets_sigterm_a_full_disk_and_a_wrong_clock_and_ends_with_the_same_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(world, tmp_path / "straight", *RUN)
    output, handler = tmp_path / "faults", signal.getsignal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:  # inside step 2 of 4, without a save due
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_run(world, output, *RUN)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert "checkpoint-2" in str(end.value) and "--resume_from_checkpoint true" in str(end.value)
    assert find_faults(output / "checkpoint-2") == [] and not (output / "model.safetensors").exists()

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"checkpoint-3 cannot be saved.* needs about \d"),
    ):
        patch.setattr("vipolyqwen.training.resuming.publish_checkpoint", full_disk)
        train_run(world, output, *RUN, *RESUME)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((output / UNFINISHED).iterdir()) and find_faults(output / "checkpoint-2") == []

    with monkeypatch.context() as patch:
        start = time.time()
        patch.setattr(time, "time", lambda: start - 3600 - time.monotonic())  # an hour back, and running backwards
        train_run(world, output, *RUN, *RESUME)
    assert same_weights(tmp_path / "straight", output)
    assert find_faults(output / "checkpoint-4") == []


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- saving


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos: No space left on device"),
    ],
)
def test_no_room_names_path_need_and_remedy_and_leaves_nothing_partial(tmp_path: Path, error: Exception) -> None:
    partial, file = tmp_path / "partial", tmp_path / "model.safetensors"
    with pytest.raises(OSError) as raised, saving(tmp_path / "checkpoint-7", 5_000, [partial, file]):
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
        file.write_bytes(b"half")
        raise error
    assert raised.value.errno in (errno.ENOSPC, errno.EDQUOT)
    for named in (str(tmp_path / "checkpoint-7"), "5,000 bytes", "--resume_from_checkpoint true"):
        assert named in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
    kept = tmp_path / "model.safetensors"
    kept.write_bytes(b"of before")
    begun = []
    with pytest.raises(OSError, match="needs about 1,000 bytes and 999 are free") as raised:
        with saving(kept, 1000, [kept]):
            begun.append(True)
    assert raised.value.errno == errno.ENOSPC and not begun and kept.read_bytes() == b"of before"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_folder_is_named(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=r"checkpoint-7 cannot be saved.*Make its folder writable") as raised:
        with saving(tmp_path / "checkpoint-7", 0, []):
            raise OSError(number, os.strerror(number), "x")
    assert raised.value.errno == number


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="other"), saving(tmp_path / "x", 0, []):
        raise KeyError("other")


# --- damage


def written(folder: Path) -> Path:
    made = folder.parent / UNFINISHED / folder.name
    made.mkdir(parents=True)
    (made / "model.safetensors").write_text("weights")
    (made / "trainer_state.json").write_text("{}")
    publish_checkpoint(made, folder)
    return folder


def test_any_flipped_byte_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    before, newest = written(tmp_path / "checkpoint-1"), written(tmp_path / "checkpoint-2")
    for name in ("model.safetensors", "trainer_state.json", MANIFEST):
        content = (newest / name).read_bytes()
        for place in range(len(content)):
            (newest / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(DamagedCheckpointError, match="checkpoint-2 is damaged: .*"):
                check_checkpoint(newest)
        assert newest_intact_checkpoint(tmp_path) == before
        (newest / name).write_bytes(content)
    assert newest_intact_checkpoint(tmp_path) == newest


def test_a_changed_manifest_is_named_itself(tmp_path: Path) -> None:
    folder = written(tmp_path / "checkpoint-1")
    text = (folder / MANIFEST).read_text()
    for changed in (text.replace('"size": 7', '"size": 8'), text.replace("  ", " "), text.replace("sha256", "sha255")):
        (folder / MANIFEST).write_text(changed)
        assert find_faults(folder) == ["the content of manifest.json has changed"]


# --- workers and media


class Killer(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_data_worker_ends_the_run_in_words() -> None:
    with pytest.raises(RuntimeError, match=r"killed.*`dataloader_num_workers`.*--resume_from_checkpoint true"):
        with explained_workers():
            list(DataLoader(Killer(), num_workers=1, timeout=60))


def test_media_deleted_during_a_run_are_named(corpus: Path, tmp_path: Path) -> None:
    for name in ("base", "pairs.jsonl"):
        (tmp_path / name).symlink_to(corpus / name)
    shutil.copytree(corpus / "media", tmp_path / "media", ignore=shutil.ignore_patterns("base", "checkpoint*", "*/*"))
    _, pairs = build_trainer(tmp_path)
    (tmp_path / "media" / "0.png").unlink()
    named = []
    for number in range(len(pairs)):
        try:
            pairs[number]
        except ValueError as error:
            named.append(str(error))
    assert len(named) == 3  # ocr, vqa_single, vqa_multi
    assert all(re.search(r"pairs\.jsonl.*0\.png.*Restore it", message) for message in named)


# --- memory


@contextmanager
def little_memory(monkeypatch: pytest.MonkeyPatch, rows: int, in_backward: bool) -> Iterator[list[int]]:
    """Lets no forward of more rows succeed; with `in_backward` only one with gradient fails."""
    sizes: list[int] = []
    original = trainer_module._embed_rows

    def embed(model: Any, inputs: Any, count: int, *options: bool) -> torch.Tensor:
        if count > rows and (torch.is_grad_enabled() or not in_backward):
            raise torch.OutOfMemoryError(f"tried to allocate {count} rows")
        sizes.append(count)
        return original(model, inputs, count, *options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "_embed_rows", embed)
        yield sizes


@pytest.mark.parametrize(("flags", "in_backward"), [([], False), (["--embed_chunk", "16"], True)])
def test_a_micro_batch_without_memory_is_halved_with_the_same_gradient(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], in_backward: bool
) -> None:
    weighting = ["--task_weighting", "inverse_loss", "--task_weighting_options", '{"baseline": "ema"}']
    trainer, pairs = build_trainer(corpus, *flags, *weighting, "--learnable_temperature", "true")
    rows = [pairs[number] for number in range(8)]
    start = copy.deepcopy(trainer.mixed_loss.state_dict())
    logged = training_step(trainer, rows)
    wanted = {name: value.clone() for name, value in gradients_of(trainer).items() if value is not None}
    state = copy.deepcopy(trainer.mixed_loss.state_dict())

    trainer.model.zero_grad()
    trainer.loss_optimizer.zero_grad()
    trainer.mixed_loss.load_state_dict(start)
    trainer.figures.clear()
    trainer.monitor.losses.clear()
    with little_memory(monkeypatch, 5, in_backward) as sizes:
        again = training_step(trainer, rows)
    assert max(sizes) <= (16 if in_backward else 5) and trainer.embed_chunk <= 5
    assert again["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert len(trainer.figures) == len(trainer.monitor.losses) == 1
    assert_same_gradients({n: g for n, g in gradients_of(trainer).items() if g is not None}, wanted, tolerance=1e-4)
    for name, value in trainer.mixed_loss.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_a_row_that_does_not_fit_ends_the_run_with_advice(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, pairs = build_trainer(corpus)
    with little_memory(monkeypatch, 0, in_backward=False):
        with pytest.raises(torch.OutOfMemoryError, match=r"micro-batch of 1 rows does not fit.*embed_chunk"):
            training_step(trainer, [pairs[0], pairs[1]])


# --- NaN weights


def test_encoding_with_weights_that_are_not_finite_is_refused_by_name(tiny: tuple) -> None:
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    batch = processor(text=["Huế"], return_tensors="pt")
    model.projection.dense.weight.data[0, 0] = torch.nan
    with torch.no_grad(), pytest.raises(FloatingPointError, match=r"1 weights.*'projection.dense.weight'"):
        model(**batch)
    assert not model(**batch).embeddings.isfinite().all()  # training names the rows
