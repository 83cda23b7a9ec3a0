"""Metrics against numbers derived by hand, and against a brute-force ranking in numpy."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vipolyqwen.evaluation import metrics as metrics_vipolyqwen
from vipolyqwen.evaluation.metrics import pair_retrieval, retrieval_metrics, six_directions, spearman

NAN = math.nan
AXES = torch.eye(4)


def from_cosines(cosines: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Queries and candidates with the given cosines, up to one factor: the queries are unit axes."""
    matrix = torch.tensor(cosines, dtype=torch.float64)  # (Q, C)
    filler = torch.sqrt(matrix.shape[0] - matrix.square().sum(dim=0))  # makes all candidates equally long
    return torch.eye(len(cosines), len(cosines) + 1), torch.cat([matrix, filler[None]]).T


def random_vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def test_ranks_of_a_worked_example() -> None:
    # Query 1 finds its candidate at rank 1, query 2 at rank 2 (0.9 before it), query 3 at rank 4.
    queries, candidates = from_cosines([[0.9, 0.1, 0.2, 0.3], [0.9, 0.8, 0.1, 0.2], [0.5, 0.6, 0.1, 0.7]])
    assert retrieval_metrics(queries, candidates, [{0}, {1}, {2}], ks=(1, 2, 3, 4)) == {
        "recall@1": pytest.approx(1 / 3),
        "recall@2": pytest.approx(2 / 3),
        "recall@3": pytest.approx(2 / 3),
        "recall@4": 1.0,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 4) / 3),
        "mean_rank": pytest.approx((1 + 2 + 4) / 3),
        "candidates": 4,
        "chance": pytest.approx(1 / 4),
    }


def test_any_relevant_candidate_counts_and_chance_grows_with_them() -> None:
    queries, candidates = from_cosines([[0.1, 0.9, 0.5, 0.3], [0.9, 0.2, 0.8, 0.7]])
    metrics = retrieval_metrics(queries, candidates, [{0, 1, 3}, {3}])
    assert metrics["recall@1"] == 0.5  # query 1 by candidate 1, query 2 at rank 3
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert metrics["chance"] == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_a_matrix_says_the_same_as_sets() -> None:
    queries, candidates = random_vectors(7, 0), random_vectors(9, 1)
    sets = [{i, (3 * i + 1) % 9} for i in range(7)]
    matrix = torch.zeros(7, 9, dtype=torch.bool)
    for row, positions in enumerate(sets):
        matrix[row, list(positions)] = True
    assert retrieval_metrics(queries, candidates, matrix) == retrieval_metrics(queries, candidates, sets)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_constant_embedding_finds_nothing(noise: float) -> None:
    vectors = normalize(torch.ones(50, 8)) + noise * random_vectors(50, 0)
    metrics = retrieval_metrics(vectors, vectors, [{i} for i in range(50)])
    assert metrics["recall@1"] == metrics["recall@10"] == 0.0
    assert metrics["mean_rank"] == 50


def test_a_tie_counts_against_the_model_once_per_tied_candidate() -> None:
    queries, candidates = from_cosines([[0.5, 0.5, 0.5, 0.1]])
    assert retrieval_metrics(queries, candidates, [{1}])["mean_rank"] == 3
    assert retrieval_metrics(queries, candidates, [{1, 2}])["mean_rank"] == 2  # one relevant one is no obstacle


def test_lengths_of_vectors_do_not_matter() -> None:
    queries, candidates = random_vectors(20, 0), random_vectors(30, 1)
    relevant = [{i} for i in range(20)]
    scale = 1 + torch.arange(30.0)[:, None]
    assert retrieval_metrics(queries * 7, candidates * scale, relevant) == retrieval_metrics(
        queries, candidates, relevant
    )


