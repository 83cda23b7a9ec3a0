"""Tiny models of the real classes, built from config, with a tokenizer made in memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.tiny_vipolyqwen import build_tiny_base, tiny_audio_config

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, 20 times longer on a busy machine

TEXTS = [
    "Hai ngôi sao đỏ lớn trên bãi cỏ.",
    "Three small blue circles in the sea.",
    "沙滩上有四个绿色的小方块。",
    "Trên biển ghi gì? Hà Nội, Đà Nẵng, Huế.",
    "What colour are the big stars on the grass?",
]


@pytest.fixture(scope="session")
def tiny() -> tuple[ViPolyQwenModel, ViPolyQwenProcessor]:
    """An untrained tiny model in evaluation mode and its processor; tests must not change them."""
    torch.manual_seed(0)
    model, processor = build_tiny_base(
        TEXTS * 4, hidden_size=64, layers=2, vision_size=32, audio_size=32, image_side=56, vocab_size=400
    )
    return model.eval(), processor


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator with a fixed seed."""
    return np.random.default_rng(0)


def random_image(rng: np.random.Generator, width: int = 60, height: int = 48) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_sound(rng: np.random.Generator, seconds: float = 0.5, sampling_rate: int = 16_000) -> dict:
    """A sound of noise, as `{"array", "sampling_rate"}`."""
    samples = rng.uniform(-0.5, 0.5, int(seconds * sampling_rate)).astype(np.float32)
    return {"array": samples, "sampling_rate": sampling_rate}


def speech_config(kind: str = "hubert", norm: str = "group", **fields: Any) -> PreTrainedConfig:
    """A tiny speech encoder, `hubert`, `wav2vec2`, `wavlm`, …, of the base ("group") or the large ("layer") design."""
    tiny = tiny_audio_config(32, 2).to_diff_dict()
    if norm == "layer":
        tiny.update(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    return AutoConfig.for_model(**{**tiny, **fields, "model_type": kind})
