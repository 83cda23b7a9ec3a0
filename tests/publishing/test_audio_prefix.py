"""`audio_prefix: fuse` through training's loading, a repository, sentence-transformers and the fingerprint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_audio, save_tiny_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.doctor import diagnose
from vipolyqwen.fingerprint_vipolyqwen import read_fingerprint, write_fingerprint
from vipolyqwen.publishing.repository import save_repository
from vipolyqwen.training.arguments import read_arguments
from vipolyqwen.training.build import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the default, `none`."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


def load(folder: Path, *flags: str) -> tuple:
    """The model and the processor of a run that continues from `folder`."""
    model_args, _, _, args = read_arguments(
        ["--model", str(folder), "--output_dir", str(folder / "out"), "--use_cpu", "true", *flags]
    )
    return load_model(model_args, args, declare_tasks(None))


@pytest.fixture(scope="module")
def fusing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repository with `fuse` and fusion by attention, fingerprint included."""
    folder = tmp_path_factory.mktemp("fusing")
    settings = {"audio_prefix": "fuse", "audio_fusion": "attention", "max_audio_seconds": "0.5"}
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    model, processor = load(base, *flags)
    torch.nn.init.normal_(model.audio_fusion.out.weight, std=0.02)
    save_repository(model, processor, folder)
    write_fingerprint(folder)
    return folder


def test_a_repository_holds_the_setting_in_model_and_processor(base: Path, fusing: Path) -> None:
    for folder, expected in ((base, "none"), (fusing, "fuse")):
        for name in ("config.json", "processor_config.json"):
            assert json.loads((folder / name).read_text(encoding="utf-8"))["audio_prefix"] == expected
        model, processor = load(folder)
        assert model.config.audio_prefix == processor.audio_prefix == expected


def test_a_prompt_before_audio_alone_steers_it_in_both_loaders(fusing: Path, rng: np.random.Generator) -> None:
    clip = random_audio(rng, 1.2)  # three windows
    encoder = SentenceTransformer(str(fusing), trust_remote_code=True)
    plain, steered = (encoder.encode([{"audio": clip}], prompt_name=name)[0] for name in (None, "audio"))
    assert plain @ steered < 0.99
    model = AutoModel.from_pretrained(fusing, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(fusing, trust_remote_code=True)
    for task, vector in ((None, plain), ("audio", steered)):
        batch = processor(audio=clip, task=task, return_tensors="pt")
        assert batch["audio_windows"].tolist() == [3]
        np.testing.assert_allclose(model(**batch).embeddings[0].detach().numpy(), vector, atol=1e-6)


def test_the_fingerprint_holds_audio_with_its_prefix_and_the_doctor_is_content(fusing: Path) -> None:
    published = read_fingerprint(fusing)
    assert published.settings["audio_prefix"] == "fuse"
    assert np.dot(published.vectors["audio: tones with prefix"], published.vectors["audio: tones"]) < 0.99
    assert {finding.level for finding in diagnose(fusing)} == {"ok"}
    path = fusing / "processor_config.json"
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"audio_prefix": "fuse"', '"audio_prefix": "none"'), encoding="utf-8")
    try:
        failed = {finding.check: finding.text for finding in diagnose(fusing) if finding.level == "fail"}
        with pytest.raises(ValueError, match="`audio_prefix` is 'fuse' in the model's configuration, but 'none'"):
            load(fusing)
    finally:
        path.write_text(content, encoding="utf-8")
    assert "audio_prefix was 'fuse'" in failed["processor"]


def test_a_model_is_not_saved_with_a_processor_that_disagrees(base: Path, tmp_path: Path) -> None:
    model, processor = load(base)
    processor.audio_prefix = "fuse"
    with pytest.raises(ValueError, match="'none' in the model's configuration, but 'fuse' in the processor"):
        save_repository(model, processor, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
