"""Restores optimizer, schedule and loss of a checkpoint into a run with some other settings, which then apply."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Settings -> the state of the loss that starts anew when they change.
LOSS_SETTINGS = {
    "log_temperatures": {"temperature", "learnable_temperature"},
    "weighting": {"task_weighting", "task_weighting_options", "tasks"},
    "distillation": {"distil", "teacher", "teacher_prompt"},
}


def restore_by_name(
    optimizer: AcceleratedOptimizer,
    scheduler: LRScheduler,
    checkpoint: Path,
    before: list[list[str]],
    now: list[list[str]],
    with_state: bool,
) -> None:
    """Restores the moments of each parameter and the step of the schedule; groups and rates are the new ones.

    Args:
        optimizer: the new optimizer.
        scheduler: its new schedule.
        checkpoint: folder with the states.
        before: names of the parameters in each group of the checkpoint's optimizer.
        now: the same of `optimizer`.
        with_state: whether the moments fit; otherwise they start at zero.

    Raises:
        ValueError: the optimizer's state in the checkpoint does not have the parameters of `before`.
    """
    saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(names) for names in before]:
        raise ValueError(f"{checkpoint / OPTIMIZER_NAME} has groups of {sizes} parameters, not those of its settings.")
    places = {
        name: place
        for group, names in zip(saved["param_groups"], before, strict=True)
        for name, place in zip(names, group["params"], strict=True)
    }
    fresh = optimizer.state_dict()
    state = {}
    for group, names in zip(fresh["param_groups"], now, strict=True):
        for place, name in zip(group["params"], names, strict=True):
            if with_state and places.get(name) in saved["state"]:
                state[place] = saved["state"][places[name]]
    optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})
    rates = [group["lr"] / group["initial_lr"] for group in saved["param_groups"] if group.get("initial_lr")]
    restore_schedule(scheduler, checkpoint, rates[0] if rates else 1.0)


def restore_schedule(scheduler: LRScheduler, checkpoint: Path, rate: float) -> None:
    """Moves a new schedule to the step of the checkpoint and sets the rates of that step.

    Args:
        scheduler: the new schedule, of an optimizer with the new rates.
        checkpoint: folder with the former schedule.
        rate: the former rate over the initial one, for a schedule that no step determines.
    """
    state = torch.load(checkpoint / SCHEDULER_NAME, map_location="cpu", weights_only=True)
    step = state.get("last_epoch", 0)
    scheduler.last_epoch = step
    groups = scheduler.optimizer.param_groups
    factors = [rate] * len(groups)
    if isinstance(scheduler, LambdaLR):
        scheduler._step_count = step + 1
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        factors = [factor(step) for factor in scheduler.lr_lambdas]
    for group, factor in zip(groups, factors, strict=True):
        group["lr"] = group.get("initial_lr", group["lr"]) * factor
    scheduler._last_lr = [group["lr"] for group in groups]


def restore_rates(optimizer: AcceleratedOptimizer, fresh: list[dict[str, Any]]) -> None:
    """Gives the groups of a restored optimizer the rates and other values of the new one; the groups are the same."""
    for group, values in zip(optimizer.param_groups, fresh, strict=True):
        group.update(values)


def group_values(optimizer: AcceleratedOptimizer) -> list[dict[str, Any]]:
    """Copies the values of each group, its parameters left out."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def fitting_state(
    part: str, module: nn.Module, saved: Mapping[str, Tensor], changed: Collection[str], path: Path
) -> dict[str, Tensor]:
    """Returns the state to load into the loss: the saved one, but the present one where settings have changed.

    Args:
        part: what the state is, for the error.
        module: the loss of this run.
        saved: its state in the checkpoint.
        changed: names of the settings that have changed.
        path: file of the state, for the error.

    Raises:
        ValueError: the states do not fit though no setting has changed, as far as the checkpoint tells.
    """
    own = module.state_dict()
    anew = tuple(name for name, settings in LOSS_SETTINGS.items() if settings & set(changed))
    kept = {name: value for name, value in saved.items() if not name.startswith(anew)} if anew else dict(saved)
    wanted = {name for name in own if not (anew and name.startswith(anew))}
    shapes = {name for name in wanted & kept.keys() if own[name].shape != kept[name].shape}
    odd = sorted((wanted ^ kept.keys()) | shapes)
    if odd:
        raise ValueError(
            f"{path} holds the {part} of another loss than this run has: {', '.join(odd)} differ. Resume it with the "
            "`temperature`, `learnable_temperature`, `task_weighting`, `distil` and `tasks` of its run, or start a "
            f"new run from its weights with `--model {path.parent}`."
        )
    if anew:
        logger.warning(f"The state of {', '.join(anew)} starts anew, since its settings have changed.")
    return {name: kept[name] if name in kept else value for name, value in own.items()}
