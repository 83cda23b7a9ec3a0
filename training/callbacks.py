"""Callbacks: throughput, skipped updates, the progress bar."""

import time
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from .balance import task_means
from .loss_optimizer import LossOptimizer


class RateCallback(TrainerCallback):
    """Measures pairs and tokens per second."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.pairs, self.tokens, self.since = 0, 0, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._reset()

    def count(self, pairs: int, inputs: dict[str, Any]) -> None:
        """Adds one batch: pairs of all ranks, tokens of this rank."""
        self.pairs += pairs
        self.tokens += int(inputs["attention_mask"].sum())

    def rates(self) -> dict[str, float]:
        """Returns pairs (of all ranks) and tokens (of this rank) per second since the last call."""
        seconds = time.perf_counter() - self.since
        rates = {"pairs_per_second": self.pairs / seconds, "tokens_per_second": self.tokens / seconds}
        self._reset()
        return rates


class DiscardCallback(TrainerCallback):
    """Skips the update of a step whose loss was not finite, and counts such steps.

    Args:
        loss_optimizer: optimizer of the learnable loss parameters, which steps after that of the model.
    """

    def __init__(self, loss_optimizer: LossOptimizer) -> None:
        self.loss_optimizer = loss_optimizer
        self.pending = False
        self.count = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Drops the gradients, so that the optimizer changes neither weights nor moments."""
        if self.pending and optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
            self.loss_optimizer.zero_grad()
            self.pending = False
            self.count += 1


class CompactProgressCallback(ProgressCallback):
    """The stock progress bar, with loss, throughput and balance as postfix in place of a printed dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows a selection; log history and `report_to` have all values."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['pairs_per_second']:.0f} pairs/s, "
                f"{logs['tokens_per_second']:.0f} tokens/s{balance(logs)}"
            )
        elif any(name.startswith("eval_") for name in logs):
            shown = {name: value for name, value in logs.items() if name.endswith(("recall@1", "spearman"))}
            line = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in sorted(shown.items()))
            self.training_bar.write(f"step {state.global_step}: {line}")


def balance(logs: dict[str, float]) -> str:
    """Formats the ratio of largest to smallest gradient share and the task with the smallest; "" if not measured."""
    shares = task_means([logs], "gradient_share")
    if len(shares) < 2 or not min(shares.values()):
        return ""
    least = min(shares, key=shares.__getitem__)
    return f", balance {max(shares.values()) / shares[least]:.1f}× ({least})"
