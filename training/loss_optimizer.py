"""The optimizer of what the loss itself learns: temperatures, log-variances.

Where a model is spread over processes, its optimizer takes no other parameters: FSDP2 finds their pieces by names in
the model, DeepSpeed owns and steps them. So these few numbers have an optimizer of their own, the same in every way to
launch. Each process has them whole, and their whole gradient too, as it computes the loss of the joined batch.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import TrainerCallback

from .arguments import ViPolyQwenTrainingArguments


class LossOptimizer(TrainerCallback):
    """AdamW without weight decay, which takes a step after each that the model takes, by the schedule of the model.

    Args:
        loss: what to train the parameters of; it may have none.
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
        self.model_rate = args.learning_rate  # the highest of the model's parts before any schedule
        self._scale: Tensor | float = 1.0  # of the loss in the last backward
        self._scale_before_step = 1.0  # what Accelerate scales by, which it lowers when it leaves a step out

    def watch(self, loss: Tensor, batches: int) -> None:
        """Finds out in the backward by how much it is scaled: for float16 by Accelerate or by DeepSpeed, else by 1.

        Args:
            loss: of one batch.
            batches: how many batches a step has, over which the loss is averaged.
        """

        def measure(grad: Tensor) -> None:
            self._scale = grad / (torch.ones_like(grad) / batches)  # in floating point exactly 1, or a power of two

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
        """Notes what tells afterwards whether the model's step was left out."""
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
        """The step, unless the model's was left out since its gradients were beyond float16."""
        if optimizer is not None and not self._was_left_out(optimizer):
            if self.model_rate:  # else the model stands still, and has no schedule to follow
                highest = max(group["lr"] for group in optimizer.param_groups)
                self.adamw.param_groups[0]["lr"] = self.rate * highest / self.model_rate
            for parameter in self.parameters.values():
                if parameter.grad is not None:  # kernels that add in any order may differ between processes
                    parameter.grad = broadcast(parameter.grad / self._scale)
            self.adamw.step()
        self.zero_grad()

    def _was_left_out(self, optimizer: AcceleratedOptimizer) -> bool:
        """Whether the model's step was; a fused AdamW leaves it out by itself, and `step_was_skipped` stays False."""
        scaler = optimizer.scaler
        return optimizer.step_was_skipped or (scaler is not None and scaler.get_scale() < self._scale_before_step)

    def zero_grad(self) -> None:
        """Without gradients a step changes neither parameters nor moments."""
        self.adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, as `PARAMETER.MOMENT`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state[parameter].items()
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Puts back what `state_dict` gave."""
        names = list(self.parameters)
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for entry, value in saved.items():
            name, _, key = entry.rpartition(".")
            state[names.index(name)][key] = value
        self.adamw.load_state_dict(self.adamw.state_dict() | {"state": dict(state)})
