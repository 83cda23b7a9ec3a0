"""What a run asks for, kept in each checkpoint, and how a resumed run differs from it.

Every argument is compared, unless it is listed here: an argument that a later version adds is compared as well.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..configuration_vipolyqwen import CHOICES
from ..data.names import did_you_mean
from ..data.sources import PairDataset
from ..data.streamed_pairs import StreamedPairs
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..publishing.repository import write_json
from .arguments import ARGUMENT_CLASSES, Arguments
from .parts import NEW_PARTS, TOWERS, plain_name

SETTINGS_FILE = "run_settings.json"  # in a checkpoint

# Without effect on what is learned: where results go, logging, saving, when to evaluate, loading of data.
FREE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume_with", "run_name", "project", "debug"}
FREE |= {"do_train", "do_eval", "do_predict", "local_rank", "disable_tqdm", "report_to", "skip_memory_metrics"}
FREE |= {"logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"}
FREE |= {"include_num_input_tokens_seen", "log_level", "log_level_replica", "monitor_steps", "prediction_loss_only"}
FREE |= {"trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_for_metrics", "eval_delay"}
FREE |= {"eval_strategy", "eval_steps", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"}
FREE |= {"eval_accumulation_steps", "batch_eval_metrics", "per_device_eval_batch_size"}
FREE |= {"bf16_full_eval", "fp16_full_eval", "save_only_model", "save_strategy", "save_steps", "save_on_each_node"}
FREE |= {"save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"}
FREE |= {"hub_strategy", "hub_always_push", "hub_revision", "restore_callback_states_from_checkpoint"}
FREE |= {"remove_unused_columns", "label_names", "length_column_name", "ignore_data_skip", "check_media"}
FREE |= {"on_bad_row", "max_bad_rows"}  # rows count by content
FREE |= {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"}
FREE |= {"dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_find_unused_parameters"}
FREE |= {"ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "deepspeed"}
# Compared by content instead: of the model's weights and of the rows.
FREE |= {"model", "vlm", "audio", "train_data", "eval_data", "without_tasks"}

# How long and in which portions a run computes: a resumed run applies them, and its record says so.
APPLIED = {"processes", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"}
APPLIED |= {"embed_chunk", "embed_chunk_tokens", "packing", "attn_implementation", "use_cpu", "tf32", "fsdp"}
APPLIED |= {"batch_tokens", "batch_pixels"}
APPLIED |= {"fsdp_config", "parallelism_config", "accelerator_config", "auto_find_batch_size", "full_determinism"}
APPLIED |= {"gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"}
APPLIED |= {"activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
APPLIED |= {"use_liger_kernel", "liger_kernel_config", "torch_empty_cache_steps", "use_cache"}
APPLIED |= {"loss_block_rows", "average_tokens_across_devices", "seed"}  # the order of the rows is that of `data_seed`

# Shapes of the model and what its weights came from: another one is another run.
FIXED = {"model", "prefixes", "lora_rank", "lora_alpha", "lora_targets", "use_dora", "load_in_4bit", *CHOICES}
# The position of a run in its data depends on these; `ignore_data_skip` gives it up.
ORDER = {"train_data", "data_seed", "batching", "mixture_temperature"}
# Decide the groups of the optimizer and its state.
GROUPING = {"freeze", "optim", "optim_args", "optim_target_modules"}
GROUPING |= {"vision_learning_rate", "audio_learning_rate", "head_learning_rate"}
# Values in these groups, and the schedule over them, which the stock Trainer restores from a checkpoint.
OPTIMIZER = GROUPING | {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
SCHEDULE = {"lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"}
# Make earlier measurements of the best checkpoint incomparable.
BEST = {"eval_data", "metric_for_best_model", "greater_is_better"}
CONTENT = "content"  # key of a value that is compared by it alone


def describe_settings(
    arguments: Arguments,
    model: nn.Module,
    processor: ViPolyQwenProcessor,
    train: PairDataset | StreamedPairs | None,
    held_out: PairDataset | None,
) -> dict[str, Any]:
    """Returns the settings of a run as JSON restores them, the effective ones where the model decides them.

    Args:
        arguments: the arguments of the run.
        model: the model before training.
        processor: its processor.
        train: pairs to train on.
        held_out: pairs to evaluate on.
    """
    model_args, data_args, loss_args, args = arguments
    values = {**vars(model_args), **vars(data_args), **vars(loss_args), **args.to_dict()}
    names = {item.name for cls in ARGUMENT_CLASSES for item in fields(cls)}
    settings = {name: values[name] for name in sorted(names - FREE)}
    settings |= {name: getattr(model.config, name) for name in CHOICES}
    pixels = processor.image_processor.size
    settings |= {
        "processes": args.world_size,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        "max_length": processor.tokenizer.model_max_length,
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
        "max_audio_seconds": processor.max_audio_seconds,
        "max_audio_windows": processor.max_audio_windows,
        "prefixes": dict(processor.task_prefixes),
        "model": _describe_model(arguments, model),
        "train_data": _describe_data(train),
        "eval_data": _describe_data(held_out),
    }
    if loss_args.teacher is not None and Path(loss_args.teacher).exists():
        settings["teacher"] = Path(loss_args.teacher).resolve().name  # a folder may move
    return json.loads(json.dumps(settings, default=str))


def _describe_model(arguments: Arguments, model: nn.Module) -> dict[str, str]:
    """Returns the name of the model and a hash of the weights that were loaded, not of newly initialised ones."""
    model_args = arguments[0]
    sources = [model_args.model or model_args.vlm, *([model_args.audio] if model_args.audio else [])]
    parts = (*TOWERS.values(), *(NEW_PARTS if model_args.model is not None else ()))
    return {"name": " + ".join(Path(name).name for name in sources), CONTENT: weights_digest(model, parts)}


def weights_digest(model: nn.Module, parts: Collection[str]) -> str:
    """Hashes the first values of every tensor of some parts, the base's under an adapter; quantised ones do not count.

    Args:
        model: the model.
        parts: names of submodules.
    """
    digest = hashlib.blake2b(digest_size=16)
    loaded = {_name_in_base(name): value for name, value in model.named_parameters() if not _is_of_adapter(name)}
    for name in sorted(name for name in loaded if name.startswith(tuple(f"{part}." for part in parts))):
        if loaded[name].is_floating_point():
            first = loaded[name].detach().flatten()[:1024].float().cpu()
            digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()


def _is_of_adapter(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save", "token_adapter.trainable"))


def _name_in_base(name: str) -> str:
    """Returns the name of a parameter in the model without peft's wrappers."""
    for wrapper in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(wrapper, "")
    return plain_name(name)


