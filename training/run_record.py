"""The record of a run for its model card: provenance, settings, data, hardware, versions; no local path."""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from ..data.source_config import SourceConfig
from ..data.sources import PairDataset
from ..data.streamed_pairs import StreamedPairs
from ..publishing.repository import TRAINING_FILE, write_json
from .arguments import Arguments, ModelArguments

SETTINGS = ("loss_table", "temperature", "learnable_temperature", "mask_duplicates", "mask_groups", "nce_min_score")
SETTINGS += ("false_negative_margin", "matryoshka_dims", "task_weighting", "task_weighting_options")
SETTINGS += ("distil", "teacher", "teacher_prompt", "teacher_temperature", "distil_cosine", "distil_kl")
SETTINGS += ("prefix_sides", "prefix_dropout", "tasks_without_prefix", "tasks")
SETTINGS += ("per_device_train_batch_size", "batch_tokens", "batch_pixels", "gradient_accumulation_steps")
SETTINGS += ("num_train_epochs", "max_steps")
SETTINGS += ("learning_rate", "vision_learning_rate", "audio_learning_rate", "head_learning_rate")
SETTINGS += ("loss_learning_rate", "freeze")
SETTINGS += ("lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm")
SETTINGS += ("bf16", "fp16", "seed", "load_best_model_at_end", "metric_for_best_model")
ADAPTER_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "use_dora", "load_in_4bit")
PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate")


def write_record(
    folder: Path,
    arguments: Arguments,
    train: PairDataset | StreamedPairs | None,
    held_out: PairDataset | None,
    history: list[dict[str, Any]] | None = None,
) -> None:
    """Writes `training.json`.

    Args:
        folder: output folder of the run; created if it does not exist.
        arguments: arguments of the run.
        train: pairs to train on.
        held_out: pairs to evaluate on.
        history: the steps at which the run was resumed with other settings, and these.
    """
    model_args, data_args, loss_args, args = arguments
    values = {**vars(model_args), **vars(data_args), **vars(loss_args), **args.to_dict()}
    names = SETTINGS if model_args.lora_rank is None else (*SETTINGS, *ADAPTER_SETTINGS)
    if loss_args.distil is None:  # the other settings of the teacher have no effect
        names = [name for name in names if not name.startswith(("teacher", "distil"))]
    elif loss_args.teacher is not None and os.path.exists(loss_args.teacher):
        values["teacher"] = Path(loss_args.teacher).name
    settings = {name: values[name] for name in names if values[name] not in (None, {}, [], -1)}  # -1: no max_steps
    record = {
        **_origin(model_args),
        "settings": {"processes": args.world_size, **settings},
        **({"resumed": history} if history else {}),
        "train_data": [] if train is None else describe_pairs(train),
        "eval_data": [] if held_out is None else describe_pairs(held_out),
        "hardware": _hardware(args.world_size, args.device),
        "versions": {name: version(name) for name in PACKAGES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TRAINING_FILE, record)


def describe_pairs(pairs: PairDataset | StreamedPairs) -> list[dict[str, Any]]:
    """Returns one entry a source: file name or Hub id, weight, and number of rows by task and by modalities.

    Of a source that is streamed, the rows are not known: `None`.
    """
    if isinstance(pairs, StreamedPairs):
        return [{**_named(source), "rows": None, "tasks": {}, "sides": {}} for source in pairs.sources]
    described, start = [], 0
    for source, rows in zip(pairs.sources, pairs.source_lengths, strict=True):
        tasks, sides = (count(start, start + rows) for count in (pairs.task_counts, pairs.modality_counts))
        described.append({**_named(source), "rows": rows, "tasks": tasks, "sides": sides})
        start += rows
    return described


def _named(source: SourceConfig) -> dict[str, Any]:
    """Returns the name of a source without its folder, whether it is that of a Hub dataset, and its weight."""
    on_hub = _is_hub_id(source.path)
    return {"name": source.path if on_hub else Path(source.path).name, "on_hub": on_hub, "weight": source.weight}


def _origin(model_args: ModelArguments) -> dict[str, Any]:
    """Returns the Hub ids of the backbones, also if inherited from `model`, and that of `model` itself."""
    if model_args.model is None:
        names = [name for name in (model_args.vlm, model_args.audio) if name is not None]
        return {"base_models": [name for name in names if _is_hub_id(name)]}
    before = cached_file(
        model_args.model,
        TRAINING_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    record = {} if before is None else json.loads(Path(before).read_text(encoding="utf-8"))
    origin = {"base_models": record.get("base_models", [])}
    return origin | ({"continued_from": model_args.model} if _is_hub_id(model_args.model) else {})


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def _hardware(processes: int, device: torch.device) -> str:
    if device.type == "cuda":
        return f"{processes} × {torch.cuda.get_device_name(device)}"
    return f"{processes} × {device.type}, {os.cpu_count()} cores"
