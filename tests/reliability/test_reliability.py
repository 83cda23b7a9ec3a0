"""Faults at random moments, many times: `make test-reliability` (an hour or two), not part of `make test`."""

import errno
import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
from helpers import train_run
from killing import (
    FLAGS,
    SAVED,
    draw_moments,
    kills,
    same_weights,
    start,
    start_ranks,
    train_uninterrupted,
    warm_up,
)
from reliability_record import Record

from vipolyqwen.training import resuming
from vipolyqwen.training.checkpoints import find_faults, list_checkpoints, newest_intact_checkpoint

pytestmark = pytest.mark.reliability

KILLS = int(os.environ.get("RELIABILITY_KILLS", "50"))
SHARDED_KILLS = int(os.environ.get("RELIABILITY_SHARDED_KILLS", "10"))
TERMS = int(os.environ.get("RELIABILITY_TERMS", "10"))
SECONDS_TO_END = 120.0  # of the ranks that are left; gloo sees a closed connection at once
RESUME = ["--resume_from_checkpoint", "true"]
CHECKPOINTS = ["--save_total_limit", "8"]  # later flags win


@pytest.fixture(scope="module")
def record() -> Record:
    """The record of the suite."""
    return Record()


@pytest.fixture(scope="module")
def straight(world: Path) -> tuple[Path, float]:
    """The undisturbed run of one process, and its seconds."""
    return world / "straight", train_uninterrupted(world / "recipe.yaml", world / "straight")


def test_killed_ranks_end_the_others_and_resume_bit_by_bit_the_same(
    world: Path, tmp_path: Path, record: Record
) -> None:
    recipe, straight = world / "recipe.yaml", tmp_path / "straight"
    warm_up()
    begun = time.monotonic()
    for rank in start_ranks(recipe, straight):
        rank.join()
        assert rank.exitcode == 0
    duration = time.monotonic() - begun
    generator, counted = random.Random(5), 0
    for number, moment in enumerate(draw_moments(5)):
        if counted == SHARDED_KILLS:
            break
        output = tmp_path / str(number)
        ranks = start_ranks(recipe, output)
        doomed = generator.choice(ranks)
        doomed.join((0.2 + 0.8 * moment.share) * duration)
        doomed.kill()
        killed = time.monotonic()
        for rank in ranks:
            rank.join(SECONDS_TO_END)
        seconds = time.monotonic() - killed
        assert all(rank.exitcode is not None for rank in ranks), f"a rank was still there after {seconds:.0f} s"
        if doomed.exitcode == 0:  # had ended
            continue
        resumed = start_ranks(recipe, output, *RESUME)
        for rank in resumed:
            rank.join()
        same = all(rank.exitcode == 0 for rank in resumed) and same_weights(straight, output)
        record.add("SIGKILL of one of two ranks under FSDP2", same, seconds=seconds)
        counted += 1
        assert same


def test_terminated_runs_save_and_end_bit_by_bit_the_same(
    world: Path, straight: tuple[Path, float], tmp_path: Path, record: Record
) -> None:
    generator, number, counted = random.Random(5), 0, 0
    while counted < TERMS:
        number += 1
        output = tmp_path / str(number)
        process = start(world / "recipe.yaml", output)
        process.join(generator.uniform(0.3, 1.0) * straight[1])
        process.terminate()  # SIGTERM, unless it has ended
        process.join()
        if process.exitcode in (0, -signal.SIGTERM):  # had ended, or had not begun to train
            continue
        assert process.exitcode == 143 and not find_faults(newest_intact_checkpoint(output))
        process = start(world / "recipe.yaml", output, *RESUME)
        process.join()
        same = process.exitcode == 0 and same_weights(straight[0], output)
        record.add("SIGTERM", same)
        counted += 1
        assert same


def test_a_full_disk_at_every_checkpoint_costs_nothing(
    world: Path, straight: tuple[Path, float], tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = resuming.publish_checkpoint

    def full(written: Path, final: Path) -> None:
        if not (tmp_path / f"room-for-{final.name}").exists():
            (tmp_path / f"room-for-{final.name}").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(written, final)

    monkeypatch.setattr(resuming, "publish_checkpoint", full)
    for number, step in enumerate(SAVED):
        before = list_checkpoints(tmp_path / "run")
        with pytest.raises(OSError, match=f"checkpoint-{step} cannot be saved"):
            train_run(world, tmp_path / "run", *FLAGS, *CHECKPOINTS, *(RESUME if number else []))
        kept = [folder for folder in list_checkpoints(tmp_path / "run") if not find_faults(folder)]
        record.add("disk full while a checkpoint is saved", set(before) <= set(kept), len(set(before) - set(kept)))
    train_run(world, tmp_path / "run", *FLAGS, *CHECKPOINTS, *RESUME)
    assert same_weights(straight[0], tmp_path / "run")


def test_a_flipped_byte_in_any_file_is_found(
    world: Path, straight: tuple[Path, float], tmp_path: Path, record: Record
) -> None:
    train_run(world, tmp_path, *FLAGS, *CHECKPOINTS)
    before, newest = list_checkpoints(tmp_path)[-2:]
    generator = random.Random(5)
    for path in sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size):
        place = generator.randrange(path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << generator.randrange(8)
        original = path.read_bytes()
        path.write_bytes(content)
        found = newest_intact_checkpoint(tmp_path) == before
        record.add("one bit of a checkpoint's file flipped", found)
        path.write_bytes(original)
        assert found, path.name
    assert newest_intact_checkpoint(tmp_path) == newest


def test_killed_runs_end_bit_by_bit_the_same(
    world: Path, straight: tuple[Path, float], tmp_path: Path, record: Record
) -> None:
    for left, resumed in islice(kills(world / "recipe.yaml", tmp_path, 5, straight[1]), KILLS):
        same = same_weights(straight[0], resumed)
        record.add("SIGKILL of one process", same)
        assert same, left
