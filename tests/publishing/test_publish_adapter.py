"""A PEFT adapter, published merged into its base or as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_audio
from hub_server import go_online, running_hub
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.publish_vipolyqwen import build_repository, main
from vipolyqwen.publishing.checks import PUBLISHED, check_files
from vipolyqwen.publishing.hub import upload
from vipolyqwen.publishing.repository import PublishError, save_repository

peft = pytest.importorskip("peft")

BASE, ADAPTER = "someone/base", "someone/base-adapter"
INPUTS = {"text": ["hello", ""], "audio": [None, random_audio(np.random.default_rng(0))]}

READER = """
import sys

base, adapter, commit, output = sys.argv[1:]
sys.modules["vipolyqwen"] = None
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
sound = {"array": np.load("sound.npy"), "sampling_rate": 16000}
processor = AutoProcessor.from_pretrained(adapter, revision="v1", trust_remote_code=True)
batch = processor(text=["hello", ""], audio=[None, sound], return_tensors="pt")


@torch.no_grad()
def embed(model):
    return model(**batch).embeddings.numpy()


pinned = AutoModel.from_pretrained(base, revision="v1", trust_remote_code=True)
vectors = {"base": embed(pinned)}
pinned.load_adapter(adapter, adapter_kwargs={"revision": commit})
vectors["load_adapter"] = embed(pinned)
vectors["AutoModel"] = embed(AutoModel.from_pretrained(adapter, trust_remote_code=True))
encoder = SentenceTransformer(adapter, revision=commit, trust_remote_code=True, device="cpu")
vectors["SentenceTransformer"] = encoder.encode(["hello", {"audio": sound}])
np.savez(output, **vectors)
"""


@pytest.fixture(scope="module")
def base(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "output"
    save_repository(*tiny, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny: tuple, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A LoRA of both towers and of a projection; its folder and its vectors of `INPUTS`."""
    folder = tmp_path_factory.mktemp("adapter") / "output"
    return folder, write_adapter(folder, tiny, base, target_modules=["q_proj", "v_proj", "audio_projection.dense"])


@pytest.fixture(scope="module")
def saving_adapter(tiny: tuple, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A LoRA beside a projection that is trained in full."""
    folder = tmp_path_factory.mktemp("saving") / "output"
    return folder, write_adapter(folder, tiny, base, target_modules=["q_proj"], modules_to_save=["audio_projection"])


def write_adapter(folder: Path, tiny: tuple, base: Path, **options: Any) -> np.ndarray:
    """Writes an adapter as if it had been trained; returns its vectors."""
    model = ViPolyQwenModel.from_pretrained(base)
    config = peft.LoraConfig(r=4, **options)
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        vectors = adapted(**tiny[1](**INPUTS, return_tensors="pt")).embeddings.numpy()
    adapted.save_pretrained(folder)
    torch.save({}, folder / "optimizer.pt")
    return vectors


@pytest.mark.parametrize("kind", ["adapter", "saving_adapter"])
def test_a_merged_adapter_is_a_model_with_the_adapter_s_vectors(
    kind: str, tiny: tuple, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, expected = request.getfixturevalue(kind)
    build_repository(folder, tmp_path / "merged", "someone/merged")
    check_files(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert "model.safetensors" in names and not [name for name in names if name.startswith("adapter")]
    model = ViPolyQwenModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        batch = tiny[1](**INPUTS, return_tensors="pt")
        assert np.abs(model(**batch).embeddings.numpy() - expected).max() <= 1e-6
        assert (np.abs(tiny[0](**batch).embeddings.numpy() - expected).max(axis=1) > 1e-3).all()


@pytest.mark.slow
def test_a_kept_adapter_loads_on_its_base_from_the_hub_pinned_or_not(
    tiny: tuple, base: Path, adapter: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = adapter
    with running_hub() as hub:
        go_online(monkeypatch, hub)
        environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        for name, value in {**environment, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        build_repository(base, tmp_path / "base", BASE)
        upload(tmp_path / "base", BASE, PUBLISHED, api=HfApi(hub.url, "hf_owner"))
        main([str(folder), "--repo_id", ADAPTER, "--adapter", BASE])
        commit = hub.repos[ADAPTER].tags["v1"]
        command = [sys.executable, "-c", READER, BASE, ADAPTER, commit, "vectors.npz"]
        np.save(tmp_path / "sound.npy", INPUTS["audio"][1]["array"])
        done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    files = hub.repos[ADAPTER].commits[commit]
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files and "config.json" not in files
    config = json.loads(files["adapter_config.json"].content)
    assert (config["base_model_name_or_path"], config["auto_mapping"]) == (BASE, None)
    card = ModelCard(files["README.md"].content.decode()).data
    assert (card.base_model, card["base_model_relation"]) == ([BASE], "adapter")
    vectors = dict(np.load(tmp_path / "vectors.npz"))
    for way in ("load_adapter", "AutoModel", "SentenceTransformer"):
        assert np.abs(vectors[way] - expected).max() <= 1e-6, way
    assert (np.abs(vectors["base"] - expected).max(axis=1) > 1e-3).all()


def test_an_adapter_that_old_readers_would_load_in_part_is_not_kept(saving_adapter: tuple, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"modules_to_save: audio_projection.*drop --adapter"):
        build_repository(saving_adapter[0], tmp_path / "out", ADAPTER, adapter_base=BASE)


def test_an_adapter_that_lacks_a_tensor_is_refused(adapter: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter[0] / "adapter_config.json").read_bytes())
    tensors = load_file(adapter[0] / "adapter_model.safetensors")
    lost = next(name for name in tensors if "lora_A" in name)
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(PublishError, match=r"not what adapter_config\.json describes. Missing: .*lora_A"):
        build_repository(folder, tmp_path / "out", "someone/x")


def test_an_adapter_in_a_pickle_is_refused(adapter: tuple, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter[0] / "adapter_config.json").read_bytes())
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(PublishError, match=r"pickles \(adapter_model.bin\)"):
        build_repository(folder, tmp_path / "out", "someone/x")


def test_a_checkpoint_without_an_adapter_cannot_be_published_as_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="adapter_config.json.*drop --adapter"):
        build_repository(base, tmp_path / "out", ADAPTER, adapter_base=BASE)
