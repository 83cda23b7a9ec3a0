"""What a published folder must hold, what it may not, and that a fresh process can use it."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from .repository import PublishError
from .verify import embed, samples

# What a published repository may hold; everything else in a folder is refused, and left alone on the Hub.
PUBLISHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "audio_vipolyqwen.py",
    "configuration_vipolyqwen.py",
    "fingerprint.json",
    "fingerprint_vipolyqwen.py",
    "media_vipolyqwen.py",
    "modeling_vipolyqwen.py",
    "packing_vipolyqwen.py",
    "pooling_vipolyqwen.py",
    "processing_vipolyqwen.py",
    "processor_config.json",
    "tasks_vipolyqwen.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "README.md",
    "LICENSE",
    "requirements.txt",
    "training.json",
)
READING = {"README.md", "LICENSE", "requirements.txt", "processor_config.json", "tokenizer.json"}
READING |= {"tokenizer_config.json", "chat_template.jinja", "modules.json", "sentence_bert_config.json"}
READING |= {"config_sentence_transformers.json"}
READING |= {f"{name}_vipolyqwen.py" for name in ("media", "processing", "tasks")}
NEEDED_ADAPTER = READING | {"adapter_config.json", "adapter_model.safetensors"}
NEEDED_MODEL = READING | {name for name in PUBLISHED if name.endswith("_vipolyqwen.py")}
NEEDED_MODEL |= {"config.json", "fingerprint.json"}

TRAINING_STATE = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")
TRAINING_STATE += ("loss_state.safetensors", "pytorch_model_fsdp.bin")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
LOCAL_PATH = re.compile(r"file://|~[/\\]|[A-Za-z]:[\\/]|\\\\|/[^/\s]+/")  # absolute, of at least two parts


def refuse_checkpoint(folder: Path) -> None:
    """Raises `PublishError` unless `folder` has the files of a checkpoint, and weights that are no pickle."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; name what training wrote, or an adapter's folder.")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    state = {name for name in names if any(fnmatch(name, pattern) for pattern in TRAINING_STATE)}
    pickles = sorted(name for name in names - state if name.endswith(PICKLES))
    if pickles:
        raise PublishError(
            f"{folder} holds pickles ({', '.join(pickles)}), which run code when they are loaded. Save the weights "
            "with `save_pretrained`, which writes safetensors, and remove these."
        )
    needed = {"adapter_config.json", "adapter_model.safetensors"}
    if "adapter_config.json" not in names:
        needed = {"config.json", "processor_config.json", "tokenizer.json"}
    _refuse_missing(folder, needed - names)
    if "adapter_config.json" not in names:
        _refuse_missing(folder, _weights(folder) - names)


def check_files(folder: Path) -> None:
    """Raises `PublishError` unless a repository has all of its files, no others, and no path of this machine."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = sorted(name for name in files if not any(fnmatch(name, pattern) for pattern in PUBLISHED))
    if others:
        raise PublishError(f"{', '.join(others)}: not part of a published model (only {', '.join(PUBLISHED)} are).")
    needed = NEEDED_ADAPTER if "adapter_config.json" in files else NEEDED_MODEL | _weights(folder)
    _refuse_missing(folder, needed - files)
    for name in sorted(name for name in files if name.endswith(".json")):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "tokenizer.json":
            content = {key: value for key, value in content.items() if key != "model"}  # a vocabulary has "/usr/" too
        for place, value in _strings(content, name):
            if LOCAL_PATH.match(value):
                raise PublishError(f"{place} is {value!r}, a path of this machine; remove it from the checkpoint.")


def _weights(folder: Path) -> set[str]:
    """Names of the files that should hold the weights."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {"model.safetensors"}
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) | {index.name}


def _refuse_missing(folder: Path, missing: set[str]) -> None:
    if missing:
        raise PublishError(f"{folder} lacks {', '.join(sorted(missing))}; `save_repository` writes a whole folder.")


def _strings(content: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text of nested JSON, with where it stands."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(value, f"{place}: {key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _strings(value, f"{place}[{number}]")


def check_that_it_loads(folder: Path, checkpoint: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Loads and uses the folder in another process that knows nothing of this package, next to the checkpoint.

    Raises:
        PublishError: it does not load, or its vectors are not those of `model`, or those of a whole checkpoint with
            the code that lies in it.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        expected = Path(elsewhere) / "expected.npy"
        has_audio = model.config.audio_config is not None
        np.save(expected, embed(model, processor, samples(processor, has_audio)))
        command = [sys.executable, "-P", Path(__file__).with_name("verify.py"), folder, expected]
        command += [checkpoint] if (checkpoint / "config.json").is_file() else []  # not an adapter
        environment = {**os.environ, "HF_MODULES_CACHE": elsewhere}  # no code of another repository of this name
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise PublishError(f"a fresh process cannot use what would be published:\n{done.stderr[-4000:]}")
