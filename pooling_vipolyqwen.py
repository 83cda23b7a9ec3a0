"""Poolings, projections and fusion: from the hidden states of a row to one vector."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

HEAD_SIZE = 64  # width of a head of `AttentionFusion`, where it divides the embedding; else one head
SHORTEST = 1e-6  # length of a vector that `unit_vectors` can still bring to length 1


class AttentionPooling(nn.Module):
    """Weights each position by the softmax of its score with a learned query (papers 000 §3.2.1, 001 §3.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(hidden_size))  # v ~ N(0, 0.02²), set by ViPolyQwenModel._init_weights

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools the positions where `mask` is true into one vector a row.

        Args:
            hidden: (B, N, D) float, or packed (T, D): the T positions where `mask` is true, row by row.
            mask: (B, N) bool; a row without any true position is pooled to zeros.

        Returns:
            (B, D) in the dtype of `hidden`, and the weights (B, N) float32: each row sums to 1, 0 where masked.
        """
        states = _blank(hidden, mask).float()
        with torch.autocast(states.device.type, enabled=False):  # a sum over D may exceed float16
            scores = states @ self.query.float()  # (B, N) or (T,)
        if hidden.dim() == 2:
            scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # −inf would make an empty row NaN
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
        return _weighted_sum(states, weights, mask).to(hidden.dtype), weights


class MeanPooling(nn.Module):
    """Weights every position the same; an ablation of `AttentionPooling`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools as `AttentionPooling.forward` does."""
        weights = mask.float() / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        return _weighted_sum(_blank(hidden, mask).float(), weights, mask).to(hidden.dtype), weights


class LastPooling(nn.Module):
    """Takes the last position; an ablation of `AttentionPooling`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pools as `AttentionPooling.forward` does; padding may be on either side."""
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).argmax(dim=-1)  # (B,)
        weights = F.one_hot(last, mask.shape[1]).float() * mask
        return _weighted_sum(_blank(hidden, mask).float(), weights, mask).to(hidden.dtype), weights


def _blank(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeroes the masked positions."""
    if hidden.dim() == 2:  # packed: real positions only
        return hidden
    return hidden.masked_fill(~mask[..., None], 0.0)  # a masked position may hold any value, even NaN


def _weighted_sum(states: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums each row's positions by their weights, both float32, into (B, D) float32, also under autocast."""
    if states.dim() == 2:
        rows = mask.nonzero()[:, 0]  # (T,), the row of each position
        weighted = weights[mask][:, None] * states  # (T, D)
        return weighted.new_zeros(len(mask), states.shape[1]).index_add(0, rows, weighted)
    with torch.autocast(states.device.type, enabled=False):
        return (weights[:, None] @ states)[:, 0]


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Brings vectors (…, D) float32 to length 1; one shorter than `SHORTEST` becomes 0, with gradient 0.

    Such a vector has no direction to speak of, and its gradient, divided by its length, would outweigh all others.
    """
    lengths = vectors.norm(dim=-1, keepdim=True)
    return (vectors / lengths.clamp(min=SHORTEST)).masked_fill(lengths < SHORTEST, 0.0)


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


class PackedStates(NamedTuple):
    """Hidden states of one route, real positions only.

    Attributes:
        states: (T, D) float, the T positions where `mask` is true, row by row.
        mask: (rows, positions) bool, at least one true position a row.
    """

    states: torch.Tensor
    mask: torch.BoolTensor


class ZeroLinear(nn.Linear):
    """A linear layer that `ViPolyQwenModel._init_weights` fills with zeros."""


class AttentionFusion(nn.Module):
    """Fuses text and audio by one cross-attention over the hidden states of both routes (future work in 003 §7).

    With x = e_text + e_audio, the heads h of width d, and the positions i of both routes:
    α_hi = softmax_i((W_q x)_h · (W_k h_i)_h / √d), and the result is x + W_o [Σ_i α_hi (W_v h_i)_h]_h. Each route has
    its W_k and W_v. W_o starts at 0, so that training starts from the mean of the
    two vectors.
    """

    def __init__(self, hidden_size: int, audio_hidden_size: int, projection_dim: int) -> None:
        super().__init__()
        self.heads = projection_dim // HEAD_SIZE if projection_dim % HEAD_SIZE == 0 else 1
        self.query = nn.Linear(projection_dim, projection_dim, bias=False)
        self.text_key = nn.Linear(hidden_size, projection_dim, bias=False)
        self.text_value = nn.Linear(hidden_size, projection_dim, bias=False)
        self.audio_key = nn.Linear(audio_hidden_size, projection_dim, bias=False)
        self.audio_value = nn.Linear(audio_hidden_size, projection_dim, bias=False)
        self.out = ZeroLinear(projection_dim, projection_dim, bias=False)

    def forward(self, vectors: torch.Tensor, text: PackedStates, audio: PackedStates) -> torch.Tensor:
        """Moves vectors by their attention to both routes.

        Args:
            vectors: (F, projection_dim) float32, the sum of the two unit vectors of each row.
            text: states of the text route of these rows, (T, hidden_size).
            audio: states of the audio route of these rows, (K, audio_hidden_size).

        Returns:
            (F, projection_dim) float32, not normalised.
        """
        query = self._split(self.query(vectors.to(text.states.dtype)))  # (F, heads, d)
        scores = [
            _spread(self._scores(query, key(route.states), route.mask), route.mask)
            for key, route in ((self.text_key, text), (self.audio_key, audio))
        ]
        weights = torch.cat(scores, dim=1).softmax(dim=1)  # (F, N + K, heads) float32
        of_text, of_audio = weights.split([text.mask.shape[1], audio.mask.shape[1]], dim=1)
        context = torch.zeros_like(query)
        for value, route, of_route in ((self.text_value, text, of_text), (self.audio_value, audio, of_audio)):
            weighted = of_route[route.mask][..., None] * self._split(value(route.states))  # (T, heads, d)
            context = context.index_add(0, route.mask.nonzero()[:, 0], weighted)
        return vectors + self.out(context.flatten(1).to(text.states.dtype)).float()

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        """Splits (T, projection_dim) into heads, (T, heads, d) float32."""
        return states.float().unflatten(-1, (self.heads, -1))

    def _scores(self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes the score of each position in each head, (T, heads) float32."""
        rows = mask.nonzero()[:, 0]  # (T,), the row of each position
        return (query[rows] * self._split(keys)).sum(dim=-1) / query.shape[-1] ** 0.5


def _spread(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Spreads packed scores (T, heads) over their rows, (F, N, heads), −inf where masked."""
    return scores.new_full((*mask.shape, scores.shape[1]), float("-inf")).masked_scatter(mask[..., None], scores)


__all__ = [
    "POOLING_CLASSES",
    "PROJECTION_CLASSES",
    "AttentionFusion",
    "AttentionPooling",
    "LastPooling",
    "LinearProjection",
    "MLPProjection",
    "MeanPooling",
    "PackedStates",
    "ZeroLinear",
    "unit_vectors",
]
