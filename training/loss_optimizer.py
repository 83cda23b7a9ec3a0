"""Optimizer of the learnable loss parameters: temperatures and log-variances.

Learnable loss parameters are replicated on every rank and use a separate AdamW, with any launcher: the optimizer of a
sharded model accepts no other parameters (FSDP2 finds shards by their names in the model, DeepSpeed steps its own).
The mean over ranks of their gradients is that of the joined batch.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import TrainerCallback

from .arguments import ViPolyQwenTrainingArguments


class LossOptimizer(TrainerCallback):
    """AdamW without weight decay that steps after each step of the model, with the model's learning-rate schedule.

    Args:
        loss: module whose parameters to train; may have none.
        args: `loss_learning_rate`, and AdamW's betas and epsilon.
    """

    def __init__(self, loss: nn.Module, args: ViPolyQwenTrainingArguments) -> None:
        self.parameters = dict(loss.named_parameters())
        self.rate = args.learning_rate if args.loss_learning_rate is None else args.loss_learning_rate
        self.adamw = torch.optim.AdamW(
            [{"params": list(self.parameters.values())}],
            lr=self.rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )
        self.model_rate = args.learning_rate  # highest of all parameter groups, before any schedule
        self._scale: Tensor | float = 1.0  # of the loss in the last backward
        self._scale_before_step = 1.0  # Accelerate's loss scale, lowered when a step is skipped

    def watch(self, loss: Tensor, batches: int) -> None:
        """Measures the loss scale during the backward: of Accelerate or DeepSpeed for float16, otherwise 1.

        Args:
            loss: of one batch.
            batches: number of batches in a step, over which the loss is averaged.
        """

        def measure(grad: Tensor) -> None:
            self._scale = grad / (torch.ones_like(grad) / batches)  # exactly 1 or a power of two in floating point

        if self.parameters and loss.requires_grad:
            loss.register_hook(measure)

    def on_pre_optimizer_step(
        self,
        args: ViPolyQwenTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: AcceleratedOptimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Records the loss scale, which tells afterwards whether the model's step was skipped."""
        if optimizer is not None and optimizer.scaler is not None:
            self._scale_before_step = optimizer.scaler.get_scale()

    def on_optimizer_step(
        self,
        args: ViPolyQwenTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: AcceleratedOptimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Steps, unless the model's step was skipped because its gradients overflowed float16."""
        if optimizer is not None and not self._was_skipped(optimizer):
            if self.model_rate:  # at rate 0 the model is frozen and has no schedule to follow
                highest = max(group["lr"] for group in optimizer.param_groups)
                self.adamw.param_groups[0]["lr"] = self.rate * highest / self.model_rate
            for parameter in self.parameters.values():
                if parameter.grad is not None:  # a rank may have the gradient of its rows alone, see `MixedLoss`
                    parameter.grad = reduce(parameter.grad / self._scale, reduction="mean")
            self.adamw.step()
        self.zero_grad()

    def _was_skipped(self, optimizer: AcceleratedOptimizer) -> bool:
        """Returns whether the model's step was skipped; a fused AdamW skips without setting `step_was_skipped`."""
        scaler = optimizer.scaler
        return optimizer.step_was_skipped or (scaler is not None and scaler.get_scale() < self._scale_before_step)

    def zero_grad(self) -> None:
        """Removes the gradients, so that the next step changes neither parameters nor moments."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the moments, as `PARAMETER.MOMENT`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restores the output of `state_dict`, of the parameters that this run has."""
        names = list(self.parameters)
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for entry, value in saved.items():
            name, _, key = entry.rpartition(".")
            if name in names:
                state[names.index(name)][key] = value
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": dict(state)})
