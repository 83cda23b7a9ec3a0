"""Tiny models of the real classes, built from config, with a tokenizer made in memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

from vipolyqwen.demo.tiny_base import build_tiny_base, tiny_audio_config
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.train_vipolyqwen import main as train_main

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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, pairs of all six tasks and of a seventh, and a recipe for them."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def save_tiny_model(folder: Path, image_side: int = 56) -> None:
    """Writes the repository of an untrained model of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "layers": 1, "vision_size": 32, "audio_size": 32, "vocab_size": 400}
    save_repository(*build_tiny_base(TEXTS * 4, image_side=image_side, **sizes), folder)


def write_world(folder: Path) -> Path:
    """Writes that; returns the recipe."""
    save_tiny_model(folder / "base")
    write_pairs(folder)
    recipe = {
        "model": str(folder / "base"),
        "train_data": [
            {"path": str(folder / "pairs.jsonl")},
            {
                "path": str(folder / "captions.jsonl"),
                "data_type": "caption",
                "columns": {"images": "picture", "b": "said"},
            },
        ],
        "eval_data": [{"path": str(folder / "pairs.jsonl")}],
        "data_types": {"caption": {"prefix": "<caption>", "loss": {"nce": 1.0, "cosine": 0.5}, "needs_image": True}},
        "loss_table": "dle",
        "task_weighting": "table",
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "recall@1",
        "greater_is_better": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def write_pairs(folder: Path) -> None:
    """Four rows of each task and eight captions."""
    rng = np.random.default_rng(0)
    rows, captions = [], []
    for number in range(4):
        random_image(rng).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", random_sound(rng, 0.2 + 0.1 * number)["array"], 16_000)
        picture = {"images": [f"{number}.png"]}
        rows += [
            {"data_type": "text_pair", "a": TEXTS[number], "b": TEXTS[number + 1], "score": number / 3},
            {"data_type": "instr", "a": f"Nói lại: {TEXTS[number]}", "b": f"{number} {TEXTS[number]}"},
            {"data_type": "ocr", "a": "Biển ghi gì?", "b": f"số {number}", **picture},
            {"data_type": "vqa_single", "a": "What is it?", "b": f"noise {number}", **picture},
            {"data_type": "vqa_multi", "a": "User: A?\nAssistant: B.\nUser: C?", "b": f"D {number}", **picture},
            {"data_type": "audio", "a": "", "b": f"tiếng {number}", "audio": f"{number}.wav"},
        ]
        captions += [{"picture": f"{number}.png", "said": f"{word} {number}"} for word in ("một hình", "a picture")]
    for name, content in (("pairs", rows), ("captions", captions)):
        lines = [json.dumps({"id": f"{name}-{i}", **row}, ensure_ascii=False) for i, row in enumerate(content)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def train_run(world: Path, output: Path, *flags: str) -> list[dict]:
    """Trains in this process and returns the log."""
    train_main([str(world / "recipe.yaml"), "--output_dir", str(output), *flags])
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
