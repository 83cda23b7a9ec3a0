"""Tiny models of the real classes, built from config, with a tokenizer made in memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEXTS, write_world

from vipolyqwen.demo.tiny_base import build_tiny_base
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, 20 times longer on a busy machine


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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, pairs of all six tasks and of a seventh, and a recipe for them."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder
