"""Losses over the similarities of large batches, block by block: the matrix never exists as a whole.

The gradients are exact: the backward computes each block again, as FlashAttention does (Dao et al. 2022), so that a
batch costs four matrix products in place of three. On several ranks each rank computes its rows against all columns,
and the columns' sums are joined; its gradient is that of its rows times the number of ranks, so that the mean over
ranks, which the backward of `gather_rows` and the optimizers take, is the gradient of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .distributed import RowShare, gather_rows
from .negatives import Exclusions

WHOLE = 2**22  # similarities; up to here the matrix is computed at once
BLOCK = {"cpu": 2**23, "cuda": 2**26}  # similarities of a block, 32 MiB near the cache and 256 MiB in float32
EXCLUDED = -1e30  # in place of an excluded similarity: its exponential is 0, and 0 times it is 0


@dataclass(frozen=True)
class BlockPlan:
    """Who is compared with whom, and in blocks of how many rows.

    Attributes:
        exclusions: candidates that are no negatives.
        rows: of a block.
        share: rows that this rank computes; `None`: all.
        margin: of false negatives, see `MixedLoss`.
        triplets: whether the hardest negatives are wanted.
        semi_hard: whether those are less similar than the positive.
    """

    exclusions: Exclusions
    rows: int
    share: RowShare | None = None
    margin: float | None = None
    triplets: bool = True
    semi_hard: bool = False

    def own(self, pairs: int) -> slice:
        """Returns the rows of the batch that this rank computes."""
        return slice(0, pairs) if self.share is None else self.share.own(self.share.pairs)

    def blocks(self, own: slice) -> Iterator[slice]:
        """Yields the rows of each block."""
        for first in range(own.start, own.stop, self.rows):
            yield slice(first, min(first + self.rows, own.stop))


def block_rows(pairs: int, candidates: int, wanted: int | None, device: torch.device) -> int | None:
    """Returns the rows of a block; `None` where the whole matrix is small enough.

    Args:
        pairs: B, rows of the batch.
        candidates: C, columns.
        wanted: rows that a user asks for; `None` chooses by size.
        device: where the matrix would be.
    """
    if wanted is not None:
        return wanted
    size = BLOCK["cpu" if device.type == "cpu" else "cuda"]
    return None if pairs * candidates <= WHOLE else max(1, size // candidates)


def contrast(
    a: Tensor, candidates: Tensor, positives: Tensor, temperatures: Tensor, plan: BlockPlan
) -> tuple[Tensor, Tensor]:
    """Returns InfoNCE of each row as `info_nce`, and the similarity of its hardest negative, (B,) each.

    The latter is `EXCLUDED` for a row without any, and everywhere without `plan.triplets`.

    Args:
        a: (B, D) float, unit vectors.
        candidates: (C, D) float, sides b, then hard negatives.
        positives: (B,) float, a_i·b_i.
        temperatures: (B,) float.
        plan: exclusions, blocks and ranks.
    """
    by_row, by_column, hardest = _Contrast.apply(a, candidates, positives, temperatures, plan)
    if plan.share is not None:
        counts = plan.share.pairs
        parts = gather_rows([by_row, hardest, by_column], [[count, count, len(a)] for count in counts])
        by_row, hardest, by_column = parts[0], parts[1], parts[2].view(len(counts), -1).logsumexp(dim=0)
    return 0.5 * (by_row + by_column), hardest


class _Contrast(torch.autograd.Function):
    """Computes of the rows of this rank both directions of InfoNCE and the hardest negatives.

    Row i: log Σ_j exp((S_ij − S_ii) / T_i). Column j: log Σ_i exp((S_ij − S_jj) / T_j), over the rows of this rank.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, a: Tensor, candidates: Tensor, positives: Tensor, temperatures: Tensor, plan: BlockPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = plan.own(len(a))
        by_row, hardest = positives[own].clone(), positives[own].clone().fill_(EXCLUDED)
        by_column = EXCLUDED / temperatures
        buffers = _Buffers(plan, own, candidates)
        for block in plan.blocks(own):
            rows, columns, diagonal = _similarities(block, a, candidates, positives, plan, buffers.first)
            here = slice(block.start - own.start, block.stop - own.start)
            _set_positives((rows, columns), block, positives[block])
            by_row[here] = _log_sum(rows, positives[block, None], temperatures[block, None], 1, buffers.second)
            in_block = _log_sum(columns, positives[None], temperatures[None], 0, buffers.second)
            by_column = torch.logaddexp(by_column, in_block)
            if plan.triplets:
                _set_positives((rows,), block, EXCLUDED)
                hardest[here] = _hardest(rows, diagonal, plan.semi_hard)
        ctx.save_for_backward(a, candidates, positives, temperatures, by_row, by_column)
        ctx.plan = plan
        return by_row, by_column, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_row: Tensor, by_column: Tensor, hardest: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(by_row.device.type, enabled=False):
            gradients = _ContrastGradient(ctx, by_row, by_column)
            for block in ctx.plan.blocks(gradients.own):
                gradients.add(block, hardest)
        return gradients.a, gradients.candidates, gradients.positives, gradients.temperatures, None


class _Buffers:
    """Memory that the blocks share: `first` for similarities, `second` for what is computed of them."""

    def __init__(self, plan: BlockPlan, own: slice, candidates: Tensor) -> None:
        size = (min(plan.rows, own.stop - own.start), len(candidates))
        self.first, self.second = candidates.new_empty(size), candidates.new_empty(size)


class _ContrastGradient:
    """Gradients of `_Contrast`, added up block by block."""

    def __init__(self, ctx: Any, by_row: Tensor, by_column: Tensor) -> None:
        self.inputs, self.plan = ctx.saved_tensors[:3], ctx.plan
        a, candidates, positives, temperatures, rows, columns = ctx.saved_tensors
        self.own = ctx.plan.own(len(a))
        self.buffers = _Buffers(ctx.plan, self.own, candidates)
        self.a, self.candidates = torch.zeros_like(a), torch.zeros_like(candidates)
        self.inverse = 1 / temperatures
        # probability of (i, j) = exp(S_ij / T + shift), its gradient by S_ij = factor · probability
        self.row_factors, self.column_factors = by_row * self.inverse[self.own], by_column * self.inverse
        self.row_shifts = -positives[self.own] * self.inverse[self.own] - rows
        self.column_shifts = -positives * self.inverse - columns
        self.positives = -self.column_factors  # probabilities of a column add up to 1
        self.positives[self.own] += self.column_factors[self.own] * (-columns[self.own]).exp()
        self.positives[self.own] += self.row_factors * torch.expm1(-rows)
        self.temperatures = torch.zeros_like(temperatures) if ctx.needs_input_grad[3] else None

    def add(self, block: slice, hardest: Tensor) -> None:
        """Adds the gradient of a block of rows."""
        a, candidates, positives = self.inputs
        here = slice(block.start - self.own.start, block.stop - self.own.start)
        rows, columns, diagonal = _similarities(block, *self.inputs, self.plan, self.buffers.first)
        _set_positives((rows, columns), block, EXCLUDED)
        gradient = self.buffers.second[: len(rows)]
        torch.addcmul(self.row_shifts[here, None], rows, self.inverse[block, None], out=gradient)
        gradient.exp_().mul_(self.row_factors[here, None])
        if self.temperatures is not None:
            moments = torch.einsum("ij,ij->i", gradient, rows) - positives[block] * gradient.sum(dim=1)
            self.temperatures[block] -= self.inverse[block] * moments
        if self.plan.triplets:  # before `columns`, which may be the same memory, is overwritten
            chosen = (rows == _hardest(rows, diagonal, self.plan.semi_hard)[:, None]).to(rows.dtype)
            gradient.addcmul_(chosen, (hardest[here] / chosen.sum(dim=1))[:, None])
        self._add_columns(gradient, columns, positives)
        torch.mm(gradient, candidates, out=self.a[block])
        self.candidates.addmm_(gradient.T, a[block])

    def _add_columns(self, gradient: Tensor, columns: Tensor, positives: Tensor) -> None:
        """Adds the gradient of the columns, (rows, B), to that of the rows, (rows, C)."""
        buffer = columns if self.temperatures is None else None  # nothing else needs them
        probabilities = torch.addcmul(self.column_shifts, columns, self.inverse, out=buffer).exp_()
        if self.temperatures is not None:
            moments = torch.einsum("ij,ij->j", probabilities, columns) - positives * probabilities.sum(dim=0)
            self.temperatures -= self.inverse * self.column_factors * moments
        gradient[:, : len(positives)].addcmul_(probabilities, self.column_factors)


