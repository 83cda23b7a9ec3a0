"""Faster layers of a run: `torch.compile` of layers, Liger kernels in the language model."""

import torch
from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.utils import is_liger_kernel_available

# The blocks of the vision tower loop over a list of lengths and would recompile for each number of images.
COMPILED = ("Qwen2VLDecoderLayer", "HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm")
VARIANTS = 64  # graphs of a layer: with or without gradient, mask, autocast; one row or many (torch: 8)


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
