"""The model card of a repository: the model, its use, its training and its results."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .. import __version__
from ..data.markdown import escaped
from .repository import TRAINING_FILE, PublishError

LANGUAGES = ["vi", "en", "zh"]
DIMENSIONS_FILE = "dimensions.json"
SHOWN_METRICS = ("recall@1", "recall@10", "mrr", "spearman")
METRIC_NAMES = {"recall@1": "recall_at_1", "recall@10": "recall_at_10", "mrr": "mrr", "spearman": "spearman_cosine"}


def model_card(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    checkpoint: Path,
    adapter_base: str | None = None,
    tag: str | None = None,
) -> ModelCard:
    """Writes the card of a model, from the model and from the files that training left in its folder.

    Args:
        name: `ORG/NAME`, or a folder's name.
        model: the model.
        processor: its processor.
        checkpoint: the folder it was trained into, with `training.json` and `trainer_state.json` if it has them.
        adapter_base: the Hub repository that the model is an adapter of; `None`: it has all weights.
        tag: the revision that the examples pin; `None`: they do not pin one.
    """
    training = read_training(checkpoint)
    state = _read_json(checkpoint / "trainer_state.json") or {}
    results = task_results(checkpoint, training, state)
    has_audio = model.config.audio_config is not None
    tags = ["sentence-transformers", "transformers", "feature-extraction", "sentence-similarity", "multimodal"]
    tags += ["text", "image", *(["audio"] if has_audio else []), "retrieval", "custom_code", "vipolyqwen"]
    is_adapter = {} if adapter_base is None else {"base_model_relation": "adapter"}
    data = ModelCardData(
        language=LANGUAGES,
        license="apache-2.0",
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=tags + (["peft", "lora"] if adapter_base is not None else []),
        base_model=[adapter_base] if adapter_base else training.get("base_models") or None,
        datasets=[source["name"] for source in training.get("train_data", []) if source["on_hub"]] or None,
        metrics=sorted({METRIC_NAMES[name] for values in results.values() for name in values.keys() & METRIC_NAMES})
        or None,
        model_name=name.split("/")[-1],
        eval_results=_eval_results(results, training) or None,
        **is_adapter,
    )
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), finalize=escaped)
    page = templates.get_template("card.md.jinja").render(
        card_data=data.to_yaml(),
        name=name,
        title=name.split("/")[-1],
        towers=_towers(model.config),
        has_audio=has_audio,
        adapter_base=adapter_base,
        pin=Markup("" if tag is None else f", revision={json.dumps(tag)}"),
        version=__version__,
        dimension=model.config.projection_dim,
        parameters=f"{model.num_parameters() / 1e6:,.1f}",
        dtype=str(model.dtype).removeprefix("torch."),
        config=model.config,
        tokens=processor.tokenizer.model_max_length,
        pixels=processor.image_processor.size,
        seconds=processor.max_audio_seconds,
        windows=processor.max_audio_windows,
        rate=processor.feature_extractor.sampling_rate if has_audio else None,
        prompts=processor.task_prefixes,
        on_sides=_tasks_by_sides(processor),
        training=training,
        steps=state.get("global_step"),
        epochs=state.get("epoch"),
        runtime=_runtime(state),
        results=results,
        metrics=SHOWN_METRICS,
        dimensions=read_dimensions(checkpoint, state.get("global_step")),
    )
    return ModelCard(page)


def read_training(checkpoint: Path) -> dict[str, Any]:
    """Reads the record of a run, {} if it has none; `checkpoint-N` and `adapter` belong to the run above them."""
    folder = checkpoint.parent if re.fullmatch(r"checkpoint-\d+|adapter", checkpoint.name) else checkpoint
    return _read_json(checkpoint / TRAINING_FILE) or _read_json(folder / TRAINING_FILE) or {}


def task_results(checkpoint: Path, training: dict[str, Any], state: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns task -> metric -> value of the folder's weights on the held-out pairs; empty if never measured."""
    step = state.get("global_step")
    if training.get("settings", {}).get("load_best_model_at_end") and not checkpoint.name.startswith("checkpoint-"):
        step = state.get("best_global_step", step)
    logged = [entry for entry in state.get("log_history", []) if entry["step"] == step]
    evaluated = [entry for entry in logged if any(name.startswith("eval_") for name in entry)]
    entry = evaluated[-1] if evaluated else _read_json(checkpoint / "eval_results.json") or {}
    results: dict[str, dict[str, float]] = {}
    for key, value in entry.items():
        match = re.fullmatch(r"eval_(.+)_(recall@\d+|mrr|spearman|candidates|chance)", key)
        if match and math.isfinite(value):  # Spearman's ρ of equal cosines is NaN, which is not a result
            results.setdefault(match[1], {})[match[2]] = value
    return results


def read_dimensions(checkpoint: Path, step: int | None) -> dict[str, Any]:
    """Reads `dimensions.json` of `evaluate_vipolyqwen.py --dims … --out CHECKPOINT`; {} without it.

    Raises:
        PublishError: it was measured on the weights of another step.
    """
    measured = _read_json(checkpoint / DIMENSIONS_FILE) or {}
    if measured and measured["step"] != step:
        raise PublishError(
            f"{checkpoint / DIMENSIONS_FILE} was measured at step {measured['step']}, the weights are of step {step}; "
            "measure them again (`evaluate_vipolyqwen.py --dims`), or remove the file."
        )
    return measured


def _eval_results(results: dict[str, dict[str, float]], training: dict[str, Any]) -> list[EvalResult]:
    """Returns the entries of the card's `model-index`."""
    sources = training.get("eval_data", [])
    hub_id = sources[0]["name"] if len(sources) == 1 and sources[0]["on_hub"] else None
    return [
        EvalResult(
            task_type="semantic-similarity" if metric == "spearman" else "information-retrieval",
            task_name="Semantic Similarity" if metric == "spearman" else "Information Retrieval",
            dataset_type=hub_id or "held-out-pairs",
            dataset_name=f"{hub_id or 'held-out pairs'}: {task}",
            dataset_config=task,
            metric_type=METRIC_NAMES[metric],
            metric_name=metric,
            metric_value=values[metric],
        )
        for task, values in sorted(results.items())
        for metric in SHOWN_METRICS
        if metric in values
    ]


def _towers(config: PreTrainedConfig) -> list[str]:
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    towers = [
        f"Qwen2-VL ({text.num_hidden_layers} layers, {text.hidden_size} wide; "
        f"vision {vision.depth} layers, {vision.embed_dim} wide) for text and images"
    ]
    if audio is not None:
        towers.append(f"{audio.model_type} ({audio.num_hidden_layers} layers, {audio.hidden_size} wide) for audio")
    return towers


def _tasks_by_sides(processor: ProcessorMixin) -> dict[str, list[str]]:
    """Sides of the prefix in training, in words -> the tasks, for those that had a prefix."""
    words = {"both": "both sides of a pair", "a": "side a, the query"}
    found = {
        shown: [f"`{task}`" for task, where in processor.prefix_sides.items() if where == sides]
        for sides, shown in words.items()
    }
    return {shown: tasks for shown, tasks in found.items() if tasks}


def _runtime(state: dict[str, Any]) -> float | None:
    """Returns the seconds that the run took, from its last log entry."""
    times = [entry["train_runtime"] for entry in state.get("log_history", []) if "train_runtime" in entry]
    return times[-1] if times else None


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
