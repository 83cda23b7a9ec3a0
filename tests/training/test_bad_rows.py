"""Bad rows that are skipped: a resumed run counts them as the undisturbed one does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import random_image, save_tiny_model, train_run

from vipolyqwen.data.sources import SHOWN, BadRow
from vipolyqwen.training.bad_rows import ReplacedRows
from vipolyqwen.training.checkpoints import MANIFEST, publish_checkpoint
from vipolyqwen.training.resuming import SAMPLER_STATE

STEPS, CUT = 4, 2
FLAGS = ["--max_steps", str(STEPS), "--eval_strategy", "no", "--save_steps", "1", "--logging_steps", "1"]
FLAGS += ["--on_bad_row", "skip", "--check_media", "none", "--task_weighting", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Streamed rows, every other bad; indexed rows, one of them bad and seven with an image that is unreadable."""
    folder = tmp_path_factory.mktemp("bad")
    save_tiny_model(folder / "base")
    for shard in range(2):
        rows = [{"a": f"hỏi {row}" if row % 2 else "", "b": f"{shard} đáp {row}"} for row in range(40)]
        (folder / f"part-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    random_image(np.random.default_rng(0)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"")
    rows = [{"a": f"{row}", "b": f"{row}", "images": "good.png" if row % 3 else "bad.png"} for row in range(20)]
    text = "\n".join(map(json.dumps, [*rows, {**rows[0], "b": ""}]))
    (folder / "pictures.jsonl").write_text(text, encoding="utf-8")
    recipe = {"model": str(folder / "base"), "per_device_train_batch_size": 2, "max_bad_rows": 1.0}
    recipe |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def data_of(world: Path, kind: str) -> list[str]:
    streamed = {"path": str(world / "part-*.jsonl"), "task": "instr", "streaming": True, "shuffle_buffer": 2}
    indexed = {"path": str(world / "pictures.jsonl"), "task": "ocr"}
    return ["--train_data", json.dumps([streamed if kind == "streamed" else indexed])]


def counts(log: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Returns the bad rows that each step has logged."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("bad_rows")} for entry in log
    }


def found_in(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / SAMPLER_STATE).read_text(encoding="utf-8"))["bad_rows"]


@pytest.mark.parametrize("kind", ["streamed", "indexed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_counts_and_examples_of_the_undisturbed_one(
    world: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    flags = [*FLAGS, *data_of(world, kind), "--dataloader_num_workers", str(workers)]
    straight = counts(train_run(world, tmp_path / "straight", *flags))
    assert 0 < straight[CUT]["bad_rows"] < straight[STEPS]["bad_rows"]  # some on either side of the cut
    checkpoint = tmp_path / "straight" / f"checkpoint-{CUT}"
    resumed = counts(train_run(world, tmp_path / "resumed", *flags, "--resume_from_checkpoint", str(checkpoint)))
    assert resumed == straight
    ends = [found_in(tmp_path / run / f"checkpoint-{STEPS}") for run in ("straight", "resumed")]
    assert ends[0] == ends[1] and ends[0]["seen"] == 2 * STEPS


def test_the_limit_counts_what_was_bad_before_and_earlier_checkpoints_begin_anew(world: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, *data_of(world, "indexed")]
    straight = counts(train_run(world, tmp_path / "straight", *flags, "--max_steps", "3"))
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    most = straight[2]["bad_rows"] / 21  # the share is reached, and a row more is too many
    earlier = tmp_path / "earlier" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST))
    place = json.loads((tmp_path / "copy" / SAMPLER_STATE).read_text(encoding="utf-8"))
    del place["bad_rows"]
    (tmp_path / "copy" / SAMPLER_STATE).write_text(json.dumps(place), encoding="utf-8")
    earlier.parent.mkdir()
    publish_checkpoint(tmp_path / "copy", earlier)
    resume = ["--max_bad_rows", str(most), "--resume_from_checkpoint"]
    with pytest.raises(ValueError, match=rf"{straight[2]['bad_rows'] + 1:.0f} of 21 rows .*`max_bad_rows`"):
        train_run(world, tmp_path / "limited", *flags, *resume, str(checkpoint))
    train_run(world, tmp_path / "old", *flags, "--max_steps", "3", *resume, str(earlier))


def test_a_checkpoint_holds_the_problems_of_the_rows_that_an_error_lists() -> None:
    rows = [BadRow("f", row, None, "cause", "problem") for row in range(SHOWN + 2)]
    found = ReplacedRows(1.0, 100, rows[:1])
    found.add(rows, 30)
    again = ReplacedRows(1.0, 100, ())
    again.restore(json.loads(json.dumps(found.state())))
    problems = [row["problem"] for row in again.state()["rows"]]
    assert problems == ["problem"] * SHOWN + [""] and again.seen == 30
    assert found.summary()["bad_rows"] == SHOWN + 2 and again.summary()["bad_rows"] == SHOWN + 1
