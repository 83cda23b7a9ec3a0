"""The page that a repository shows: what the model is, how to use it, what it was trained on, how well it does."""

import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from .repository import TRAINING_FILE

LANGUAGES = ["vi", "en", "zh"]
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
    """The card of a model, from itself and from what training left in its folder.

    Args:
        name: `ORG/NAME`, or a folder's name.
        model: the model.
        processor: its processor.
        checkpoint: the folder it was trained into, with `training.json` and `trainer_state.json` if it has them.
        adapter_base: the Hub repository that the model is an adapter of; `None`: its weights are whole.
        tag: the revision that the examples pin; `None`: they pin none.
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
        base_model=([adapter_base] if adapter_base is not None else training.get("base_models")) or None,
        datasets=[source["name"] for source in training.get("train_data", []) if source["on_hub"]] or None,
        metrics=sorted({METRIC_NAMES[name] for values in results.values() for name in values.keys() & METRIC_NAMES})
        or None,
        model_name=name.split("/")[-1],
        eval_results=_eval_results(results, training) or None,
        **is_adapter,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        title=name.split("/")[-1],
        towers=_towers(model.config),
        has_audio=has_audio,
        adapter_base=adapter_base,
        pin="" if tag is None else f', revision="{tag}"',
        dimension=model.config.projection_dim,
        parameters=f"{model.num_parameters() / 1e6:,.1f}",
        dtype=str(model.dtype).removeprefix("torch."),
        config=model.config,
        tokens=processor.tokenizer.model_max_length,
        pixels=processor.image_processor.size,
        seconds=processor.max_audio_seconds,
        rate=processor.feature_extractor.sampling_rate if has_audio else None,
        prompts=processor.task_prefixes,
        training=training,
        steps=state.get("global_step"),
        epochs=state.get("epoch"),
        runtime=_runtime(state),
        results=results,
        metrics=SHOWN_METRICS,
    )


def read_training(checkpoint: Path) -> dict[str, Any]:
    """What the run wrote down about itself; `checkpoint-N` and `adapter` belong to the run above them."""
    folder = checkpoint.parent if re.fullmatch(r"checkpoint-\d+|adapter", checkpoint.name) else checkpoint
    return _read_json(checkpoint / TRAINING_FILE) or _read_json(folder / TRAINING_FILE) or {}


def task_results(checkpoint: Path, training: dict[str, Any], state: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value on the held-out pairs, of the very weights in the folder; empty if never measured."""
    step = state.get("global_step")
    if training.get("settings", {}).get("load_best_model_at_end") and not checkpoint.name.startswith("checkpoint-"):
        step = state.get("best_global_step", step)
    logged = [entry for entry in state.get("log_history", []) if entry["step"] == step]
    evaluated = [entry for entry in logged if any(name.startswith("eval_") for name in entry)]
    entry = evaluated[-1] if evaluated else _read_json(checkpoint / "eval_results.json") or {}
    results: dict[str, dict[str, float]] = {}
    for key, value in entry.items():
        match = re.fullmatch(r"eval_(.+)_(recall@\d+|mrr|spearman|candidates|chance)", key)
        if match and math.isfinite(value):  # Spearman's ρ of equal cosines is NaN, which is no result
            results.setdefault(match[1], {})[match[2]] = value
    return results


def _eval_results(results: dict[str, dict[str, float]], training: dict[str, Any]) -> list[EvalResult]:
    """Entries of the card's `model-index`."""
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
        towers.append(f"{audio.model_type} ({audio.num_hidden_layers} layers, {audio.hidden_size} wide) for sound")
    return towers


def _runtime(state: dict[str, Any]) -> float | None:
    """Seconds that the run took, which its last log entry tells."""
    times = [entry["train_runtime"] for entry in state.get("log_history", []) if "train_runtime" in entry]
    return times[-1] if times else None


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

Turns text, images{% if has_audio %}, sound{% endif %} and any mix of them into **one {{ dimension }}-d unit \
vector**, so that any of them finds any other by cosine. Vietnamese first, then English and Chinese.

