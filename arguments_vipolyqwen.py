"""Checks the names, kinds and shapes of what the model's forward is given, before anything is computed."""

from collections.abc import Iterable, Mapping

import torch

LANGUAGE_ARGUMENTS = ("output_hidden_states", "output_attentions", "is_causal")
DIMENSIONS = {
    "input_ids": 2,
    "attention_mask": 2,
    "pixel_values": 2,
    "image_grid_thw": 2,
    "audio_features": 2,
    "audio_attention_mask": 2,
    "audio_windows": 1,
    "has_audio": 1,
    "position_ids": 3,
    "inputs_embeds": 3,
    "image_indices": 1,
}
LONG = ("input_ids", "image_grid_thw", "audio_windows", "position_ids", "image_indices")
FLOATING = ("pixel_values", "audio_features", "inputs_embeds")
BELONGS_TO = {
    "pixel_values": "input_ids",  # or `inputs_embeds`
    "attention_mask": "input_ids",
    "image_indices": "image_grid_thw",
    "audio_windows": "audio_features",
    "audio_attention_mask": "audio_features",
}
MASKS = (("attention_mask", "input_ids"), ("audio_attention_mask", "audio_features"))  # of equal shape


def check_names(names: Iterable[str]) -> None:
    """Refuses arguments that neither `forward` nor the language model takes.

    Raises:
        ValueError: one is unknown.
    """
    unknown = sorted(set(names) - set(LANGUAGE_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"`forward` takes no argument {', '.join(map(repr, unknown))}, which would be ignored. Pass the tensors "
            f"of the processor under their names, and of further arguments {', '.join(LANGUAGE_ARGUMENTS)}."
        )


def check_tensors(inputs: Mapping[str, torch.Tensor | None]) -> None:
    """Checks kind and shape of each tensor of a batch, and that none would be ignored; reads no values.

    Args:
        inputs: tensors under the names of `ViPolyQwenModel.forward`, `None` where one is not passed.

    Raises:
        ValueError: one is no tensor, of another dtype or shape than `forward` takes, or lacks the one it belongs to.
    """
    for name, value in inputs.items():
        if value is not None:
            _check_tensor(name, value)
    no_tokens = inputs["inputs_embeds"] is None
    for name, other in BELONGS_TO.items():
        if inputs[name] is not None and inputs[other] is None and (other != "input_ids" or no_tokens):
            raise ValueError(f"`{name}` was passed without `{other}` and would be ignored; pass both or neither.")
    for mask, masked in MASKS:
        given, expected = inputs[mask], inputs[masked]
        if given is not None and expected is not None and given.shape != expected.shape:
            raise ValueError(
                f"`{mask}` has the shape {tuple(given.shape)} and `{masked}` {tuple(expected.shape)}; pass both as "
                "the processor returns them."
            )


def _check_tensor(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is a {type(value).__name__}; pass a tensor (`return_tensors='pt'`).")
    if value.ndim != DIMENSIONS[name]:
        raise ValueError(f"`{name}` has the shape {tuple(value.shape)}; it must have {DIMENSIONS[name]} dimensions.")
    if name in LONG and value.dtype != torch.long:
        raise ValueError(f"`{name}` is of {value.dtype}; pass torch.long.")
    if name in FLOATING and not value.is_floating_point():
        raise ValueError(f"`{name}` is of {value.dtype}; pass floating-point numbers, as the processor returns them.")


__all__ = ["LANGUAGE_ARGUMENTS", "check_names", "check_tensors"]
