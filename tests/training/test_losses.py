"""Losses against numbers derived by hand.

Most tests use one batch of three rows: a = the unit axes e1, e2, e3 and b below, so that S_kj is coordinate k of b_j.

    b1 = (0.6, 0.8, 0)          [0.6  0    0.8]                  [3 0 4]
    b2 = (0,   1,   0)      S = [0.8  1    0  ]   S / 0.2 =      [4 5 0]
    b3 = (0.8, 0,   0.6)        [0    0    0.6]                  [0 0 3]
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run_on_two_ranks
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vipolyqwen.data.schema import canonical_task
from vipolyqwen.training.distributed import gather_rows, gather_sizes
from vipolyqwen.training.loss_figures import MixedLossOutput
from vipolyqwen.training.losses import (
    LOSS_TABLES,
    TaskLoss,
    cosine_distance,
    hardest_triplet,
    info_nce,
    pairwise_rank,
    score_mse,
)
from vipolyqwen.training.mixed_loss import MixedLoss
from vipolyqwen.training.weighting import TableWeighting

NAN = math.nan
TASKS = ["text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"]
T = 0.2
A = torch.eye(3)
B = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.8, 0.0, 0.6]])
S = torch.tensor([[0.6, 0.0, 0.8], [0.8, 1.0, 0.0], [0.0, 0.0, 0.6]])
SCORES = torch.tensor([0.9, 0.5, 0.7])

E3, E4, E5 = math.exp(3), math.exp(4), math.exp(5)  # 20.0855, 54.5982, 148.4132
# Row i of S/T and column i of S/T, less the diagonal: the two directions of NCE.
NCE_ROWS = [math.log(E3 + 1 + E4) - 3, math.log(E4 + E5 + 1) - 5, math.log(1 + 1 + E3) - 3]  # 1.3266, 0.3182, 0.0949
NCE_COLUMNS = [
    math.log(E3 + E4 + 1) - 3,
    math.log(1 + E5 + 1) - 5,
    math.log(E4 + 1 + E3) - 3,
]  # 1.3266, 0.0134, 1.3266
NCE = [(row + column) / 2 for row, column in zip(NCE_ROWS, NCE_COLUMNS, strict=True)]  # 1.3266, 0.1658, 0.7107
TRIPLET = [4 - 3 + 0.2, 0, 0]  # 4 - 5 + 0.2 and 0 - 3 + 0.2 are negative
TRIPLET_MULTI = [4 - 3 + 0.3, 0, 0]
COSINE = [0.4, 0, 0.4]
# p = (0.8, 1, 0.8), so with s = (0.9, 0.5, 0.7):
MSE = [0.01, 0.25, 0.01]
# P = (1, 2), (1, 3), (3, 2); p_i - p_j = -0.2, 0, -0.2; hinges 0.25, 0.05, 0.25
RANK = [0.55 / 3] * 3


def row_sum(**weighted: tuple[float, list[float]]) -> list[float]:
    """Σ weight × values, row by row."""
    return [sum(weight * values[row] for weight, values in weighted.values()) for row in range(3)]


NCE_TRIPLET = row_sum(nce=(1, NCE), triplet=(1, TRIPLET))
MIXED = {
    "text_pair": row_sum(nce=(1, NCE), mse=(1, MSE)),
    "instr": row_sum(nce=(1, NCE), cosine=(1, COSINE)),
    "ocr": NCE_TRIPLET,
    "vqa_single": NCE_TRIPLET,
    "vqa_multi": row_sum(nce=(1, NCE), triplet=(1.5, TRIPLET_MULTI)),
    "audio": row_sum(nce=(1, NCE), cosine=(1, COSINE), triplet=(1, TRIPLET)),
}
ALL = row_sum(nce=(1, NCE), mse=(1, MSE), rank=(1, RANK), cosine=(1, COSINE), triplet=(1, TRIPLET))
EXPECTED = {
    "dle": MIXED | {"text_pair": row_sum(nce=(1, NCE), mse=(20, MSE), rank=(7, RANK))},
    "mixed": MIXED,
    "nce": dict.fromkeys(TASKS, NCE),
    "sum": dict.fromkeys(TASKS, ALL),
}


def near(values: list[float]) -> object:
    """Expected values in float32."""
    return pytest.approx(values, rel=2e-6, abs=2e-6, nan_ok=True)


def run(loss: MixedLoss, tasks: list[str], scores: Tensor = SCORES, **keys: Tensor | float) -> MixedLossOutput:
    """The loss of the three rows under the given task names."""
    ids = torch.tensor([loss.tasks.index(task) for task in tasks])
    return loss(A, B, ids, scores, **keys)


def random_batch(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unnormalised a, b, and task ids and scores in which every task occurs."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(rows, 5, generator=generator, dtype=dtype)
    b = a + torch.randn(rows, 5, generator=generator, dtype=dtype)
    task_ids = torch.arange(rows) % len(TASKS)
    scores = torch.where(task_ids == 0, torch.rand(rows, generator=generator), NAN)
    return a, b, task_ids, scores


# --- components


def test_nce_averages_both_directions() -> None:
    assert info_nce(S, T).tolist() == near(NCE)


def test_nce_of_one_direction_is_not_the_other() -> None:
    assert NCE_ROWS[2] == pytest.approx(0.09492, abs=1e-5)
    assert NCE_COLUMNS[2] == pytest.approx(1.32656, abs=1e-5)
    assert info_nce(S, T)[2].item() == pytest.approx(0.71074, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nce_of_equal_similarities_is_log_batch_size(value: float) -> None:
    assert info_nce(torch.full((8, 8), value), 0.07).tolist() == near([math.log(8)] * 8)


def test_nce_of_orthogonal_pairs_that_match() -> None:
    # Row and column: e^(1/T) against B - 1 times e^0, T = 0.5, B = 4.
    assert info_nce(torch.eye(4), 0.5).tolist() == near([math.log(math.exp(2) + 3) - 2] * 4)


def test_nce_mask_leaves_out_pairs_in_both_directions_but_never_the_positive() -> None:
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 0] = True  # S_21 = 4: in row 2 and in column 1
    mask.fill_diagonal_(True)
    expected = [
        (math.log(E3 + 1 + E4) - 3 + math.log(E3 + 1) - 3) / 2,
        (math.log(E5 + 1) - 5 + math.log(1 + E5 + 1) - 5) / 2,
        NCE[2],
    ]
    assert info_nce(S, T, mask).tolist() == near(expected)


def test_mse_uses_the_cosine_mapped_to_the_unit_interval() -> None:
    cosines = torch.tensor([1.0, 0.0, -1.0, 0.6, 0.6])
    scores = torch.tensor([0.5, 0.0, 0.0, 0.9, NAN])  # p = 1, 0.5, 0, 0.8
    assert score_mse(cosines, scores).tolist() == near([0.25, 0.25, 0, 0.01, 0])


def test_cosine_distance() -> None:
    assert cosine_distance(torch.tensor([1.0, 0.0, -1.0, 0.6])).tolist() == near([0, 1, 2, 0.4])


def test_triplet_takes_the_hardest_negative_of_side_b() -> None:
    assert hardest_triplet(S, T, 0.2).tolist() == near([1.2, 0, 0])


def test_triplet_margin_may_differ_by_row() -> None:
    # 4 - 3 + 0, 4 - 5 + 1.5, 0 - 3 + 4
    assert hardest_triplet(S, T, torch.tensor([0.0, 1.5, 4.0])).tolist() == near([1, 0.5, 1])


def test_triplet_mask_moves_on_to_the_next_negative() -> None:
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = True
    # Left for row 1: 0 - 3 + 6; row 2: 0 - 5 + 6; row 3: 0 - 3 + 6
    assert hardest_triplet(S, T, 6.0, mask).tolist() == near([3, 1, 3])


def test_a_semi_hard_triplet_takes_the_hardest_negative_below_the_positive() -> None:
    # Row 1 passes over 4 > 3: 0 - 3 + 4; row 2: 4 - 5 + 4; row 3: 0 - 3 + 4
    assert hardest_triplet(S, T, 4.0, semi_hard=True).tolist() == near([1, 3, 1])


def test_a_semi_hard_triplet_takes_the_easiest_negative_where_none_is_below_the_positive() -> None:
    above = torch.tensor([[0.1, 0.3, 0.2], [0.0, 0.5, 0.6], [0.0, 0.0, 0.9]])
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    # Row 1: 0.2 - 0.1 + 0.1; row 2: 0.6 - 0.5 + 0.1, the only one left; row 3 has none.
    assert hardest_triplet(above, 1.0, 0.1, mask, semi_hard=True).tolist() == near([0.2, 0.2, 0])


def test_a_semi_hard_triplet_equal_to_the_positive_is_not_below_it() -> None:
    equal = torch.full((2, 2), 0.5)
    assert hardest_triplet(equal, 1.0, 0.1, semi_hard=True).tolist() == near([0.1, 0.1])


def test_rank_is_the_mean_over_ordered_pairs_at_every_scored_row() -> None:
    cosines = torch.tensor([0.6, 1.0, 0.6])
    assert pairwise_rank(cosines, SCORES, 0.05).tolist() == near(RANK)


def test_rank_leaves_out_rows_without_score() -> None:
    # P = {(1, 2)}: 0.05 - (0.8 - 1) = 0.25; rows 3 and 4 have no score.
    cosines = torch.tensor([0.6, 1.0, 0.6, -1.0])
    assert pairwise_rank(cosines, torch.tensor([0.9, 0.5, NAN, NAN]), 0.05).tolist() == near([0.25, 0.25, 0, 0])


def test_rank_of_the_right_order_by_more_than_the_margin_is_zero() -> None:
    cosines = torch.tensor([0.9, 0.5, 0.1])
    assert pairwise_rank(cosines, SCORES.sort(descending=True).values, 0.05).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], [0.5, NAN, NAN], [NAN, NAN, NAN]])
def test_rank_without_an_ordered_pair_is_zero(scores: list[float]) -> None:
    assert pairwise_rank(torch.tensor([0.6, 1.0, 0.6]), torch.tensor(scores), 0.05).tolist() == [0, 0, 0]


def test_rank_takes_the_margin_of_the_higher_scored_row() -> None:
    # P = {(2, 1)}: m_2 - (0.8 - 1) with m_2 = 0.3
    value = pairwise_rank(torch.tensor([1.0, 0.6]), torch.tensor([0.1, 0.9]), torch.tensor([0.0, 0.3]))
    assert value.tolist() == near([0.5, 0.5])


# --- tables of tasks


@pytest.mark.parametrize("table", EXPECTED)
@pytest.mark.parametrize("task", TASKS)
def test_every_row_of_every_table(table: str, task: str) -> None:
    output = run(MixedLoss(LOSS_TABLES[table], T), [task] * 3)
    assert output.per_sample.tolist() == near(EXPECTED[table][task])
    assert output.loss.item() == pytest.approx(sum(EXPECTED[table][task]) / 3, rel=1e-5)


@pytest.mark.parametrize("table", EXPECTED)
def test_tables_name_the_six_tasks_in_order(table: str) -> None:
    assert list(LOSS_TABLES[table]) == TASKS


def test_fixed_sum_leaves_score_components_out_where_there_is_no_score() -> None:
    output = run(MixedLoss(LOSS_TABLES["sum"], T), ["ocr", "text_pair", "audio"], torch.tensor([NAN, 0.5, 0.7]))
    # P = {(3, 2)}: 0.05 - (0.8 - 1) = 0.25
    base = row_sum(nce=(1, NCE), cosine=(1, COSINE), triplet=(1, TRIPLET))
    assert output.per_sample.tolist() == near([base[0], base[1] + 0.25 + 0.25, base[2] + 0.01 + 0.25])
    assert output.components["mse"].tolist() == near([NAN, 0.25, 0.01])
    assert output.components["rank"].tolist() == near([NAN, 0.25, 0.25])


def test_aliases_of_the_first_paper() -> None:
    names = ["contrastive_with_score", "instruction", "ocr", "my_captions"]
    assert [canonical_task(name) for name in names] == ["text_pair", "instr", "ocr", "my_captions"]


def test_task_loss_from_a_recipe() -> None:
    assert TaskLoss.from_dict({"nce": 1, "triplet": 1.5, "triplet_margin": 0.3}) == LOSS_TABLES["dle"]["vqa_multi"]


def test_task_loss_names_an_unknown_setting_and_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tripelt'.*known: \['nce', 'mse', 'rank', 'cosine', 'triplet', "):
        TaskLoss.from_dict({"nce": 1.0, "tripelt": 1.0})


@pytest.mark.parametrize("field", ["nce", "mse", "rank", "cosine", "triplet", "triplet_margin", "rank_margin"])
@pytest.mark.parametrize("value", [-0.5, NAN, math.inf, "1e-3", True])
def test_task_loss_refuses_what_is_no_weight(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"TaskLoss.{field} is {value!r}"):
        TaskLoss.from_dict({"nce": 1.0} | {field: value})


def test_task_loss_refuses_a_task_without_loss() -> None:
    with pytest.raises(ValueError, match="every weight is 0"):
        TaskLoss(triplet_margin=0.3)


# --- mixed batches


def test_mixed_batch_gives_each_row_its_own_formula_over_all_rows() -> None:
    # One scored row: P is empty, so Rank = 0.
    output = run(MixedLoss(LOSS_TABLES["dle"], T), ["vqa_multi", "text_pair", "instr"])
    expected = [NCE[0] + 1.5 * 1.3, NCE[1] + 20 * 0.25, NCE[2] + 0.4]
    assert output.per_sample.tolist() == near(expected)
    assert output.loss.item() == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_rank_ranks_the_text_pairs_and_nothing_else() -> None:
    # Row 3 is no text_pair though it has a score: P = {(1, 2)}, Rank = 0.25.
    output = run(MixedLoss(LOSS_TABLES["dle"], T), ["text_pair", "text_pair", "ocr"])
    expected = [NCE[0] + 20 * 0.01 + 7 * 0.25, NCE[1] + 20 * 0.25 + 7 * 0.25, NCE[2]]
    assert output.per_sample.tolist() == near(expected)


def test_components_are_unweighted_and_nan_where_not_used() -> None:
    components = run(MixedLoss(LOSS_TABLES["dle"], T), ["vqa_multi", "text_pair", "instr"]).components
    assert {name: values.tolist() for name, values in components.items()} == {
        "nce": near(NCE),
        "mse": near([NAN, 0.25, NAN]),
        "rank": near([NAN, 0, NAN]),
        "cosine": near([NAN, NAN, 0.4]),
        "triplet": near([1.3, NAN, NAN]),
        "distil": near([NAN, NAN, NAN]),
    }


def test_a_declared_task_uses_its_own_margins() -> None:
    loss = MixedLoss({"mine": TaskLoss(rank=2.0, triplet=1.0, rank_margin=0.3, triplet_margin=1.5)}, T)
    # Hinges of P = (1, 2), (1, 3), (3, 2): 0.5, 0.3, 0.5; triplets 4 - 3 + 1.5, 4 - 5 + 1.5, 0
    rank = 2 * 1.3 / 3
    assert run(loss, ["mine"] * 3).per_sample.tolist() == near([rank + 2.5, rank + 0.5, rank])


def test_permuting_the_rows_permutes_the_values() -> None:
    a, b, task_ids, scores = random_batch(12)
    keys = torch.arange(12) // 2
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss = MixedLoss(LOSS_TABLES["dle"])
    plain = loss(normalize(a), normalize(b), task_ids, scores, keys, keys)
    moved = loss(normalize(a[order]), normalize(b[order]), task_ids[order], scores[order], keys[order], keys[order])
    torch.testing.assert_close(moved.per_sample, plain.per_sample[order])
    torch.testing.assert_close(moved.loss, plain.loss)


@pytest.mark.parametrize("table", EXPECTED)
def test_gradient_is_that_of_the_formula(table: str) -> None:
    a, b, task_ids, scores = random_batch(9, torch.float64)
    keys = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 7])
    loss = MixedLoss(LOSS_TABLES[table], weighting=TableWeighting(TASKS))

    def total(a: Tensor, b: Tensor) -> Tensor:
        return loss(normalize(a), normalize(b), task_ids, scores, keys, keys).loss

    assert torch.autograd.gradcheck(total, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("table", EXPECTED)
def test_one_row_alone_has_finite_loss_and_gradient(table: str) -> None:
    for task in range(len(TASKS)):
        a = A[:1].clone().requires_grad_()
        keys = torch.tensor([3])
        output = MixedLoss(LOSS_TABLES[table])(a, B[:1], torch.tensor([task]), SCORES[:1], keys, keys)
        output.loss.backward()
        assert output.components["nce"].item() == 0  # no negative
        assert torch.isfinite(output.loss)
        assert torch.isfinite(a.grad).all()


def test_bfloat16_vectors_are_computed_in_float32_even_under_autocast() -> None:
    a, b, task_ids, scores = random_batch(12)
    a, b = normalize(a).bfloat16(), normalize(b).bfloat16()
    loss = MixedLoss(LOSS_TABLES["dle"])
    expected = loss(a.float(), b.float(), task_ids, scores)
    with torch.autocast("cpu", torch.bfloat16):
        output = loss(a.requires_grad_(), b, task_ids, scores)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.per_sample, expected.per_sample)
    output.loss.backward()
    assert a.grad.dtype == torch.bfloat16
    assert torch.isfinite(a.grad).all()


def test_inputs_are_left_as_they_are() -> None:
    scores = torch.tensor([0.9, 0.2, NAN])
    run(MixedLoss(LOSS_TABLES["sum"], T), ["text_pair"] * 3, scores, a_keys=torch.zeros(3), b_keys=torch.zeros(3))
    assert torch.equal(B, torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.8, 0.0, 0.6]]))
    assert scores.tolist() == near([0.9, 0.2, NAN])


# --- duplicates and low scores


def test_rows_with_the_same_content_are_no_negatives() -> None:
    loss = MixedLoss({"mine": TaskLoss(nce=1.0, triplet=1.0, triplet_margin=6.0)}, T)
    same, distinct = torch.tensor([5, 5, 9]), torch.arange(3)
    for keys in ({"b_keys": same}, {"a_keys": same}, {"a_keys": distinct, "b_keys": same}):
        components = run(loss, ["mine"] * 3, **keys).components
        # Out of S/T fall (1, 2) = 0 and (2, 1) = 4.
        nce = [
            (math.log(E3 + E4) - 3 + math.log(E3 + 1) - 3) / 2,
            (math.log(E5 + 1) - 5 + math.log(E5 + 1) - 5) / 2,
            NCE[2],
        ]
        assert components["nce"].tolist() == near(nce)
        assert components["triplet"].tolist() == near([4 - 3 + 6, 0 - 5 + 6, 0 - 3 + 6])


def test_either_side_makes_a_duplicate() -> None:
    loss = MixedLoss({"mine": TaskLoss(triplet=1.0, triplet_margin=6.0)}, T)
    output = run(loss, ["mine"] * 3, a_keys=torch.tensor([1, 1, 2]), b_keys=torch.tensor([1, 2, 1]))
    # Row 1 has no negative left; row 2 keeps (2, 3) = 0, row 3 keeps (3, 2) = 0.
    assert output.per_sample.tolist() == near([0, 1, 3])


def test_duplicates_stay_negatives_when_switched_off() -> None:
    keys = torch.zeros(3, dtype=torch.long)
    output = run(MixedLoss(LOSS_TABLES["dle"], T, mask_duplicates=False), ["ocr"] * 3, a_keys=keys, b_keys=keys)
    assert output.per_sample.tolist() == near(NCE_TRIPLET)


def test_a_batch_of_one_content_has_no_negatives_and_finite_gradient() -> None:
    a = A.clone().requires_grad_()
    keys = torch.zeros(3, dtype=torch.long)
    output = MixedLoss(LOSS_TABLES["dle"])(a, B, torch.full((3,), 5), SCORES, keys, keys)
    assert output.per_sample.tolist() == near(COSINE)
    output.loss.backward()
    assert torch.isfinite(a.grad).all()


def test_a_low_scored_row_is_no_positive_but_stays_a_negative() -> None:
    scores = torch.tensor([0.49, 0.5, 0.7])
    components = run(MixedLoss(LOSS_TABLES["sum"], T), ["text_pair"] * 3, scores).components
    assert components["nce"].tolist() == near([0, NCE[1], NCE[2]])
    assert components["triplet"].tolist() == near([0, 0, 0])
    assert components["cosine"].tolist() == near([0, 0, 0.4])
    assert components["mse"].tolist() == near([0.31**2, 0.25, 0.01])
    # P = (2, 1), (3, 1), (3, 2); p_i - p_j = 0.2, 0, -0.2; hinges 0, 0.05, 0.25
    assert components["rank"].tolist() == near([0.1, 0.1, 0.1])


def test_low_scores_stay_positives_when_switched_off() -> None:
    loss = MixedLoss(LOSS_TABLES["mixed"], T, nce_min_score=None)
    output = run(loss, ["text_pair"] * 3, torch.tensor([0.0, 0.0, 0.0]))
    assert output.components["nce"].tolist() == near(NCE)


# --- weights in the batch loss


def test_batch_loss_weighs_each_row_by_its_task() -> None:
    loss = MixedLoss(LOSS_TABLES["dle"], T, TableWeighting(TASKS))
    rows = [NCE[0] + 1.5 * 1.3, NCE[1] + 20 * 0.25, NCE[2] + 0.4]
    for epoch, weights in ((0.0, [0.8, 0.25, 1.2]), (1.0, [0.8, 0.22, 1.3])):
        output = run(loss, ["vqa_multi", "text_pair", "instr"], epoch=epoch)
        expected = sum(weight * row for weight, row in zip(weights, rows, strict=True)) / 3
        assert output.loss.item() == pytest.approx(expected, rel=1e-6)
        assert output.per_sample.tolist() == near(rows)


def test_summary_names_the_tasks_present_and_the_components_they_use() -> None:
    loss = MixedLoss(LOSS_TABLES["dle"], T, TableWeighting(TASKS))
    summary = loss.summarise(run(loss, ["instr", "ocr", "instr"], torch.full((3,), NAN)))
    both = NCE[0] + NCE[2] + 2 * 0.4
    by_row = 1.2 * both / 2 + NCE[1]  # of one row of each task
    assert summary == {
        "rows/instr": 2.0,
        "rows/ocr": 1.0,
        "share_per_row/instr": pytest.approx(1.2 * both / 2 / by_row, rel=1e-5),
        "share_per_row/ocr": pytest.approx(NCE[1] / by_row, rel=1e-5),
        "loss/instr": pytest.approx((NCE[0] + NCE[2]) / 2 + 0.4, rel=1e-6),
        "loss/instr/nce": pytest.approx((NCE[0] + NCE[2]) / 2, rel=1e-6),
        "loss/instr/cosine": pytest.approx(0.4, rel=1e-6),
        "weight/instr": pytest.approx(1.2, rel=1e-6),
        "share/instr": pytest.approx(1.2 * both / (1.2 * both + NCE[1]), rel=1e-5),
        "loss/ocr": pytest.approx(NCE[1], rel=1e-5),
        "loss/ocr/nce": pytest.approx(NCE[1], rel=1e-5),
        "loss/ocr/triplet": 0.0,
        "weight/ocr": 1.0,
        "share/ocr": pytest.approx(NCE[1] / (1.2 * both + NCE[1]), rel=1e-5),
    }
    assert json.loads(json.dumps(summary)) == summary


# --- bad input


def test_missing_scores_are_named() -> None:
    with pytest.raises(ValueError, match=r"Tasks \['text_pair'\] need a score.*rows \[1, 2\] of the batch"):
        run(MixedLoss(LOSS_TABLES["mixed"]), ["ocr", "text_pair", "text_pair"], torch.tensor([NAN, NAN, NAN]))


def test_shapes_that_do_not_fit_are_named() -> None:
    loss = MixedLoss(LOSS_TABLES["dle"])
    with pytest.raises(ValueError, match=r"shapes \[\(3, 3\), \(2, 3\), \(3,\), \(3,\)\]"):
        loss(A, B[:2], torch.zeros(3).long(), SCORES)
    with pytest.raises(ValueError, match=r"shapes \[\(0, 3\)"):
        loss(A[:0], B[:0], torch.zeros(0).long(), SCORES[:0])


@pytest.mark.parametrize("task_id", [-1, 6])
def test_unknown_task_ids_are_named(task_id: int) -> None:
    with pytest.raises(ValueError, match=rf"task_ids \[0, {task_id}, 0\] must lie in \[0, 6\)"):
        MixedLoss(LOSS_TABLES["dle"])(A, B, torch.tensor([0, task_id, 0]), SCORES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"nce_min_score": 1.5}, "nce_min_score is 1.5"),
        ({"weighting": TableWeighting(["ocr"])}, r"The weighting is for tasks \['ocr'\]"),
    ],
)
def test_settings_are_validated(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedLoss(LOSS_TABLES["dle"], **settings)


def test_settings_are_no_state() -> None:
    assert not MixedLoss(LOSS_TABLES["dle"], weighting=TableWeighting(TASKS)).state_dict()


def test_score_optional_is_a_setting_of_the_task() -> None:
    strict = {"ocr": replace(LOSS_TABLES["sum"]["ocr"], score_optional=False)}
    with pytest.raises(ValueError, match="need a score"):
        run(MixedLoss(strict), ["ocr"] * 3, torch.full((3,), NAN))


# --- several processes


def test_gather_is_the_identity_on_one_rank() -> None:
    assert gather_sizes([3, 0], A.device) == [[3, 0]]
    assert gather_rows([A, B], [[3, 3]])[0] is A


def joined_loss(model: torch.nn.Module, inputs: Tensor, rest: tuple[Tensor, ...]) -> MixedLossOutput:
    """The mixed loss of the joined batch from this process's rows; inputs are (rows, 2, 5): both sides."""
    a, b = normalize(model(inputs), dim=-1).unbind(dim=1)
    sizes = gather_sizes([len(a)] * 2, a.device)
    joined = gather_rows([a, b], sizes)
    joined += [gather_rows([x], [of_rank[:1] for of_rank in sizes])[0] for x in rest]
    return MixedLoss(LOSS_TABLES["dle"])(*joined)


def linear_model() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Linear(5, 4, dtype=torch.float64)


def joined_batch() -> tuple[Tensor, tuple[Tensor, ...]]:
    a, b, task_ids, scores = random_batch(13, torch.float64)
    keys = torch.arange(13) % 11
    return torch.stack([a, b], dim=1), (task_ids, scores, keys, keys)


def compare_with_one_process(rank: int) -> None:
    """Runs in each of two processes: the gradient DDP leaves must be that of one process with all rows."""
    inputs, rest = joined_batch()
    alone = linear_model()
    expected = MixedLoss(LOSS_TABLES["dle"])(*normalize(alone(inputs), dim=-1).unbind(dim=1), *rest)
    expected.loss.backward()
    for split in (9, 1, 13):  # rows of rank 0; with 13, rank 1 has none
        mine = slice(None, split) if rank == 0 else slice(split, None)
        model = DistributedDataParallel(linear_model())
        output = joined_loss(model, inputs[mine], tuple(x[mine] for x in rest))
        output.loss.backward()
        torch.testing.assert_close(output.per_sample, expected.per_sample, rtol=0, atol=1e-10)
        for found, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-10)


def test_two_processes_with_uneven_rows_have_the_gradient_of_one(tmp_path: Path) -> None:
    run_on_two_ranks(compare_with_one_process, tmp_path)
