"""Checks of a folder before it is published: its files, the paths inside them, and that a fresh process can use it."""

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

from transformers.dynamic_module_utils import get_relative_import_files

from ..fingerprint_vipolyqwen import FILE_NAME, Measured, save_fingerprint
from .repository import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SENTENCE_TRANSFORMERS_FILES, TRAINING_FILE, PublishError

ROOT = Path(__file__).parents[1]


def _with_imports(name: str) -> set[str]:
    """Names of a shipped file and of all files that it imports, which `save_pretrained` copies along."""
    return {name, *(Path(path).name for path in get_relative_import_files(ROOT / name))}


ADAPTER = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
READING = {"README.md", "LICENSE", "requirements.txt", *SENTENCE_TRANSFORMERS_FILES}
READING |= {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
READING |= _with_imports("processing_vipolyqwen.py")
NEEDED_ADAPTER = READING | ADAPTER
NEEDED_MODEL = READING | _with_imports("modeling_vipolyqwen.py") | {"config.json", FILE_NAME}
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What a published repository may hold; everything else in a folder is refused, and left alone on the Hub.
PUBLISHED = sorted(NEEDED_ADAPTER | NEEDED_MODEL | {WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors", TRAINING_FILE})

TRAINING_STATE = ("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json")
TRAINING_STATE += ("loss_state.safetensors", "pytorch_model_fsdp.bin")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
LOCAL_PATH = re.compile(r"file://|~[/\\]|[A-Za-z]:[\\/]|\\\\|/[^/\s]+/")  # absolute, of at least two parts


def refuse_checkpoint(folder: Path) -> None:
    """Raises `PublishError` unless `folder` has the files of a checkpoint, with its weights in safetensors."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder; name the output folder of a run, or of an adapter.")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    state = {name for name in names if any(fnmatch(name, pattern) for pattern in TRAINING_STATE)}
    pickles = sorted(name for name in names - state if name.endswith(PICKLES))
    if pickles:
        raise PublishError(
            f"{folder} holds pickles ({', '.join(pickles)}), which run code when they are loaded. Save the weights "
            "with `save_pretrained`, which writes safetensors, and remove these."
        )
    if ADAPTER_CONFIG in names:
        needed = ADAPTER
    else:
        needed = {"config.json", "processor_config.json", "tokenizer.json", *_weights(folder)}
    _refuse_missing(folder, needed - names)


def check_files(folder: Path) -> None:
    """Raises `PublishError` unless a repository has all of its files, no others, and no path of this machine."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = sorted(name for name in files if not any(fnmatch(name, pattern) for pattern in PUBLISHED))
    if others:
        raise PublishError(f"{', '.join(others)}: not part of a published model (only {', '.join(PUBLISHED)} are).")
    needed = NEEDED_ADAPTER if ADAPTER_CONFIG in files else NEEDED_MODEL | _weights(folder)
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
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        return {WEIGHTS}
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) | {WEIGHTS_INDEX}


def _refuse_missing(folder: Path, missing: set[str]) -> None:
    if missing:
        raise PublishError(f"{folder} lacks {', '.join(sorted(missing))}; `save_repository` writes all of them.")


def _strings(content: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yields every string of nested JSON, with its place."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(value, f"{place}: {key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _strings(value, f"{place}[{number}]")


def check_that_it_loads(folder: Path, checkpoint: Path, expected: Measured) -> None:
    """Runs the doctor on a repository in another process, whose code cannot import this package.

    Args:
        folder: the repository.
        checkpoint: what it was made from; unless it is an adapter, its code must give the same vectors.
        expected: the fingerprint of the model in this process.

    Raises:
        PublishError: a part does not load, or gives other vectors, or a vector that is not of norm 1.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        fingerprint = Path(elsewhere) / FILE_NAME
        save_fingerprint(expected, fingerprint)
        command = [sys.executable, "-P", "-m", "vipolyqwen.doctor", folder, "--fingerprint", fingerprint]
        command += ["--checkpoint", checkpoint] if (checkpoint / "config.json").is_file() else []
        environment = {**os.environ, "HF_MODULES_CACHE": elsewhere}  # no code of another repository of this name
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        found = done.stdout or done.stderr[-4000:]
        raise PublishError(f"a fresh process cannot use what would be published:\n{found}")
