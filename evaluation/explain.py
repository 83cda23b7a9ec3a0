"""Writes one page about a model: pooling weights and nearest neighbours of inputs, worst failures of a task.

    python evaluate_vipolyqwen.py MODEL --explain INPUT… [--corpus PAIRS] [--failures PAIRS] [--out PAGE.html]

The page is self-contained: it needs no other file and no network.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from sentence_transformers import SentenceTransformer

from ..data.sides import Side, embed
from ..media_vipolyqwen import check_is_text
from .figures import STYLE, show, views
from .metrics import query_ranks
from .pooling_weights import PoolingWeights, inspect_pooling
from .search import Search, read_pairs, read_sides, searches
from .templates import ENVIRONMENT

AUDIO_ENDINGS = (".mp3", ".wav", ".ogg", ".flac", ".aac")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tiff", ".webp")
KEYS = ("text", "image", "audio", "task")
NEIGHBOURS = 4  # of each kind
FAILURES = 8  # of each task
FOUND = 3  # wrong candidates shown for each failure


@dataclass(frozen=True)
class Input:
    """One input to explain, and the task whose prefix precedes it."""

    side: Side
    task: str | None = None


def read_input(given: str) -> Input:
    """Parses an input of the command line: a text, the path of an image or audio file, or JSON of several.

    Raises:
        ValueError: the path does not exist or is neither an image nor audio, or the JSON is invalid.
    """
    if given.lstrip().startswith("{"):
        return _read_json(given)
    check_is_text(given)  # raises for a path without a file, or with an unknown extension
    ending = os.path.splitext(given)[1].lower()
    if os.path.isfile(given) and ending in AUDIO_ENDINGS:
        return Input(Side(audio=given))
    if os.path.isfile(given) and ending in IMAGE_ENDINGS:
        return Input(Side(images=(given,)))
    if not given.strip() or os.path.isfile(given):
        raise ValueError(
            f"{given!r} is neither a text nor an image or audio file; pass a text, a path that ends in "
            f'{", ".join((*IMAGE_ENDINGS, *AUDIO_ENDINGS))}, or JSON such as \'{{"image": "PATH"}}\'.'
        )
    return Input(Side(given))


def _read_json(given: str) -> Input:
    try:
        values = json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{given!r} begins like JSON but is invalid: {error}. Write it like {{"image": "PATH", "text": "…"}}.'
        ) from error
    unknown = [key for key in values if key not in KEYS]
    if unknown or not set(values) - {"task"}:
        raise ValueError(f"{given!r} has the keys {', '.join(values)}; use some of {', '.join(KEYS)}.")
    images = values.get("image", [])
    images = tuple(images) if isinstance(images, list) else (images,)
    if not all(isinstance(value, str) for value in (*images, *(values[key] for key in values if key != "image"))):
        raise ValueError(f"{given!r}: texts and paths are strings; only `image` may be a list, of paths.")
    for path in (*images, *([values["audio"]] if "audio" in values else [])):
        if not os.path.isfile(path):
            raise ValueError(f"{given!r}: no file {path!r} found; correct the path.")
    return Input(literal_side(values.get("text", ""), images, values.get("audio")), values.get("task"))


def literal_side(text: str, images: tuple[str, ...] = (), audio: str | None = None) -> Side:
    """Returns a side whose text places no image, whatever it says: images come first."""
    placeholder = "<image>"
    while placeholder in text:
        placeholder = f"<{placeholder}>"
    return Side(text, images, audio, placeholder)


def explain(
    embedder: SentenceTransformer, name: str, inputs: Sequence[Input], corpus: Path | None, failures: Path | None
) -> str:
    """Returns the page as HTML.

    Args:
        embedder: a viPolyQwen model as sentence-transformers loads it.
        name: the model's name on the page.
        inputs: the inputs to explain.
        corpus: a file of pairs or a recipe whose sides are searched for neighbours.
        failures: a file of pairs or a recipe whose searches are judged.

    Raises:
        ValueError: the model is not a viPolyQwen.
    """
    model, processor = embedder[0].auto_model, embedder[0].processor
    if model.config.model_type != "vipolyqwen":
        raise ValueError(
            f"{name} is a {model.config.model_type}; only a viPolyQwen model has pooling weights to show."
        )
    neighbours = Neighbours(embedder, corpus) if corpus and inputs else None
    shown = []
    for item in inputs:
        pooled = inspect_pooling(model, processor, item.side, item.task)
        shown.append(_section(item, pooled, neighbours))
    tables = []
    if failures is not None:
        pairs, min_score = read_pairs(failures)
        tables = [worst(embedder, search) for search in searches(pairs, min_score)]
    return ENVIRONMENT.get_template("explain.html.jinja").render(
        style=STYLE, name=name, config=model.config, inputs=shown, corpus=corpus, failures=failures, tables=tables
    )


def _section(item: Input, pooled: PoolingWeights, neighbours: "Neighbours | None") -> dict[str, Any]:
    return {
        "kind": item.side.kind,
        "task": item.task,
        "figures": views(pooled, item.side),
        "shares": pooled.shares(),
        "player": show(Side(audio=item.side.audio)) if item.side.audio is not None else None,
        "fused": bool(pooled.spans) and pooled.audio is not None,
        "neighbours": neighbours.of(pooled.vector) if neighbours else {},
    }


class Neighbours:
    """Finds the nearest sides of a corpus, separately for each kind: the overall nearest are often of one kind only.

    Args:
        embedder: the model.
        path: a file of pairs or a recipe.
    """

    def __init__(self, embedder: SentenceTransformer, path: Path) -> None:
        pairs, _ = read_pairs(path)
        distinct: dict[int, tuple[Side, str]] = {}
        for _, a, b in read_sides(pairs):
            distinct.setdefault(a.key(), (a, "" if a.kind == "text" else b.text))
            distinct.setdefault(b.key(), (b, "" if b.kind == "text" else a.text))
        self.sides: dict[str, list[tuple[Side, str]]] = {}  # with the text paired with an image or audio
        for side, partner in distinct.values():
            self.sides.setdefault(side.kind, []).append((side, partner))
        self.vectors = {kind: embed(embedder, [side for side, _ in sides]) for kind, sides in self.sides.items()}

    def of(self, vector: torch.Tensor) -> dict[str, list[tuple[float, Markup, str]]]:
        """Returns {`text, of 12`: (cosine, rendered side, paired text) of the nearest}."""
        found = {}
        for kind, sides in self.sides.items():
            top = (self.vectors[kind] @ vector).topk(min(NEIGHBOURS, len(sides)))
            hits = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found[f"{kind}, of {len(sides)}"] = [(cosine, show(sides[i][0]), sides[i][1]) for cosine, i in hits]
        return found


def worst(embedder: SentenceTransformer, search: Search) -> dict[str, Any]:
    """Returns the queries of one search whose right answer ranks lowest, the worst first."""
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
