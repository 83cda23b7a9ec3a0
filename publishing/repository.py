"""Saves and loads a repository: weights, code, processor, sentence-transformers files."""

import json
import os
import shutil
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..configuration_vipolyqwen import SUPPORTED
from ..modeling_vipolyqwen import ViPolyQwenModel, loading_problems
from ..processing_vipolyqwen import ViPolyQwenProcessor

if TYPE_CHECKING:
    from peft import PeftModel

TRAINING_FILE = "training.json"  # written by train_vipolyqwen.py, published, read here
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_SHARD_SIZE = "5GB"
SENTENCE_TRANSFORMERS_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]


class PublishError(Exception):
    """Why something was not published, and what to do."""


def save_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes a repository: `AutoModel`, `AutoProcessor` and `SentenceTransformer` load the folder as it is.

    Args:
        model: the model; its code is copied along.
        processor: its processor, whose task prefixes become the prompts.
        folder: where to; created if it does not exist.
        state_dict: weights to write instead of the model's, as a sharded trainer gathers them.
        max_shard_size: largest file of weights.

    Raises:
        ValueError: `audio_prefix` of the processor is not the model's.
    """
    check_audio_prefix(model.config, processor)
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    _open_like_other_files(Path(folder))
    save_reading_files(processor, Path(folder), has_audio=model.config.audio_config is not None)


def _open_like_other_files(folder: Path) -> None:
    """Gives the weights, which safetensors writes for their owner only, the mode of the configuration beside them."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def check_audio_prefix(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Raises ValueError if `audio_prefix` of a processor is not that of the model's configuration."""
    if config.audio_prefix != processor.audio_prefix:
        raise ValueError(
            f"`audio_prefix` is {config.audio_prefix!r} in the model's configuration, but {processor.audio_prefix!r} "
            "in the processor. Vectors of audio alone depend on both: set the processor's to the model's."
        )


def save_reading_files(processor: ProcessorMixin, folder: Path, has_audio: bool) -> None:
    """Writes the files that turn inputs into tensors: the processor's and those of sentence-transformers."""
    processor.save_pretrained(folder)
    for name, content in sentence_transformers_files(processor, has_audio).items():
        write_json(folder / name, content)


def save_adapter(
    model: "PeftModel", processor: ProcessorMixin, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes an adapter, without its base, and the processor files.

    Args:
        model: the model with its adapter.
        processor: its processor.
        folder: where to; created if it does not exist.
        state_dict: weights to write instead of those of `model`, as a sharded trainer gathers them.
    """
    model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
    (folder / "README.md").unlink()  # an empty card; publish_vipolyqwen.py writes one
    save_reading_files(processor, folder, has_audio=model.config.audio_config is not None)


def copy_adapter(checkpoint: Path, base: str, processor: ProcessorMixin, folder: Path, has_audio: bool) -> None:
    """Copies an adapter for publishing: same weights, `base` as its base; writes the processor files.

    Args:
        checkpoint: folder that `save_adapter` wrote.
        base: Hub repository of the base.
        processor: processor of the adapter.
        folder: where to; it must exist.
        has_audio: whether the base has a speech encoder.

    Raises:
        PublishError: the adapter replaces modules, which transformers 5.17 does not load.
    """
    config = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if config.get("modules_to_save"):
        raise PublishError(
            f"The adapter replaces modules (modules_to_save: {', '.join(config['modules_to_save'])}), which "
            "transformers 5.17 leaves random, without an error, when it loads an adapter. Publish it merged: drop "
            "--adapter."
        )
    # `auto_mapping` names this package, which readers do not have
    config |= {"base_model_name_or_path": base, "auto_mapping": None, "task_type": "FEATURE_EXTRACTION"}
    write_json(folder / ADAPTER_CONFIG, config)
    shutil.copy(checkpoint / ADAPTER_WEIGHTS, folder)
    save_reading_files(processor, folder, has_audio)


def sentence_transformers_files(processor: ProcessorMixin, has_audio: bool) -> dict[str, Any]:
    """Returns name -> content of the files that make the stock modules of sentence-transformers feed the model."""
    modalities = ["text", "image", *(["audio"] if has_audio else []), "message"]
    route = {"method": "forward", "method_output_name": "embeddings"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {name: dict(route) for name in modalities} | {"message": {**route, "format": "structured"}},
        "module_output_name": "sentence_embedding",
        "unpad_inputs": False,
    }
    model = {
        "model_type": "SentenceTransformer",
        "requirements": SUPPORTED,
        "prompts": dict(processor.task_prefixes),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    return dict(zip(SENTENCE_TRANSFORMERS_FILES, (MODULES, transformer, model), strict=True))


def load_repository(source: Path | str, revision: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a model that has exactly the tensors of its checkpoint, and its processor.

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
            part.name_or_path = ""  # where a backbone was loaded from; the card names it
    processor = ViPolyQwenProcessor.from_pretrained(source, config=model.config, revision=revision or "main")
    return model.eval(), processor


def load_adapter(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads the base model of a PEFT adapter, merges the adapter into it, and loads its processor."""
    from peft import PeftModel, get_peft_model_state_dict  # only adapters need it

    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise PublishError(f"{folder / ADAPTER_CONFIG} has no `base_model_name_or_path`; name the base there.")
    if os.path.isabs(base) and not os.path.isdir(base):
        moved = folder.parent / Path(base).name  # with the run's folder
        if not moved.is_dir():
            raise PublishError(
                f"The base of {folder} was {base}; neither that nor {moved} exists. Put it back, or name its "
                "folder as `base_model_name_or_path` in adapter_config.json."
            )
        base = str(moved)
    model, processor = load_repository(base, config.get("revision"))
    adapted = PeftModel.from_pretrained(model, folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted))
    if stored != wanted:
        raise PublishError(
            f"{folder / ADAPTER_WEIGHTS} is not what {ADAPTER_CONFIG} describes. "
            f"Missing: {sorted(wanted - stored)}; unexpected: {sorted(stored - wanted)}."
        )
    if (folder / "processor_config.json").is_file():
        processor = ViPolyQwenProcessor.from_pretrained(folder, config=model.config)
    return adapted.merge_and_unload(safe_merge=True).eval(), processor


def write_json(path: Path, content: Any) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
