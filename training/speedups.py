"""Faster layers: images of one size together, `torch.compile` of layers, Liger kernels in the language model."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.utils import is_liger_kernel_available

from ..packing_vipolyqwen import TORCH_VARLEN

# The blocks of the vision tower loop over a list of lengths and would recompile for each number of images.
COMPILED = ("Qwen2VLDecoderLayer", "HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm")
VARIANTS = 64  # graphs of a layer: with or without gradient, mask, autocast; one row or many (torch: 8)


class BatchedVisionAttention(VisionAttention):
    """Attends to the images of a run of one size in one call; the stock layer, with SDPA, to one image after another.

    Queries and keys are rotated together, in three passes over them.
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
            **kwargs: unused.
        """
        patches = len(hidden_states)
        states = self.qkv(hidden_states).view(patches, 3, self.num_heads, -1)
        cosine, sine = (x[:, None, None].float() for x in position_embeddings)
        rotated = _Rotation.apply(states[:, :2], cosine, sine)
        attended, first = [], 0
        for size, run in groupby((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()):
            images = len(list(run))
            last = first + images * size
            parts = (rotated[first:last, 0], rotated[first:last, 1], states[first:last, 2])
            by_image = (part.unflatten(0, (images, size)).transpose(1, 2) for part in parts)
            values = scaled_dot_product_attention(*by_image, scale=self.scaling)  # (images, heads, size, head size)
            attended.append(values.transpose(1, 2).reshape(last - first, -1))
            first = last
        return self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))


class _Rotation(torch.autograd.Function):
    """Rotates pairs of dimensions d and d + head size / 2 by an angle each; the gradient rotates back."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotate(states, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotate(gradient, cosine, -sine), None, None


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Computes in float32, (patches, 2, heads, head size), and returns the dtype of the states."""
    half = states.shape[-1] // 2
    values = states.float()
    rotated = values * cosine
    rotated[..., :half].addcmul_(values[..., half:], sine[..., :half], value=-1)
    rotated[..., half:].addcmul_(values[..., :half], sine[..., half:])
    return rotated.to(states.dtype)


def batch_vision_attention(model: nn.Module) -> int:
    """Lets the vision tower attend to images of one size together, in place; names of weights do not change.

    FlashAttention, which takes all sizes in one call, and eager attention stay as they are.

    Args:
        model: a `ViPolyQwenModel`.

    Returns:
        the number of layers changed.
    """
    layers = [module for module in model.modules() if type(module) is VisionAttention]
    layers = [layer for layer in layers if layer.config._attn_implementation in ("sdpa", TORCH_VARLEN)]
    for layer in layers:
        layer.__class__ = BatchedVisionAttention
    return len(layers)


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> int:
    """Compiles the layers in `COMPILED` in place, with dynamic shapes; names of weights do not change.

    The stock Trainer compiles the full model, whose selection of rows and images depends on the data: graph breaks
    would soon exceed the recompile limit, and torch would fall back to eager mode. Layers of one class share a graph.

    Args:
        model: a `ViPolyQwenModel`.
        backend: backend of `torch.compile`.
        mode: mode of `torch.compile`.

    Returns:
        the number of layers, which are compiled at their first call.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    layers = [module for module in model.modules() if type(module).__name__ in COMPILED]
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)


def use_liger_kernels(model: nn.Module, device: torch.device) -> None:
    """Replaces norms, MLPs and rotary embedding of the language model by Liger kernels; weights and names remain.

    Layers are replaced one by one, because the stock Trainer dispatches on a model type that Liger does not know, and
    Liger's function for Qwen2-VL cannot be imported with transformers 5.23 and patches an unused rotary embedding
    with older ones.

    Args:
        model: a `ViPolyQwenModel`; changed in place. The rotary embedding changes for every Qwen2-VL of the process.
        device: device to train on.

    Raises:
        ValueError: liger-kernel is not installed, or the device is not CUDA.
    """
    if not is_liger_kernel_available():
        raise ValueError(
            "`use_liger_kernel` is true, but liger-kernel is not installed: pip install liger-kernel, or leave it out."
        )
    if device.type != "cuda":
        raise ValueError(
            f"`use_liger_kernel` is true, but training runs on {device}; its kernels need CUDA. Leave it out."
        )
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    def fused_norm(norm: nn.Module) -> LigerRMSNorm:
        fused = LigerRMSNorm(len(norm.weight), norm.variance_epsilon)
        fused.weight = norm.weight
        return fused

    language_model = model.vlm.language_model
    language_model.norm = fused_norm(language_model.norm)
    for layer in language_model.layers:
        layer.input_layernorm = fused_norm(layer.input_layernorm)
        layer.post_attention_layernorm = fused_norm(layer.post_attention_layernorm)
        with torch.device("meta"):  # its projections are replaced below
            fused = LigerSwiGLUMLP(language_model.config)
        for name, projection in layer.mlp.named_children():
            if name in ("gate_proj", "up_proj", "down_proj"):
                setattr(fused, name, projection)
        layer.mlp = fused
    modeling_qwen2_vl.apply_rotary_pos_emb = liger_rotary_pos_emb
