"""Computes retrieval and similarity metrics from vectors."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from itertools import permutations

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

MAX_SIMILARITIES = 2**24  # 64 MiB of float32: queries × candidates in memory at a time
TIE = 1e-6  # cosines closer than this count as equal, so that float32 rounding decides no rank


def retrieval_metrics(
    queries: Tensor, candidates: Tensor, relevant: Sequence[AbstractSet[int]] | Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Ranks all candidates for every query by cosine; the rank of a query is that of its best relevant candidate.

    Ties count against the model: an irrelevant candidate as similar as the relevant one ranks before it, so a constant
    embedding scores zero.

    Args:
        queries: (Q, D) float, finite; need not be normalised.
        candidates: (C, D) float, finite; need not be normalised.
        relevant: per query the positions of its relevant candidates, or a (Q, C) bool matrix; never empty.
        ks: cut-offs of the recall.

    Returns:
        recall@K (share of queries with rank <= K), mrr (mean of 1/rank), mean_rank, candidates (C), and chance (the
        expected recall@1 of a random order).
    """
    rank = query_ranks(queries, candidates, relevant)
    relevant_count = int(relevant.bool().sum()) if isinstance(relevant, Tensor) else sum(map(len, relevant))
    metrics = {f"recall@{k}": (rank <= k).double().mean().item() for k in ks}
    metrics |= {"mrr": (1 / rank).mean().item(), "mean_rank": rank.mean().item()}
    return metrics | {"candidates": len(candidates), "chance": relevant_count / len(queries) / len(candidates)}


