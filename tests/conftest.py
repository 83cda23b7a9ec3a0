"""Fixtures that any test may ask for; what they need is imported when one does, so that pytest starts fast."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads; a second thread slows tiny tensors down

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import numpy as np

    from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
    from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor


@pytest.fixture(scope="session")
def tiny() -> "tuple[ViPolyQwenModel, ViPolyQwenProcessor]":
    """An untrained tiny model in evaluation mode and its processor; tests must not change them."""
    import torch
    from helpers import TEXTS

    from vipolyqwen.demo.tiny_base import build_tiny_base

    torch.manual_seed(0)
    model, processor = build_tiny_base(
        TEXTS * 4, hidden_size=64, layers=2, vision_size=32, audio_size=32, image_side=56, vocab_size=400
    )
    return model.eval(), processor


@pytest.fixture
def rng() -> "np.random.Generator":
    """A random generator with a fixed seed."""
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, pairs of all six tasks and of a seventh, and a recipe for them."""
    from helpers import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder
