"""Poolings and projections: from the hidden states of a row to one vector."""

import torch
from torch import nn
from torch.nn import functional as F


class AttentionPooling(nn.Module):
    """Weights each position by the softmax of its score with a learned query (papers 000 §3.2.1, 001 §3.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))  # v ~ N(0, 0.02²), set by ViPolyQwenModel._init_weights

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools the positions where `mask` is true into one vector a row.

        Args:
            hidden: (B, N, D) float, or packed (T, D): the T positions where `mask` is true, row by row.
            mask: (B, N) bool, at least one true position a row.

        Returns:
            (B, D) in the dtype of `hidden`, and the weights (B, N) float32: each row sums to 1, 0 where masked.
        """
        hidden = _blank(hidden, mask)
        scores = (hidden @ self.query.to(hidden.dtype)).float()  # (B, N) or (T,)
        if hidden.dim() == 2:
            scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return _weighted_sum(hidden, weights, mask), weights


class MeanPooling(nn.Module):
    """Weights every position the same; an ablation of `AttentionPooling`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools as `AttentionPooling.forward` does."""
        weights = mask.float() / mask.sum(dim=-1, keepdim=True)
        return _weighted_sum(_blank(hidden, mask), weights, mask), weights


class LastPooling(nn.Module):
    """Takes the last position; an ablation of `AttentionPooling`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools as `AttentionPooling.forward` does; padding may be on either side."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=-1)  # (B,)
        weights = F.one_hot(last, mask.shape[1]).float()
        return _weighted_sum(_blank(hidden, mask), weights, mask), weights


def _blank(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeroes the masked positions."""
    if hidden.dim() == 2:  # packed: real positions only
        return hidden
    return hidden.masked_fill(~mask[..., None], 0.0)  # a masked position may hold any value, even NaN


def _weighted_sum(hidden: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums each row's positions by their weights, in float32, into (B, D)."""
    if hidden.dim() == 2:
        rows = mask.nonzero()[:, 0]  # (T,), the row of each position
        weighted = weights[mask][:, None] * hidden.float()  # (T, D)
        return weighted.new_zeros(len(mask), hidden.shape[1]).index_add(0, rows, weighted).to(hidden.dtype)
    return torch.einsum("bn,bnd->bd", weights, hidden.float()).to(hidden.dtype)


POOLING_CLASSES = {"attention": AttentionPooling, "mean": MeanPooling, "last": LastPooling}


class LinearProjection(nn.Module):
    """Computes p = LayerNorm(W c), W without bias (papers 001, 003, 004)."""

    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, projection_dim, bias=False)
        self.norm = nn.LayerNorm(projection_dim)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Projects (B, hidden_size) to (B, projection_dim), same dtype."""
        return self.norm(self.dense(pooled))


class MLPProjection(nn.Module):
    """Computes p = LayerNorm(W2 · GELU(LayerNorm(W1 c))) (paper 000 §3.2.2)."""

    def __init__(self, hidden_size: int, projection_dim: int) -> None:
        super().__init__()
        self.dense_in = nn.Linear(hidden_size, hidden_size)
        self.norm_in = nn.LayerNorm(hidden_size)
        self.dense_out = nn.Linear(hidden_size, projection_dim)
        self.norm = nn.LayerNorm(projection_dim)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Projects (B, hidden_size) to (B, projection_dim), same dtype."""
        return self.norm(self.dense_out(F.gelu(self.norm_in(self.dense_in(pooled)))))


PROJECTION_CLASSES = {"linear": LinearProjection, "mlp": MLPProjection}

__all__ = [
    "POOLING_CLASSES",
    "PROJECTION_CLASSES",
    "AttentionPooling",
    "LastPooling",
    "LinearProjection",
    "MLPProjection",
    "MeanPooling",
]