def _describe_data(pairs: PairDataset | StreamedPairs | None) -> dict[str, str] | None:
    """Returns the names of the sources with rows and weights, and a hash of the content of all rows.

    Of sources that are streamed, no row is known beforehand; their entries in the recipe are compared.
    """
    if pairs is None:
        return None
    if isinstance(pairs, StreamedPairs):
        named = [f"{Path(source.path).name}: streamed × {source.weight:g}" for source in pairs.sources]
        entries = repr([replace(source, path=Path(source.path).name, media_root=None) for source in pairs.sources])
        return {"name": ", ".join(named), CONTENT: hashlib.blake2b(entries.encode(), digest_size=16).hexdigest()}
    named = [
        f"{Path(source.path).name}: {rows} rows" + ("" if source.weight == 1 else f" × {source.weight:g}")
        for source, rows in zip(pairs.sources, pairs.source_lengths, strict=True)
    ]
    marks = [source.image_placeholder for source in pairs.sources]
    content = repr((pairs.fingerprints(), pairs.source_weights, marks)).encode()
    return {"name": ", ".join(named), CONTENT: hashlib.blake2b(content, digest_size=16).hexdigest()}


def write_settings(
    folder: Path, settings: Mapping[str, Any], history: list[dict[str, Any]], groups: list[list[str]]
) -> None:
    """Writes the settings of a run into a checkpoint.

    Args:
        folder: the checkpoint.
        settings: of `describe_settings`.
        history: changes at each resumption so far.
        groups: names of the parameters of each group of the optimizer.
    """
    content = {"version": __version__, "settings": settings, "history": history, "optimizer_groups": groups}
    write_json(folder / SETTINGS_FILE, content)