def _similarities(
    block: slice, a: Tensor, candidates: Tensor, positives: Tensor, plan: BlockPlan, buffer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes a block: its rows (n, C), its columns (n, B), both with `EXCLUDED`, and the positives in it, (n,)."""
    rows = torch.mm(a[block], candidates.T, out=buffer[: block.stop - block.start])
    pairs = len(positives)
    diagonal = rows.diagonal(block.start)[: len(rows)].clone()  # positives to the last bit, for comparisons
    mask, columns = plan.exclusions.of_rows(block.start, block.stop), rows[:, :pairs]
    if plan.margin is not None:
        by_row, by_column = rows > (diagonal + plan.margin)[:, None], columns > positives + plan.margin
        if mask is not None:
            by_row, by_column = by_row | mask, by_column | mask[:, :pairs]
        columns = columns.masked_fill(by_column, EXCLUDED)
        rows.masked_fill_(by_row, EXCLUDED)
    elif mask is not None:
        rows.masked_fill_(mask, EXCLUDED)
    return rows, columns, diagonal


def _set_positives(matrices: tuple[Tensor, ...], block: slice, value: Tensor | float) -> None:
    """Sets the similarity of each row with its positive."""
    for matrix in matrices:
        diagonal = matrix.diagonal(block.start)[: len(matrix)]
        diagonal.copy_(value) if isinstance(value, Tensor) else diagonal.fill_(value)


def _log_sum(values: Tensor, positives: Tensor, temperatures: Tensor, dim: int, buffer: Tensor) -> Tensor:
    """Computes log Σ exp((values − positives) / temperatures) over a dimension of (n, C) values."""
    highest = values.amax(dim=dim, keepdim=True)
    scaled = torch.sub(values, highest, out=buffer[: values.shape[0], : values.shape[1]])
    total = scaled.div_(temperatures).exp_().sum(dim=dim, keepdim=True)
    return ((highest - positives) / temperatures + total.log()).squeeze(dim)


def _hardest(rows: Tensor, positives: Tensor, semi_hard: bool) -> Tensor:
    """Returns the similarity of each row's hardest negative as `hardest_triplet`, (n,); `EXCLUDED` without any."""
    if not semi_hard:
        return rows.amax(dim=1)
    below = rows.masked_fill(rows >= positives[:, None], EXCLUDED).amax(dim=1)
    easiest = rows.masked_fill(rows == EXCLUDED, -EXCLUDED).amin(dim=1)
    easiest = easiest.masked_fill(easiest == -EXCLUDED, EXCLUDED)
    return torch.where(below == EXCLUDED, easiest, below)


def rank_in_blocks(cosines: Tensor, scores: Tensor, margins: Tensor, plan: BlockPlan) -> Tensor:
    """Returns the values of `pairwise_rank`, (B,).

    Args:
        cosines: (B,) float, a_i·b_i.
        scores: (B,) float in [0, 1], NaN for rows that are not ranked.
        margins: (B,) float.
        plan: blocks and ranks.
    """
    total = _RankSum.apply((cosines + 1) / 2, scores, margins, plan)
    if plan.share is not None:
        total = gather_rows([total[None]], [[1]] * len(plan.share.pairs))[0].sum()
    filled = scores.nan_to_num(nan=torch.inf)
    below = torch.searchsorted(filled.sort().values, filled).masked_fill(scores.isnan(), 0)
    rank = total / below.sum().clamp(min=1)
    return torch.where(scores.isnan(), 0.0, rank)


class _RankSum(torch.autograd.Function):
    """Sums the shortfalls of the pairs whose higher-scored row is of this rank; see `pairwise_rank`."""

    @staticmethod
    def forward(ctx: FunctionCtx, predicted: Tensor, scores: Tensor, margins: Tensor, plan: BlockPlan) -> Tensor:
        total, gradient = predicted.new_zeros(()), torch.zeros_like(predicted)
        for block in plan.blocks(plan.own(len(predicted))):
            shortfall = (margins - predicted)[block, None] + predicted
            shortfall = shortfall.relu_().masked_fill_(~(scores[block, None] > scores), 0.0)
            total += shortfall.sum()
            active = (shortfall > 0).to(predicted.dtype)
            gradient += active.sum(dim=0)
            gradient[block] -= active.sum(dim=1)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.saved_tensors[0], None, None, None


def divergence_in_blocks(students: Tensor, teachers: Tensor, temperature: float, plan: BlockPlan) -> Tensor:
    """Returns the KL divergence of in-batch similarities of each side, (M,) float; see `Distillation`.

    Args:
        students: (M, d) float, unit vectors.
        teachers: (M, W) float, unit vectors, without gradient.
        temperature: of both distributions.
        plan: blocks and ranks.
    """
    if plan.share is None:
        return _Divergence.apply(students, teachers, temperature, plan, slice(0, len(students)))
    taught = plan.share.taught
    values = _Divergence.apply(students, teachers, temperature, plan, plan.share.own(taught))
    return gather_rows([values], [[count] for count in taught])[0]


class _Divergence(torch.autograd.Function):
    """Compares each side's similarities with all others, for the sides of this rank."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, students: Tensor, teachers: Tensor, temperature: float, plan: BlockPlan, own: slice
    ) -> Tensor:
        ctx.save_for_backward(students, teachers)
        ctx.temperature, ctx.plan, ctx.own = temperature, plan, own
        values = [students.new_empty(0)]
        for block in plan.blocks(own):
            wanted, found = (_log_shares(x, block, temperature) for x in (teachers, students))
            values.append((wanted.exp() * (wanted - found)).sum(dim=1))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        students, teachers = ctx.saved_tensors
        total = torch.zeros_like(students)
        with torch.autocast(grad.device.type, enabled=False):
            for block in ctx.plan.blocks(ctx.own):
                wanted, found = (_log_shares(x, block, ctx.temperature).exp_() for x in (teachers, students))
                here = slice(block.start - ctx.own.start, block.stop - ctx.own.start)
                gradient = found.sub_(wanted).mul_(grad[here, None] / ctx.temperature)
                total[block] += gradient @ students
                total.addmm_(gradient.T, students[block])
        return total, None, None, None, None


def _log_shares(vectors: Tensor, block: slice, temperature: float) -> Tensor:
    """Returns the log-softmax of the similarities of a block's vectors with all others, (n, M)."""
    similarities = vectors[block] @ vectors.T
    _set_positives((similarities,), block, EXCLUDED)
    return similarities.div_(temperature).log_softmax(dim=1)
