"""Loading of some towers: what is held, what is refused, and the same vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_audio, random_image, save_tiny_model
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from vipolyqwen.configuration_vipolyqwen import ViPolyQwenConfig
from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.serving.loading import load_model

ABSENT = {("text",): ("vlm.visual.", "audio_"), ("text", "image"): ("audio_",), ("text", "audio"): ("vlm.visual.",)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "model"
    save_tiny_model(folder)
    write_fingerprint(folder)
    return folder


@pytest.fixture(scope="module")
def everything(repository: Path) -> ViPolyQwenModel:
    return ViPolyQwenModel.from_pretrained(repository)


@pytest.mark.parametrize("towers", ABSENT)
def test_only_the_weights_of_the_chosen_towers_are_loaded(towers: tuple[str, ...], repository: Path) -> None:
    model, report = AutoModel.from_pretrained(
        repository, towers=list(towers), trust_remote_code=True, output_loading_info=True
    )
    with safe_open(repository / "model.safetensors", framework="pt") as file:
        kept = {name for name in file.keys() if not name.startswith(ABSENT[towers])}  # noqa: SIM118
    assert set(model.state_dict()) == kept
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_skipped_weights_are_never_read(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    import transformers.core_model_loading as loading

    materialize = loading.spawn_materialize
    monkeypatch.setattr(
        loading, "spawn_materialize", lambda *args, **kwargs: (read.append(1), materialize(*args, **kwargs))[1]
    )
    model = ViPolyQwenModel.from_pretrained(repository, towers=["text"])
    assert len(read) == len(model.state_dict())


def test_sentence_transformers_passes_towers_on(repository: Path, everything: ViPolyQwenModel) -> None:
    options: dict[str, Any] = {"trust_remote_code": True, "model_kwargs": {"towers": ["text"]}}
    encoder = SentenceTransformer(str(repository), **options)
    plain = SentenceTransformer(str(repository), trust_remote_code=True)
    assert not [name for name, _ in encoder.named_parameters() if "visual" in name or "audio" in name]
    texts = ["Huế", "a longer text", "沙滩"]
    assert torch.equal(encoder.encode(texts, convert_to_tensor=True), plain.encode(texts, convert_to_tensor=True))


@pytest.mark.parametrize(("kind", "argument"), [("image", "pixel_values"), ("audio", "audio_features")])
def test_inputs_for_an_absent_tower_are_an_error_that_names_the_argument(
    kind: str, argument: str, repository: Path, rng: Any
) -> None:
    encoder = SentenceTransformer(str(repository), trust_remote_code=True, model_kwargs={"towers": ["text"]})
    item = random_image(rng, 60, 48) if kind == "image" else random_audio(rng, 0.2)
    with pytest.raises(ValueError, match=rf"`{argument}`.*towers=\['text', '{kind}'\]"):
        encoder.encode([{kind: item}])


@pytest.mark.parametrize("towers", [[], ["image"], ["text", "video"], "text"])
def test_wrong_towers_are_an_error(towers: Any, repository: Path) -> None:
    with pytest.raises(ValueError, match="towers"):
        ViPolyQwenModel.from_pretrained(repository, towers=towers)


def test_verification_of_some_towers_is_refused(repository: Path) -> None:
    with pytest.raises(ValueError, match=r"verify.*towers"):
        ViPolyQwenModel.from_pretrained(repository, towers=["text"], verify=True)


def test_a_model_of_some_towers_cannot_be_saved(repository: Path, tmp_path: Path) -> None:
    model = ViPolyQwenModel.from_pretrained(repository, towers=["text"])
    with pytest.raises(ValueError, match="towers"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert "towers" not in model.config.to_dict()
    assert "towers" not in json.loads((repository / "config.json").read_text(encoding="utf-8"))


def test_the_caller_s_configuration_stays_as_it_is(repository: Path) -> None:
    config = ViPolyQwenConfig.from_pretrained(repository)
    model = ViPolyQwenModel.from_pretrained(repository, config=config, towers=["text"])
    assert (config.towers, model.config.towers) == (None, ["text"])


def test_a_server_s_model_checks_the_vectors_of_its_towers(repository: Path) -> None:
    checks = {finding.check: finding.level for finding in load_model(str(repository), towers=["text"]).check()}
    assert checks == {"text": "ok", "prefix": "ok"}
    checks = {finding.check for finding in load_model(str(repository), towers=["text", "image"]).check()}
    assert checks == {"text", "image", "mix", "prefix"}
