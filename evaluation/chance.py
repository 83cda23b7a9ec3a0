"""Computes the scores that a random order is expected to get, so that every figure stands beside its chance level."""

from collections.abc import Iterable, Mapping, Sequence
from math import log2
from typing import Any

import numpy as np
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS

AT_K = ("hit_rate", "recall", "ndcg")
KNOWN = (AbsTaskRetrieval, AbsTaskSTS, AbsTaskClassification, AbsTaskPairClassification)


def data_parts(task: AbsTask) -> list[Any]:
    """Returns the data of every subset and split of a loaded task; some tasks of mteb have splits alone."""
    if isinstance(task, AbsTaskRetrieval):
        task.convert_v1_dataset_format_to_v2(num_proc=None)  # tasks that override the loader need it
    data = task.dataset
    return [
        data[subset][split] if subset in data else data[split]
        for subset in task.hf_subsets
        for split in task.eval_splits
    ]


def task_chance(task: AbsTask, metrics: Iterable[str]) -> dict[str, float]:
    """Returns metric -> chance level, the mean over splits and subsets, for the metrics that have a known one.

    The known ones: hit rate, recall and nDCG at K and the mean rank of a search; 0 for Spearman's ρ; 1 / labels for
    accuracy; the share of positive pairs for average precision.

    Args:
        task: of mteb or custom, with its data loaded.
        metrics: names of scores, such as `hit_rate_at_1`.
    """
    if not isinstance(task, KNOWN):
        return {}
    parts = data_parts(task)
    chances = {}
    for metric in metrics:
        levels = [_part_chance(task, part, metric) for part in parts]
        if levels and None not in levels:
            chances[metric] = float(np.mean(levels))
    return chances


def _part_chance(task: AbsTask, part: Mapping[str, Any], metric: str) -> float | None:
    """Returns the chance level of one subset and split."""
    if isinstance(task, AbsTaskRetrieval):
        if part["top_ranked"] is not None:
            return None
        gains = [list(found.values()) for found in part["relevant_docs"].values() if found]
        return search_chance(metric, gains, len(part["corpus"]))
    if isinstance(task, AbsTaskSTS) and metric.endswith(("spearman", "pearson")):
        return 0.0
    if isinstance(task, AbsTaskClassification) and metric == "accuracy":
        labels = part[task.label_column_name]
        return None if isinstance(labels[0], list) else 1 / len(set(labels))
    if isinstance(task, AbsTaskPairClassification) and metric.endswith("_ap"):
        return float(np.mean([label for labels in part[task.label_column_name] for label in np.atleast_1d(labels)]))
    return None


def search_chance(metric: str, gains: Sequence[Sequence[float]], candidates: int) -> float | None:
    """Returns the expected score of a random order of all candidates, the mean over the queries.

    Args:
        metric: `hit_rate_at_K`, `recall_at_K`, `ndcg_at_K` or `mean_rank` (of the best relevant candidate).
        gains: per query the gains of its candidates in the relevance judgements; those above 0 are relevant.
        candidates: number of candidates.

    Returns:
        The chance level; `None` for another metric, or without a relevant candidate.
    """
    name, _, cutoff = metric.rpartition("_at_")
    counts = [sum(gain > 0 for gain in of_query) for of_query in gains]
    kept = [(of_query, count) for of_query, count in zip(gains, counts, strict=True) if count]
    if not kept:
        return None
    if metric == "mean_rank":
        return float(np.mean([(candidates + 1) / (count + 1) for _, count in kept]))
    if name not in AT_K:
        return None
    k = min(int(cutoff), candidates)
    if name == "recall":
        return k / candidates
    if name == "hit_rate":
        return float(np.mean([1 - _no_hit(count, candidates, k) for _, count in kept]))
    return float(np.mean([_ndcg(of_query, candidates, k) for of_query, _ in kept]))


def _no_hit(relevant: int, candidates: int, k: int) -> float:
    """Returns the probability that none of the first K is relevant (hypergeometric)."""
    misses = [(candidates - relevant - place) / (candidates - place) for place in range(k)]
    return max(0.0, float(np.prod(misses)))


def _ndcg(gains: Sequence[float], candidates: int, k: int) -> float:
    """Returns the expected nDCG@K: the mean gain of a candidate at every place, over the best order's DCG."""
    discounts = [1 / log2(place + 2) for place in range(k)]
    best = sorted(gains, reverse=True)[:k]
    ideal = sum(gain * discount for gain, discount in zip(best, discounts, strict=False))
    return sum(gains) / candidates * sum(discounts) / ideal
