"""One page that looks inside a model: what its pooling attends to, what lies near an input, where a task fails.

    python evaluate_vipolyqwen.py MODEL --explain INPUT… [--corpus PAIRS] [--failures PAIRS] [--out PAGE.html]

The page needs no other file and no network.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from sentence_transformers import SentenceTransformer

from ..media_vipolyqwen import check_is_text
from .figures import STYLE, show, views
from .metrics import query_ranks
from .pooling_weights import Attention, look_inside
from .search import Search, Side, embed, read_pairs, read_sides, searches

AUDIO_ENDINGS = (".mp3", ".wav", ".ogg", ".flac", ".aac")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
KEYS = ("text", "image", "audio", "task")
NEIGHBOURS = 4  # of each kind
FAILURES = 8  # of each task
FOUND = 3  # shown in place of a right answer


@dataclass(frozen=True)
class Input:
    """What to look into: one input, and the task whose prefix stands before it."""

    side: Side
    task: str | None = None


def read_input(given: str) -> Input:
    """An input of the command line: a text, the path of a picture or a sound, or JSON of several.

    Raises:
        ValueError: it looks like a path and is none, or like JSON and is not what this can read.
    """
    if given.lstrip().startswith("{"):
        return _read_json(given)
    check_is_text(given)  # the path of no file, or of one that is no picture or sound by its ending, is an error
    ending = os.path.splitext(given)[1].lower()
    if os.path.isfile(given) and ending in AUDIO_ENDINGS:
        return Input(Side(audio=given))
    if os.path.isfile(given) and ending in PICTURE_ENDINGS:
        return Input(Side(images=(given,)))
    if not given.strip() or os.path.isfile(given):
        raise ValueError(
            f"{given!r} is neither a text nor a picture or a sound; pass a text, a path that ends in "
            f'{", ".join((*PICTURE_ENDINGS, *AUDIO_ENDINGS))}, or JSON such as \'{{"image": "PATH"}}\'.'
        )
    return Input(Side(given))


def _read_json(given: str) -> Input:
    try:
        values = json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{given!r} begins as JSON but is none: {error}. Write it like {{"image": "PATH", "text": "…"}}.'
        ) from error
    unknown = [key for key in values if key not in KEYS]
    if unknown or not set(values) - {"task"}:
        raise ValueError(f"{given!r} has the keys {', '.join(values)}; an input has some of {', '.join(KEYS)}.")
    images = values.get("image", [])
    images = tuple(images) if isinstance(images, list) else (images,)
    if not all(isinstance(value, str) for value in (*images, *(values[key] for key in values if key != "image"))):
        raise ValueError(f"{given!r}: texts and paths are strings; only `image` may be a list, of paths.")
    for path in (*images, *([values["audio"]] if "audio" in values else [])):
        if not os.path.isfile(path):
            raise ValueError(f"{given!r}: there is no file {path!r}; correct the path.")
    text, placeholder = values.get("text", ""), "<image>"
    while placeholder in text:  # the text may say anything; only the order of the keys places images
        placeholder = f"<{placeholder}>"
    if [key for key in values if key in ("text", "image")] == ["text", "image"]:  # as sentence-transformers orders it
        text += placeholder * len(images)
    return Input(Side(text, images, values.get("audio"), placeholder), values.get("task"))


def explain(
    embedder: SentenceTransformer, name: str, inputs: Sequence[Input], corpus: Path | None, failures: Path | None
) -> str:
    """The page.

    Args:
        embedder: a viPolyQwen model as sentence-transformers loads it.
        name: what the page calls it.
        inputs: what to look into.
        corpus: a file of pairs or a recipe, among whose sides to look for neighbours.
        failures: a file of pairs or a recipe, whose searches to judge.
    """
    model, processor = embedder[0].auto_model, embedder[0].processor
    if model.config.model_type != "vipolyqwen":
        raise ValueError(
            f"{name} is a {model.config.model_type}; only a viPolyQwen model has pooling weights to show."
        )
    neighbours = Neighbours(embedder, corpus) if corpus and inputs else None
    shown = []
    for item in inputs:
        attention = look_inside(model, processor, item.side, item.task)
        shown.append(_section(item, attention, neighbours))
    tables = []
    if failures is not None:
        pairs, min_score = read_pairs(failures)
        tables = [worst(embedder, search) for search in searches(pairs, min_score)]
    return (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            style=STYLE,
            name=name,
            config=model.config,
            inputs=shown,
            corpus=corpus,
            failures=failures,
            tables=tables,
        )
    )


def _section(item: Input, attention: Attention, neighbours: "Neighbours | None") -> dict[str, Any]:
    return {
        "kind": item.side.kind,
        "task": item.task,
        "figures": views(attention, item.side),
        "shares": attention.shares(),
        "player": show(Side(audio=item.side.audio)) if item.side.audio is not None else None,
        "fused": bool(attention.pieces) and attention.sound is not None,
        "neighbours": neighbours.of(attention.vector) if neighbours else {},
    }


class Neighbours:
    """The distinct sides of a corpus and their vectors, by kind: the nearest of all would often be of one kind only.

    Args:
        embedder: the model.
        path: a file of pairs or a recipe.
    """

    def __init__(self, embedder: SentenceTransformer, path: Path) -> None:
        pairs, _ = read_pairs(path)
        distinct: dict[int, tuple[Side, str]] = {}
        for _, a, b in read_sides(pairs):
            distinct.setdefault(a.key(), (a, "" if a.kind == "text" else b.text))
            distinct.setdefault(b.key(), (b, ""))
        self.sides: dict[str, list[tuple[Side, str]]] = {}  # with the text that goes with a picture or a sound
        for side, partner in distinct.values():
            self.sides.setdefault(side.kind, []).append((side, partner))
        self.vectors = {kind: embed(embedder, [side for side, _ in sides]) for kind, sides in self.sides.items()}

    def of(self, vector: torch.Tensor) -> dict[str, list[tuple[float, Markup, str]]]:
        """{`text, of 12`: cosine, what it is and its partner, of the nearest}."""
        found = {}
        for kind, sides in self.sides.items():
            top = (self.vectors[kind] @ vector).topk(min(NEIGHBOURS, len(sides)))
            hits = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found[f"{kind}, of {len(sides)}"] = [(cosine, show(sides[i][0]), sides[i][1]) for cosine, i in hits]
        return found


def worst(embedder: SentenceTransformer, search: Search) -> dict[str, Any]:
    """The queries of one search whose right answer stands furthest down, the worst first."""
    queries, candidates = search.embed_queries(embedder), search.embed_candidates(embedder)
    ranks = query_ranks(queries, candidates, search.relevant)
    order = [place for place in ranks.argsort(descending=True, stable=True).tolist() if ranks[place] > 1]
    rows = []
    for place in order[:FAILURES]:
        cosines = candidates @ queries[place]
        right = max(search.relevant[place], key=lambda candidate: cosines[candidate].item())
        found = [i for i in cosines.argsort(descending=True).tolist() if i not in search.relevant[place]][:FOUND]
        rows.append(
            {
                "rank": int(ranks[place]),
                "query": show(search.queries[place]),
                "right": (cosines[right].item(), show(search.candidates[right])),
                "found": [(cosines[i].item(), show(search.candidates[i])) for i in found],
            }
        )
    counts = {"queries": len(queries), "candidates": len(candidates), "missed": len(order)}
    return {"task": search.task, "rows": rows, **counts}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>Inside {{ name }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
{{ style }}
h2{border-top:1px solid var(--line);padding-top:.8em;margin-top:1.6em}h3{margin:1.1em 0 .3em}
small,figcaption,.soft{color:var(--soft)}figure{margin:.6em 0 1.2em}figcaption{font-size:.87em;margin-bottom:.3em}
.scale{display:inline-block;width:180px;height:.8em;vertical-align:middle;border:1px solid var(--line);
background:linear-gradient(90deg,transparent,rgb(var(--heat)/var(--most)))}
.share{display:grid;grid-template-columns:9em 4em 1fr;gap:.2em .8em;align-items:center;max-width:560px}
.bar{background:rgb(var(--heat)/var(--most));height:.75em;border-radius:2px}.number{text-align:right}
.hits{display:grid;grid-template-columns:repeat(auto-fill,minmax(235px,1fr));gap:.7em;margin:.3em 0 .8em}
.hit{border:1px solid var(--line);border-radius:5px;padding:.45em .6em;overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th{text-align:left}td,th{padding:.5em .7em;border-bottom:1px solid var(--line);vertical-align:top}
td.right{border-left:3px solid var(--good)}td .side{max-width:260px}
</style></head><body>
<h1>Inside {{ name }}</h1>
{% if inputs %}
<h2>How to read the figures</h2>
<p><b>α</b> is the weight of a position in the pooling: a route's vector is the projection of Σ αᵢ·hᵢ, the weighted
mean of the last hidden states hᵢ ({{ config.pooling }} pooling). Over all positions of a route α is never negative and
<b>sums to 1</b>: over text, image patches and
<span class="tokens"><span class="special" style="--a:0">special tokens</span></span> (prefix, borders of an image,
end) on the text route; over frames on the audio route.
{% if config.audio_config %}An input with text and sound has both routes; {% if config.audio_fusion == "mean" %}its
vector is the normalised mean of the two.{% else %}its vector is that of the audio route.{% endif %}{% endif %}</p>
<p><span class="scale"></span> &nbsp;0 … the largest α of the same figure. Colours do not compare between figures; the
numbers do (hold the pointer over a token or a frame).</p>
<p class="soft">α says where the last layer is read. The states there have already looked at one another: weight on an
end token is not weight on nothing.</p>
{% endif %}
{% for item in inputs %}
<h2>Input {{ loop.index }}: {{ item.kind }}{% if item.task %}, task {{ item.task }}{% endif %}</h2>
<h3>What the pooling attends to</h3>
{% if item.shares | length > 1 %}<div class="share">{% for name, share in item.shares.items() %}
<span>{{ name }}</span><span class="number">{{ "%.3f" % share }}</span>
<span class="bar" style="width:{{ "%.1f" % (100 * share) }}%"></span>{% endfor %}</div>{% endif %}
{% for caption, figure in item.figures %}<figure><figcaption>{{ caption }}</figcaption>{{ figure }}</figure>
{% endfor %}
{% if item.player %}{{ item.player }}{% endif %}
{% if item.fused %}<p>Both routes of this input, fused by “{{ config.audio_fusion }}”.</p>{% endif %}
{% if corpus %}<h3>Nearest neighbours in {{ corpus }}</h3>
{% for kind, hits in item.neighbours.items() %}<p class="soft">{{ kind }}</p>
<div class="hits">{% for cosine, hit, partner in hits %}<div class="hit"><small>cosine {{ "%.3f" % cosine }}</small>
{{ hit }}{% if partner %}<small>goes with: {{ partner }}</small>{% endif %}</div>
{% endfor %}</div>{% endfor %}{% endif %}
{% endfor %}
{% for table in tables %}
<h2>Worst failures: {{ table.task }}</h2>
<p>{{ failures }}: {{ table.missed }} of {{ table.queries }} queries do not find their answer first among
{{ table.candidates }} candidates.{% if table.rows %} The {{ table.rows | length }} worst, with cosines:{% endif %}</p>
{% if table.rows %}<div class="scroll"><table><tr><th>rank<th>query<th>right answer<th>found instead</tr>
{% for row in table.rows %}<tr><td>{{ row.rank }}<td>{{ row.query }}
<td class="right"><small>{{ "%.3f" % row.right[0] }}</small>{{ row.right[1] }}
<td>{% for cosine, hit in row.found %}<small>{{ "%.3f" % cosine }}</small>{{ hit }}{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% endfor %}
</body></html>
"""
