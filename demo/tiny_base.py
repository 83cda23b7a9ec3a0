"""Builds a tiny trimodal base of the real classes from config, for the demo and the tests."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    HubertConfig,
    PreTrainedConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Wav2Vec2FeatureExtractor,
)

from ..audio_vipolyqwen import receptive_field
from ..modeling_vipolyqwen import ViPolyQwenModel
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..training.build import build_model

QWEN2_VL_SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, max_length: int = 512) -> Qwen2Tokenizer:
    """Trains a byte-level BPE tokenizer of the Qwen2 kind, with Qwen2-VL's special tokens, on `texts`."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=QWEN2_VL_SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.model_max_length = max_length
    return tokenizer


def tiny_processor(tokenizer: Qwen2Tokenizer, audio_config: PreTrainedConfig, image_side: int = 112) -> Any:
    """Builds a processor whose images are all close to `image_side` × `image_side` pixels."""
    return ViPolyQwenProcessor(
        Qwen2VLImageProcessorPil(min_pixels=image_side**2, max_pixels=image_side**2),
        tokenizer,
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
        min_audio_samples=receptive_field(audio_config),
    )


def tiny_vlm_config(tokenizer: Qwen2Tokenizer, hidden_size: int, layers: int, vision_size: int) -> Qwen2VLConfig:
    """Configures a Qwen2-VL of heads 32 wide; its embedding table is longer than the tokenizer, as the real one."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN2_VL_SPECIAL_TOKENS}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 64,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": hidden_size // 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": hidden_size
            ** -0.5,  # 0.02 suits widths of thousands; narrow towers barely learn from it
        },
        vision_config={
            "depth": layers,
            "embed_dim": vision_size,
            "hidden_size": hidden_size,
            "num_heads": vision_size // 32,
            "mlp_ratio": 2,
            "initializer_range": vision_size**-0.5,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


LOWEST_HERTZ = 80.0  # of the first filter of the speech encoder
CONVOLUTIONS = ((40, 20), (8, 4), (4, 4))  # kernel and stride of each layer: 20 ms a frame, as the real seven make


def tiny_audio_config(
    hidden_size: int, layers: int, convolutions: tuple[tuple[int, int], ...] = CONVOLUTIONS
) -> HubertConfig:
    """Configures a HuBERT with a short convolutional stack, (kernel, stride) of each layer."""
    return HubertConfig(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=2 * hidden_size,
        conv_dim=[hidden_size] * len(convolutions),
        conv_kernel=[kernel for kernel, _ in convolutions],
        conv_stride=[stride for _, stride in convolutions],
        initializer_range=hidden_size**-0.5,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )


def build_tiny_base(
    texts: Iterable[str],
    hidden_size: int = 192,
    layers: int = 4,
    vision_size: int = 128,
    audio_size: int = 128,
    image_side: int = 112,
    vocab_size: int = 1024,
    convolutions: tuple[tuple[int, int], ...] = CONVOLUTIONS,
    filter_bank: bool = False,
    **config_kwargs: Any,
) -> tuple[ViPolyQwenModel, ViPolyQwenProcessor]:
    """Builds an untrained trimodal model and its processor.

    Args:
        texts: training data of the tokenizer.
        hidden_size: width of the language model, a multiple of 64.
        layers: layers of each tower.
        vision_size: width of the vision tower, a multiple of 32.
        audio_size: width of the speech encoder, a multiple of 32.
        image_side: images are scaled to about this many pixels a side.
        vocab_size: the tokenizer's.
        convolutions: kernel and stride of each layer of the speech encoder's convolutional stack.
        filter_bank: begin with the filters of `set_filter_bank` in its first layer, not with random ones.
        **config_kwargs: fields of `ViPolyQwenConfig`.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    audio_config = tiny_audio_config(audio_size, layers, convolutions)
    processor = tiny_processor(tokenizer, audio_config, image_side)
    vlm_config = tiny_vlm_config(processor.tokenizer, hidden_size, layers, vision_size)
    model = build_model(vlm_config, audio_config, **config_kwargs)
    if filter_bank:
        set_filter_bank(
            model.audio_tower.feature_extractor.conv_layers[0].conv, processor.feature_extractor.sampling_rate
        )
    return model, processor


@torch.no_grad()
def set_filter_bank(convolution: nn.Conv1d, rate: int) -> None:
    """Sets the filters of a first convolutional layer to windowed waves, evenly spaced on the mel scale.

    A pretrained speech encoder has learned such filters (Zeghidour et al. 2021, LEAF); from random weights they would
    take most of the demo's steps. Half of the filters are cosines and half sines, of unit norm.

    Args:
        convolution: weight of shape (filters, 1, kernel), bias if any unchanged.
        rate: sampling rate in Hz.
    """
    filters, _, kernel = convolution.weight.shape
    lowest, highest = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST_HERTZ, 0.475 * rate))
    mels = torch.linspace(lowest, highest, filters // 2)
    hertz = 700 * (10 ** (mels / 2595) - 1)  # (filters / 2,)
    seconds = (torch.arange(kernel) - (kernel - 1) / 2) / rate  # (kernel,)
    phases = 2 * math.pi * hertz[:, None] * seconds
    waves = torch.cat([phases.cos(), phases.sin()]) * torch.hann_window(kernel, periodic=False)
    convolution.weight.copy_(nn.functional.normalize(waves, dim=1)[:, None])
