"""Runs the tasks of a suite through mteb; every task yields one row of the scorecard, also if skipped or failed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.results import TaskResult

from .chance import task_chance
from .custom_tasks import CustomRetrieval, CustomSTS
from .encoder import MeasuredEncoder
from .ranks import is_ranked, mean_rank
from .scorecard import Row
from .suite import Suite

logger = logging.getLogger(__name__)

SHOWN_SCORES = ("hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10", "ndcg_at_10", "cosine_spearman")


def suite_tasks(suite: Suite) -> list[AbsTask | Row]:
    """Returns the tasks of a suite in order; an entry that cannot be read is replaced by a row with the reason."""
    made: list[AbsTask | Row] = []
    for entry in suite.entries:
        row = {"task": entry.get("name", entry["task"])}
        try:
            made += suite.tasks(entry)
        except FileNotFoundError as error:
            made.append(row | {"status": "skipped", "reason": str(error)})
        except ValueError as error:
            status = "skipped" if isinstance(error.__cause__, ConnectionError) else "failed"  # the Hub, unreachable
            made.append(row | {"status": status, "reason": str(error)})
    return made


def run_task(encoder: MeasuredEncoder, task: AbsTask, out: Path, batch_size: int, save_vectors: bool) -> Row:
    """Runs one task, or returns the cached result of a run with the same model, data, prompts and dtype.

    Args:
        encoder: the model.
        task: a task of mteb or a custom task.
        out: folder for the results of mteb's tasks (`results/`) and of custom tasks (`custom/results/`), in mteb's
            format, for measurements (`measures/`) and for vectors (`vectors/`).
        batch_size: rows per batch.
        save_vectors: whether to write vectors, for custom tasks with the relevance judgements; disables the cache.

    Returns:
        The task's description, `status` (run, cached, skipped, failed) and `reason`, or scores and measurements.
    """
    row = describe(task) | {"prompts": encoder.prompts(task)}
    if missing := sorted(set(task.metadata.modalities) - set(encoder.mteb_model_meta.modalities)):
        supported = ", ".join(encoder.mteb_model_meta.modalities)
        return row | {"status": "skipped", "reason": f"it needs {', '.join(missing)}; the model supports {supported}"}
    meta = encoder.mteb_model_meta
    kept = out / "measures" / meta.model_name_as_path() / str(meta.revision) / f"{row['task']}.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    known = {key: row[key] for key in ("revision", "subsets", "prompts")} | {"dtype": encoder.home()["dtype"]}
    is_same = before is not None and all(before[key] == value for key, value in known.items())
    is_custom = isinstance(task, CustomRetrieval | CustomSTS)
    cache = mteb.ResultCache(out / "custom" if is_custom else out)  # a submission holds only mteb's tasks
    if is_same and "chances" in before.get("measures", {}) and not save_vectors:
        result = cache.load_task_result(row["task"], meta)
        if result is not None:
            return row | before["measures"] | scores(task, result, before["measures"]) | {"status": "cached"}
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(known), encoding="utf-8")
    try:
        result, measures = _measure(encoder, task, cache, batch_size, save_vectors, is_same)
    except Exception as error:  # a failed task does not end the suite; the row and the exit code report it
        status, reason = why(error, task)
        if status == "failed":
            logger.exception("%s failed", row["task"])
        return row | {"status": status, "reason": reason}
    finally:
        if task.data_loaded:
            task.unload_data()
    kept.write_text(json.dumps(known | {"measures": measures}, indent=1), encoding="utf-8")
    if save_vectors:
        write_vectors(encoder, task, out / "vectors" / meta.model_name_as_path() / str(meta.revision) / row["task"])
    return row | measures | scores(task, result, measures) | {"status": "run"}


def _measure(
    encoder: MeasuredEncoder,
    task: AbsTask,
    cache: mteb.ResultCache,
    batch_size: int,
    save_vectors: bool,
    resumes: bool,
) -> tuple[TaskResult, dict[str, Any]]:
    """Runs a task; returns mteb's result, and the measurements with candidates, chance levels and mean rank."""
    if not task.data_loaded:
        task.load_data()
    ranked = is_ranked(task)
    encoder.start(save_vectors or ranked)
    encoder.tell_sides_apart(task)
    run = mteb.evaluate(
        encoder,
        task,
        co2_tracker=False,
        cache=cache,
        overwrite_strategy="only-missing" if resumes and not (save_vectors or ranked) else "always",
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        show_progress_bar=False,
    )
    measures = encoder.measures()
    measures["candidates"] = list(encoder.documents.values()) if isinstance(task, AbsTaskRetrieval) else []
    measures["chances"] = task_chance(task, dict.fromkeys((*SHOWN_SCORES, "mean_rank", task.metadata.main_score)))
    if ranked:
        measures["mean_rank"] = mean_rank(encoder, task)
    return run.task_results[0], measures


def describe(task: AbsTask) -> Row:
    """Returns the description of a task."""
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
    """Returns status and reason of an error: skipped if data or a library is missing, failed otherwise."""
    metadata = task.metadata
    if isinstance(error, ConnectionError):
        missing = f"{metadata.dataset['path']} at revision {metadata.dataset['revision']}"
        return "skipped", f"the data set {missing} is not cached and the Hub cannot be reached"
    if isinstance(error, FileNotFoundError):  # `datasets` also raises it for a gated or removed data set
        return "skipped", str(error)
    if isinstance(error, ImportError) and "audio" in metadata.modalities:
        return "skipped", (
            f"{error} mteb's loaders of models decode audio with torchcodec, FFmpeg and torchaudio: install the "
            "versions for your torch. Models loaded by sentence-transformers need none of them."
        )
    if isinstance(error, ImportError):
        return "skipped", str(error)
    return "failed", f"{type(error).__name__}: {error}"


def scores(task: AbsTask, result: TaskResult, measures: Mapping[str, Any]) -> Row:
    """Returns the main score, further common scores and the mean rank, and the chance level of the main score."""
    of_parts = [part for parts in result.scores.values() for part in parts]
    shown = {name: float(np.mean([part[name] for part in of_parts])) for name in SHOWN_SCORES if name in of_parts[0]}
    if "mean_rank" in measures:
        shown["mean_rank"] = measures["mean_rank"]
    return {"score": result.get_score(), "scores": shown, "chance": measures["chances"].get(task.metadata.main_score)}


def write_vectors(encoder: MeasuredEncoder, task: AbsTask, folder: Path) -> None:
    """Writes SUBSET-SPLIT.npz with (rows, dimension) float32 arrays.

    Arrays: `query` and `document` (of a task on pairs only if its sides have different prompts), or `inputs0`,
    `inputs1`, … in mteb's order of encoding; for custom tasks also
    `relevant`, (pairs, 2) int64 positions of query and document, or `score`, (pairs,) float64.
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
