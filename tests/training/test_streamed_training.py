"""Training on sources that are streamed: steps, resume, bad rows, and settings that need all rows."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TEXTS, run_on_two_ranks, save_tiny_model, train_run
from safetensors.torch import load_file

from vipolyqwen.train_vipolyqwen import main as train_main
from vipolyqwen.training.resuming import SAMPLER_STATE

ROWS = 40
PLAIN = ["--eval_strategy", "no", "--save_steps", "1", "--logging_steps", "1", "--max_steps", "6"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    save_tiny_model(folder / "base")
    for shard in range(2):
        rows = [{"a": f"{row} {TEXTS[row % 4]}", "b": f"{shard} đáp {row}"} for row in range(ROWS)]
        (folder / f"part-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {"path": str(folder / "part-*.jsonl"), "task": "instr", "streaming": True, "shuffle_buffer": 16}
    recipe = {"model": str(folder / "base"), "train_data": [source], "per_device_train_batch_size": 4}
    recipe |= {"learning_rate": 1e-3, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with two data workers."""
    output = tmp_path_factory.mktemp("straight")
    train_run(world, output, *PLAIN, "--dataloader_num_workers", "2")
    return output


def assert_same_weights(found: Path, wanted: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_ends_with_the_same_weights(world: Path, straight: Path, tmp_path: Path, step: int) -> None:
    flags = ["--dataloader_num_workers", "2", "--resume_from_checkpoint", str(straight / f"checkpoint-{step}")]
    log = train_run(world, tmp_path, *PLAIN, *flags)
    assert max(entry["step"] for entry in log) == 6
    assert_same_weights(tmp_path, straight)
    place = json.loads((tmp_path / "checkpoint-6" / SAMPLER_STATE).read_text(encoding="utf-8"))
    assert place["row"] == 24 and [each["worker"] for each in place["streams"][0]] == [0, 1]


def test_another_number_of_data_workers_is_refused_and_another_accumulation_continues(
    world: Path, straight: Path, tmp_path: Path
) -> None:
    flags = ["--resume_from_checkpoint", str(straight / "checkpoint-3")]
    with pytest.raises(ValueError, match=r"'workers': 2.*'workers': 1.*as many ranks and data workers"):
        train_run(world, tmp_path, *PLAIN, *flags)
    flags += ["--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"]
    train_run(world, tmp_path, *PLAIN, *flags)
    place = json.loads((tmp_path / "checkpoint-5" / SAMPLER_STATE).read_text(encoding="utf-8"))
    drawn = sum(each["drawn"] for each in place["streams"][0])
    assert drawn == 4 * (3 + 2 * 2)  # rows of three batches before, and of two steps of two


def train_on_rank(rank: int, world: Path, output: Path) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    main = ["--output_dir", str(output), *PLAIN, "--max_steps", "4", "--on_bad_row", "skip", "--max_bad_rows", "1.0"]
    sources = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))["train_data"]
    main += ["--train_data", json.dumps([{**sources[0], "path": str(output.parent / "part-*.jsonl")}])]
    train_main([str(world / "recipe.yaml"), *main])
    train_main([str(world / "recipe.yaml"), *main, "--max_steps", "5", "--resume_from_checkpoint", "true"])


def test_two_ranks_read_other_shards_and_resume_with_their_bad_rows(world: Path, tmp_path: Path) -> None:
    for shard in range(2):  # every other row is bad
        rows = [{"a": f"{row}" if row % 2 else "", "b": f"{shard} {row}"} for row in range(ROWS)]
        (tmp_path / f"part-{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run_on_two_ranks(train_on_rank, tmp_path, world, tmp_path / "out")
    place = json.loads((tmp_path / "out" / "checkpoint-5" / SAMPLER_STATE).read_text(encoding="utf-8"))
    assert place["row"] == 5 * 2 * 4
    assert [rank[0]["drawn"] for rank in place["streams"]] == [20, 20]
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    bad = place["bad_rows"]["rows"]  # of both ranks, each its shard: all, since blocks of 16 were read
    counts = {entry["step"]: entry["bad_rows"] for entry in log}
    assert len({(row["file"], row["row"]) for row in bad}) == len(bad) == counts[5] >= counts[4] > 10
    assert {row["file"][-1] for row in bad} == {"0", "1"} and place["bad_rows"]["seen"] == 5 * 2 * 4


def test_bad_rows_are_counted_and_limited(world: Path, tmp_path: Path) -> None:
    good = (world / "part-0.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*good[:3], json.dumps({"a": "", "b": "x"})]), encoding="utf-8")
    source = {"path": str(tmp_path / "bad.jsonl"), "task": "instr", "streaming": True}
    flags = ["--train_data", json.dumps([source]), "--on_bad_row", "skip"]
    log = train_run(world, tmp_path / "out", *PLAIN, *flags)
    assert log[-1]["bad_rows"] == 1 and log[-1]["bad_rows/invalid a"] == 1
    with pytest.raises(ValueError, match=r"of 1001 rows cannot be used|of 1000 rows cannot be used"):
        train_run(world, tmp_path / "none", *PLAIN, *flags, "--max_bad_rows", "0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "-1"], "`max_steps` is -1, but the train_data is streamed"),
        (["--batching", "homogeneous"], "`batching` is 'homogeneous', which needs all rows beforehand"),
        (["--batch_tokens", "99"], "`batch_tokens` is 99"),
        (["--distil", "1.0", "--teacher", "x"], "`distil` needs all rows beforehand"),
    ],
)
def test_settings_that_need_all_rows_are_refused(world: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_run(world, tmp_path, *PLAIN, *flags)


def test_the_record_says_that_the_rows_were_streamed(straight: Path) -> None:
    record = json.loads((straight / "training.json").read_text(encoding="utf-8"))
    assert [(each["name"], each["rows"]) for each in record["train_data"]] == [("part-*.jsonl", None)]
