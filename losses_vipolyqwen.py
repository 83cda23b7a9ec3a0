"""Vectors -> loss: components, the table of tasks, task weighting, and the mixed loss of one batch.

Row i of a batch is a pair of unit vectors a_i, b_i of one task. Throughout, float32 or wider:

    similarities: (B, B), S_kj = a_k·b_j in [-1, 1].
    cosines: (B,), its diagonal a_i·b_i.
    scores: (B,), s_i in [0, 1], NaN where a row has none.
    temperature: T > 0.
    mask: (B, B) bool, True at (k, j) where a_k and b_j are no negatives of each other; the diagonal has no meaning.
    margin: one number or (B,), one per row.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

COMPONENTS = ("nce", "mse", "rank", "cosine", "triplet")
SCORE_COMPONENTS = ("mse", "rank")  # of the score; the others pull a pair together, whatever its score
DATA_TYPE_ALIASES = {"contrastive_with_score": "text_pair", "instruction": "instr"}


def canonical_data_type(name: str) -> str:
    """Name of a data type as this repository writes it; the STW paper's names (§3.1.1) are aliases."""
    return DATA_TYPE_ALIASES.get(name, name)


@dataclass(frozen=True)
class TaskLoss:
    """Loss of one task: the weight of each component, and their margins."""

    nce: float = 0.0
    mse: float = 0.0
    rank: float = 0.0
    cosine: float = 0.0
    triplet: float = 0.0
    triplet_margin: float = 0.2  # in units of S/T
    rank_margin: float = 0.05  # in units of the score
    score_optional: bool = False  # a row without a score leaves out mse and rank; otherwise that is an error

    def __post_init__(self) -> None:
        for name in (*COMPONENTS, "triplet_margin", "rank_margin"):
            _check_weight(getattr(self, name), f"TaskLoss.{name}")
        if not any(getattr(self, name) for name in COMPONENTS):
            raise ValueError(f"{self}: every weight is 0, so the task has no loss; give one of {COMPONENTS} a weight.")

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "TaskLoss":
        """Builds it from a recipe's mapping; an unknown key is an error."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"Unknown loss setting {unknown}; known: {known}.")
        return cls(**values)


def _check_weight(value: float, name: str) -> None:
    """Raises ValueError unless `value` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a finite number >= 0.")


_TRIPLET = TaskLoss(nce=1.0, triplet=1.0)
_MIXED = {  # bimodal paper §4.2; the audio row is the trimodal paper's
    "text_pair": TaskLoss(nce=1.0, mse=1.0),
    "instr": TaskLoss(nce=1.0, cosine=1.0),
    "ocr": _TRIPLET,
    "vqa_single": _TRIPLET,
    "vqa_multi": TaskLoss(nce=1.0, triplet=1.5, triplet_margin=0.3),
    "audio": TaskLoss(nce=1.0, cosine=1.0, triplet=1.0),
}
_SUM = TaskLoss(nce=1.0, mse=1.0, rank=1.0, cosine=1.0, triplet=1.0, score_optional=True)
LOSS_TABLES: dict[str, dict[str, TaskLoss]] = {
    "dle": _MIXED | {"text_pair": TaskLoss(nce=1.0, mse=20.0, rank=7.0)},  # STW paper §4.2
    "mixed": _MIXED,
    "nce": dict.fromkeys(_MIXED, TaskLoss(nce=1.0)),  # ablation: NCE only
    "sum": dict.fromkeys(_MIXED, _SUM),  # ablation: one fixed sum for every task
}