It is a viPolyQwen model of {{ parameters }} M parameters ({{ dtype }}): {{ towers | join("; ") }}. Each route has \
its own {{ config.pooling }} pooling and {{ config.projection }} projection\
{% if has_audio %}; an input with both gives \
{{ "the normalised mean of the two" if config.audio_fusion == "mean" else "the vector of the sound alone" }}\
{% endif %}.
{% if adapter_base %}
This repository holds a **LoRA adapter** of [{{ adapter_base }}](https://huggingface.co/{{ adapter_base }}); \
`pip install peft`, and the base is loaded by itself. To pin a revision with transformers, load the base and then \
`model.load_adapter("{{ name }}", adapter_kwargs={"revision": …})`: `AutoModel` would look for the same revision \
in the base.
{% elif not training.base_models %}
It was built from a configuration, not on published backbones, or its checkpoint does not say on which.
{% endif %}

## Use

The repository holds code: pin a revision, `revision="…"`, one of its tags. `pip install -r requirements.txt`.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}", trust_remote_code=True{{ pin }})
documents = model.encode(
    [
        "Ba quả bóng xanh lớn trên cát.",
        "picture.png",
        {"image": "picture.png", "text": "Biển ghi gì?"},
{%- if has_audio %}
        "voice.wav",
{%- endif %}
    ]
)
query = model.encode("Three large blue balls on the sand.")
print(model.similarity(query, documents))
```

With transformers alone:

```python
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{{ name }}", trust_remote_code=True{{ "" if adapter_base else pin }})
processor = AutoProcessor.from_pretrained("{{ name }}", trust_remote_code=True{{ pin }})
batch = processor(text=["Biển ghi gì?", "hello"], images=[["picture.png"], []], task="ocr", return_tensors="pt")
with torch.no_grad():
    embeddings = model(**batch).embeddings  # (2, {{ dimension }})
```

In a vector database (here FAISS; the vectors are unit vectors, so inner product is cosine):

```python
import faiss
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}", trust_remote_code=True{{ pin }})
index = faiss.IndexFlatIP(model.get_embedding_dimension())
index.add(model.encode(["bốn bông hoa đỏ", "picture.png"]))
scores, rows = index.search(model.encode(["four red flowers"]), 2)
```

## Inputs and limits

| input | limit |
|---|---|
| text | {{ tokens }} tokens; NFC-normalised; special tokens in it are plain characters |
| image | path, PIL image or array; scaled to {{ pixels.shortest_edge }} to {{ pixels.longest_edge }} pixels |
{% if has_audio -%}
| sound | path, `{"array", "sampling_rate"}` or decoder; made {{ rate }} Hz mono; {{ seconds }} s |
{% endif -%}
| mix | a dict of these: `{"image": …, "text": …}` |

Without a prompt you get the general vector. A prompt puts a task's prefix in front and steers it: \
{% for task in prompts %}`{{ task }}`{{ ", " if not loop.last }}{% endfor %} (`prompt_name="ocr"`, or `task="ocr"`).

- Use one prompt for what you compare, and measure on your own data: a cosine has no meaning outside this model.
- It embeds, it does not generate. It learned the biases of its backbones and of its training pairs.
- It is made for Vietnamese, English and Chinese; other languages were not measured.

## Training

{% if training -%}
{% if training.continued_from %}Trained further from [{{ training.continued_from }}]\
(https://huggingface.co/{{ training.continued_from }}). {% endif -%}
{% if steps %}{{ steps }} steps, {{ "%.2f" | format(epochs) }} epochs{% if runtime %}, \
{{ "%.0f" | format(runtime) }} s{% endif %}. {% endif %}One mixed batch of all tasks; each row's task selects its loss.

| setting | value |
|---|---|
{% for key, value in training.settings.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
| data | rows | visits per epoch | tasks |
|---|---|---|---|
{% for source in training.train_data -%}
| {{ source.name }} | {{ source.rows }} | {{ source.weight }} | \
{% for task, rows in (source.tasks or source.data_types).items() -%}
{{ task }} {{ rows }}{{ ", " if not loop.last }}{% endfor %} |
{% endfor %}
Hardware: {{ training.hardware }}. Software: \
{% for name, version in training.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.
{%- else -%}
The checkpoint does not tell how it was trained{% if steps %} (only that it took {{ steps }} steps){% endif %}.
{%- endif %}

## Results

{% if results -%}
Side b found by side a among the held-out pairs of each task{% if training.eval_data %} \
({% for source in training.eval_data %}{{ source.name }}, {{ source.rows }} rows{{ "; " if not loop.last }}\
{% endfor %}){% endif %}. Chance is the recall@1 of a random order.

| task | {{ metrics | join(" | ") }} | candidates | chance |
|---|{{ "---|" * (metrics | length + 2) }}
{% for task, values in results | dictsort -%}
| {{ task }} | {% for metric in metrics %}{{ "%.3f" | format(values[metric]) if metric in values }} | {% endfor -%}
{{ values.candidates }} | {{ "%.4f" | format(values.chance) }} |
{% endfor %}
{%- else -%}
This checkpoint was not evaluated on held-out pairs.
{%- endif %}

## Licence

Apache-2.0, the weights and the code. The backbones have their own licences.
"""
