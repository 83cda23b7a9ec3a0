"""The speech encoder made blind to padding, and its receptive field."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

# Speech encoders in which, but for the group norm below, no layer carries padding into a real frame.
PADDING_BLIND = ("hubert", "wav2vec2", "wavlm", "unispeech", "unispeech-sat")


class PaddedAudio(NamedTuple):
    """Waveforms of different lengths in one tensor, with the lengths that the padding hides."""

    values: torch.Tensor  # (clips, samples) float, right-padded
    lengths: torch.Tensor  # (clips,) long


class PaddingInvariantFeatureEncoder(nn.Module):
    """The convolutional stack of a wav2vec2-like encoder, made blind to padding.

    The stock stack gets no mask, and the group norm over time of its first layer (HuBERT-base, wav2vec2-base,
    wavlm-base) mixes padding into every frame. Here that norm counts real frames only; the strided convolutions after
    it take no padding of their own, so real frames never see anything else. Parameter names stay the stock ones.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.conv_layers = stock.conv_layers

    def forward(self, audio: PaddedAudio) -> torch.Tensor:
        """Turns (clips, samples) waveforms into (clips, channels, frames) features."""
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
    """Group norm with one channel a group over the first `lengths` frames of (clips, channels, frames) `hidden`."""
    mask = (torch.arange(hidden.shape[-1], device=hidden.device) < lengths[:, None])[:, None]  # (clips, 1, frames)
    count = lengths[:, None, None]
    values = hidden.float().masked_fill(~mask, 0.0)
    mean = values.sum(dim=-1, keepdim=True) / count
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    normalised = (centred * torch.rsqrt(variance + norm.eps)).to(hidden.dtype)
    return normalised * norm.weight[:, None] + norm.bias[:, None]


def make_padding_invariant(tower: PreTrainedModel) -> PreTrainedModel:
    """Swaps in `PaddingInvariantFeatureEncoder` and freezes the vector that only SpecAugment would train."""
    if not hasattr(tower, "feature_extractor") or not hasattr(tower, "_get_feat_extract_output_lengths"):
        raise ValueError(
            f"{type(tower).__name__} does not map waveforms to frames through a convolutional feature extractor; "
            "use a speech encoder such as hubert, wav2vec2 or wavlm as `audio_config`."
        )
    config = tower.config.to_dict()
    if config["model_type"] not in PADDING_BLIND or config.get("conv_pos_batch_norm") or config.get("add_adapter"):
        raise ValueError(
            f"Padding would change what this {config['model_type']} encoder makes of a batch's shorter clips; use "
            f"one of {', '.join(PADDING_BLIND)}, without `conv_pos_batch_norm` or `add_adapter`."
        )
    tower.feature_extractor = PaddingInvariantFeatureEncoder(tower.feature_extractor)
    if hasattr(tower, "masked_spec_embed"):
        tower.masked_spec_embed.requires_grad_(False)
    return tower


def keep_supported_attention(audio_config: PreTrainedConfig) -> None:
    """Leaves a speech encoder that has only its own attention (WavLM) out of a switch for the whole model."""
    if not MODEL_MAPPING[type(audio_config)]._supports_sdpa:
        audio_config._attn_implementation = "eager"


def receptive_field(audio_config: Any) -> int:
    """The fewest samples of which a wav2vec2-like convolutional stack makes one frame (400 for HuBERT-base)."""
    samples = 1
    for kernel, stride in zip(reversed(audio_config.conv_kernel), reversed(audio_config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
