"""Linear layers that multiply float32 matrices on AMD processors with oneDNN, twice as fast as MKL, torch's choice."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

FEWEST_PRODUCTS = 2**22  # of a call; with fewer, oneDNN saves less than it takes to call (benchmarks/linear_speed.py)
FEWEST_PRODUCTS_WITH_GRADIENT = 2**27  # in training most batches have a new shape, for which oneDNN prepares itself
READING_ROWS = 7  # reading the weights takes as long as the products of so many rows


def _onednn_is_faster() -> bool:
    """Returns whether oneDNN multiplies float32 matrices faster than MKL on this machine.

    MKL uses AVX-512 on Intel processors only; on AMD's it computes with vectors half as wide.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    found = torch.cpu.get_capabilities()
    return found.get("avx512_f", False) and found["cpu_name"].startswith("AMD")


ONEDNN_IS_FASTER = _onednn_is_faster()


class _LikeStock(type):
    """Makes `Linear` equal `nn.Linear`, so that tables of layers by class, as `quantize_dynamic` has, hold it too."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is nn.Linear and cls is Linear)

    def __hash__(cls) -> int:
        return hash(nn.Linear) if cls is Linear else super().__hash__()


class Linear(nn.Linear, metaclass=_LikeStock):
    """A linear layer with the parameters and values, to rounding, of `nn.Linear`; computes with `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Computes x Wᵀ + b of (…, in_features)."""
        return linear(input, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Turns the linear layers of a model into `Linear`, in place, where that pays; subclasses keep their forward."""
    if ONEDNN_IS_FASTER:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


def linear(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x Wᵀ + b; large float32 products on an AMD processor with oneDNN, any other as torch does.

    Args:
        values: (…, in_features) float.
        weight: (out_features, in_features) float.
        bias: (out_features,) float, or `None`.

    Returns:
        (…, out_features) float.
    """
    if ONEDNN_IS_FASTER and type(values) is Tensor and values.is_cpu and _suits_onednn(values, weight):
        return _by_onednn(values, weight, bias)
    return F.linear(values, weight, bias)


def _suits_onednn(values: Tensor, weight: Tensor) -> bool:
    """Returns whether oneDNN can compute a product, and is faster at it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._len_torch_dispatch_stack() > 0:  # FLOP counters and the like know torch's operators only
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False  # vmap, jacobians and derivatives in forward mode know torch's operators only, too
    plain = type(weight) in (nn.Parameter, Tensor)  # not fake, quantized or sharded; the caller checks the values
    if not plain or values.dim() < 2 or values.shape[-1] != weight.shape[1]:
        return False
    rows = values.shape[:-1].numel()
    fewest = FEWEST_PRODUCTS_WITH_GRADIENT if torch.is_grad_enabled() else FEWEST_PRODUCTS
    if rows == 0 or (rows + READING_ROWS) * weight.numel() < fewest:
        return False
    return values.dtype == weight.dtype == torch.float32 and weight.is_cpu and torch.backends.mkldnn.enabled


def _by_onednn(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes a linear layer with oneDNN, with gradient where one is wanted."""
    if torch.is_grad_enabled():
        return _OneDNNLinear.apply(values, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")  # the operator of torch.compile


class _OneDNNLinear(torch.autograd.Function):
    """Computes a linear layer and its gradient with oneDNN."""

    @staticmethod
    def forward(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _by_onednn(values, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weight, _ = inputs
        of_values, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(values if of_weight else None, weight if of_values else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        of_values, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # (R, out_features); a batch of gradients cannot be flattened
        return (
            _by_onednn(grad, weight.t(), None) if of_values else None,
            _by_onednn(rows.t(), values.flatten(0, -2).t(), None) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


__all__ = ["Linear", "linear", "use_onednn"]
