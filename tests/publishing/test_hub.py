"""The repository as others meet it: another process, another directory, none of our code but what the folder holds."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_audio, random_image
from sentence_transformers import SentenceTransformer
from transformers.dynamic_module_utils import get_imports

from vipolyqwen.demo.tiny_base import tiny_vlm_config
from vipolyqwen.processing_vipolyqwen import TASK_PREFIXES
from vipolyqwen.publishing.repository import SUPPORTED, save_repository
from vipolyqwen.training.build import build_model

SHIPPED = {
    "arguments_vipolyqwen.py",
    "audio_vipolyqwen.py",
    "configuration_vipolyqwen.py",
    "conversations_vipolyqwen.py",
    "download_vipolyqwen.py",
    "fingerprint_vipolyqwen.py",
    "headers_vipolyqwen.py",
    "images_vipolyqwen.py",
    "linear_vipolyqwen.py",
    "media_vipolyqwen.py",
    "microbatches_vipolyqwen.py",
    "modeling_vipolyqwen.py",
    "packing_vipolyqwen.py",
    "pooling_vipolyqwen.py",
    "processing_vipolyqwen.py",
    "tasks_vipolyqwen.py",
    "vision_vipolyqwen.py",
    "waveforms_vipolyqwen.py",
}
# What sentence-transformers brings along.
NEEDED = {"torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "PIL", "packaging"}
OPTIONAL = {"av", "soundfile", "scipy"}  # only behind `if is_…_available()`

# Runs in the other process. Every case is a batch of inputs of the shape sentence-transformers takes, and a task.
READER = """
import json, sys
import numpy as np

repository, cases_file, output = sys.argv[1:]
sys.modules["vipolyqwen"] = None  # an import of the package fails, as where it is not installed

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)


def opened(row):
    row = dict(row)
    if "image" in row:
        row["image"] = Image.open(row["image"])
    if "audio" in row:
        row["audio"] = {"array": np.load(row["audio"]["array"]), "sampling_rate": row["audio"]["sampling_rate"]}
    return row


def column(rows, name):
    return [row.get(name) for row in rows] if any(name in row for row in rows) else None


@torch.no_grad()
def embed(model, processor, rows, task):
    images = [[row["image"]] if "image" in row else None for row in rows] if column(rows, "image") else None
    texts = [row.get("text", "") for row in rows]
    batch = processor(text=texts, images=images, audio=column(rows, "audio"), task=task, return_tensors="pt")
    return model(**batch).embeddings.numpy()


