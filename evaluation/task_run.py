"""A suite's tasks run through mteb, each to one row of a scorecard; nothing is left out silently."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import AbsTask
from mteb.results import TaskResult

from .custom_tasks import CustomRetrieval, CustomSTS
from .encoder import MeasuredEncoder
from .suite import Suite

logger = logging.getLogger(__name__)

SHOWN_SCORES = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "ndcg_at_10", "mean_rank", "cosine_spearman")
Row = dict[str, Any]


def suite_tasks(suite: Suite) -> list[AbsTask | Row]:
    """The tasks of a suite in its order, with a row in place of an entry that could not be made into tasks."""
    made: list[AbsTask | Row] = []
    for entry in suite.entries:
        row = {"task": entry.get("name", entry["task"])}
        try:
            made += suite.tasks(entry)
        except FileNotFoundError as error:
            made.append(row | {"status": "skipped", "reason": str(error)})
        except ValueError as error:
            made.append(row | {"status": "failed", "reason": str(error)})
    return made


def run_task(encoder: MeasuredEncoder, task: AbsTask, out: Path, batch_size: int, save_vectors: bool) -> Row:
    """Runs one task, or takes what a run with the same model, data and prompts has left.

    Args:
        encoder: the model.
        task: of mteb or of one's own.
        out: folder of the results of mteb's tasks (`results/`) and of own ones (`own/results/`), in mteb's format,
            of what was measured beside (`measures/`) and of vectors (`vectors/`).
        batch_size: rows that are embedded at a time.
        save_vectors: whether to write vectors, for own tasks with what is relevant to what.

    Returns:
        What the task is, `status` (run, cached, skipped, failed) and `reason`, or scores and measures.
    """
    row = describe(task) | {"prompts": encoder.prompts(task.metadata)}
    if missing := sorted(set(task.metadata.modalities) - set(encoder.mteb_model_meta.modalities)):
        takes = ", ".join(encoder.mteb_model_meta.modalities)
        return row | {"status": "skipped", "reason": f"it needs {', '.join(missing)}; the model takes {takes}"}
    meta = encoder.mteb_model_meta
    kept = out / "measures" / meta.model_name_as_path() / str(meta.revision) / f"{row['task']}.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    known = {key: row[key] for key in ("revision", "subsets", "prompts")} | {"dtype": encoder.home()["dtype"]}
    is_same = before is not None and all(before[key] == value for key, value in known.items())
    is_own = isinstance(task, CustomRetrieval | CustomSTS)
    cache = mteb.ResultCache(out / "own" if is_own else out)  # what is submitted holds mteb's tasks alone
    if is_same and before["status"] == "run" and not save_vectors:
        result = cache.load_task_result(row["task"], meta)
        if result is not None:
            return row | before["measures"] | scores(task, result, before["measures"]) | {"status": "cached"}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(known | {"status": "begun"}), encoding="utf-8")
    encoder.start(save_vectors)
    try:
        run = mteb.evaluate(
            encoder,
            task,
            co2_tracker=False,
            cache=cache,
            overwrite_strategy="only-missing" if is_same and not save_vectors else "always",
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
        )
    except Exception as error:  # a suite goes on after a task that fails; the row and the exit code tell of it
        status, reason = why(error, task)
        if status == "failed":
            logger.exception("%s failed", row["task"])
        return row | {"status": status, "reason": reason}
    if not run.task_results:  # mteb does not raise for a private data set that it may not read
        return row | {"status": "skipped", "reason": run.exceptions[0].exception}
    result = run.task_results[0]
    measures = encoder.measures() | {"candidates": list(encoder.documents.values())}
    kept.write_text(json.dumps(known | {"status": "run", "measures": measures}, indent=1), encoding="utf-8")
    if save_vectors:
        write_vectors(encoder, task, out / "vectors" / meta.model_name_as_path() / str(meta.revision) / row["task"])
    return row | measures | scores(task, result, measures) | {"status": "run"}


def describe(task: AbsTask) -> Row:
    """What a task is, before it is run."""
    metadata = task.metadata
    return {
        "task": metadata.name,
        "type": metadata.type,
        "category": metadata.category,
        "modalities": metadata.modalities,
        "dataset": metadata.dataset["path"],
        "revision": metadata.dataset["revision"],
        "subsets": list(task.hf_subsets),
        "metric": metadata.main_score,
    }


def why(error: Exception, task: AbsTask) -> tuple[str, str]:
    """Status and reason for what a task raised: what is not here is skipped, anything else has failed."""
    metadata = task.metadata
    if isinstance(error, ConnectionError):
        there = f"{metadata.dataset['path']} at revision {metadata.dataset['revision']}"
        return "skipped", f"the data set {there} is not here and the Hub cannot be reached"
    if isinstance(error, FileNotFoundError):  # also what `datasets` raises for a gated or a removed data set
        return "skipped", str(error)
    if isinstance(error, ImportError) and "audio" in metadata.modalities:
        return "skipped", (
            f"{error} mteb's own loaders of models read sounds with torchcodec, FFmpeg and torchaudio: install those "
            "of your torch's version. A model that sentence-transformers loads needs none of them here."
        )
    if isinstance(error, ImportError):
        return "skipped", str(error)
    return "failed", f"{type(error).__name__}: {error}"


def scores(task: AbsTask, result: TaskResult, measures: Mapping[str, Any]) -> Row:
    """Main score, the usual further ones, and chance where it can be told; means over splits and subsets."""
    of_parts = [part for parts in result.scores.values() for part in parts]
    shown = {name: float(np.mean([part[name] for part in of_parts])) for name in SHOWN_SCORES if name in of_parts[0]}
    if "chance" in of_parts[0]:
        chance = of_parts[0]["chance"]
    else:
        chance = expected_hits(task.metadata.main_score, measures["candidates"])
    return {"score": result.get_score(), "scores": shown, "chance": chance}


def expected_hits(metric: str, candidates: list[int]) -> float | None:
    """The score of a random order with one right answer, for metrics where that is K / candidates."""
    name, _, cutoff = metric.rpartition("_at_")
    if name not in ("hit_rate", "recall") or not candidates:
        return None
    return float(np.mean([min(1.0, int(cutoff) / count) for count in candidates]))


def write_vectors(encoder: MeasuredEncoder, task: AbsTask, folder: Path) -> None:
    """Writes SUBSET-SPLIT.npz with (rows, dimension) float32 arrays.

    Arrays: `query` and `document`, or `inputs0`, `inputs1`, … in the order in which mteb asked for them; for own tasks
    also `relevant`, (pairs, 2) positions of query and document, or `score`, (pairs,).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for (subset, split), sides in encoder.kept.items():
        arrays: dict[str, np.ndarray] = {}
        for side, parts in sides.items():
            if side == "inputs":
                arrays |= {f"inputs{number}": part for number, part in enumerate(parts)}
            else:
                arrays[side] = np.concatenate(parts)
        if isinstance(task, CustomRetrieval):
            arrays["relevant"] = np.array(task.relevant)
        elif isinstance(task, CustomSTS):
            arrays["score"] = np.array(task.pairs["score"])
        np.savez(folder / f"{subset}-{split}.npz", **arrays)