def read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """Returns what `write_settings` wrote; `None` for a checkpoint of an earlier version, which has no such file."""
    path = checkpoint / SETTINGS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns name -> (former value, value now) of the settings that differ.

    A setting that only one side knows was added or removed by another version of the libraries; it counts if its value
    is not the default.
    """
    defaults = json.loads(json.dumps(_defaults(), default=str))
    names = [*now, *(name for name in before if name not in now)]
    pairs = {name: (before.get(name, defaults.get(name)), now.get(name, defaults.get(name))) for name in names}
    return {name: pair for name, pair in pairs.items() if _compared(pair[0]) != _compared(pair[1])}


def _defaults() -> dict[str, Any]:
    defaults = [(item.name, item.default) for cls in ARGUMENT_CLASSES for item in fields(cls)]
    return {name: value for name, value in defaults if isinstance(value, (str, int, float, bool, type(None)))}


def _compared(value: Any) -> Any:
    return value[CONTENT] if isinstance(value, dict) and CONTENT in value else value


def show_table(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Formats differences as a table of text: setting, value in the checkpoint, value now."""
    rows = [("setting", "in the checkpoint", "now"), *((name, *map(show, pair)) for name, pair in differences.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)


def show(value: Any) -> str:
    """Formats a value for a line of a table."""
    if isinstance(value, dict) and CONTENT in value:
        return f"{value['name']} ({value[CONTENT][:8]})"
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def recorded(value: Any) -> Any:
    """Returns a value for the history in the record of a run."""
    return show(value) if isinstance(value, dict) and CONTENT in value else value


def check_names(accepted: Collection[str]) -> None:
    """Raises ValueError for a name in `resume_with` that is no setting."""
    known = {item.name for cls in ARGUMENT_CLASSES for item in fields(cls)} - FREE | {"train_data", "eval_data"}
    for name in accepted:
        if name not in known:
            raise ValueError(f"`resume_with` names {name!r}, which is no setting of a run.{did_you_mean(name, known)}")


def check_differences(
    checkpoint: Path, differences: Mapping[str, tuple[Any, Any]], accepted: Collection[str], sharded: str | None
) -> None:
    """Refuses differences that are not accepted, and those that cannot be applied.

    Args:
        checkpoint: the checkpoint.
        differences: of `find_differences`.
        accepted: names of settings that may differ.
        sharded: the launcher that shards the optimizer's state, whose groups cannot change; `None` for none.

    Raises:
        ValueError: shows all differences as a table.
    """
    remedy = f"start a new run from its weights with `--model {checkpoint}`"
    table = f"\n{show_table(differences)}\n"
    refused = [name for name in differences if name not in APPLIED and name not in accepted]
    fixed = [name for name in differences if name in FIXED]
    if fixed:
        raise ValueError(
            f"{checkpoint} was written with other settings than this run has:{table}Within a run, "
            f"{', '.join(f'`{name}`' for name in fixed)} cannot change: give the former values, or {remedy}."
        )
    if refused:
        raise ValueError(
            f"{checkpoint} was written with other settings than this run has:{table}Give the former values; accept "
            f"changes by name with `--resume_with {','.join(refused)}`, and they apply from there on; or {remedy}."
        )
    restored = OPTIMIZER if sharded == "DeepSpeed" else GROUPING
    regrouped = [name for name in differences if name in restored]
    if sharded is not None and regrouped:
        raise ValueError(
            f"{checkpoint} was written with other settings than this run has:{table}{sharded} restores its optimizer "
            f"as it was, so {', '.join(f'`{name}`' for name in regrouped)} cannot change: give the former values, or "
            f"{remedy}."
        )
