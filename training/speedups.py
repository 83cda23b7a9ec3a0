"""`torch.compile` for the layers that repeat, which is where the time goes."""

import torch
from torch import nn

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
