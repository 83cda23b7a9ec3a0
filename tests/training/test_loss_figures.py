"""Figures for the log: moved to the host when they are logged, and the same as when they were moved at every step."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, build_trainer, train_run
from torch.utils._python_dispatch import TorchDispatchMode

from vipolyqwen.training.loss_figures import LossFigures
from vipolyqwen.training.losses import LOSS_TABLES
from vipolyqwen.training.mixed_loss import MixedLoss

KINDS = ("loss/", "weight/", "share/", "gradient_", "temperature")


class CountTransfers(TorchDispatchMode):
    """Counts numbers that python reads from tensors, each of which would wait for an accelerator."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_figures_are_averaged_when_they_are_logged(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = []
    average = LossFigures.average
    monkeypatch.setattr(
        LossFigures, "average", lambda self, batches: averaged.append(len(batches)) or average(self, batches)
    )
    flags = [*PLAIN, "--save_strategy", "no", "--max_steps", "4", "--monitor_steps", "3", "--prefix_dropout", "0"]
    flags += ["--learnable_temperature", "true", "--per_device_train_batch_size", "3"]  # not every task in each batch
    each = [entry for entry in train_run(world, tmp_path / "each", *flags) if "loss" in entry]
    joint = [entry for entry in train_run(world, tmp_path / "two", *flags, "--logging_steps", "2") if "loss" in entry]
    assert averaged == [1, 1, 1, 1, 2, 2]
    for number, entry in enumerate(joint):
        parts = each[2 * number : 2 * number + 2]
        names = {name for part in parts for name in part if name.startswith(KINDS)}
        assert {name for name in entry if name.startswith(KINDS)} == names
        for name in names:
            values = [part[name] for part in parts if name in part]
            assert entry[name] == pytest.approx(sum(values) / len(values), rel=1e-6), name


@pytest.mark.parametrize("weighting", ["none", "table", "gradnorm"])
def test_a_step_reads_few_numbers_from_the_device(world: Path, tmp_path: Path, weighting: str) -> None:
    for name, target in {"base": world / "base", "pairs.jsonl": world / "pairs.jsonl", "media": world}.items():
        (tmp_path / name).symlink_to(target)
    trainer, pairs = build_trainer(tmp_path, "--loss_table", "dle", "--task_weighting", weighting)
    batch = trainer.data_collator(list(pairs))
    embeddings = trainer.embed(trainer.model, batch)
    trainer.embed = lambda *_: embeddings
    with CountTransfers() as transfers:
        trainer.compute_loss(trainer.model, batch)
    known = 3  # of the host: are ids and scores valid, tokens of the batch; of the device: is the loss finite
    assert transfers.count <= known + 6 * (weighting == "gradnorm")  # it looks at which tasks are active


@pytest.mark.parametrize("fault", ["loss", "gram", "weight"])
def test_a_figure_that_is_not_finite_shows_in_the_loss(fault: str) -> None:
    loss = MixedLoss(LOSS_TABLES["dle"])
    unit = torch.eye(3, requires_grad=True)
    output = loss(unit, unit, torch.tensor([1, 2, 1]), torch.full((3,), torch.nan), with_gradients=True)
    assert loss.measure(output)[0].item() == output.loss.item()
    faults = {
        "loss": {"loss": torch.tensor(math.inf)},
        "gram": {"gradient_gram": output.gradient_gram.clone().index_fill_(0, torch.tensor([1]), math.nan)},
        "weight": {"task_weights": output.task_weights.clone().index_fill_(0, torch.tensor([2]), math.inf)},
    }
    assert math.isnan(loss.measure(replace(output, **faults[fault]))[0].item())
