"""Training on several ranks: rows gathered with gradient, sharded parameters (FSDP2, DeepSpeed ZeRO-3)."""

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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


def end_process_group() -> None:
    """Waits for all ranks and ends the process group with its threads; a collective that every rank must join.

    Python aborts a process that ends while a thread of gloo holds a tensor. The group ends its threads when nothing
    refers to it, and Trainers and wrapped models do: let go of them before the call. Without a group nothing happens.
    """
    if not dist.is_initialized():
        return
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def is_deepspeed(model: nn.Module) -> bool:
    """Returns whether a model is DeepSpeed's engine, without importing DeepSpeed, which takes seconds."""
    return "deepspeed" in sys.modules and isinstance(model, sys.modules["deepspeed"].DeepSpeedEngine)


def full_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies parameters unsharded, each on its device; a collective that every rank must join."""
    if is_deepspeed_zero3_enabled():
        import deepspeed  # pyright: ignore[reportMissingImports]  # installed wherever ZeRO-3 is enabled

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: value.detach().clone() for name, value in parameters.items()}
    values = {name: value.detach() for name, value in parameters.items()}
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in values.items()
    }


@contextmanager
def unsharded_loading(args: TrainingArguments) -> Iterator[None]:
    """Loads models unsharded inside the context, also under ZeRO-3; DeepSpeed shards them when training begins.

    Otherwise transformers (5.23) shards while it loads, which is a collective and fails at HuBERT's weight norm.
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
    """Gives the model its original class inside the context, in place of the subclass that `fully_shard` makes.

    Otherwise saving would copy torch's FSDP code beside the weights and name it in the configuration.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield model
    finally:
        model.__class__ = sharded


@dataclass(frozen=True)
class RowShare:
    """Rows of a joined batch that a rank computes; the others compute theirs.

    Attributes:
        rank: index of this rank.
        pairs: rows of each rank, in rank order.
        taught: sides of each rank with a teacher's vector.
    """

    rank: int
    pairs: tuple[int, ...]
    taught: tuple[int, ...] = ()

    def own(self, counts: Sequence[int]) -> slice:
        """Returns this rank's part of what `counts` counts of each rank."""
        first = sum(counts[: self.rank])
        return slice(first, first + counts[self.rank])


def gather_sizes(sizes: Sequence[int], device: torch.device) -> list[list[int]]:
    """Gathers a few integers of every rank in one collective: (ranks, len(sizes)), in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(sizes)]
    mine = torch.tensor(sizes, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return torch.stack(gathered).tolist()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Averages a tensor over all ranks in place, and returns it."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def gather_rows(parts: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Joins the rows of all ranks, part by part and in rank order, in one collective and with gradient.

    Every rank then computes the loss of the joined batch, which yields the gradient of one rank with the joined batch:
    the backward pass sums the gradients of the W equal losses L with respect to this rank's rows x_r, so rank r
    backpropagates W ∂L/∂x_r through the model; DDP and FSDP average parameter gradients over ranks,
    1/W Σ_r W ∂L/∂x_r ∂x_r/∂θ = dL/dθ. Therefore the loss must not be scaled by W.

    Args:
        parts: K tensors, (rows of this rank, …), any dtype; the same dtype and trailing shape for all parts.
        sizes: (ranks, K), rows of every part on every rank, from `gather_sizes`; may differ and may be 0.

    Returns:
        K tensors, (rows of all ranks, …); the parts themselves on a single rank.
    """
    if len(sizes) == 1:
        return list(parts)
    joined = _GatherRows.apply(torch.cat(list(parts)), [sum(of_rank) for of_rank in sizes])
    pieces = joined.split([size for of_rank in sizes for size in of_rank])
    return [torch.cat(pieces[number :: len(parts)]) for number in range(len(parts))]


class _GatherRows(torch.autograd.Function):
    """Concatenates the rows of all ranks; the backward sums the gradient of this rank's rows over all ranks."""

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
