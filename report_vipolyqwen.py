"""The demo's judge: loads the saved repository as a user would, measures it on held-out scenes and draws a page.

    python -m vipolyqwen.report_vipolyqwen OUTPUT_DIR

Reads corpus, model and the logs of all training stages in OUTPUT_DIR; writes metrics.json and report.html there.
"""

import argparse
import base64
import hashlib
import json
import re
from collections import defaultdict
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from vipolyqwen.metrics_vipolyqwen import pair_retrieval, six_directions

MODALITIES = ("text", "image", "audio")
TASKS = ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio")
STAGES = ("text", "warmup", "run")  # folders of the training stages, in order
METRICS = ("recall@1", "recall@10", "candidates", "chance")
EXAMPLES = 3  # searches shown for each kind of query
HITS = 3  # results shown for each search


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of the demo")
    folder = parser.parse_args().folder
    judge(folder)


def judge(folder: Path) -> None:
    """Writes metrics.json and report.html of the demo in `folder`."""
    corpus, repository = folder / "corpus", str(folder / "model")
    embedder = SentenceTransformer(repository, trust_remote_code=True)
    model = AutoModel.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    scenes = read_rows(corpus / "trimodal.jsonl")
    inputs = {
        "text": [row["text"] for row in scenes],
        "image": [Image.open(corpus / row["image"]).convert("RGB") for row in scenes],
        "audio": [sound(corpus / row["audio"]) for row in scenes],
    }
    vectors = {name: embedder.encode(values, convert_to_tensor=True).cpu() for name, values in inputs.items()}
    check_same_vectors(model, processor, inputs, vectors)
    directions = six_directions(vectors)
    tasks = task_metrics(embedder, read_rows(corpus / "eval.jsonl"), corpus)
    metrics = {
        "directions": {name: {key: values[key] for key in METRICS} for name, values in directions.items()},
        "tasks": {name: {key: values[key] for key in METRICS} for name, values in tasks.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            metrics=metrics,
            curves=loss_curves([folder / stage / "trainer_state.json" for stage in STAGES]),
            searches=example_searches(scenes, vectors, corpus),
            attention=attention_views(model, processor, scenes[0], corpus),
        )
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sound(path: Path) -> dict[str, Any]:
    """A sound as sentence-transformers takes it."""
    samples, rate = soundfile.read(path, dtype="float32")
    return {"array": samples, "sampling_rate": rate}


@torch.no_grad()
def check_same_vectors(model: Any, processor: Any, inputs: dict[str, list], vectors: dict[str, torch.Tensor]) -> None:
    """Both ways of loading must give the same vectors."""
    names = {"text": "text", "image": "images", "audio": "audio"}
    for name, values in inputs.items():
        batch = processor(**{names[name]: values[:8]}, return_tensors="pt")
        difference = (model(**batch).embeddings - vectors[name][:8]).abs().max().item()
        if difference > 1e-5:
            raise RuntimeError(
                f"AutoModel and SentenceTransformer differ by {difference} on {name}; the limit is 1e-5."
            )


def task_metrics(embedder: SentenceTransformer, rows: list[dict], corpus: Path) -> dict[str, dict[str, float]]:
    """Retrieval of side b by side a with the task's prompt, for each task's held-out pairs that belong together."""
    metrics = {}
    for task in TASKS:
        pairs = [row for row in rows if row["data_type"] == task and row["score"] in (None, 1.0)]
        sides_a = [side_a(row, corpus) for row in pairs]
        a = embedder.encode(sides_a, prompt_name=task, convert_to_tensor=True).cpu()
        b = embedder.encode([row["b"] for row in pairs], convert_to_tensor=True).cpu()
        a_keys = [key_of(row["a"], *row["images"], row["audio"]) for row in pairs]
        b_keys = [key_of(row["b"]) for row in pairs]
        metrics[task] = pair_retrieval(a, b, torch.tensor(a_keys), torch.tensor(b_keys))
    return metrics


def side_a(row: dict[str, Any], corpus: Path) -> str | dict[str, Any] | list[dict[str, Any]]:
    """Side a as sentence-transformers takes it: a text, a sound, or a message with images at their places."""
    if row["audio"]:
        return sound(corpus / row["audio"])
    if not row["images"]:
        return row["a"]
    images = [{"type": "image", "image": Image.open(corpus / path).convert("RGB")} for path in row["images"]]
    pieces = [{"type": "text", "text": piece} for piece in row["a"].split("<image>")]
    if len(pieces) == 1:
        content = [*images, *pieces]
    else:
        content = [part for pair in zip(pieces, [*images, None], strict=True) for part in pair if part is not None]
    return [{"role": "user", "content": content}]


def key_of(*content: str | None) -> int:
    """A number that stands for some content."""
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), signed=True)


