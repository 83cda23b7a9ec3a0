"""Training on several ranks: rows gathered with gradient, sharded weights (FSDP2, DeepSpeed ZeRO-3)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)


def is_deepspeed(model: nn.Module) -> bool:
    """Whether a model is DeepSpeed's engine; that library is not imported for the question, which takes seconds."""
    return "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def full_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of parameters in full, on their device; all processes have to call this together."""
    if is_deepspeed_zero3_enabled():
        import deepspeed  # only then it is there

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: value.detach().clone() for name, value in parameters.items()}
    values = {name: value.detach() for name, value in parameters.items()}
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in values.items()
    }


@contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """A process loads all weights for a while, also under ZeRO-3, which spreads those of training when it begins.

    transformers (5.23) would spread them while it loads, wait for the other processes to do the same, and fail at the
    weight norm of a HuBERT.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    config = args.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


@contextmanager
def unsharded_class(model: nn.Module) -> Iterator[nn.Module]:
    """The model as an instance of its own class for a while.

    `fully_shard` makes a subclass of FSDPModule of it. Saving would then write torch's code beside the weights in
    place of the model's, and name that in the configuration.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield model
    finally:
        model.__class__ = sharded


def gather_with_grad(x: Tensor) -> Tensor:
    """All rows of all processes in rank order, with gradient; x itself where there is one process.

    Every process then computes the loss of the whole joined batch. Why that gives the gradient of one process with the
    whole batch: the backward pass sums over the W processes what their (equal) losses L say about this process's rows,
    so it hands W ∂L/∂x_r to rank r's own model pass; DDP and FSDP average the parameter gradients,
    1/W Σ_r W ∂L/∂x_r ∂x_r/∂θ = dL/dθ. So the loss must be neither divided by nor multiplied with W.

    Args:
        x: (rows of this process, …) any dtype; the row count may differ between processes and be 0.

    Returns:
        (rows of all processes, …).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return _GatherRows.apply(x, torch.cat(counts).tolist())


class _GatherRows(torch.autograd.Function):
    """Concatenation over ranks; the backward sums the gradient of this rank's rows over all ranks."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: x.shape[0]] = x
        blocks = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(blocks, padded)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[dist.get_rank()], None
