"""Cached gradients: a batch of any size in the memory of a few rows (Gao et al. 2021, "Scaling Deep Contrastive…").

The loss of a contrastive batch needs all vectors at once, but not all activations. So the rows pass through the model
twice, a chunk at a time: first without gradient, which leaves nothing but the vectors; then, when the backward of the
loss has brought the gradient g of each vector, with gradient, and every chunk goes straight on to the backward of
Σ vectors · g. Both passes of a chunk draw the same random numbers, so dropout drops the same activations.

To autograd all of this is one function of the batch, whose backward holds the second pass. Whatever stands above it
(the loss, its own parameters, monitors, gathering over processes, loss scaling, accumulation) knows nothing of it. But
DeepSpeed wants to run each backward itself: there every chunk is what it calls a micro-batch (`DeepSpeedInChunks`).
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
Embed = Callable[[Chunk], Tensor]  # rows of the batch -> their vectors, (rows, D) float


def embed_in_chunks(
    embed: Embed, chunks: Sequence[Chunk], model: nn.Module, device: torch.device, exchange: bool = True
) -> Tensor:
    """Vectors of all chunks, one after another, (rows, D), with a gradient that costs the memory of one chunk.

    Args:
        embed: calls `model` once; it is called once for each chunk, and again for each in the backward.
        chunks: rows of each call. With several processes all must have as many, since their calls meet in collectives;
            a chunk may be empty if `embed` can do with that.
        model: what `embed` calls; under DDP and FSDP2 its processes exchange gradients in the last chunk only, under
            DeepSpeed in each.
        device: where the model is.
        exchange: whether the last chunk is the last of a step; not so where gradients are accumulated over batches.
    """
    anchor = torch.empty(0, device=device, requires_grad=True)  # no tensor that comes in has a gradient of its own
    return _CachedGradients.apply(anchor, embed, chunks, model, exchange)


class _CachedGradients(torch.autograd.Function):
    """All chunks without gradient; the backward does them again with it, each up to the parameters."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, anchor: Tensor, embed: Embed, chunks: Sequence[Chunk], model: nn.Module, exchange: bool
    ) -> Tensor:
        vectors, surroundings = [], []
        for chunk in chunks:
            surroundings.append(_Surroundings(anchor))
            vectors.append(embed(chunk))
        ctx.embed, ctx.chunks, ctx.model, ctx.exchange, ctx.surroundings = embed, chunks, model, exchange, surroundings
        return torch.cat(vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[None, ...]:
        gradients = grad.split([len(chunk) for chunk in ctx.chunks])
        for number, (chunk, gradient) in enumerate(zip(ctx.chunks, gradients, strict=True), start=1):
            with torch.enable_grad(), _exchanging(ctx.model, ctx.exchange and number == len(ctx.chunks)):
                with ctx.surroundings[number - 1].again():
                    vectors = ctx.embed(chunk)
                if is_deepspeed(ctx.model):
                    ctx.model.backward((vectors * gradient).sum(), scale_wrt_gas=False)
                else:
                    vectors.backward(gradient)
        return (None,) * 5


class _Surroundings:
    """What a forward depends on besides weights and inputs: random state and autocast, as they are now."""

    def __init__(self, anchor: Tensor) -> None:
        self.device_type = anchor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(anchor)
        self.autocast = (torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Brings them back for a while; the random state then goes on where it was."""
        enabled, dtype = self.autocast
        with (
            torch.random.fork_rng(self.devices, device_type=self.device_type),
            torch.autocast(self.device_type, dtype, enabled),
        ):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=self.device_type)
            yield


class DeepSpeedInChunks(DeepSpeedEngineWrapper):
    """What accelerate calls in place of the engine: the loss has an ordinary backward, each chunk the engine's."""

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: object) -> None:
        """Backward, and the update where it is due."""
        loss.backward()
        if sync_gradients:
            self.engine.step()


@contextmanager
def _exchanging(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the backward inside is the last of a step: then DDP and FSDP2 exchange what each has added up."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif is_deepspeed(model):
        model.set_gradient_accumulation_boundary(wanted)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not wanted else nullcontext():
        yield
