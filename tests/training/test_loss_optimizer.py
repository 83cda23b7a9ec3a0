"""The optimizer of what the loss learns: in step with that of the model, whatever scales the loss or skips a step."""

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import train_run
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainerState, get_scheduler

from vipolyqwen.training.arguments import ViPolyQwenTrainingArguments, read_arguments
from vipolyqwen.training.loss_optimizer import LossOptimizer
from vipolyqwen.training.losses import TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss
from vipolyqwen.training.weighting import UncertaintyWeighting

LEARNED = ["--learnable_temperature", "true", "--task_weighting", "uncertainty", "--loss_learning_rate", "0.1"]
BRIEF = ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--save_steps", "1", "--max_steps", "3"]


def learning_loss() -> MixedLoss:
    """A loss with a temperature and two uncertainties to learn."""
    tasks = {"ocr": TaskLoss(nce=1.0), "audio": TaskLoss(nce=1.0)}
    return MixedLoss(tasks, weighting=UncertaintyWeighting(list(tasks)), learnable_temperature=True)


def arguments(*flags: str) -> ViPolyQwenTrainingArguments:
    given = ["--model", "x", "--output_dir", "x", "--use_cpu", "true", "--report_to", "none", *flags]
    return read_arguments(given)[3]


def take_step(loss_optimizer: LossOptimizer, args: ViPolyQwenTrainingArguments, optimizer: object) -> None:
    loss_optimizer.on_optimizer_step(args, TrainerState(), TrainerControl(), optimizer=optimizer)


@pytest.mark.parametrize("rates", [("0.1", "0.001"), ("0.003", "0.5")])
def test_steps_are_those_of_one_optimizer_for_model_and_loss(rates: tuple[str, str]) -> None:
    args = arguments("--loss_learning_rate", rates[0], "--learning_rate", rates[1], "--adam_beta2", "0.9")
    apart, joint = (learning_loss() for _ in range(2))
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    options = {"betas": (0.9, 0.9), "eps": args.adam_epsilon, "weight_decay": 0.0}
    own = {"params": list(joint.parameters()), "lr": float(rates[0])}
    optimizers = [
        torch.optim.AdamW([{"params": [weights[0]]}], lr=float(rates[1]), **options),
        torch.optim.AdamW([{"params": [weights[1]]}, own], lr=float(rates[1]), **options),
    ]
    optimizers[0] = Accelerator(cpu=True).prepare(optimizers[0])
    schedules = [get_scheduler("linear", optimizer, 2, 6) for optimizer in optimizers]
    loss_optimizer = LossOptimizer(apart, args)
    for step in range(5):
        for loss, weight in zip((apart, joint), weights, strict=True):
            numbers = [weight, *loss.parameters()]
            sum((number * math.cos(step + place)).square().sum() for place, number in enumerate(numbers)).backward()
        for optimizer in optimizers:
            optimizer.step()
        take_step(loss_optimizer, args, optimizers[0])
        for schedule, optimizer in zip(schedules, optimizers, strict=True):
            schedule.step()
            optimizer.zero_grad()
        for found, wanted in zip(apart.parameters(), joint.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)
    assert (apart.log_temperatures - math.log(0.07)).abs() > 2 * float(rates[0])


def test_what_is_saved_brings_back_every_moment() -> None:
    args = arguments("--learning_rate", "0.1")
    losses = [learning_loss()]
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
    loss_optimizers = [LossOptimizer(losses[0], args)]
    for step in range(4):
        if step == 2:
            losses.append(copy.deepcopy(losses[0]))
            loss_optimizers.append(LossOptimizer(losses[1], args))
            loss_optimizers[1].load_state_dict(copy.deepcopy(loss_optimizers[0].state_dict()))
        for loss, loss_optimizer in zip(losses, loss_optimizers, strict=True):
            (loss.log_temperatures.sum() * (step - 1.7)).backward()  # the uncertainties have no gradient yet
            take_step(loss_optimizer, args, optimizer)
    assert torch.equal(losses[0].log_temperatures, losses[1].log_temperatures)
    states = [loss_optimizer.state_dict() for loss_optimizer in loss_optimizers]
    assert states[0] == states[1] and sorted(states[0]) == [
        f"log_temperatures.{name}" for name in ("exp_avg", "exp_avg_sq", "step")
    ]


# --- in a run


@pytest.fixture
def scaler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that scale the loss as Accelerate does for float16, which it does on GPUs alone."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_scaler(self: Trainer) -> None:
        create(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", **request.param)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_with_scaler)


def learned(folder: Path) -> dict[str, Tensor]:
    """What the loss has learned, and the moments."""
    state = load_file(folder / "loss_state.safetensors")
    return {name: value for name, value in state.items() if name.startswith(("loss.", "optimizer."))}


@pytest.fixture(scope="module")
def unscaled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of up to three batches."""
    output = tmp_path_factory.mktemp("unscaled")
    train_run(world, output, *BRIEF, *LEARNED, *ACCUMULATED)
    return output


ACCUMULATED = ["--gradient_accumulation_steps", "3", "--max_grad_norm", "0"]  # 4 batches an epoch: 3, 1, 3
ACCUMULATED += ["--head_learning_rate", "0.004"]


def test_parts_of_the_model_with_rates_of_their_own_leave_the_rate_of_the_loss_alone(unscaled: Path) -> None:
    moved = learned(unscaled / "checkpoint-1")["loss.log_temperatures"] - math.log(0.07)
    assert moved.abs().item() == pytest.approx(0.1, rel=1e-3)  # AdamW's first step is as long as its rate


@pytest.mark.parametrize("scaler", [{"init_scale": 2.0**16, "growth_interval": 1}], indirect=True)
def test_scaling_the_loss_for_float16_does_not_change_what_it_learns(
    world: Path, unscaled: Path, tmp_path: Path, scaler: None
) -> None:
    train_run(world, tmp_path, *BRIEF, *LEARNED, *ACCUMULATED)
    for step in (1, 2, 3):
        found, wanted = (learned(folder / f"checkpoint-{step}") for folder in (tmp_path, unscaled))
        assert found.keys() == wanted.keys() and len(found) == 2 + 2 * 3
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("scaler", [{"init_scale": 2.0**127, "backoff_factor": 2.0**-110}], indirect=True)
def test_a_step_whose_gradients_overflow_teaches_the_loss_nothing(
    world: Path, tmp_path: Path, scaler: None, optimizer: str
) -> None:
    train_run(world, tmp_path, *BRIEF, *LEARNED, "--optim", optimizer)
    one, two = (learned(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    assert one["loss.log_temperatures"].item() == pytest.approx(math.log(0.07))
    assert not one["loss.weighting.log_variances"].any() and len(one) == 2
    assert (two["loss.log_temperatures"] - one["loss.log_temperatures"]).abs() > 0.05
    assert two["optimizer.log_temperatures.step"] == 1