def load(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


model, processor = load(repository)
encoder = SentenceTransformer(repository, trust_remote_code=True, device="cpu")
model.save_pretrained("again")
processor.save_pretrained("again")
again = load("again")

vectors = {}
for name, case in json.load(open(cases_file)).items():
    rows, task = [opened(row) for row in case["rows"]], case["task"]
    vectors[f"{name}|AutoModel"] = embed(model, processor, rows, task)
    vectors[f"{name}|saved again"] = embed(*again, rows, task)
    inputs = [row["text"] if list(row) == ["text"] else row for row in rows]
    vectors[f"{name}|SentenceTransformer"] = encoder.encode(inputs, prompt_name=task)
np.savez(output, **vectors)
json.dump(
    {
        "training": model.training,
        "dtype": str(model.dtype),
        "modules": [type(part).__module__ for part in (model, processor, encoder[0].model, encoder[0].processor)],
        "prompts": encoder.prompts,
        "dimension": encoder.get_embedding_dimension(),
        "similarity": encoder.similarity_fn_name,
    },
    open(output + ".json", "w"),
)
"""


def row_of(kinds: str, rng: np.random.Generator, folder: Path, name: str) -> dict[str, Any]:
    """An input with an image, a text and a sound, as `kinds` says, in files of `folder`."""
    row: dict[str, Any] = {}
    if "image" in kinds:
        row["image"] = str(folder / f"{name}.png")
        random_image(rng, int(rng.integers(40, 90)), int(rng.integers(40, 90))).save(row["image"])
    if "text" in kinds:
        row["text"] = f"Trên biển ghi gì? <ocr> {name} " * int(rng.integers(1, 4))
    if "audio" in kinds:
        rate = 22_050  # sentence-transformers takes one rate a batch
        array = random_audio(rng, float(rng.uniform(0.1, 0.3)), rate)["array"]
        np.save(folder / f"{name}.npy", array)
        row["audio"] = {"array": str(folder / f"{name}.npy"), "sampling_rate": rate}
    return row


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Batches of one kind, of all kinds mixed, and all of that with every prompt."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("inputs")
    kinds = ("text", "image", "audio", "image+text", "text+audio", "image+audio", "image+text+audio")
    rows = {kind: [row_of(kind, rng, folder, f"{kind}{i}") for i in range(2)] for kind in kinds}
    mixed = [row for pair in zip(*rows.values(), strict=True) for row in pair]
    cases = {kind: {"rows": rows[kind], "task": None} for kind in kinds}
    cases["mixed"] = {"rows": mixed, "task": None}
    for task in TASK_PREFIXES:
        cases[f"{task}: text"] = {"rows": rows["text"], "task": task}
        cases[f"{task}: mixed"] = {"rows": mixed, "task": task}
    return cases


@pytest.fixture(scope="module")
def repository(tiny: tuple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny-viPolyQwen.v1"  # a name as repositories have, no Python name
    save_repository(*tiny, folder)
    return folder


@pytest.fixture(scope="module")
def read(repository: Path, cases: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """Vectors and facts that a fresh process found in the repository."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "cases.json").write_text(json.dumps(cases))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, str(repository), "cases.json", "vectors.npz"],
        cwd=elsewhere,
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads((elsewhere / "vectors.npz.json").read_text())
    return dict(np.load(elsewhere / "vectors.npz")), facts


@torch.no_grad()
def embed_here(model: Any, processor: Any, rows: list[dict], task: str | None) -> np.ndarray:
    sounds = [row.get("audio") for row in rows]
    batch = processor(
        text=[row.get("text", "") for row in rows],
        images=[[row["image"]] if "image" in row else None for row in rows],
        audio=[sound and {**sound, "array": np.load(sound["array"])} for sound in sounds],
        task=task,
        return_tensors="pt",
    )
    return model(**batch).embeddings.numpy()


@pytest.mark.parametrize("way", ["AutoModel", "SentenceTransformer", "saved again"])
def test_another_process_gets_the_same_vectors(way: str, tiny: tuple, cases: dict, read: tuple) -> None:
    vectors, _ = read
    assert len(cases) == 8 + 2 * len(TASK_PREFIXES)
    for name, case in cases.items():
        expected = embed_here(*tiny, case["rows"], case["task"])
        found = vectors[f"{name}|{way}"]
        assert (found.shape, found.dtype) == ((len(case["rows"]), 1024), np.float32)
        assert np.abs(found - expected).max() <= 1e-6, name


def test_a_prompt_steers_the_vector_of_everything_that_has_tokens(cases: dict, read: tuple) -> None:
    vectors, _ = read
    for task in TASK_PREFIXES:
        moved = np.abs(vectors[f"{task}: mixed|SentenceTransformer"] - vectors["mixed|SentenceTransformer"]).max(
            axis=1
        )
        for row, distance in zip(cases["mixed"]["rows"], moved, strict=True):
            assert (distance > 1e-4) == (list(row) != ["audio"]), (task, list(row))


def test_what_another_process_loads_is_the_repository_s_own_code_ready_to_use(read: tuple) -> None:
    _, facts = read
    assert all(module.startswith("transformers_modules.") for module in facts["modules"])
    assert facts["training"] is False
    assert facts["dtype"] == "torch.float32"
    prompts = {name: prompt for name, prompt in facts["prompts"].items() if prompt}
    assert prompts == TASK_PREFIXES
    assert (facts["dimension"], facts["similarity"]) == (1024, "cosine")


def test_the_repository_holds_the_shipped_files_and_no_others(repository: Path) -> None:
    assert {path.name for path in repository.glob("*.py")} == SHIPPED
    names = {path.name for path in repository.iterdir()} - SHIPPED
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "modules.json"} <= names
    assert {"sentence_bert_config.json", "config_sentence_transformers.json", "chat_template.jinja"} <= names
    assert not [path for path in repository.iterdir() if path.is_dir()]
    config = json.loads((repository / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_vipolyqwen.ViPolyQwenConfig",
        "AutoModel": "modeling_vipolyqwen.ViPolyQwenModel",
    }
    processor = json.loads((repository / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_vipolyqwen.ViPolyQwenProcessor"}
    assert json.loads((repository / "config_sentence_transformers.json").read_text())["requirements"] == SUPPORTED


def is_guarded(node: ast.AST) -> bool:
    """Whether an `if` asks `is_…_available()`."""
    calls = [call for call in ast.walk(node.test) if isinstance(call, ast.Call)] if isinstance(node, ast.If) else []
    return any(isinstance(call.func, ast.Name) and call.func.id.endswith("_available") for call in calls)


def imports_of(tree: ast.AST, guarded: bool = False) -> list[tuple[str, int, bool]]:
    """Module, level of a relative import, and whether it is optional, of every import."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level, guarded))
        found += imports_of(node, guarded or is_guarded(node) or isinstance(node, ast.Try))
    return found


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_file_imports_only_what_its_readers_have(name: str, repository: Path) -> None:
    source = (repository / name).read_text(encoding="utf-8")
    for module, level, guarded in imports_of(ast.parse(source)):
        top = module.split(".")[0]
        if level > 0:
            assert level == 1 and f"{module}.py" in SHIPPED, f"the Hub cannot resolve `from {'.' * level}{module}`"
        elif top in OPTIONAL:
            assert guarded, f"{module} is optional, but is imported without asking whether it is there"
        else:
            assert top in NEEDED | set(sys.stdlib_module_names), f"{module} is neither needed nor optional"
    assert set(get_imports(repository / name)) <= NEEDED | set(sys.stdlib_module_names)  # what loading insists on
    lines = source.splitlines()
    assert not [line for line in lines if line.strip().startswith("from .") and "import" not in line]


def test_a_bimodal_repository_offers_no_audio(tiny: tuple, tmp_path: Path, rng: np.random.Generator) -> None:
    _, processor = tiny
    model = build_model(tiny_vlm_config(processor.tokenizer, 64, 2, 32)).eval()
    save_repository(model, processor, tmp_path)
    encoder = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert np.abs(encoder.encode("Huế") - embed_here(model, processor, [{"text": "Huế"}], None)[0]).max() <= 1e-6
    with pytest.raises(ValueError, match="audio"):
        encoder.encode([random_audio(rng)])