def info_nce(similarities: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (bimodal paper §4.2): (B,) >= 0, and 0 for a row without any negative.

    NCE_i = -1/2 [log softmax_j(S_ij/T) + log softmax_j(S_ji/T)] at j = i.
    """
    logits = similarities / temperature
    if mask is not None:
        logits = logits.masked_fill(mask & ~_diagonal_mask(mask), -torch.inf)
    return -0.5 * (logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal())


def score_mse(cosines: Tensor, scores: Tensor) -> Tensor:
    """Squared error of the score (STW paper §4.2.1): (B,) in [0, 1], and 0 where the score is absent.

    MSE_i = ((a_i·b_i + 1)/2 - s_i)².
    """
    errors = (cosines + 1) / 2 - scores
    return torch.where(scores.isnan(), 0.0, errors).square()


def pairwise_rank(cosines: Tensor, scores: Tensor, margin: float | Tensor = 0.05) -> Tensor:
    """Ranking of the scored rows (STW paper §4.2.1): (B,) the one value Rank at every scored row, 0 at the others.

    Rank = mean over P = {(i, j): s_i > s_j} of max(0, m_r - (p_i - p_j)), p_i = (a_i·b_i + 1)/2; 0 when P is empty.
    It is a term of every scored row's loss, so the mean over scored rows is Rank itself. A pair takes the margin of
    its higher-scored row.
    """
    predicted = (cosines + 1) / 2
    in_p = scores[:, None] > scores[None, :]  # (B, B); a comparison with NaN is False
    shortfall = (margin - predicted)[:, None] + predicted[None, :]
    rank = torch.where(in_p, shortfall.relu(), 0.0).sum() / in_p.sum().clamp(min=1)
    return torch.where(scores.isnan(), 0.0, rank)


def cosine_distance(cosines: Tensor) -> Tensor:
    """Cosine distance (STW paper §4.2.2): Cos_i = 1 - a_i·b_i, (B,) in [0, 2]."""
    return 1 - cosines


def hardest_triplet(
    similarities: Tensor, temperature: float, margin: float | Tensor = 0.2, mask: Tensor | None = None
) -> Tensor:
    """Triplet with the hardest negative (STW paper §4.2.3): (B,) >= 0, and 0 for a row without any negative.

    Triplet_i = max(0, max_{j≠i} S_ij/T - S_ii/T + m).
    """
    logits = similarities / temperature
    excluded = _diagonal_mask(logits) if mask is None else mask | _diagonal_mask(logits)
    hardest = logits.masked_fill(excluded, -torch.inf).amax(dim=1)
    return (hardest - logits.diagonal() + margin).relu()


def _diagonal_mask(square: Tensor) -> Tensor:
    """(B, B) bool, True on the diagonal, on the device of `square`."""
    return torch.eye(square.shape[0], dtype=torch.bool, device=square.device)


class TaskWeighting(nn.Module):
    """λ_t of each task. A strategy overrides `forward`; what it learns or measures lives in parameters and buffers."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    def forward(self, task_losses: Tensor, present: Tensor, epoch: float) -> Tensor:
        """Weights of the tasks for this batch.

        Args:
            task_losses: (T,) float with gradient, the unweighted mean loss of each task's rows; 0 where absent.
            present: (T,) bool, True where the batch has rows of the task.
            epoch: epochs since the start of training, fractions included.

        Returns:
            (T,) float >= 0.
        """
        raise NotImplementedError


class UniformWeighting(TaskWeighting):
    """`none`: λ_t = 1."""

    def forward(self, task_losses: Tensor, present: Tensor, epoch: float) -> Tensor:
        """All ones; see the base class."""
        return torch.ones_like(task_losses)


class TableWeighting(TaskWeighting):
    """`table`: published weights by epoch (STW paper §3.1.2), or the user's own {epoch: {task: weight}}.

    A row of the table holds from its epoch on, until the next row's; a task it does not name has weight 1.
    """

    STW_TABLE: Mapping[int, Mapping[str, float]] = {  # audio is not in the paper
        0: {"text_pair": 0.25, "instr": 1.2, "ocr": 1.0, "vqa_single": 1.0, "vqa_multi": 0.8, "audio": 1.0},
        1: {"text_pair": 0.22, "instr": 1.3, "ocr": 1.2, "vqa_single": 1.0, "vqa_multi": 0.8, "audio": 1.0},
    }

    def __init__(self, tasks: Sequence[str], table: Mapping[int, Mapping[str, float]] | None = None) -> None:
        super().__init__(tasks)
        rows = self.STW_TABLE if table is None else self._checked(table)
        self.starts = sorted(rows)
        weights = torch.tensor([[rows[epoch].get(task, 1.0) for task in self.tasks] for epoch in self.starts])
        self.register_buffer("weights", weights, persistent=False)  # (E, T)

    def _checked(self, table: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
        """The user's table under canonical task names; raises ValueError naming what is wrong with it."""
        rows: dict[int, dict[str, float]] = {}
        for epoch, row in table.items():
            if not str(epoch).isdecimal():  # JSON has only text keys
                raise ValueError(f"Task weight table: epoch {epoch!r} must be a whole number >= 0.")
            rows[int(epoch)] = {canonical_data_type(task): weight for task, weight in row.items()}
            for task, weight in rows[int(epoch)].items():
                if task not in self.tasks:
                    raise ValueError(f"Task weight table, epoch {epoch}: unknown task {task!r}; known: {self.tasks}.")
                _check_weight(weight, f"Task weight table, epoch {epoch}: weight of {task!r}")
        if 0 not in rows:
            raise ValueError(f"Task weight table has rows for epochs {sorted(rows)}; it needs a row for epoch 0.")
        return rows

    def forward(self, task_losses: Tensor, present: Tensor, epoch: float) -> Tensor:
        """The table's row for the epoch; see the base class."""
        return self.weights[bisect_right(self.starts, epoch) - 1].to(task_losses)


WEIGHTINGS: dict[str, type[TaskWeighting]] = {"none": UniformWeighting, "table": TableWeighting}


@dataclass
class MixedLossOutput:
    """What one batch gives."""

    loss: Tensor  # scalar with gradient, (1/B) Σ_i λ_type(i) L_type(i)
    per_sample: Tensor  # (B,) with gradient, L_type(i) before λ
    components: dict[str, Tensor]  # per component (B,) without gradient, unweighted; NaN where a row does not use it
    task_weights: Tensor  # (T,) λ_t
    task_ids: Tensor  # (B,) long, as given


class MixedLoss(nn.Module):
    """One loss per row, chosen by the row's task, over one mixed batch (STW paper §4.2, trimodal paper §4.2).

    NCE and Triplet see all rows of the batch, whatever their task. With several processes give it the joined batch of
    `gather_with_grad`.

    Args:
        tasks: task name -> its loss; the order gives the task ids.
        temperature: T > 0.
        weighting: λ per task over the same task names; None is λ = 1.
        mask_duplicates: rows whose a or b is the same content as the positive's are no negatives.
        nce_min_score: a row scored below this is no positive: all its components but mse and rank are 0, though it
            stays a negative for other rows. None switches it off.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskLoss],
        temperature: float = 0.07,
        weighting: TaskWeighting | None = None,
        mask_duplicates: bool = True,
        nce_min_score: float | None = 0.5,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be > 0 (the papers use 0.07 and 0.2).")
        if nce_min_score is not None and not 0 <= nce_min_score <= 1:
            raise ValueError(f"nce_min_score is {nce_min_score}; it must lie in [0, 1], or be None for off.")
        self.tasks = list(tasks)
        self.weighting = UniformWeighting(self.tasks) if weighting is None else weighting
        if self.weighting.tasks != self.tasks:
            raise ValueError(f"The weighting is for tasks {self.weighting.tasks}, the loss for {self.tasks}.")
        self.temperature, self.mask_duplicates, self.nce_min_score = temperature, mask_duplicates, nce_min_score
        losses = tasks.values()
        constants = {  # they come from the settings and are no state
            "weights": [[getattr(loss, name) for name in COMPONENTS] for loss in losses],  # (T, 5)
            "triplet_margins": [loss.triplet_margin for loss in losses],  # (T,)
            "rank_margins": [loss.rank_margin for loss in losses],  # (T,)
            "requires_score": [loss.mse + loss.rank > 0 and not loss.score_optional for loss in losses],  # (T,)
            "by_score": [name in SCORE_COMPONENTS for name in COMPONENTS],  # (5,)
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        task_ids: Tensor,
        scores: Tensor,
        a_keys: Tensor | None = None,
        b_keys: Tensor | None = None,
        epoch: float = 0.0,
    ) -> MixedLossOutput:
        """Loss of one batch.

        Args:
            a: (B, D) float, unit vectors.
            b: (B, D) float, unit vectors.
            task_ids: (B,) long, positions in `tasks`.
            scores: (B,) float in [0, 1], NaN where absent.
            a_keys: (B,) int64, equal for equal content of side a; without keys no duplicates are masked on that side.
            b_keys: (B,) int64, the same for side b.
            epoch: epochs since the start of training, for the weighting.
        """
        self._check_batch(a, b, task_ids, scores)
        dtype = torch.promote_types(a.dtype, torch.float32)
        scores = scores.to(dtype)
        with torch.autocast(a.device.type, enabled=False):  # autocast would put the matmul back to bfloat16
            similarities = a.to(dtype) @ b.to(dtype).T  # (B, B)
            values = self._values(similarities, task_ids, scores, self._mask(a_keys, b_keys))  # (B, 5)
            weights = self.weights.to(dtype)[task_ids]  # (B, 5)
            per_sample = (weights * values).sum(dim=1)
            task_weights = self.weighting(*self._task_means(per_sample, task_ids), epoch)
            loss = (task_weights[task_ids] * per_sample).mean()
        uses = (weights > 0) & ~(self.by_score & scores.isnan()[:, None])  # (B, 5)
        shown = values.detach().where(uses, torch.nan).unbind(dim=1)
        return MixedLossOutput(loss, per_sample, dict(zip(COMPONENTS, shown, strict=True)), task_weights, task_ids)

    def _values(self, similarities: Tensor, task_ids: Tensor, scores: Tensor, mask: Tensor | None) -> Tensor:
        """(B, 5) float, every component of every row, unweighted and finite, used or not."""
        cosines = similarities.diagonal()
        ranked = self.weights[task_ids, COMPONENTS.index("rank")] > 0
        rank_margins = self.rank_margins.to(scores)[task_ids]
        triplet_margins = self.triplet_margins.to(scores)[task_ids]
        values = {
            "nce": info_nce(similarities, self.temperature, mask),
            "mse": score_mse(cosines, scores),
            "rank": pairwise_rank(cosines, scores.where(ranked, torch.nan), rank_margins),
            "cosine": cosine_distance(cosines),
            "triplet": hardest_triplet(similarities, self.temperature, triplet_margins, mask),
        }
        stacked = torch.stack([values[name] for name in COMPONENTS], dim=1)
        if self.nce_min_score is None:
            return stacked
        no_positive = scores < self.nce_min_score  # (B,); False for NaN
        return stacked.masked_fill(no_positive[:, None] & ~self.by_score, 0.0)

    def _mask(self, a_keys: Tensor | None, b_keys: Tensor | None) -> Tensor | None:
        """(B, B) bool, True where two rows share their a or their b, or None."""
        keys = [k for k in (a_keys, b_keys) if k is not None]
        if not self.mask_duplicates or not keys:
            return None
        return torch.stack([k[:, None] == k[None, :] for k in keys]).any(dim=0)

    def _task_means(self, per_sample: Tensor, task_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) mean loss of each task's rows, 0 where absent, and (T,) bool presence."""
        counts = torch.bincount(task_ids, minlength=len(self.tasks))
        sums = per_sample.new_zeros(len(self.tasks)).index_add(0, task_ids, per_sample)
        return sums / counts.clamp(min=1), counts > 0

    def _check_batch(self, a: Tensor, b: Tensor, task_ids: Tensor, scores: Tensor) -> None:
        """Raises ValueError for shapes that do not fit, unknown task ids and missing scores."""
        rows = a.shape[:1]
        if a.ndim != 2 or a.shape != b.shape or task_ids.shape != rows or scores.shape != rows or not a.numel():
            shapes = [tuple(x.shape) for x in (a, b, task_ids, scores)]
            raise ValueError(f"a, b, task_ids, scores have shapes {shapes}; they must be (B, D), (B, D), (B,), (B,).")
        if ((task_ids < 0) | (task_ids >= len(self.tasks))).any():
            raise ValueError(f"task_ids {task_ids.tolist()} must lie in [0, {len(self.tasks)}): {self.tasks}.")
        missing = self.requires_score[task_ids] & scores.isnan()
        if missing.any():
            names = sorted({self.tasks[task] for task in task_ids[missing].tolist()})
            positions = missing.nonzero().flatten().tolist()
            raise ValueError(
                f"Tasks {names} need a score (mse or rank > 0), but rows {positions} of the batch have none; "
                "give these rows a score, or set mse and rank of the task to 0."
            )

    def summarise(self, output: MixedLossOutput) -> dict[str, float]:
        """Means over the rows of each task present: loss/TASK, loss/TASK/COMPONENT (unweighted) and weight/TASK."""
        task_ids = output.task_ids.cpu()
        values = torch.stack([output.per_sample.detach(), *output.components.values()]).cpu()  # (1 + 5, B)
        task_weights = output.task_weights.tolist()
        summary = {}
        for task_id in task_ids.unique().tolist():
            task, rows = self.tasks[task_id], values[:, task_ids == task_id]
            summary[f"loss/{task}"] = rows[0].mean().item()
            for name, value in zip(output.components, rows[1:].nanmean(dim=1).tolist(), strict=True):
                if not math.isnan(value):
                    summary[f"loss/{task}/{name}"] = value
            summary[f"weight/{task}"] = task_weights[task_id]
        return summary


def gather_with_grad(x: Tensor) -> Tensor:
    """All rows of all processes in rank order, with gradient; x itself where there is one process.

    Every process then computes the loss of the whole joined batch. Why that gives the gradient of one process with the
    whole batch: the backward pass sums over the W processes what their (equal) losses L say about this process's rows,
    so it hands W ∂L/∂x_r to rank r's own model pass; DDP and FSDP average the parameter gradients,
    1/W Σ_r W ∂L/∂x_r ∂x_r/∂θ = dL/dθ. So the loss must be neither divided by nor multiplied with W.

    Args:
        x: (rows of this process, …) any dtype; the row count may differ between processes and be 0.

    Returns:
        (rows of all processes, …).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return _GatherRows.apply(x, torch.cat(counts).tolist())


class _GatherRows(torch.autograd.Function):
    """Concatenation over ranks; the backward sums the gradient of this rank's rows over all ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: x.shape[0]] = x
        blocks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(blocks, padded)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None
