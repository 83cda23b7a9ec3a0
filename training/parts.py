"""The parts of the model as training names them: towers, new parts, names of parameters."""

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from ..modeling_vipolyqwen import ViPolyQwenModel

TOWERS = {  # name in `freeze` and `lora_targets` -> submodule of the model
    "vision": "vlm.visual",
    "language": "vlm.language_model",
    "audio": "audio_tower",
}
# In no backbone, so initialised at random; a model has `audio_…` with a speech encoder, the last by `audio_fusion`.
NEW_PARTS = ("pooling", "projection", "audio_pooling", "audio_projection", "audio_fusion")


def plain_name(name: str) -> str:
    """Returns a parameter's name without peft's prefix: `base_model.model.vlm.…` becomes `vlm.…`."""
    return name.removeprefix("base_model.model.")


def new_parts(model: nn.Module) -> list[str]:
    """Returns those of `NEW_PARTS` that a model has."""
    return [name for name in NEW_PARTS if name in dict(model.named_children())]


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters of the new parts by name, also under an adapter."""
    named = {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in named.items() if name.split(".")[0] in NEW_PARTS}


def freeze_towers(model: "ViPolyQwenModel", names: list[str]) -> None:
    """Freezes towers in place; a tower with nothing to train before it builds no autograd graph.

    Args:
        model: the model.
        names: keys of `TOWERS`.

    Raises:
        ValueError: `names` has "audio", but the model has no speech encoder.
    """
    for name in names:
        if name == "audio" and model.config.audio_config is None:
            raise ValueError("`freeze` names 'audio', but this model has no speech encoder; drop it.")
        tower = model.get_submodule(TOWERS[name])
        tower.requires_grad_(False)
        if name != "language" or "vision" in names:  # else images' gradients pass through it
            # Frozen weights are not enough: gradient checkpointing makes the first layer's output require a gradient.
            tower.forward = torch.no_grad()(tower.forward)
