"""Task weighting: λ of each task in a mixed batch, uniform or from a table, losses, variances or gradients.

Every strategy is a `TaskWeighting`. `forward` returns the weights of a batch; `observe` updates the strategy with the
measurements of that batch. Measured and learned values are buffers and parameters, so that they are saved and resumed.

    task_losses: (T,) float32 or wider, the mean unweighted loss ℓ_t of each task's rows; 0 where absent.
    present: (T,) bool, True where the batch has rows of the task.
    gradient_norms: (T,) float, ‖∇_E p_t‖ of each task's part p_t of the batch loss, before λ; E are all embeddings.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.schema import canonical_task
from .losses import check_weight


class TaskWeighting(nn.Module):
    """Returns λ_t of each task; see the module's docstring for the arguments."""

    needs_gradient_norms = False  # whether `observe` uses them; costs a backward through the loss each step

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    def forward(self, epoch: float) -> Tensor:
        """Returns the weights at `epoch` (since the start of training, fractional), (T,) float32 > 0."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """Returns a term added to the loss of each row of a task, (T,) float32; it bounds learned weights."""
        return torch.zeros(len(self.tasks))

    def observe(self, task_losses: Tensor, present: Tensor, gradient_norms: Tensor | None) -> None:
        """Updates the strategy with a training batch, after `forward`; without effect by default."""

    def keep_bounds(self) -> None:
        """Moves learned weights back into their bounds, after an update; without effect by default."""

    def _by_task(self, values: Mapping[str, float], name: str, default: float = 1.0) -> Tensor:
        """Orders {task: value} by task, (T,) float32; raises ValueError for an unknown task or an invalid weight."""
        given = {canonical_task(task): value for task, value in values.items()}
        for task, value in given.items():
            if task not in self.tasks:
                raise ValueError(f"{name}: unknown task {task!r}; known: {self.tasks}.")
            check_weight(value, f"{name}: {task!r}")
        return torch.tensor([float(given.get(task, default)) for task in self.tasks])


class UniformWeighting(TaskWeighting):
    """`none`: λ_t = 1."""

    def forward(self, epoch: float) -> Tensor:
        """Returns ones; see the base class."""
        return torch.ones(len(self.tasks))


class TableWeighting(TaskWeighting):
    """`table`: published weights by epoch (STW paper §3.1.2), or given ones, {epoch: {task: weight}}.

    A row of the table applies from its epoch to the next row's; tasks without an entry have weight 1.
    """

    STW_TABLE: Mapping[int, Mapping[str, float]] = {  # audio is not in the paper
        0: {"text_pair": 0.25, "instr": 1.2, "ocr": 1.0, "vqa_single": 1.0, "vqa_multi": 0.8, "audio": 1.0},
        1: {"text_pair": 0.22, "instr": 1.3, "ocr": 1.2, "vqa_single": 1.0, "vqa_multi": 0.8, "audio": 1.0},
    }

    def __init__(self, tasks: Sequence[str], table: Mapping[int, Mapping[str, float]] | None = None) -> None:
        super().__init__(tasks)
        if table is None:
            rows = {epoch: _known(row, self.tasks) for epoch, row in self.STW_TABLE.items()}
        else:
            rows = {_checked_epoch(epoch): row for epoch, row in table.items()}
        if 0 not in rows:
            raise ValueError(f"Task weight table has rows for epochs {sorted(rows)}; it needs a row for epoch 0.")
        self.starts = sorted(rows)
        weights = [self._by_task(rows[epoch], f"Task weight table, epoch {epoch}") for epoch in self.starts]
        self.register_buffer("weights", torch.stack(weights), persistent=False)  # (E, T)

    def forward(self, epoch: float) -> Tensor:
        """Returns the table's row for the epoch; see the base class."""
        return self.weights[bisect_right(self.starts, epoch) - 1]


