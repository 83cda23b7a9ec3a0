"""Loss components of each row, and the tables that map tasks to components.

Row i of a batch is a pair of unit vectors a_i, b_i of one task. Throughout, float32 or wider:

    similarities: (B, C), S_kj = a_k·c_j in [-1, 1]. The candidates are c_j = b_j for j < B, then C - B hard negatives.
    cosines: (B,), its diagonal a_i·b_i.
    scores: (B,), s_i in [0, 1], NaN for a row without a score.
    temperature: T > 0, one number or (B,), one per row.
    mask: (B, C) bool, True at (k, j) where c_j is excluded from the negatives of a_k; the diagonal is ignored.
    margin: one number or (B,), one per row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

COMPONENTS = ("nce", "mse", "rank", "cosine", "triplet", "distil")
TEMPERATURES = (1e-3, 100.0)  # beyond, float32 no longer tells S/T of two rows apart, or no gradient is left
SCORE_COMPONENTS = ("mse", "rank")  # regress the score
TRIPLET_NEGATIVES = ("hardest", "semi_hard")
POSITIVE_COMPONENTS = ("nce", "cosine", "triplet")  # pull a pair together; `distil` follows a teacher instead


@dataclass(frozen=True)
class TaskLoss:
    """Loss of one task: weights of the components, and margins."""

    nce: float = 0.0
    mse: float = 0.0
    rank: float = 0.0
    cosine: float = 0.0
    triplet: float = 0.0
    distil: float = 0.0  # needs a teacher, see `Distillation`
    triplet_margin: float = 0.2  # in units of S/T
    rank_margin: float = 0.05  # in units of the score
    score_optional: bool = False  # whether mse and rank skip rows without a score; otherwise an error

    def __post_init__(self) -> None:
        for name in (*COMPONENTS, "triplet_margin", "rank_margin"):
            check_weight(getattr(self, name), f"TaskLoss.{name}")
        if not any(getattr(self, name) for name in COMPONENTS):
            raise ValueError(f"{self}: every weight is 0, so the task has no loss; give one of {COMPONENTS} a weight.")

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "TaskLoss":
        """Builds a task's loss from a recipe's mapping; raises ValueError for an unknown key."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"Unknown loss setting {unknown}; known: {known}.")
        return cls(**values)


def check_weight(value: float, name: str) -> None:
    """Raises ValueError unless `value` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a finite number >= 0.")


def check_temperature(value: float, name: str, lowest: float = TEMPERATURES[0]) -> None:
    """Raises ValueError unless a temperature is a number from `lowest` to the highest of `TEMPERATURES`."""
    highest = TEMPERATURES[1]
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
        raise ValueError(
            f"{name} is {value!r}; it must be > 0, from {lowest} to {highest:.0f} (the papers use 0.07 and 0.2)."
        )


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


def info_nce(
    similarities: Tensor, temperature: float | Tensor, mask: Tensor | None = None, column_mask: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (bimodal paper §4.2): (B,) >= 0, and 0 for a row without any negative.

    NCE_i = -1/2 [log softmax_j(S_ij/T_i) + log softmax_j(S_ji/T_i)] at j = i; only the first term has hard negatives.

    Args:
        similarities: see the module's docstring.
        temperature: likewise.
        mask: likewise; applies to the first term.
        column_mask: (B, B) bool, True at (k, j) where a_k is excluded from the negatives of b_j; defaults to `mask`.
    """
    rows = len(similarities)
    by_row = similarities / _column(temperature)  # (B, C)
    by_column = similarities[:, :rows] / temperature  # (B, B), column j has the temperature of row j
    if mask is not None:
        by_row = by_row.masked_fill(mask & ~_diagonal_mask(mask), -torch.inf)
        column_mask = mask[:, :rows] if column_mask is None else column_mask
    if column_mask is not None:
        by_column = by_column.masked_fill(column_mask & ~_diagonal_mask(column_mask), -torch.inf)
    return -0.5 * (by_row.log_softmax(dim=1).diagonal() + by_column.log_softmax(dim=0).diagonal())


def score_mse(cosines: Tensor, scores: Tensor) -> Tensor:
    """Squared error of the score (STW paper §4.2.1): (B,) in [0, 1], and 0 where the score is absent.

    MSE_i = ((a_i·b_i + 1)/2 - s_i)².
    """
    errors = (cosines + 1) / 2 - scores
    return torch.where(scores.isnan(), 0.0, errors).square()


def pairwise_rank(cosines: Tensor, scores: Tensor, margin: float | Tensor = 0.05) -> Tensor:
    """Ranking of the scored rows (STW paper §4.2.1): (B,), Rank at every scored row, 0 at the others.

    Rank = mean over P = {(i, j): s_i > s_j} of max(0, m_r - (p_i - p_j)), p_i = (a_i·b_i + 1)/2; 0 when P is empty.
    Every scored row carries the batch value, so the mean over scored rows is Rank itself. A pair takes the margin of
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
    similarities: Tensor,
    temperature: float | Tensor,
    margin: float | Tensor = 0.2,
    mask: Tensor | None = None,
    semi_hard: bool = False,
) -> Tensor:
    """Triplet with the hardest negative (STW paper §4.2.3): (B,) >= 0, and 0 for a row without any negative.

    Triplet_i = max(0, max_{j≠i} S_ij/T_i - S_ii/T_i + m). With `semi_hard` the maximum is over the negatives that are
    less similar than the positive, and a row without such a one takes its easiest negative (Schroff et al. 2015):
    the hardest negative draws the vectors of a model that knows nothing together.
    """
    logits = similarities / _column(temperature)
    excluded = _diagonal_mask(logits) if mask is None else mask | _diagonal_mask(logits)
    positives = logits.diagonal()
    hardest = logits.masked_fill(excluded, -torch.inf).amax(dim=1)
    if semi_hard:
        below = ~excluded & (logits < positives[:, None])
        easiest = logits.masked_fill(excluded, torch.inf).amin(dim=1)
        chosen = logits.masked_fill(~below, -torch.inf).amax(dim=1).where(below.any(dim=1), easiest)
        hardest = chosen.where(~excluded.all(dim=1), -torch.inf)
    return (hardest - positives + margin).relu()


def _column(values: float | Tensor) -> float | Tensor:
    """Reshapes (B,) to (B, 1), to broadcast over the columns of a matrix; leaves a scalar as it is."""
    return values[:, None] if isinstance(values, Tensor) and values.ndim else values


def _diagonal_mask(matrix: Tensor) -> Tensor:
    """Returns (B, C) bool, True on the diagonal, on the device of `matrix`."""
    return torch.eye(*matrix.shape, dtype=torch.bool, device=matrix.device)
