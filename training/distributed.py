"""What differs for a model whose weights lie in pieces on several processes (FSDP2, DeepSpeed ZeRO-3)."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
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


def whole(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
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
def loading_whole(args: TrainingArguments) -> Iterator[None]:
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
def own_class(model: nn.Module) -> Iterator[nn.Module]:
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
