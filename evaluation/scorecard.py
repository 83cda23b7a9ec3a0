"""Writes the results of tasks and models as summary.json and summary.md."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..data.markdown import code_span
from .templates import ENVIRONMENT

LIBRARIES = ("mteb", "sentence-transformers", "transformers", "torch")
RANK_METRICS = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "ndcg_at_10", "mean_rank")
PAGE_TYPES = ("DocumentUnderstanding", "Retrieval")  # of mteb
Row = dict[str, Any]


def write_scorecard(folder: Path, suite: str, rows: Mapping[str, list[Row]]) -> str:
    """Writes both files into `folder` and returns the page.

    Args:
        folder: the output folder.
        suite: name of the suite.
        rows: model -> one row per task, as `run_task` returns them; the first model comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {library: version(library) for library in LIBRARIES}
    content = {"suite": suite, "versions": versions, "models": rows}
    (folder / "summary.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = ENVIRONMENT.get_template("scorecard.md.jinja").render(
        suite=suite,
        versions=versions,
        models=list(rows),
        scores=_score_lines(rows),
        retrieval=_retrieval_lines(rows, RANK_METRICS),
        pages=_retrieval_lines(_pages(rows), RANK_METRICS[:2]),
        measures=_measure_lines(rows),
        unscored=_unscored_lines(rows),
    )
    (folder / "summary.md").write_text(page, encoding="utf-8")
    return page


def _done(row: Row) -> bool:
    return row["status"] in ("run", "cached")


def _tasks(rows: Mapping[str, list[Row]]) -> dict[str, dict[str, Row]]:
    """Returns task -> model -> row."""
    tasks: dict[str, dict[str, Row]] = {}
    for model, of_model in rows.items():
        for row in of_model:
            tasks.setdefault(row["task"], {})[model] = row
    return tasks


def _score_lines(rows: Mapping[str, list[Row]]) -> list[list[str]]:
    lines = []
    for name, models in _tasks(rows).items():
        row = next((row for row in models.values() if _done(row)), next(iter(models.values())))
        shown = [
            _number(models[model]["score"]) if _done(models[model]) else models[model]["status"] for model in rows
        ]
        chance, candidates = _number(row.get("chance")), _range(row.get("candidates") or [])
        lines.append([name, row.get("metric", "–"), *shown, chance, candidates])
    return lines


def _retrieval_lines(rows: Mapping[str, list[Row]], metrics: tuple[str, ...]) -> list[list[str]]:
    """Returns a line per task and model with a hit rate, and one per task with the chance levels."""
    lines = []
    for name, models in _tasks(rows).items():
        found = {model: row for model, row in models.items() if _done(row) and "hit_rate_at_1" in row["scores"]}
        for model, row in found.items():
            lines.append([name, model, *(_number(row["scores"].get(metric)) for metric in metrics), ""])
        if found:
            row = next(iter(found.values()))
            chances = [_number(row["chances"].get(metric)) for metric in metrics]
            lines.append([name, "chance", *chances, _range(row["candidates"])])
    return lines


def _pages(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Returns the tasks in which a text finds the image of a page: mteb calls some of them plain retrieval."""
    return {
        model: [row for row in of_model if row.get("category") == "t2i" and row["type"] in PAGE_TYPES]
        for model, of_model in rows.items()
    }


def _measure_lines(rows: Mapping[str, list[Row]]) -> list[list[str]]:
    lines = []
    for name, models in _tasks(rows).items():
        for model, row in models.items():
            if _done(row):
                rate = "–" if row["rows_per_second"] is None else f"{row['rows_per_second']:.1f}"
                peak = _size(row["peak_host_bytes"]) + (" (process)" if row["peak_host_of"] == "process" else "")
                cuda = "–" if row["peak_cuda_bytes"] is None else _size(row["peak_cuda_bytes"])
                where = f"{row['device']}, {row['dtype']}"
                lines.append([name, model, _prompts(row["prompts"]), str(row["rows"]), rate, peak, cuda, where])
    return lines


def _unscored_lines(rows: Mapping[str, list[Row]]) -> list[list[str]]:
    return [
        [row["task"], model, row["status"], row["reason"].replace("\n", " ")]
        for model, of_model in rows.items()
        for row in of_model
        if not _done(row)
    ]


def _prompts(prompts: Mapping[str, str]) -> str:
    if not prompts:
        return "as defined by mteb for this model"
    return Markup(", ".join(f"{side} {code_span(prompt) if prompt else 'none'}" for side, prompt in prompts.items()))


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _range(counts: list[int]) -> str:
    if not counts:
        return "–"
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
