"""Checks arguments: their types in recipes, and stock arguments without effect here, which are refused by name."""

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

OWN_LOOP = "pairs are embedded and scored by this package, which has no labels or logits"
OWN_LOADER = "this package splits every batch between the ranks, so that a run resumes at the exact row"
# Stock argument -> why another value than the default would change nothing, and what to use instead.
REFUSED = {
    "label_smoothing_factor": f"{OWN_LOOP}; `temperature` softens InfoNCE",
    "average_tokens_across_devices": f"{OWN_LOOP}, and the loss is a mean over the pairs of all ranks",
    "label_names": OWN_LOOP,
    "prediction_loss_only": f"{OWN_LOOP}; evaluation measures retrieval",
    "include_for_metrics": OWN_LOOP,
    "batch_eval_metrics": OWN_LOOP,
    "eval_do_concat_batches": OWN_LOOP,
    "eval_use_gather_object": OWN_LOOP,
    "eval_accumulation_steps": "embeddings go to the host after every batch of an evaluation",
    "bf16_full_eval": "evaluation has the precision of training; use `bf16`",
    "fp16_full_eval": "evaluation has the precision of training; use `fp16`",
    "train_sampling_strategy": f"{OWN_LOADER}; use `batching`",
    "length_column_name": "micro-batches are planned by lengths that are measured; use `embed_chunk_tokens`",
    "dataloader_in_order": "a run could not resume at the exact row",
    "auto_find_batch_size": "other batches have other negatives; bound memory with `embed_chunk`",
    "optim_target_modules": "the optimizer's groups follow the parts of the model; use `lora_rank`",
    "use_cache": "an embedding model generates nothing",
    "liger_kernel_config": "`use_liger_kernel` replaces the layers that the model has",
    "parallelism_config": "pairs are compared across all ranks, so all of them take part in data parallelism; use "
    "`fsdp` or `deepspeed`",
    "do_predict": "use evaluate_vipolyqwen.py",
}
OWN_DEFAULTS = {"remove_unused_columns": False}  # the collator needs every column
LOADER_OPTIONS = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}


def refuse_without_effect(args: TrainingArguments) -> None:
    """Raises ValueError for a stock argument that would change nothing."""
    defaults = {item.name: item.default for item in fields(TrainingArguments)} | OWN_DEFAULTS
    reasons = {**REFUSED, "remove_unused_columns": "the collator needs every column"}
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != defaults[name] and value not in (None, [], ()):
            raise ValueError(f"`{name}` is {value!r}, which has no effect here: {reason}. Leave it out.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"`max_steps` is {args.max_steps}; give a number of steps >= 1, or -1 for `num_train_epochs`."
        )
    if args.max_steps < 0 and not args.num_train_epochs > 0:
        raise ValueError(f"`num_train_epochs` is {args.num_train_epochs}; it must be above 0, or set `max_steps`.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")


def refuse_loader_options(args: TrainingArguments) -> None:
    """Raises ValueError for options of Accelerate's data loader, which training does not use."""
    for name, default in LOADER_OPTIONS.items():
        value = getattr(args.accelerator_config, name)
        if value != default:
            raise ValueError(
                f"`accelerator_config` has `{name}` {value!r}, which has no effect here: {OWN_LOADER}. Leave it out."
            )


def typed(values: Mapping[str, Any], classes: tuple[type, ...], where: str) -> dict[str, Any]:
    """Returns the values of a recipe as the types of their arguments: texts such as `1e-4` become numbers.

    Args:
        values: argument -> value.
        classes: the dataclasses of the arguments.
        where: the recipe, for errors.

    Raises:
        ValueError: a number or a switch has a value of another type.
    """
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    return {name: _typed(name, value, _choices(hints.get(name, Any)), where) for name, value in values.items()}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, otherwise the type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _typed(name: str, value: Any, choices: tuple[Any, ...], where: str) -> Any:
    wanted = [kind for kind in choices if kind in (bool, int, float)]
    others = [kind for kind in choices if kind not in (bool, int, float, type(None))]
    if not wanted or others or (value is None and type(None) in choices):
        return value
    if isinstance(value, bool):
        fits = value if bool in wanted else None
    elif isinstance(value, str):
        fits = _parsed(value, wanted)
    else:
        fits = value if isinstance(value, tuple(wanted)) else _number(value, wanted)
    if fits is None:
        kinds = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"{where}: `{name}` is {value!r}; it must be {' or '.join(kinds[kind] for kind in wanted)}.")
    return fits


def _parsed(text: str, wanted: list[Any]) -> Any:
    """Returns the value that a text stands for, `None` if it stands for none."""
    if bool in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in wanted:
            try:
                return kind(text)
            except ValueError:
                continue
    return None


def _number(value: Any, wanted: list[Any]) -> int | float | None:
    """Returns a number as a wanted type without loss, otherwise `None`."""
    if isinstance(value, int) and float in wanted:
        return value
    if isinstance(value, float) and value.is_integer() and int in wanted:
        return int(value)
    return None