def loss_curves(stages: list[Path], width: int = 300, height: int = 90) -> list[dict[str, Any]]:
    """The loss of each task over the steps of all stages as points of an SVG line."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    before = 0
    for stage in stages:
        state = json.loads(stage.read_text(encoding="utf-8"))
        for entry in state["log_history"]:
            for name, value in entry.items():
                if re.fullmatch(r"loss(/\w+)?", name):
                    series[name.removeprefix("loss/")].append((before + entry["step"], value))
        before += state["global_step"]
    curves = []
    for name, points in sorted(series.items()):
        top, last = max(value for _, value in points), points[-1][0]
        line = " ".join(f"{width * x / last:.1f},{height * (1 - y / top):.1f}" for x, y in points)
        curves.append({"name": name, "line": line, "top": top, "end": points[-1][1], "steps": last})
    return curves


def example_searches(scenes: list[dict], vectors: dict[str, torch.Tensor], corpus: Path) -> list[dict[str, Any]]:
    """A few queries of each modality and their nearest scenes in the two others."""
    searches = []
    for asked in MODALITIES:
        for query in evenly(len(scenes), EXAMPLES):
            results = []
            for found in MODALITIES:
                if found != asked:
                    similarity = vectors[found] @ vectors[asked][query]
                    top = similarity.topk(HITS)
                    hits = [
                        {"html": show(scenes[i], found, corpus), "score": score, "right": i == query}
                        for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    ]
                    results.append({"modality": found, "hits": hits})
            searches.append({"modality": asked, "html": show(scenes[query], asked, corpus), "results": results})
    return searches


def evenly(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    return [total * (2 * number + 1) // (2 * count) for number in range(count)]


def show(scene: dict[str, Any], modality: str, corpus: Path) -> str:
    """A scene in one modality as HTML that carries its own picture or sound."""
    if modality == "text":
        return f"<span>{escape(scene['text'])}</span>"
    content = base64.b64encode((corpus / scene[modality]).read_bytes()).decode()
    if modality == "image":
        return f'<img width="84" alt="{escape(scene["scene"])}" src="data:image/png;base64,{content}">'
    return f'<audio controls src="data:audio/flac;base64,{content}"></audio><small>{escape(scene["scene"])}</small>'


@torch.no_grad()
def attention_views(model: Any, processor: Any, scene: dict[str, Any], corpus: Path) -> dict[str, str]:
    """What the pooling attends to in one scene's text, picture and sound, as HTML."""
    text = processor(text=scene["text"], return_tensors="pt")
    weights = model(**text, output_pooling_weights=True).pooling_weights[0]
    tokens = [processor.tokenizer.decode([token]) for token in text["input_ids"][0].tolist()]
    image = Image.open(corpus / scene["image"]).convert("RGB")
    picture = processor(images=image, return_tensors="pt")
    picture_weights = model(**picture, output_pooling_weights=True).pooling_weights[0]
    slots = picture["input_ids"][0] == processor.image_token_id
    grid = (picture["image_grid_thw"][0, 1:] // processor.image_processor.merge_size).tolist()
    samples = sound(corpus / scene["audio"])
    frames = model(**processor(audio=samples, return_tensors="pt"), output_pooling_weights=True).audio_pooling_weights
    return {
        "text": shaded_tokens(tokens, weights),
        "image": heat_map(image, picture_weights[slots].reshape(grid)),
        "audio": shaded_waveform(samples["array"], frames[0]),
    }


def shaded_tokens(tokens: list[str], weights: torch.Tensor) -> str:
    """Tokens on a ground as strong as their weight."""
    strength = (weights / weights.max()).tolist()
    return "".join(
        f'<span style="background:rgba(217,72,15,{alpha:.2f})" title="{weight:.3f}">{escape(token)}</span>'
        for token, alpha, weight in zip(tokens, strength, weights.tolist(), strict=True)
    )


def heat_map(image: Image.Image, weights: torch.Tensor) -> str:
    """The image beside itself under a red veil, thinner where the weight is high."""
    strength = (weights / weights.max()).numpy()
    alpha = Image.fromarray((255 * strength).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    veiled = Image.composite(image, Image.blend(image, Image.new("RGB", image.size, (30, 0, 60)), 0.8), alpha)
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(image, (0, 0))
    both.paste(veiled, (image.width, 0))
    encoded = BytesIO()
    both.save(encoded, "PNG")
    return f'<img width="336" src="data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}">'


def shaded_waveform(samples: np.ndarray, weights: torch.Tensor, width: int = 600, height: int = 90) -> str:
    """The waveform as SVG on a ground as strong as each frame's weight."""
    strength = (weights / weights.max()).tolist()
    step = width / len(strength)
    frames = "".join(
        f'<rect x="{step * i:.1f}" width="{step:.2f}" height="{height}" fill="rgba(217,72,15,{alpha:.2f})"/>'
        for i, alpha in enumerate(strength)
    )
    peaks = [np.abs(part).max() for part in np.array_split(samples, width)]
    scale = height / 2 / max(peaks)
    bars = "".join(f"M{x} {height / 2 - p * scale:.1f}V{height / 2 + p * scale:.1f}" for x, p in enumerate(peaks))
    return f'<svg width="{width}" height="{height}">{frames}<path d="{bars}" stroke="#333"/></svg>'


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>viPolyQwen demo</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
.curves,.searches{display:flex;flex-wrap:wrap;gap:1em}.curve{width:310px}.bar{background:#d9480f;height:.6em}
.search{border:1px solid #ddd;border-radius:6px;padding:.7em;width:100%}.hits{display:flex;gap:1em;margin:.4em 0}
.hit{border:2px solid #ddd;border-radius:4px;padding:.3em;min-width:90px;max-width:260px}.right{border-color:#2b8a3e}
audio{width:170px;height:30px;display:block}small{color:#777}
</style>
<h1>viPolyQwen demo</h1>
<p>A tiny model of the real classes, trained here on scenes that are described, drawn, written and spoken in
Vietnamese, English and Chinese. Everything below is measured on scenes that no training row knows, with the saved
repository loaded by a fresh process.</p>
<h2>Search across modalities</h2>
<table><tr><th>direction<th>recall@1<th><th>recall@10<th>candidates<th>chance</tr>
{% for group in ("directions", "tasks") %}
{% if group == "tasks" %}<tr><th>task<th>recall@1<th><th>recall@10<th>candidates<th>chance</tr>{% endif %}
{% for name, m in metrics[group].items() %}
<tr><td>{{ name }}<td>{{ "%.3f" % m["recall@1"] }}
<td style="width:160px"><div class="bar" style="width:{{ (150 * m["recall@1"]) | int }}px"></div>
<td>{{ "%.3f" % m["recall@10"] }}<td>{{ m["candidates"] }}<td>{{ "%.4f" % m["chance"] }}</tr>
{% endfor %}{% endfor %}</table>
<h2>Loss of each task</h2>
<p>InfoNCE alone first, on text and then on everything; at the end the mixed losses, whose further terms are why the
lines rise there.</p>
<div class="curves">{% for c in curves %}<div class="curve"><b>{{ c.name }}</b>
<small>0 … {{ "%.2f" % c.top }}, {{ c.steps }} steps, ends at {{ "%.2f" % c.end }}</small>
<svg width="300" height="92"><polyline points="{{ c.line }}" fill="none" stroke="#1864ab" stroke-width="2"/></svg>
</div>{% endfor %}</div>
<h2>Example searches</h2><p>A green frame is the scene that was asked for.</p>
<div class="searches">{% for s in searches %}<div class="search"><b>{{ s.modality }}:</b> {{ s.html | safe }}
{% for r in s.results %}<div class="hits"><b style="width:3em">{{ r.modality }}</b>
{% for h in r.hits %}
<div class="hit{{ " right" if h.right }}">{{ h.html | safe }} <small>{{ "%.2f" % h.score }}</small></div>
{% endfor %}</div>
{% endfor %}</div>{% endfor %}</div>
<h2>What the pooling attends to</h2>
<p>{{ attention.text | safe }}</p><p>{{ attention.image | safe }}</p><p>{{ attention.audio | safe }}</p>
</html>
"""

if __name__ == "__main__":
    main()
