"""Faster layers: `torch.compile` for those that repeat, Liger's fused kernels for the language model."""

import torch
from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.utils import is_liger_kernel_available

# The images' blocks loop over a list of lengths and would be compiled anew for each number of images.
COMPILED = ("Qwen2VLDecoderLayer", "HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm")
VARIANTS = 64  # of a layer: with and without gradient, mask, autocast; one row or many; torch's limit is 8


def compile_layers(model: nn.Module, backend: str, mode: str | None) -> int:
    """Compiles each layer in place, for any shape; names of weights stay as they are.

    The stock Trainer compiles the whole model, whose choice of rows and images depends on the data: it breaks into
    many graphs and is soon left as it was. Layers of one class share one graph.

    Args:
        model: a `ViPolyQwenModel`.
        backend: of `torch.compile`.
        mode: of `torch.compile`.

    Returns:
        The number of layers that will be compiled when they are first called.
    """
    torch._dynamo.config.recompile_limit = VARIANTS
    layers = [module for module in model.modules() if type(module).__name__ in COMPILED]
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)


def use_liger_kernels(model: nn.Module, device: torch.device) -> None:
    """Puts the kernels into the language model of `model`; weights and their names stay as they are.

    The stock Trainer's own call does nothing here: liger goes by a model's type and knows none called vipolyqwen. Its
    function for Qwen2-VL cannot be imported beside transformers 5.23 and, before that, patches a rotary embedding that
    is no longer called; so its layers are put in one by one.

    Args:
        model: a `ViPolyQwenModel`.
        device: where it will run.

    Raises:
        ValueError: liger-kernel is not installed, or the device is none that it has kernels for.
    """
    if not is_liger_kernel_available():
        raise ValueError(
            "`use_liger_kernel` is true, but liger-kernel is not installed: pip install liger-kernel, or leave it out."
        )
    if device.type != "cuda":
        raise ValueError(f"`use_liger_kernel` is true, but training runs on {device}; its kernels need CUDA. Drop it.")
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    def fused_norm(norm: nn.Module) -> LigerRMSNorm:
        fused = LigerRMSNorm(len(norm.weight), norm.variance_epsilon)
        fused.weight = norm.weight
        return fused

    language_model = model.vlm.language_model
    language_model.norm = fused_norm(language_model.norm)
    for layer in language_model.layers:
        layer.input_layernorm = fused_norm(layer.input_layernorm)
        layer.post_attention_layernorm = fused_norm(layer.post_attention_layernorm)
        with torch.device("meta"):  # its own weights would only be thrown away
            fused = LigerSwiGLUMLP(language_model.config)
        for name, projection in layer.mlp.named_children():
            if name in ("gate_proj", "up_proj", "down_proj"):
                setattr(fused, name, projection)
        layer.mlp = fused
    modeling_qwen2_vl.apply_rotary_pos_emb = liger_rotary_pos_emb  # a function, so for every Qwen2-VL of this process