def query_ranks(
    queries: Tensor,
    candidates: Tensor,
    relevant: Sequence[AbstractSet[int]] | Tensor,
    similarity: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Returns the (Q,) float64 rank, from 1, of each query's best relevant candidate; see `retrieval_metrics`.

    Args:
        queries: (Q, D) float, finite.
        candidates: (C, D) float, finite.
        relevant: as in `retrieval_metrics`.
        similarity: maps (q, D) queries and (C, D) candidates to (q, C) similarities; `None`: the cosine.
    """
    directions = _directions(queries, "queries"), _directions(candidates, "candidates")
    if similarity is None:
        (queries, candidates), similarity = directions, _dot_product
    if len(relevant) != len(queries):
        raise ValueError(f"There are {len(queries)} queries but {len(relevant)} sets of relevant candidates.")
    ranks = []
    chunk = max(1, MAX_SIMILARITIES // len(candidates))
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        is_relevant = _relevance_matrix(relevant[rows], start, len(candidates))
        similarities = torch.as_tensor(similarity(queries[rows], candidates))
        ranks.append(best_ranks(similarities, is_relevant.to(similarities.device)))
    return torch.cat(ranks).double()


def _dot_product(queries: Tensor, candidates: Tensor) -> Tensor:
    return queries @ candidates.T


def _directions(vectors: Tensor, name: str) -> Tensor:
    """Returns (N, D) float32 unit vectors; raises ValueError if empty or not finite."""
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"{name} has shape {tuple(vectors.shape)}; it must be (N, D) with at least one row.")
    broken = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"{name} has NaN or infinite values in {len(broken)} rows, the first being row {broken[0]}.")
    return functional.normalize(vectors.detach().float(), dim=1)


def _relevance_matrix(relevant: Sequence[AbstractSet[int]] | Tensor, first_query: int, width: int) -> Tensor:
    """Returns (q, C) bool with at least one True per row, from sets of positions or from the matrix itself."""
    if isinstance(relevant, Tensor):
        matrix = relevant.bool()
        if matrix.shape[1:] != (width,):
            raise ValueError(f"relevant has rows of shape {tuple(matrix.shape[1:])}; there are {width} candidates.")
    else:
        matrix = torch.zeros(len(relevant), width, dtype=torch.bool)
        for row, positions in enumerate(relevant):
            if positions and not 0 <= min(positions) <= max(positions) < width:
                raise ValueError(f"Query {first_query + row}: relevant {sorted(positions)}, but {width} candidates.")
            matrix[row, list(positions)] = True
    empty = (~matrix.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Query {first_query + empty[0]} has no relevant candidate; remove it.")
    return matrix


def best_ranks(similarities: Tensor, is_relevant: Tensor) -> Tensor:
    """Returns the (q,) int64 rank from 1 of each query's best relevant candidate, after all tied irrelevant ones.

    Args:
        similarities: (q, C) float.
        is_relevant: (q, C) bool, with at least one True per row.
    """
    best = similarities.masked_fill(~is_relevant, -torch.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarities >= best - TIE) & ~is_relevant).sum(dim=1)


def pair_retrieval(
    a: Tensor,
    b: Tensor,
    a_keys: Tensor,
    b_keys: Tensor,
    scores: Tensor | None = None,
    min_score: float | None = 0.5,
) -> dict[str, float]:
    """Evaluates held-out pairs: each distinct a with a relevant b searches all distinct b.

    Args:
        a: (N, D) float, one row per pair.
        b: (N, D) float, one row per pair.
        a_keys: (N,) int64, equal for equal content of side a.
        b_keys: (N,) int64, equal for equal content of side b.
        scores: (N,) float in [0, 1], NaN where absent; None if no pair has one.
        min_score: a pair scored below is not relevant, but its b stays a candidate; None: all are relevant.

    Returns:
        The metrics of `retrieval_metrics`.
    """
    columns = {"a": a, "b": b, "a_keys": a_keys, "b_keys": b_keys} | ({} if scores is None else {"scores": scores})
    lengths = {name: None if column is None else len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or not lengths["a"]:
        raise ValueError(f"Row counts of the pairs are {lengths}; all must be equal and at least 1.")
    query_rows, candidate_rows, relevant = pair_search(a_keys, b_keys, scores, min_score)
    return retrieval_metrics(a[query_rows], b[candidate_rows], relevant)


def pair_search(
    a_keys: Tensor, b_keys: Tensor, scores: Tensor | None = None, min_score: float | None = 0.5
) -> tuple[list[int], list[int], list[set[int]]]:
    """Builds the search of `pair_retrieval`: each distinct a with a relevant b, in all distinct b.

    Returns:
        The row of each query, the row of each candidate, and for each query the positions of its relevant candidates.
    """
    is_relevant = torch.ones(len(a_keys), dtype=torch.bool)
    if scores is not None and min_score is not None:
        is_relevant = ~(scores.cpu() < min_score)  # NaN (no score) counts as relevant
    if not is_relevant.any():
        raise ValueError(
            f"All {len(a_keys)} pairs are scored below min_score = {min_score}; none is relevant. Lower it."
        )
    b_ids, b_rows = _distinct(b_keys)
    a_ids, a_rows = _distinct(a_keys)
    relevant: dict[int, set[int]] = {}
    for row in is_relevant.nonzero().flatten().tolist():
        relevant.setdefault(a_ids[row], set()).add(b_ids[row])
    return [a_rows[query] for query in relevant], b_rows, list(relevant.values())


def _distinct(keys: Tensor) -> tuple[list[int], list[int]]:
    """Returns per row the index of its content, in order of appearance, and per content its first row."""
    ids: dict[int, int] = {}
    numbers = [ids.setdefault(key, len(ids)) for key in keys.tolist()]
    first_rows: dict[int, int] = {}
    for row, number in enumerate(numbers):
        first_rows.setdefault(number, row)
    return numbers, list(first_rows.values())


def spearman(a: Tensor, b: Tensor, scores: Tensor) -> float:
    """Computes Spearman's ρ between the cosine of each pair and its score.

    Args:
        a: (N, D) float, finite.
        b: (N, D) float, finite.
        scores: (N,) float; pairs whose score is NaN are ignored.

    Returns:
        ρ in [-1, 1]; NaN where undefined: fewer than two pairs, or all cosines or all scores equal.
    """
    scored = ~scores.isnan()
    cosines = (_directions(a, "a") * _directions(b, "b")).sum(dim=1)[scored]
    kept = scores[scored]
    if len(kept) < 2 or cosines.max() - cosines.min() < TIE or kept.max() == kept.min():
        return float("nan")
    return float(spearmanr(cosines.cpu().numpy(), kept.float().cpu().numpy()).statistic)


def six_directions(vectors: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Evaluates retrieval of each modality by each other one: {"text->image": metrics, …}, six directions for three.

    Args:
        vectors: modality -> (N, D) float; row i of every modality describes the same scene.
    """
    counts = {name: len(rows) for name, rows in vectors.items()}
    if len(counts) < 2 or len(set(counts.values())) != 1:
        raise ValueError(f"Rows per modality are {counts}; pass two modalities or more, all with equal rows.")
    same = [{row} for row in range(next(iter(counts.values())))]
    pairs = permutations(vectors, 2)
    return {f"{query}->{found}": retrieval_metrics(vectors[query], vectors[found], same) for query, found in pairs}
