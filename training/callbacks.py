"""Callbacks: throughput, skipped updates, the progress bar."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from .balance import share_ratio, solved_tasks, start_losses, task_means
from .loss_optimizer import LossOptimizer


class RateCallback(TrainerCallback):
    """Measures pairs and tokens per second of training; evaluation and saving do not count.

    Tokens are added up on the device, so that no step waits for a transfer to the host.
    """

    def __init__(self) -> None:
        self.total_pairs, self.total_seconds = 0, 0.0  # since training began
        self._reset()

    def _reset(self) -> None:
        self.pairs, self.since, self.paused = 0, time.perf_counter(), 0.0
        self.tokens: torch.Tensor | int = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self.total_pairs, self.total_seconds = 0, 0.0
        self._reset()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock inside the context."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - started

    def count(self, pairs: int, inputs: dict[str, Any]) -> None:
        """Adds one batch: pairs of all ranks, tokens of this rank."""
        self.pairs += pairs
        self.tokens = self.tokens + inputs["attention_mask"].sum()

    def rates(self) -> dict[str, float]:
        """Returns pairs (of all ranks) and tokens (of this rank) per second since the last call."""
        seconds = max(time.perf_counter() - self.since - self.paused, 1e-9)
        rates = {"pairs_per_second": self.pairs / seconds, "tokens_per_second": int(self.tokens) / seconds}
        self.total_pairs, self.total_seconds = self.total_pairs + self.pairs, self.total_seconds + seconds
        self._reset()
        return rates

    def of_run(self, steps: int) -> dict[str, float]:
        """Returns the stock figures of a run, pairs and steps per second, by the time that training took.

        Args:
            steps: optimizer steps of the run.
        """
        self.rates()
        samples, rate = self.total_pairs / self.total_seconds, steps / self.total_seconds
        return {"train_samples_per_second": round(samples, 3), "train_steps_per_second": round(rate, 3)}


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
                f"{logs['tokens_per_second']:.0f} tokens/s{balance(logs, start_losses(_training(state)))}"
            )
        elif any(name.startswith("eval_") for name in logs):
            shown = {name: value for name, value in logs.items() if name.endswith(("recall@1", "spearman"))}
            line = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in sorted(shown.items()))
            self.training_bar.write(f"step {state.global_step}: {line}")


def balance(logs: dict[str, float], start: dict[str, float]) -> str:
    """Formats the ratios of gradient shares, and the task with the smallest share that is not solved.

    Args:
        logs: one log entry.
        start: task -> loss at the start of the run.

    Returns:
        Such as ", balance 19.8× by task, 3.2× by row (ocr)"; "" if no gradients were measured.
    """
    shares, solved = task_means([logs], "gradient_share"), solved_tasks([logs], start)
    if len(shares) < 2 or not min(shares.values()):
        return ""
    least = min((task for task in shares if task not in solved), key=shares.__getitem__, default="all solved")
    by_task = share_ratio([logs], without=solved)
    by_row = share_ratio([logs], "gradient_share_per_row", without=solved)
    shown = f"{by_task:.1f}× by task" + ("" if math.isnan(by_row) else f", {by_row:.1f}× by row")
    return f", balance {shown} ({least})"


def _training(state: TrainerState) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if "loss" in entry]
