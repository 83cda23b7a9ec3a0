"""Faster layers of the vision tower: patches by a matrix product, images of one size in one attention."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention

from .linear_vipolyqwen import linear
from .packing_vipolyqwen import TORCH_VARLEN


class PatchProjection(nn.Conv3d):
    """Projects patches by one matrix product, where the stock convolution makes one step of its window a patch."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects patches (P, channels, frames, height, width) of the size of the window to (P, D, 1, 1, 1)."""
        return linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


class BatchedVisionAttention(VisionAttention):
    """Attends to the images of a run of one size in one call; the stock layer, with SDPA, to one image after another.

    Queries and keys are rotated together, in three passes over them. FlashAttention, which takes all sizes in one
    call, and eager attention are those of the stock layer.
    """

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns (patches, width) for the hidden states of the patches of all images.

        Args:
            hidden_states: (patches, width) float, image after image.
            cu_seqlens: (images + 1,) int32, cumulative patches, from 0.
            position_embeddings: cosine and sine of the patches, (patches, head size) each.
            **kwargs: passed to the stock layer; unused with SDPA.
        """
        if position_embeddings is None or self.config._attn_implementation not in ("sdpa", TORCH_VARLEN):
            return super().forward(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        patches = len(hidden_states)
        states = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1)
        cosine, sine = (x[:, None, None].float() for x in position_embeddings)
        rotated = _Rotation.apply(states[:, :2], cosine, sine)
        attended, first = [], 0
        for size, images in _runs_of(cu_seqlens):
            last = first + images * size
            parts = (rotated[first:last, 0], rotated[first:last, 1], states[first:last, 2])
            by_image = (part.unflatten(0, (images, size)).transpose(1, 2) for part in parts)
            values = scaled_dot_product_attention(*by_image, scale=self.scaling)  # (images, heads, size, head size)
            attended.append(values.transpose(1, 2).reshape(last - first, -1))
            first = last
        return self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))


_last_runs: list[tuple[Tensor, list[tuple[int, int]]]] = []  # of one tower's pass


def _runs_of(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Returns patches and number of the images of each run; the host waits once for the layers of a tower."""
    for seen, runs in _last_runs:
        if seen is cu_seqlens:
            return runs
    sizes = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    _last_runs[:] = [(cu_seqlens, runs)]
    return runs


class _Rotation(torch.autograd.Function):
    """Rotates pairs of dimensions d and d + head size / 2 by an angle each; the gradient rotates back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return _rotate(states, cosine, sine)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _Rotation.apply(gradient, cosine, -sine), None, None


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Computes in float32, (patches, 2, heads, head size), and returns the dtype of the states."""
    half = states.shape[-1] // 2
    values = states.float()
    rotated = values * cosine
    rotated[..., :half].addcmul_(values[..., half:], sine[..., :half], value=-1)
    rotated[..., half:].addcmul_(values[..., :half], sine[..., half:])
    return rotated.to(states.dtype)


def use_faster_vision(model: nn.Module) -> None:
    """Turns layers of the vision tower of a model into those above, in place; names of weights do not change."""
    for module in model.modules():
        if type(module) is VisionAttention:
            module.__class__ = BatchedVisionAttention
        elif type(module) is nn.Conv3d and module.kernel_size == module.stride:
            module.__class__ = PatchProjection


__all__ = ["BatchedVisionAttention", "PatchProjection", "use_faster_vision"]
