"""Training in batches that are filled to a budget of tokens and pixels."""

import json
from pathlib import Path

import pytest
import torch
from helpers import build_trainer, save_tiny_model, train_run, write_world
from safetensors.torch import load_file

from vipolyqwen.data.budget import BudgetBatches
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.resuming import SAMPLER_STATE

BUDGETS = ["--batch_tokens", "60", "--per_device_train_batch_size", "8"]
PLAIN = ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_steps", "1"]
EPOCHS = ["--max_steps", "-1", "--num_train_epochs", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")).parent


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """An undisturbed run of two epochs, and its log."""
    output = tmp_path_factory.mktemp("straight")
    return output, train_run(world, output, *PLAIN, *EPOCHS, *BUDGETS)


def places(output: Path) -> dict[int, tuple[int, int]]:
    """Epoch and row after each step of which there is a checkpoint."""
    found = {}
    for file in output.glob(f"checkpoint-*/{SAMPLER_STATE}"):
        place = json.loads(file.read_text(encoding="utf-8"))
        found[place["step"]] = (place["epoch"], place["row"])
    return dict(sorted(found.items()))


def test_a_run_over_epochs_takes_every_batch_of_each(straight: tuple[Path, list[dict]]) -> None:
    output, log = straight
    steps = max(entry["step"] for entry in log)
    visited = places(output)
    assert visited[steps] == (2, 0) and (1, 0) in visited.values()
    assert 10 < steps < 64  # 64 rows in two epochs, several in a batch
    rows = [row for epoch, row in visited.values() if epoch == 0]
    assert len({after - before for before, after in zip(rows, rows[1:], strict=False)}) > 1  # of different sizes
    assert log[-1]["epoch"] == 2.0


@pytest.mark.parametrize("step", [3, -2])
def test_a_run_resumed_in_an_epoch_ends_with_the_same_weights(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path, step: int
) -> None:
    number = list(places(straight[0]))[step]
    flags = ["--resume_from_checkpoint", str(straight[0] / f"checkpoint-{number}")]
    log = train_run(world, tmp_path, *PLAIN, *EPOCHS, *BUDGETS, *flags)
    assert max(entry["step"] for entry in log) == max(entry["step"] for entry in straight[1])
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path, straight[0]))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_budget_applies_from_the_row_of_the_checkpoint_on(
    world: Path, straight: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    flags = ["--resume_from_checkpoint", str(straight[0] / "checkpoint-3"), "--batch_tokens", "1000"]
    log = train_run(world, tmp_path, *PLAIN, *EPOCHS, *BUDGETS[2:], *flags)
    left = 32 - places(straight[0])[3][1]
    assert max(entry["step"] for entry in log) == 3 + -(-left // 8) + 4  # 8 rows in a batch from there on


def test_steps_bound_a_run_however_many_batches_its_epochs_have(world: Path, tmp_path: Path) -> None:
    log = train_run(world, tmp_path, *PLAIN, "--save_strategy", "no", "--max_steps", "37", *BUDGETS)
    assert max(entry["step"] for entry in log) == 37


def test_a_pair_counts_the_same_in_batches_of_different_sizes(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    rows = [{"task": "instr", "a": f"hỏi {number}", "b": f"đáp {number}"} for number in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ["--batch_tokens", "100", "--gradient_accumulation_steps", "2", "--loss_table", "nce"]
    trainer, pairs = build_trainer(tmp_path, *flags)
    assert isinstance(trainer._get_train_batches(), BudgetBatches)
    batches = [trainer.data_collator(pairs.__getitems__(rows)) for rows in ([0, 1, 6, 7, 12, 13], [2, 3])]
    trainer.current_gradient_accumulation_steps = 2
    plain = [trainer.compute_loss(trainer.model, batch).item() for batch in batches]
    total = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert total == 8
    weighted = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=total).item() for batch in batches]
    assert sum(weighted) / 2 == pytest.approx((6 * plain[0] + 2 * plain[1]) / 8)  # the stock loop divides by 2
    assert trainer._get_num_items_in_batch(batches[:1], torch.device("cpu")) is None


def test_rows_beyond_a_budget_are_counted(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from transformers.utils import logging as library

    library.enable_propagation()
    with caplog.at_level(logging.WARNING):
        train_run(world, tmp_path, *PLAIN, "--batch_pixels", "100", "--max_steps", "1")
    library.disable_propagation()
    assert "of 32 rows have more than the 100 pixels of `batch_pixels`" in caplog.text


@pytest.mark.parametrize("name", ["batch_tokens", "batch_pixels"])
def test_a_budget_below_one_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is 0; give a number of .* >= 1"):
        read_arguments(["--model", "x", "--output_dir", "y", f"--{name}", "0"])
