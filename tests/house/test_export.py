"""ONNX of the text route: equal to the model for lengths, batches, both sides of padding; bad exports are refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TEXTS, save_tiny_model
from transformers import AutoModel, AutoProcessor

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from vipolyqwen import export_vipolyqwen  # noqa: E402
from vipolyqwen.export_vipolyqwen import TextRoute, check_layers, main  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `outputs/demo/model`, exported to `outputs/onnx`."""
    folder = tmp_path_factory.mktemp("export")
    save_tiny_model(folder / "outputs/demo/model")
    main([str(folder / "outputs/demo/model"), "--out", str(folder / "outputs/onnx")])
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    """The model and its processor."""
    path = folder / "outputs/demo/model"
    model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_batch_and_length_gives_the_models_vectors(folder: Path, loaded: tuple, side: str) -> None:
    model, processor = loaded
    session = onnxruntime.InferenceSession(folder / "outputs/onnx/model.onnx")
    for texts in (["a"], TEXTS, [TEXTS[0] * 9, "b", TEXTS[2]], TEXTS * 4):
        batch = processor(text=texts, return_tensors="pt", padding_side=side)
        given = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
        found = session.run(None, given)[0]
        with torch.no_grad():
            wanted = model(**batch).embeddings.numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_the_example_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    [example] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in code]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(example, "serving.md", "exec"), names)
    assert names["vectors"].shape == (2, 1024)


@pytest.mark.slow
def test_what_exists_is_kept_and_what_differs_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(folder / "outputs/demo/model")
    with pytest.raises(ValueError, match="model.onnx exists"):
        main([model, "--out", str(folder / "outputs/onnx")])
    monkeypatch.setattr(export_vipolyqwen, "export", lambda model, processor, path: path.write_bytes(b""))
    monkeypatch.setattr(export_vipolyqwen, "compare", lambda model, processor, path: float("nan"))
    with pytest.raises(ValueError, match="nan.*0.0001"):
        main([model, "--out", str(folder / "other")])
    assert not (folder / "other/model.onnx").exists()


def test_the_plain_mask_is_the_models(tiny: tuple) -> None:
    model, processor = tiny
    batch = processor(text=TEXTS, return_tensors="pt")
    with torch.no_grad():
        found = TextRoute(model)(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(found, model(**batch).embeddings, atol=1e-5, rtol=0)


def test_sliding_windows_are_refused(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny[0].config.text_config, "layer_types", ["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="1 layers have a sliding window"):
        check_layers(tiny[0])
