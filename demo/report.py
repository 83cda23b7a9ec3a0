"""The demo's judge: loads the saved repository as a user would, measures it on held-out scenes and draws a page.

    python -m vipolyqwen.demo.report OUTPUT_DIR

Reads corpus, model and the logs of all training stages in OUTPUT_DIR; writes metrics.json and report.html there.
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import soundfile
import torch
from markupsafe import Markup
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from ..data.collator import interleave
from ..evaluation.figures import STYLE, show, views
from ..evaluation.metrics import pair_retrieval, six_directions
from ..evaluation.pooling_weights import inspect_pooling
from ..evaluation.search import Side

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
            style=STYLE,
            attention=pooling_views(model, processor, scenes[0], corpus),
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
        pairs = [row for row in rows if row["task"] == task and row["score"] in (None, 1.0)]
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
    images = [Image.open(corpus / path).convert("RGB") for path in row["images"]]
    return [{"role": "user", "content": interleave(row["a"], images, "<image>")}]


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
                        {"html": show_scene(scenes[i], found, corpus), "score": score, "right": i == query}
                        for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                    ]
                    results.append({"modality": found, "hits": hits})
            searches.append({"modality": asked, "html": show_scene(scenes[query], asked, corpus), "results": results})
    return searches


def evenly(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    return [total * (2 * number + 1) // (2 * count) for number in range(count)]


def show_scene(scene: dict[str, Any], modality: str, corpus: Path) -> Markup:
    """A scene in one modality as HTML that carries its own picture or sound."""
    if modality == "text":
        return show(Side(scene["text"]))
    path = str(corpus / scene[modality])
    side = Side(images=(path,)) if modality == "image" else Side(audio=path)
    return show(side, width=84) + Markup("<small>{}</small>").format(scene["scene"])


def pooling_views(model: Any, processor: Any, scene: dict[str, Any], corpus: Path) -> list[tuple[str, Markup]]:
    """What the pooling attends to in one scene's text, picture and sound, as captions and figures."""
    picture, speech = str(corpus / scene["image"]), str(corpus / scene["audio"])
    sides = [Side(scene["text"]), Side(images=(picture,)), Side(audio=speech)]
    return [view for side in sides for view in views(inspect_pooling(model, processor, side), side)]


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>viPolyQwen demo</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
{{ style }}
table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}
.curves,.searches{display:flex;flex-wrap:wrap;gap:1em}.curve{width:310px}.bar{background:rgb(var(--heat));height:.6em}
.search{border:1px solid var(--line);border-radius:6px;padding:.7em;width:100%}
.hits{display:flex;gap:1em;margin:.4em 0}
.hit{border:2px solid var(--line);border-radius:4px;padding:.3em;min-width:90px;max-width:260px}
.right{border-color:var(--good)}
.hit .side audio{width:170px}small{color:var(--soft)}
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
<div class="searches">{% for s in searches %}<div class="search"><b>{{ s.modality }}:</b> {{ s.html }}
{% for r in s.results %}<div class="hits"><b style="width:3em">{{ r.modality }}</b>
{% for h in r.hits %}
<div class="hit{{ " right" if h.right }}">{{ h.html }} <small>{{ "%.2f" % h.score }}</small></div>
{% endfor %}</div>
{% endfor %}</div>{% endfor %}</div>
<h2>What the pooling attends to</h2>
<p>α is the weight of a position in the pooling; over all positions of a figure with its special tokens it sums to 1.
The stronger the colour, the larger α, against the largest of the figure.</p>
{% for caption, figure in attention %}<p><small>{{ caption }}</small></p>{{ figure }}{% endfor %}
</html>
"""

if __name__ == "__main__":
    main()