class InverseLossWeighting(TaskWeighting):
    """`inverse_loss`: λ_t = (ℓ̄ / ℓ_t) · α_t · β_epoch (STW paper §3.1.1), ℓ̄ the mean of ℓ_t over the tasks.

    Args:
        tasks: names of the tasks.
        baseline: source of ℓ_t: `fixed`, the middle of the paper's range; `ema`, a running mean of measured losses.
            A task without ℓ_t (not in the paper, or not yet seen) has weight 1 and does not count in ℓ̄.
        decay: weight of the past in the running mean.
        losses: {task: ℓ_t} for `fixed`, overrides the paper's.
        alpha: {task: α_t}, overrides the paper's; 1 for tasks in neither.
        beta: (β at epoch 0, β from epoch 1 on).
    """

    LOSSES: Mapping[str, float] = {"text_pair": 4.25, "instr": 0.9, "ocr": 1.1, "vqa_single": 1.3, "vqa_multi": 1.3}
    ALPHA: Mapping[str, float] = {
        "text_pair": 0.30,
        "instr": 1.2,
        "ocr": 1.05,
        "vqa_single": 1.05,
        "vqa_multi": 1.05,
    }
    LARGEST_RATIO = 100.0  # clamps a loss near 0 to ℓ̄ / 100, so that weights stay finite

    def __init__(
        self,
        tasks: Sequence[str],
        baseline: str = "fixed",
        decay: float = 0.98,
        losses: Mapping[str, float] | None = None,
        alpha: Mapping[str, float] | None = None,
        beta: Sequence[float] = (1.1, 0.9),
    ) -> None:
        super().__init__(tasks)
        if baseline not in ("fixed", "ema"):
            raise ValueError(f"inverse_loss: baseline is {baseline!r}; it must be 'fixed' or 'ema'.")
        if not 0 <= decay < 1:
            raise ValueError(f"inverse_loss: decay is {decay!r}; it must lie in [0, 1).")
        if len(beta) != 2:
            raise ValueError(f"inverse_loss: beta is {list(beta)!r}; give two numbers, for epoch 0 and for the rest.")
        for value in beta:
            check_weight(value, "inverse_loss: beta")
        if losses and baseline == "ema":
            raise ValueError(f"inverse_loss: losses {dict(losses)} are for baseline 'fixed'; 'ema' measures them.")
        self.baseline, self.decay, self.beta = baseline, decay, tuple(beta)
        factors = self._by_task(_known(self.ALPHA, self.tasks) | dict(alpha or {}), "inverse_loss: alpha")
        self.register_buffer("alpha", factors, persistent=False)  # (T,)
        given = _known(self.LOSSES, self.tasks) | dict(losses or {}) if baseline == "fixed" else {}
        running = self._by_task(given, "inverse_loss: losses", default=torch.nan)
        self.register_buffer("losses", running, persistent=baseline == "ema")  # (T,), NaN: not known

    def forward(self, epoch: float) -> Tensor:
        """Returns weights from the losses known so far; see the base class."""
        known = ~self.losses.isnan()
        if not known.any():
            return torch.ones_like(self.losses)
        mean = self.losses[known].mean()
        floor = (mean / self.LARGEST_RATIO).clamp(min=torch.finfo(self.losses.dtype).tiny)
        ratios = torch.where(mean > 0, mean / self.losses.clamp(min=floor), 1.0)  # every known loss may be 0
        return torch.where(known, ratios * self.alpha * self.beta[epoch >= 1], 1.0)

    def observe(self, task_losses: Tensor, present: Tensor, gradient_norms: Tensor | None) -> None:
        """Moves the running means towards the losses of the tasks present; see the base class."""
        if self.baseline == "ema":
            new = task_losses.to(self.losses)
            moved = torch.where(self.losses.isnan(), new, self.decay * self.losses + (1 - self.decay) * new)
            self.losses.copy_(torch.where(present, moved, self.losses))


