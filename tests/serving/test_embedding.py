import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import TEXTS, random_audio, random_image
from safetensors.torch import load_file, save_file

from vipolyqwen.data.precision import pack, shorten, unpack
from vipolyqwen.serving.embedding import Embedder, embed
from vipolyqwen.serving.loading import LoadedModel, load_model

INPUTS: Sequence[Any] = [TEXTS[0], {"image": b"no image"}, TEXTS[1], {"text": TEXTS[2]}, "missing/photo.png"]


def test_bad_inputs_cost_no_other_input(model: LoadedModel) -> None:
    found = embed(model.encoder, INPUTS, on_error="none", batch_size=2)
    assert found.ok.tolist() == [True, False, True, True, False]
    assert found.vectors.shape == (5, 1024) and np.isnan(found.vectors[~found.ok]).all()
    assert "8 bytes" in found.reasons[1] and "photo.png" in found.reasons[4] and found.reasons[0] is None
    skipped = embed(model.encoder, INPUTS, on_error="skip", batch_size=2)
    assert np.array_equal(skipped.vectors, found.vectors[found.ok]) and len(skipped.reasons) == 5
    assert np.abs(skipped.vectors - model.encoder.encode(TEXTS[:3])).max() <= 1e-6


def test_every_form_of_an_input_has_its_result_beside_every_other(
    model: LoadedModel, rng: np.random.Generator
) -> None:
    clips = [random_audio(rng, 0.2, rate) for rate in (16_000, 22_050)]
    buffer = io.BytesIO()
    soundfile.write(buffer, clips[0]["array"], 16_000, format="WAV", subtype="FLOAT")
    stored = {"bytes": buffer.getvalue(), "path": "a.wav"}
    conversation = [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}]
    inputs: list[Any] = [TEXTS[0], conversation, conversation[0], *({"audio": clip} for clip in clips), *clips]
    inputs += [{"audio": stored}, {"audio": (clips[0]["array"], 16_000)}, {"audio": stored, "text": TEXTS[2]}]
    inputs += [random_image(rng), {"image": random_image(rng)}, {"text": TEXTS[1]}]
    bad = [5, None, b"abc", {}, [], [5], [[]], {"audio": {}}, {"audio": []}, {"image": []}, {"text": None}, {"x": 1}]
    bad += [{"role": "user", "content": None}, [{"role": "user"}], {"array": clips[0]["array"]}, (TEXTS[0], TEXTS[1])]
    found = embed(model.encoder, [*inputs, *bad], on_error="none", batch_size=64)
    assert found.ok.tolist() == [True] * len(inputs) + [False] * len(bad)
    for item, vector in zip(inputs, found.vectors, strict=False):
        alone = embed(model.encoder, [item]).vectors[0]
        assert np.abs(vector - alone).max() <= 1e-5
    for first, second in ((3, 5), (4, 6), (3, 7), (3, 8), (1, 2), (1, 12)):
        assert np.abs(found.vectors[first] - found.vectors[second]).max() <= 1e-5


def test_code_that_was_published_before_towers_could_be_left_out_is_served(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(model.encoder.transformers_model.config), "check_inputs")
    assert Embedder(model.encoder).prepare([lambda: TEXTS[0]]).kept == [0]


def test_an_error_names_the_position(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="Input 1 of 2"):
        embed(model.encoder, INPUTS[:2])


def test_no_inputs_and_only_bad_inputs_have_results(model: LoadedModel) -> None:
    assert embed(model.encoder, []).vectors.shape == (0, 1024)
    found = embed(model.encoder, [INPUTS[1]] * 3, on_error="skip", dimensions=64)
    assert found.vectors.shape == (0, 64) and not found.ok.any()


def test_prompt_and_dimensions_are_those_of_encode(model: LoadedModel, rng: np.random.Generator) -> None:
    inputs = [TEXTS[0], {"image": random_image(rng), "text": TEXTS[1]}]
    found = embed(model.encoder, inputs, prompt_name="ocr", dimensions=128).vectors
    expected = model.encoder.encode(inputs, prompt_name="ocr", truncate_dim=128, normalize_embeddings=True)
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "word"),
    [({"on_error": "ignore"}, "ignore"), ({"batch_size": 0}, "batch_size"), ({"dimensions": 0}, "dimensions")],
)
def test_wrong_arguments(options: dict, word: str, model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=word):
        embed(model.encoder, TEXTS, **options)


def test_packed_vectors() -> None:
    vectors = np.array([[0.6, -0.8, 0, 0, 0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]], np.float32)
    stored, scales = pack(vectors, "int8")
    assert stored[0, :3].tolist() == [95, -127, 0] and stored[1, :5].tolist() == [127] * 4 + [0]
    assert np.allclose(scales, [0.8 / 127, 0.5 / 127])
    bits, _ = pack(vectors, "binary")
    assert bits.tolist() == [[0b10000000], [0b11110000]]
    assert np.allclose(unpack(bits, "binary")[0], np.array([1, -1, -1, -1, -1, -1, -1, -1]) / np.sqrt(8))


def test_shortened_vectors_have_length_one() -> None:
    assert np.allclose(shorten(np.array([[0.6, 0.0, 0.8]], np.float32), 2), [[1.0, 0.0]])
    assert np.allclose(shorten(np.array([[0.0, 1.0]], np.float32), 1), [[0.0]])


def test_a_model_with_other_weights_than_published_is_refused(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="doctor"):
        load_model(str(other), device="cpu")
