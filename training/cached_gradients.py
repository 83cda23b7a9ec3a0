"""Gradient caching: a batch of any size in the memory of one micro-batch (Gao et al. 2021, GradCache).

A contrastive loss needs all vectors at once, but not all activations. Each chunk of rows therefore passes through the
model twice: first without gradient, to keep only the vectors; then, once the backward of the loss has produced the
gradient g of each vector, with gradient, followed at once by the backward of Σ vectors · g. Both passes restore the
same random state, so that dropout drops the same activations.

Autograd sees a single function of the batch, whose backward holds the second pass. The code above it (loss, learnable
loss parameters, monitors, gathering over ranks, loss scaling, accumulation) needs no change. Only DeepSpeed runs each
backward itself; it treats every chunk as a micro-batch (`DeepSpeedInChunks`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from .distributed import is_deepspeed

Chunk = Sequence[int]
Embed = Callable[[Chunk], Tensor]  # row indices -> vectors, (rows, D) float


def embed_in_chunks(
    embed: Embed, chunks: Sequence[Chunk], model: nn.Module, device: torch.device, exchange: bool = True
) -> Tensor:
    """Embeds all chunks in order, (rows, D), with a gradient that needs the memory of one chunk.

    Args:
        embed: runs `model` once on the rows of a chunk; runs again for each chunk in the backward.
        chunks: row indices of each chunk. All ranks need the same number, since their forwards join the same
            collectives; a chunk may be empty if `embed` accepts that.
        model: the model that `embed` runs; DDP and FSDP2 reduce gradients over ranks in the last chunk only, DeepSpeed
            in each.
        device: device of the model.
        exchange: whether the last chunk ends a step; False while gradients are accumulated over batches.
    """
    anchor = torch.empty(
        0, device=device, requires_grad=True
    )  # so that autograd runs the backward: no other input has a gradient
    return _CachedGradients.apply(anchor, embed, chunks, model, exchange)


class _CachedGradients(torch.autograd.Function):
    """Embeds all chunks without gradient; the backward repeats each with gradient, down to the parameters."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, anchor: Tensor, embed: Embed, chunks: Sequence[Chunk], model: nn.Module, exchange: bool
    ) -> Tensor:
        vectors, states = [], []
        for chunk in chunks:
            states.append(_ForwardState(anchor))
            vectors.append(embed(chunk))
        ctx.embed, ctx.chunks, ctx.model, ctx.exchange, ctx.states = embed, chunks, model, exchange, states
        return torch.cat(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, ...]:
        gradients = grad.split([len(chunk) for chunk in ctx.chunks])
        for number, (chunk, gradient) in enumerate(zip(ctx.chunks, gradients, strict=True), start=1):
            with torch.enable_grad(), _exchanging(ctx.model, ctx.exchange and number == len(ctx.chunks)):
                with ctx.states[number - 1].restored():
                    vectors = ctx.embed(chunk)
                if is_deepspeed(ctx.model):
                    ctx.model.backward((vectors * gradient).sum(), scale_wrt_gas=False)
                else:
                    vectors.backward(gradient)
        return (None,) * 5


class _ForwardState:
    """Current random state and autocast, on which a forward depends besides weights and inputs."""

    def __init__(self, anchor: Tensor) -> None:
        self.device_type = anchor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(anchor)
        self.autocast = (torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores both inside the context; afterwards the random state continues as if nothing had been drawn."""
        enabled, dtype = self.autocast
        with (
            torch.random.fork_rng(self.devices, device_type=self.device_type),
            torch.autocast(self.device_type, dtype, enabled),
        ):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield


class DeepSpeedInChunks(DeepSpeedEngineWrapper):
    """Replaces accelerate's wrapper of the engine: plain backward for the loss, the engine's for each chunk."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: object) -> None:
        """Runs the backward of the loss, and the update at the end of a step."""
        loss.backward()
        if sync_gradients:
            self.engine.step()


@contextmanager
def _exchanging(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Reduces gradients over ranks in a backward inside the context only if `wanted`, at the end of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif is_deepspeed(model):
        model.set_gradient_accumulation_boundary(wanted)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext():
        yield
