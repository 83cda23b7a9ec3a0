"""Makes a speech encoder independent of padding, joins windows of long audio, computes the receptive field."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

# Speech encoders in which only the group norm replaced below carries padding into a real frame.
PADDING_BLIND = ("hubert", "wav2vec2", "wavlm", "unispeech", "unispeech-sat")


class PaddedAudio(NamedTuple):
    """Right-padded waveforms and their lengths, passed together where the stock encoder takes a tensor.

    Attributes:
        values: (clips, samples) float, scaled as the feature extractor does it, right-padded.
        lengths: (clips,) long, real samples of each clip.
    """

    values: torch.Tensor
    lengths: torch.Tensor


class PaddingInvariantFeatureEncoder(nn.Module):
    """Convolutional stack of a wav2vec2-like encoder whose real frames do not depend on padding.

    The stock stack takes no mask, and the group norm over time in its first layer (HuBERT-base, wav2vec2-base,
    WavLM-base) mixes padding into every frame. Here the norm covers real frames only. The strided convolutions add no
    padding, so a real frame sees real samples only. Parameter names stay the stock ones.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.conv_layers = stock.conv_layers

    def forward(self, audio: PaddedAudio) -> torch.Tensor:
        """Computes the features of waveforms.

        Args:
            audio: (clips, samples) values and (clips,) lengths.

        Returns:
            (clips, channels, frames) in the dtype of the values; frames of padding hold arbitrary finite values.
        """
        hidden = audio.values[:, None]  # (clips, 1, samples)
        lengths = audio.lengths
        for layer in self.conv_layers:
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                hidden = layer.conv(hidden)
                lengths = (lengths - layer.conv.kernel_size[0]) // layer.conv.stride[0] + 1
                hidden = layer.activation(_masked_group_norm(hidden, lengths, layer.layer_norm))
            else:
                hidden = layer(hidden)
        return hidden


def _masked_group_norm(hidden: torch.Tensor, lengths: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Normalises each channel over the first `lengths` (clips,) frames of `hidden` (clips, channels, frames)."""
    mask = (torch.arange(hidden.shape[-1], device=hidden.device) < lengths[:, None])[:, None]  # (clips, 1, frames)
    count = lengths[:, None, None]
    values = hidden.float().masked_fill(~mask, 0.0)
    mean = values.sum(dim=-1, keepdim=True) / count
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    normalised = (centred * torch.rsqrt(variance + norm.eps)).to(hidden.dtype)
    return normalised * norm.weight[:, None] + norm.bias[:, None]


def make_padding_invariant(tower: PreTrainedModel) -> PreTrainedModel:
    """Replaces the convolutional stack of a speech encoder by `PaddingInvariantFeatureEncoder`, in place.

    Also freezes `masked_spec_embed`, which receives a gradient from SpecAugment only.

    Raises:
        ValueError: the model takes no waveforms, or has another layer that mixes padding into real frames.
    """
    if not hasattr(tower, "feature_extractor") or not hasattr(tower, "_get_feat_extract_output_lengths"):
        raise ValueError(
            f"{type(tower).__name__} does not map waveforms to frames through a convolutional feature extractor; "
            "use a speech encoder such as hubert, wav2vec2 or wavlm as `audio_config`."
        )
    config = tower.config.to_dict()
    if config["model_type"] not in PADDING_BLIND or config.get("conv_pos_batch_norm") or config.get("add_adapter"):
        raise ValueError(
            f"Padding would change the vectors that this {config['model_type']} encoder gives to the shorter clips of "
            f"a batch; use one of {', '.join(PADDING_BLIND)}, without `conv_pos_batch_norm` or `add_adapter`."
        )
    tower.feature_extractor = PaddingInvariantFeatureEncoder(tower.feature_extractor)
    if hasattr(tower, "masked_spec_embed"):
        tower.masked_spec_embed.requires_grad_(False)
    return tower


def keep_supported_attention(audio_config: PreTrainedConfig) -> None:
    """Pins an encoder without SDPA (WavLM) to `eager`, so that `attn_implementation` of the model leaves it alone."""
    if not MODEL_MAPPING[type(audio_config)]._supports_sdpa:
        audio_config._attn_implementation = "eager"


def check_windows(audio_windows: torch.Tensor, given: int) -> None:
    """Checks the counts of windows of each clip.

    Args:
        audio_windows: (clips,) long, windows of each clip.
        given: number of windows that were passed.

    Raises:
        ValueError: the counts are not those of the windows passed, or a clip has none.
    """
    if audio_windows.sum() != given or (audio_windows < 1).any():
        raise ValueError(
            f"`audio_windows` is {audio_windows.tolist()}, {int(audio_windows.sum())} windows of "
            f"{len(audio_windows)} clips, but `audio_features` has {given}; pass both as the processor returns them, "
            "with at least one window a clip."
        )


def join_windows(frames: torch.Tensor, audio_windows: torch.Tensor) -> torch.Tensor:
    """Returns the mask of the frames of each clip, (clips, frames) bool, right-padded.

    Args:
        frames: (windows,) long, frames of each window.
        audio_windows: (clips,) long, windows of each clip, in the same order.
    """
    clips = torch.arange(len(audio_windows), device=frames.device).repeat_interleave(audio_windows)  # of each window
    total = frames.new_zeros(len(audio_windows)).index_add(0, clips, frames)
    return torch.arange(int(total.max()), device=frames.device) < total[:, None]


def receptive_field(audio_config: Any) -> int:
    """Returns the fewest samples that give one frame of a wav2vec2-like stack (400 for HuBERT-base, 25 ms)."""
    samples = 1
    for kernel, stride in zip(reversed(audio_config.conv_kernel), reversed(audio_config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


__all__ = [
    "PADDING_BLIND",
    "PaddedAudio",
    "PaddingInvariantFeatureEncoder",
    "check_windows",
    "join_windows",
    "keep_supported_attention",
    "make_padding_invariant",
    "receptive_field",
]
