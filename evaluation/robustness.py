"""Measures how much retrieval degrades when Vietnamese queries are spelled as people really type them.

    python evaluate_vipolyqwen.py MODEL --robustness [PAIRS.jsonl or RECIPE.yaml] [--out FOLDER]

Searches with every query as written and under each rule of `vietnamese.py`; candidates keep their spelling. Writes
robustness.json and robustness.md.
"""

import json
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from sentence_transformers import SentenceTransformer

from ..data.vietnamese import RULES, is_vietnamese, switch_code, switched_share
from .memory import peak_memory
from .metrics import query_ranks
from .search import Search, read_pairs, searches
from .templates import ENVIRONMENT

METRICS = ("recall@1", "recall@10", "mrr")
CONFIDENCE = 0.95


def robustness(embedder: SentenceTransformer, path: Path) -> dict[str, Any]:
    """Measures every task with Vietnamese queries.

    Args:
        embedder: any model of sentence-transformers that supports the modalities of the pairs.
        path: a file of pairs, or a recipe with `eval_data` and optionally `nce_min_score`.

    Returns:
        Settings, speed and memory, and for each search and spelling the metrics with their drop against the queries
        as written: the mean of the paired differences, with an interval by bootstrap of the queries.

    Raises:
        ValueError: no query is Vietnamese.
    """
    pairs, min_score = read_pairs(path)
    started = time.perf_counter()
    results, rows = [], 0
    for search in searches(pairs, min_score, text_asks=True):
        kept = [place for place, query in enumerate(search.queries) if is_vietnamese(query.text)]
        if kept:
            queries, relevant = [search.queries[i] for i in kept], [search.relevant[i] for i in kept]
            result, embedded = _measure(embedder, replace(search, queries=queries, relevant=relevant))
            results.append(result)
            rows += embedded
    if not results:
        raise ValueError(
            f"{path}: none of the {len(pairs)} pairs has a query with a Vietnamese letter; pass Vietnamese pairs."
        )
    seconds = time.perf_counter() - started
    return {
        "pairs": str(path),
        "min_score": min_score,
        "searches": results,
        "rows_per_second": round(rows / seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "device": str(embedder.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }


def _measure(embedder: SentenceTransformer, search: Search) -> tuple[dict[str, Any], int]:
    """Returns the result of one search, and the number of embedded rows."""
    candidates = search.embed_candidates(embedder)
    written = search.embed_queries(embedder)
    clean = query_ranks(written, candidates, search.relevant)
    spellings = {"as written": {metric: {"value": values.mean()} for metric, values in per_query(clean).items()}}
    rows = len(candidates) + len(written)
    texts = [query.text for query in search.queries]
    for name, rule in RULES.items():
        typed = [rule(text) for text in texts]
        changed = [place for place, text in enumerate(texts) if typed[place] != text]
        vectors = written.clone()
        if changed:
            sides = [replace(search.queries[place], text=typed[place]) for place in changed]
            vectors[changed] = search.embed_queries(embedder, sides)
        rows += len(changed)
        ranks = query_ranks(vectors, candidates, search.relevant)
        spellings[name] = {"changed": len(changed) / len(texts), **drops(clean, ranks)}
        if rule is switch_code:
            spellings[name]["switched_words"] = switched_share(texts)
    counts = {"task": search.task, "queries": len(texts), "candidates": len(candidates)}
    chance = sum(map(len, search.relevant)) / len(texts) / len(candidates)
    kinds = {"searched": sorted({side.kind for side in search.candidates})}
    return {**counts, "chance": chance, **kinds, "spellings": spellings}, rows


def per_query(ranks: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns {metric: (Q,) float64 value of each query}, from (Q,) float64 ranks."""
    ranks = ranks.numpy()
    return {"recall@1": (ranks <= 1) * 1.0, "recall@10": (ranks <= 10) * 1.0, "mrr": 1 / ranks}


def drops(clean: torch.Tensor, ranks: torch.Tensor) -> dict[str, dict[str, float]]:
    """Returns each metric under a spelling: value, drop against clean queries, and the drop's 95 % interval.

    Args:
        clean: (Q,) float64 rank of each query as written.
        ranks: (Q,) float64 rank of each query under the spelling.
    """
    result = {}
    before, after = per_query(clean), per_query(ranks)
    for metric in METRICS:
        lost = before[metric] - after[metric]
        low, high = interval(lost)
        result[metric] = {"value": after[metric].mean(), "drop": lost.mean(), "low": low, "high": high}
    return result


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of (Q,) paired differences: percentiles over 9999 resamples of queries."""
    if len(differences) < 2:
        return float("nan"), float("nan")
    found = bootstrap(
        (differences,), np.mean, batch=256, method="percentile", confidence_level=CONFIDENCE, rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def write_result(result: dict[str, Any], folder: Path, command: str) -> None:
    """Writes robustness.json and robustness.md, and prints the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"command": command, **result}
    (folder / "robustness.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    page = markdown(result)
    (folder / "robustness.md").write_text(page, encoding="utf-8")
    print(page)


def markdown(result: dict[str, Any]) -> str:
    """Renders the result as tables, one for each search."""
    header = ["spelling", "queries changed", *(column for metric in METRICS for column in (metric, "drop"))]
    tables = [
        search | {"lines": [_line(name, values) for name, values in search["spellings"].items()]}
        for search in result["searches"]
    ]
    template = ENVIRONMENT.get_template("robustness.md.jinja")
    return template.render(result | {"searches": tables, "header": header})


def _line(name: str, values: dict[str, Any]) -> list[str]:
    cells = [name, f"{values['changed']:.0%}" if "changed" in values else "–"]
    for metric in METRICS:
        shown = values[metric]
        drop = "{drop:.3f} [{low:.3f}, {high:.3f}]".format(**shown) if values.get("changed") else "–"
        cells += [f"{shown['value']:.3f}", drop.replace("-0.000", "0.000")]
    return cells
