"""Rows of tasks and models to summary.json and summary.md."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("mteb", "sentence-transformers", "transformers", "torch")
Row = dict[str, Any]


def write_scorecard(folder: Path, suite: str, rows: Mapping[str, list[Row]]) -> str:
    """Writes both files into `folder` and returns the page.

    Args:
        folder: where to.
        suite: its name.
        rows: model -> one row a task, as `run_task` gives them; models side by side, the first one first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {library: version(library) for library in LIBRARIES}
    content = {"suite": suite, "versions": versions, "models": rows}
    (folder / "summary.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = "\n\n".join(
        [
            f"# {suite}",
            f"{', '.join(f'{library} {number}' for library, number in versions.items())}. Chance is that of a random "
            "order with what is relevant here (own tasks) or one right answer (mteb's). Rows a second count reading "
            "and embedding.",
            *_main_table(rows),
            *_retrieval_table(rows),
            *_measures_table(rows),
            *_left_out(rows),
        ]
    )
    (folder / "summary.md").write_text(page + "\n", encoding="utf-8")
    return page


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, rule, *lines)
    )


def _done(row: Row) -> bool:
    return row["status"] in ("run", "cached")


def _tasks(rows: Mapping[str, list[Row]]) -> dict[str, dict[str, Row]]:
    """Task -> model -> row."""
    tasks: dict[str, dict[str, Row]] = {}
    for model, of_model in rows.items():
        for row in of_model:
            tasks.setdefault(row["task"], {})[model] = row
    return tasks


def _main_table(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = []
    for name, models in _tasks(rows).items():
        row = next((row for row in models.values() if _done(row)), next(iter(models.values())))
        shown = [
            _number(models[model]["score"]) if _done(models[model]) else models[model]["status"] for model in rows
        ]
        chance = _number(row["chance"]) if row.get("chance") is not None else "–"
        lines.append([name, row.get("metric", "–"), *shown, chance, _range(row.get("candidates") or [])])
    return ["## Scores", _table(["task", "metric", *rows, "chance", "candidates"], lines)]


def _retrieval_table(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = []
    names = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "ndcg_at_10", "mean_rank")
    for name, models in _tasks(rows).items():
        for model, row in models.items():
            if _done(row) and "hit_rate_at_1" in row["scores"]:
                values = [row["scores"].get(key) for key in names]
                lines.append([name, model, *("–" if value is None else _number(value) for value in values)])
    head = ["task", "model", "R@1", "R@5", "R@10", "nDCG@10", "mean rank"]
    note = "R@K is the share of queries with a right answer among the first K."
    return ["## Retrieval", note, _table(head, lines)] if lines else []


def _measures_table(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = []
    for name, models in _tasks(rows).items():
        for model, row in models.items():
            if _done(row):
                rate = "–" if row["rows_per_second"] is None else f"{row['rows_per_second']:.1f}"
                peak = _size(row["peak_host_bytes"]) + (" (process)" if row["peak_host_of"] == "process" else "")
                cuda = "–" if row["peak_cuda_bytes"] is None else _size(row["peak_cuda_bytes"])
                where = f"{row['device']}, {row['dtype']}"
                lines.append([name, model, _prompts(row["prompts"]), str(row["rows"]), rate, peak, cuda, where])
    head = ["task", "model", "prompt", "rows", "rows/s", "peak memory", "peak CUDA", "device"]
    return ["## Prompts, speed and memory", _table(head, lines)] if lines else []


def _left_out(rows: Mapping[str, list[Row]]) -> list[str]:
    lines = [
        [row["task"], model, row["status"], row["reason"].replace("\n", " ")]
        for model, of_model in rows.items()
        for row in of_model
        if not _done(row)
    ]
    return ["## Without a score", _table(["task", "model", "status", "reason"], lines)] if lines else []


def _prompts(prompts: Mapping[str, str]) -> str:
    if not prompts:
        return "as mteb has it for this model"
    return ", ".join(f"{side} {f'`{prompt}`' if prompt else 'none'}" for side, prompt in prompts.items())


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _range(counts: list[int]) -> str:
    if not counts:
        return "–"
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}–{max(counts)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
