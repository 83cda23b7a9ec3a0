"""What makes a checkpoint whole: every tensor, every file, nothing that a reader could not trust."""

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel, ProcessorMixin

from ..modeling_vipolyqwen import ViPolyQwenModel, loading_problems
from ..processing_vipolyqwen import ViPolyQwenProcessor
from .hub import PublishError

# What a published repository may hold; everything else in a folder is refused, and left alone on the Hub.
PUBLISHED = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
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
READING = {"processor_config.json", "processing_vipolyqwen.py", "tokenizer.json", "tokenizer_config.json"}
READING |= {"chat_template.jinja", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
READING |= {"README.md", "LICENSE", "requirements.txt", "media_vipolyqwen.py", "tasks_vipolyqwen.py"}
NEEDED_WHOLE = READING | {"config.json", "configuration_vipolyqwen.py", "modeling_vipolyqwen.py"}
NEEDED_WHOLE |= {"fingerprint.json", "fingerprint_vipolyqwen.py", "packing_vipolyqwen.py", "pooling_vipolyqwen.py"}
NEEDED_ADAPTER = READING | {"adapter_config.json", "adapter_model.safetensors"}

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
    needed = NEEDED_ADAPTER if "adapter_config.json" in files else NEEDED_WHOLE | _weights(folder)
    _refuse_missing(folder, needed - files)
    for name in sorted(name for name in files if name.endswith(".json")):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if name == "tokenizer.json":
            content = {key: value for key, value in content.items() if key != "model"}  # a vocabulary has "/usr/" too
        for place, value in _strings(content, name):
            if LOCAL_PATH.match(value):
                raise PublishError(f"{place} is {value!r}, a path of this machine; remove it from the checkpoint.")


def load_whole(source: Path | str, revision: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model that has exactly the tensors of its checkpoint, and its processor.

    Args:
        source: a folder, or a Hub repository.
        revision: of a Hub repository; `None`: the newest.
    """
    model, report = ViPolyQwenModel.from_pretrained(
        source,
        dtype="auto",
        revision=revision or "main",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, with the other faults
    )
    problems = loading_problems(report)
    if problems:
        raise PublishError(
            f"{source} does not hold the tensors of its model. {problems}. Nothing may be re-initialised: "
            "save the model again, with the versions it was trained with."
        )
    for part in (model.config.text_config, model.config.vision_config, model.config.audio_config):
        if part is not None:
            part.name_or_path = ""  # where a backbone was loaded from, which the card tells
    processor = ViPolyQwenProcessor.from_pretrained(source, config=model.config, revision=revision or "main")
    return model.eval(), processor


def load_adapter(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base model of a PEFT adapter with the adapter merged into it, and its processor."""
    from peft import PeftModel, get_peft_model_state_dict  # only adapters need it

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise PublishError(f"{folder / 'adapter_config.json'} does not say what `base_model_name_or_path` is.")
    if os.path.isabs(base) and not os.path.isdir(base):
        moved = folder.parent / Path(base).name  # with the run's whole folder
        if not moved.is_dir():
            raise PublishError(
                f"The base of {folder} was {base}, which is not there, nor is {moved}. Put it back, or write where it "
                "is into adapter_config.json as `base_model_name_or_path`."
            )
        base = str(moved)
    model, processor = load_whole(base, config.get("revision"))
    adapted = PeftModel.from_pretrained(model, folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted))
    if stored != wanted:
        raise PublishError(
            f"{folder / 'adapter_model.safetensors'} is not what adapter_config.json describes. "
            f"Missing: {sorted(wanted - stored)}; unexpected: {sorted(stored - wanted)}."
        )
    if (folder / "processor_config.json").is_file():
        processor = ViPolyQwenProcessor.from_pretrained(folder, config=model.config)
    return adapted.merge_and_unload(safe_merge=True).eval(), processor


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