@pytest.mark.parametrize("bound", [1, 100, 2**24])
def test_equals_brute_force_for_every_chunk_size(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_vipolyqwen, "MAX_SIMILARITIES", bound)
    queries, candidates = random_vectors(23, 0), random_vectors(31, 1)
    generator = np.random.default_rng(0)
    relevant = [set(generator.choice(31, size=generator.integers(1, 4), replace=False).tolist()) for _ in range(23)]
    metrics = retrieval_metrics(queries, candidates, relevant)

    unit = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (queries, candidates)]
    orders = np.argsort(-(unit[0] @ unit[1].T), axis=1)
    ranks = [min(order.tolist().index(c) for c in found) + 1 for order, found in zip(orders, relevant, strict=True)]
    for k in (1, 5, 10):
        assert metrics[f"recall@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert metrics["mean_rank"] == pytest.approx(np.mean(ranks))
    assert metrics["chance"] == pytest.approx(np.mean([len(found) for found in relevant]) / 31)


def test_memory_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(similarities: Tensor, is_relevant: Tensor) -> Tensor:
        sizes.append(similarities.numel())
        return torch.ones(len(similarities))

    monkeypatch.setattr(metrics_vipolyqwen, "MAX_SIMILARITIES", 100)
    monkeypatch.setattr(metrics_vipolyqwen, "best_ranks", spy)
    retrieval_metrics(random_vectors(23, 0), random_vectors(31, 1), [{0}] * 23)
    assert max(sizes) <= 100
    assert sum(sizes) == 23 * 31


@pytest.mark.parametrize(
    ("queries", "candidates", "relevant", "message"),
    [
        (AXES[:0], AXES, [], r"queries has shape \(0, 4\)"),
        (AXES, AXES[:0], [{0}] * 4, r"candidates has shape \(0, 4\)"),
        (AXES, AXES, [{0}] * 3, "4 queries but 3 sets"),
        (AXES, AXES, [{0}, {1}, set(), {3}], "Query 2 has no relevant candidate"),
        (AXES, AXES, [{0}, {1}, {4}, {3}], r"Query 2: relevant \[4\], but 4 candidates"),
        (AXES, AXES, torch.ones(4, 3, dtype=torch.bool), "there are 4 candidates"),
        (AXES, torch.tensor([[0.0, NAN, 0.0, 0.0]]), [{0}] * 4, "candidates has NaN or infinite values in 1 rows"),
    ],
)
def test_bad_retrieval_input_is_named(queries: Tensor, candidates: Tensor, relevant: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(queries, candidates, relevant)


# --- pairs


def test_pairs_search_distinct_contents() -> None:
    # Contents of a: 10, 20; of b: 1, 2, 3. 10 answers to 1 and 3, 20 to 2.
    a = AXES[[0, 1, 0]]
    b = normalize(torch.tensor([[0.5, 0.1, 1.0, 0.0], [0.9, 0.3, 0.0, 0.0], [0.8, 0.0, 0.6, 0.0]]))
    metrics = pair_retrieval(a, b, torch.tensor([10, 20, 10]), torch.tensor([1, 2, 3]))
    # a = 10 sees cosines 0.45, 0.95, 0.8: candidate 2 stands before its best; a = 20 sees 0.09, 0.32, 0: rank 1.
    assert metrics["candidates"] == 3
    assert metrics["mean_rank"] == 1.5
    assert metrics["recall@1"] == 0.5
    assert metrics["chance"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_equal_answers_are_one_candidate() -> None:
    a, b = AXES[:3], AXES[[0, 0, 2]]  # two questions with the same answer
    metrics = pair_retrieval(a, b, torch.arange(3), torch.tensor([7, 7, 8]))
    # Candidates e1 and e3. Question 2 is e2: both candidates tie at 0, so rank 2.
    assert metrics["candidates"] == 2
    assert metrics["mean_rank"] == pytest.approx((1 + 2 + 1) / 3)


def test_low_scored_pairs_are_candidates_but_not_relevant() -> None:
    keys = torch.arange(4)
    scores = torch.tensor([0.9, 0.49, 0.5, NAN])
    b = AXES[[1, 0, 2, 3]]  # b of the low-scored pair looks like the first a
    metrics = pair_retrieval(AXES, b, keys, keys, scores)
    # Queries 1, 3, 4. Query 1: its b has cosine 0, as has every candidate but the second with 1: rank 4.
    assert metrics["candidates"] == 4
    assert metrics["mean_rank"] == pytest.approx((4 + 1 + 1) / 3)
    assert pair_retrieval(AXES, b, keys, keys, scores, min_score=None)["mean_rank"] == pytest.approx(
        (4 + 4 + 1 + 1) / 4
    )


def test_bad_pairs_are_named() -> None:
    keys = torch.arange(4)
    with pytest.raises(ValueError, match="'a': 4, 'b': 4, 'a_keys': 4, 'b_keys': None"):
        pair_retrieval(AXES, AXES, keys, None)
    with pytest.raises(ValueError, match="at least 1"):
        pair_retrieval(AXES[:0], AXES[:0], keys[:0], keys[:0])
    with pytest.raises(ValueError, match="All 4 pairs are scored below min_score = 0.5"):
        pair_retrieval(AXES, AXES, keys, keys, torch.full((4,), 0.1))


# --- similarity


def test_spearman_of_a_worked_example() -> None:
    # Cosines 1, 0.8, 0.6, 0 rank 4, 3, 2, 1; scores rank 4, 2, 3, 1: 1 - 6 (0 + 1 + 1 + 0) / (4 · 15) = 0.8
    a = AXES[[0, 0, 0, 0]]
    b = torch.tensor([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 1, 0, 0]])
    assert spearman(a, b, torch.tensor([1.0, 0.3, 0.4, 0.0])) == pytest.approx(0.8)
    assert spearman(a, b, torch.tensor([0.0, 0.3, 0.4, 1.0])) == pytest.approx(-1.0)


def test_spearman_leaves_out_pairs_without_score() -> None:
    b = torch.tensor([[1, 0, 0, 0], [0.8, 0.6, 0, 0], [0.6, 0.8, 0, 0]])
    assert spearman(AXES[[0, 0, 0]], b, torch.tensor([1.0, NAN, 0.1])) == pytest.approx(1.0)


def test_spearman_of_constant_input_is_nan_without_a_warning() -> None:
    b = random_vectors(4, 0)[:, :4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(spearman(AXES, b, torch.full((4,), 0.5)))
        assert math.isnan(spearman(AXES, AXES, torch.arange(4.0)))
        assert math.isnan(spearman(AXES, b, torch.tensor([0.5, NAN, NAN, NAN])))


# --- modalities


def test_six_directions_name_query_and_candidates() -> None:
    axes = torch.eye(12)
    vectors = {"text": axes, "image": axes, "audio": axes.roll(1, dims=0)}
    metrics = six_directions(vectors)
    assert sorted(metrics) == [
        "audio->image",
        "audio->text",
        "image->audio",
        "image->text",
        "text->audio",
        "text->image",
    ]
    found = {name: values["recall@1"] for name, values in metrics.items()}
    assert found == {name: float("audio" not in name) for name in metrics}
    assert all(values["candidates"] == 12 and values["chance"] == pytest.approx(1 / 12) for values in metrics.values())


def test_directions_are_not_symmetric() -> None:
    # text e1, e2; image e1, e1 + small e2: image 2 is nearer to text 1 than to text 2, text 2 finds image 2.
    vectors = {"text": torch.eye(2), "image": torch.tensor([[1.0, 0.0], [1.0, 0.1]])}
    metrics = six_directions(vectors)
    assert metrics["text->image"]["recall@1"] == 1.0
    assert metrics["image->text"]["recall@1"] == 0.5


@pytest.mark.parametrize("vectors", [{}, {"text": AXES}, {"text": AXES, "image": AXES[:3]}])
def test_bad_modalities_are_named(vectors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="Rows per modality"):
        six_directions(vectors)
