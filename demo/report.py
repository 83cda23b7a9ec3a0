"""Judges the demo: loads the saved repository as a user would, measures it on held-out scenes and draws a page.

    python -m vipolyqwen.demo.report OUTPUT_DIR

Reads corpus, model and the logs of all training stages in OUTPUT_DIR; writes metrics.json and report.html there.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor

from ..data.sides import Side, embed, prompt_name
from ..evaluation.charts import Points, line_chart
from ..evaluation.figures import STYLE, show, views
from ..evaluation.metrics import pair_retrieval, six_directions
from ..evaluation.pooling_weights import inspect_pooling
from ..evaluation.search import read_pairs, read_sides
from .world import read_rows

STAGES = ("text", "warmup", "run")  # folders of the training stages, in order
METRICS = ("recall@1", "recall@10", "candidates", "chance")
EXAMPLES = 3  # searches shown for each kind of query
HITS = 3  # results shown for each search

Sides = dict[str, list[Side]]  # modality -> the scenes in it


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of the demo")
    judge(parser.parse_args().folder)


def judge(folder: Path) -> None:
    """Writes metrics.json and report.html of the demo in `folder`."""
    corpus, repository = folder / "corpus", str(folder / "model")
    embedder = SentenceTransformer(repository, trust_remote_code=True)
    scenes = read_rows(corpus / "trimodal.jsonl")
    sides = scene_sides(scenes, corpus)
    vectors = {modality: embed(embedder, values) for modality, values in sides.items()}
    measured = {"directions": six_directions(vectors), "tasks": task_metrics(embedder, corpus / "eval.jsonl")}
    metrics = {
        group: {name: {key: values[key] for key in METRICS} for name, values in rows.items()}
        for group, rows in measured.items()
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    losses = loss_series([folder / stage / "trainer_state.json" for stage in STAGES])
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("report.html.jinja").render(
        metrics=metrics,
        charts=[Markup(line_chart({name: line}, width=260, height=90)) for name, line in losses.items()],
        searches=example_searches(sides, [row["scene"] for row in scenes], vectors),
        style=STYLE,
        attention=pooling_views(repository, sides),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def scene_sides(scenes: list[dict[str, Any]], corpus: Path) -> Sides:
    """Returns the scenes as texts, images and audio, which stay in their files."""
    return {
        "text": [Side(row["text"]) for row in scenes],
        "image": [Side(images=(str(corpus / row["image"]),)) for row in scenes],
        "audio": [Side(audio=str(corpus / row["audio"])) for row in scenes],
    }


def task_metrics(embedder: SentenceTransformer, path: Path) -> dict[str, dict[str, float]]:
    """Measures retrieval of side b by side a, prompts as in training, among each task's pairs that belong together."""
    groups: dict[str, list[tuple[Side, Side]]] = defaultdict(list)
    for row, a, b in read_sides(read_pairs(path)[0]):
        if row.score in (None, 1.0):
            groups[row.task].append((a, b))
    metrics = {}
    for task, pairs in groups.items():
        a, b = zip(*pairs, strict=True)
        keys = (torch.tensor([side.key() for side in sides]) for sides in (a, b))
        vectors = (embed(embedder, of, prompt_name(embedder, task, side)) for side, of in (("a", a), ("b", b)))
        metrics[task] = pair_retrieval(*vectors, *keys)
    return metrics


def loss_series(stages: list[Path]) -> dict[str, Points]:
    """Returns name -> (step, loss) of each task and of all together, with the steps of the stages added up."""
    series: dict[str, Points] = defaultdict(list)
    before = 0
    for stage in stages:
        state = json.loads(stage.read_text(encoding="utf-8"))
        for entry in state["log_history"]:
            for name, value in entry.items():
                if re.fullmatch(r"loss(/\w+)?", name):
                    series[name.removeprefix("loss/")].append((before + entry["step"], value))
        before += state["global_step"]
    return dict(sorted(series.items()))


def example_searches(sides: Sides, codes: list[str], vectors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Searches a few queries of each modality among the scenes in the two others.

    Args:
        sides: the scenes in each modality.
        codes: name of each scene.
        vectors: (scenes, projection_dim) float32 unit vectors of each modality.
    """
    searches = []
    for asked in sides:
        for query in evenly(len(codes), EXAMPLES):
            results = []
            for found in (modality for modality in sides if modality != asked):
                top = (vectors[found] @ vectors[asked][query]).topk(HITS)
                hits = [
                    {"html": show_scene(sides[found][i], codes[i]), "score": score, "right": i == query}
                    for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
                ]
                results.append({"modality": found, "hits": hits})
            html = show_scene(sides[asked][query], codes[query])
            searches.append({"modality": asked, "html": html, "results": results})
    return searches


def evenly(total: int, count: int) -> list[int]:
    """Returns `count` numbers below `total`, evenly spread."""
    return [total * (2 * number + 1) // (2 * count) for number in range(count)]


def show_scene(side: Side, code: str) -> Markup:
    """Returns a scene in one modality as self-contained HTML; images and audio also show the scene's name."""
    if side.kind == "text":
        return show(side)
    return show(side, width=84) + Markup("<small>{}</small>").format(code)


def pooling_views(repository: str, sides: Sides) -> list[tuple[str, Markup]]:
    """Returns captions and figures of the pooling weights over the first scene's text, image and audio."""
    model = AutoModel.from_pretrained(repository, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    first = [values[0] for values in sides.values()]
    return [view for side in first for view in views(inspect_pooling(model, processor, side), side)]


if __name__ == "__main__":
    main()