class UncertaintyWeighting(TaskWeighting):
    """`uncertainty`: λ_t = exp(−s_t) with a learned log-variance s_t and penalty s_t / 2 (Kendall et al. 2018).

    This is their form for classification, which InfoNCE is; a task with loss ℓ converges to λ = 1 / (2ℓ).
    """

    LARGEST = math.log(1000)  # |s_t|: without a bound, the weight of a task whose loss is 0 would become infinite

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__(tasks)
        self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))  # (T,)

    def forward(self, epoch: float) -> Tensor:
        """Returns weights with gradient; see the base class."""
        return (-self.log_variances).exp()

    def penalty(self) -> Tensor:
        """Returns half the log-variances, with gradient; see the base class."""
        return self.log_variances / 2

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Bounds the log-variances; see the base class."""
        self.log_variances.clamp_(-self.LARGEST, self.LARGEST)


class GradNormWeighting(TaskWeighting):
    """`gradnorm`: weights that equalise the tasks' gradient norms (Chen et al. 2018, algorithm 1).

    G_t = λ_t ‖∇_E p_t‖ is moved towards mean(G) · r_t^α, where r_t = (ℓ_t / ℓ_t⁰) / mean(ℓ / ℓ⁰) is large for a task
    that trains slowly: one step on λ down Σ_t |G_t − mean(G) · r_t^α|, targets held fixed, then Σ λ_t = number of
    tasks. Gradients are taken at the last tensor that all tasks share, the embeddings. Unlike the paper, the step is
    taken on log λ and relative to mean(G), so that weights stay positive at any scale of the gradients.

    Args:
        tasks: names of the tasks.
        alpha: strength of the pull towards slow tasks; 0 aims at equal norms. The paper uses 0.12 and 1.5.
        learning_rate: of log λ.
    """

    needs_gradient_norms = True

    def __init__(self, tasks: Sequence[str], alpha: float = 0.12, learning_rate: float = 0.025) -> None:
        super().__init__(tasks)
        check_weight(alpha, "gradnorm: alpha")
        check_weight(learning_rate, "gradnorm: learning_rate")
        self.alpha, self.learning_rate = alpha, learning_rate
        self.register_buffer("weights", torch.ones(len(self.tasks)))  # (T,)
        self.register_buffer("first_losses", torch.full((len(self.tasks),), torch.nan))  # (T,) ℓ_t⁰, NaN: not seen

    def forward(self, epoch: float) -> Tensor:
        """Returns the current weights; see the base class."""
        return self.weights.clone()

    def observe(self, task_losses: Tensor, present: Tensor, gradient_norms: Tensor | None) -> None:
        """Takes one step on the weights of the tasks present; see the base class."""
        if gradient_norms is None:
            raise ValueError("gradnorm: this batch has no gradient norms; give the loss embeddings with gradient.")
        losses = task_losses.to(self.weights)
        self.first_losses.copy_(torch.where(self.first_losses.isnan() & present, losses, self.first_losses))
        active = present & (gradient_norms > 0) & (self.first_losses > 0)
        if active.sum() < 2:
            return
        norms = self.weights[active] * gradient_norms.to(self.weights)[active]  # G_t
        rates = losses[active] / self.first_losses[active]
        targets = norms.mean() * (rates / rates.mean()) ** self.alpha
        step = (norms - targets).sign() * norms / norms.mean()  # of Σ |G_t − target_t| / mean(G) by log λ_t
        self.weights[active] *= (-self.learning_rate * step).exp()
        seen = ~self.first_losses.isnan()
        self.weights[seen] *= seen.sum() / self.weights[seen].sum()


WEIGHTINGS: dict[str, type[TaskWeighting]] = {
    "none": UniformWeighting,
    "table": TableWeighting,
    "inverse_loss": InverseLossWeighting,
    "uncertainty": UncertaintyWeighting,
    "gradnorm": GradNormWeighting,
}


def build_weighting(name: str, tasks: Sequence[str], options: Mapping[str, Any] | None = None) -> TaskWeighting:
    """Builds a weighting by name; raises ValueError for an unknown name or option."""
    if name not in WEIGHTINGS:
        raise ValueError(f"`task_weighting` is {name!r}; it must be one of {', '.join(WEIGHTINGS)}.")
    try:
        return WEIGHTINGS[name](tasks, **(options or {}))
    except TypeError as error:
        raise ValueError(f"`task_weighting_options` for {name!r} are {dict(options or {})}: {error}.") from error


def _known(values: Mapping[str, float], tasks: Sequence[str]) -> dict[str, float]:
    """Keeps the entries of a published table that name one of these tasks."""
    return {task: value for task, value in values.items() if task in tasks}


def _checked_epoch(epoch: int | str) -> int:
    if not str(epoch).isdecimal():  # JSON has only text keys
        raise ValueError(f"Task weight table: epoch {epoch!r} must be an integer >= 0.")
    return int(epoch)
