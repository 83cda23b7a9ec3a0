"""A published tiny model and a corpus of every kind of row."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import TEXTS, random_audio, random_image, save_tiny_model

from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.serving.loading import LoadedModel, load_model


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "tiny"
    save_tiny_model(folder)
    write_fingerprint(folder)
    return folder


@pytest.fixture(scope="session")
def model(repository: Path) -> LoadedModel:
    return load_model(str(repository), device="cpu")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 14 rows: texts, an image, images in a text, audio, a mix, and three bad rows."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    random_image(rng).save(folder / "0.png")
    random_image(rng, 40, 40).save(folder / "1.png")
    soundfile.write(folder / "0.wav", random_audio(rng)["array"], 16_000)
    (folder / "broken.png").write_bytes(b"no image")
    rows = [{"id": f"t{i}", "text": text * (1 + i % 3)} for i, text in enumerate(TEXTS)]
    rows += [
        {"id": "image", "images": "0.png"},
        {"id": "images", "text": "<image> hay <image>?", "images": ["0.png", "1.png"]},
        {"id": "audio", "audio": "0.wav"},
        {"id": "mix", "text": "Biển ghi gì?", "images": ["1.png"], "audio": "0.wav"},
        {"id": "path", "text": "0.png"},
        {"id": "token", "text": "<ocr> <|image_pad|>"},
        {"id": "empty", "text": " "},
        {"id": "broken", "images": "broken.png"},
        {"id": "missing", "images": "missing.png"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "corpus.jsonl"
