"""Computes the mean rank of searches of mteb, which mteb does not report, from the vectors that it embedded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mteb.abstasks import AbsTask, AbsTaskRetrieval

from .chance import data_parts
from .encoder import MeasuredEncoder
from .metrics import query_ranks

MAX_CANDIDATES = 200_000  # 0.8 GB of float32 vectors of width 1024; larger corpora get no mean rank


def is_ranked(task: AbsTask) -> bool:
    """Returns whether the mean rank of a loaded task is computed: a search of all of at most 200,000 candidates."""
    if not isinstance(task, AbsTaskRetrieval) or task.ignore_identical_ids or task.skip_first_result:
        return False
    return all(part["top_ranked"] is None and len(part["corpus"]) <= MAX_CANDIDATES for part in data_parts(task))


def mean_rank(encoder: MeasuredEncoder, task: AbsTaskRetrieval) -> float:
    """Returns the mean rank, from 1, of each query's best relevant candidate; the mean over splits and subsets.

    Ranks all candidates by the encoder's similarity, in blocks; ties count against the model. Queries without a
    relevant candidate in the corpus do not count.

    Args:
        encoder: has embedded the task, with `keep_vectors`.
        task: a search for which `is_ranked` is true.
    """
    ranks = []
    for (subset, split), sides in encoder.kept.items():
        queries, candidates = (np.concatenate(sides[side]) for side in ("query", "document"))
        asking, relevant = _relevant(task.dataset[subset][split], len(queries), len(candidates))
        found = query_ranks(
            torch.from_numpy(queries[asking]), torch.from_numpy(candidates), relevant, encoder.similarity
        )
        ranks.append(found.mean().item())
    return float(np.mean(ranks))


def _relevant(split: Mapping[str, Any], queries: int, candidates: int) -> tuple[list[int], list[set[int]]]:
    """Returns the positions of the queries that have a relevant candidate, and the positions of those candidates."""
    query_ids, document_ids = list(split["queries"]["id"]), list(split["corpus"]["id"])
    if (len(query_ids), len(document_ids)) != (queries, candidates):
        raise ValueError(
            f"{queries} queries and {candidates} candidates were embedded, but the data set has {len(query_ids)} and "
            f"{len(document_ids)}; run the task again without the cached result."
        )
    places = {name: place for place, name in enumerate(document_ids)}
    found = [
        {places[name] for name, gain in split["relevant_docs"].get(query, {}).items() if gain > 0 and name in places}
        for query in query_ids
    ]
    asking = [place for place, positions in enumerate(found) if positions]
    return asking, [found[place] for place in asking]
