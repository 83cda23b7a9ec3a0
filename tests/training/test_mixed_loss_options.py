"""Which candidates count as negatives, temperatures and Matryoshka lengths, against numbers derived by hand.

Three rows: a = the unit axes, b as in test_losses, so that S_kj is coordinate k of b_j; T = 0.2.

          [0.6  0    0.8]              [3 0 4]
    S =   [0.8  1    0  ]    S / T =   [4 5 0]
          [0    0    0.6]              [0 0 3]
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vipolyqwen.data.schema import MODALITY_PAIRS
from vipolyqwen.training.losses import LOSS_TABLES, TaskLoss
from vipolyqwen.training.mixed_loss import HardNegatives, MixedLoss
from vipolyqwen.training.weighting import build_weighting

T = 0.2
A = torch.eye(3)
B = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.8, 0.0, 0.6]])
NO_SCORES = torch.full((3,), math.nan)
NCE, TRIPLET = TaskLoss(nce=1.0), TaskLoss(triplet=1.0)
E3, E4, E5 = math.exp(3), math.exp(4), math.exp(5)


def near(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-5, abs=1e-6)


def values(task: TaskLoss, inputs: dict | None = None, **settings: object) -> list[float]:
    """Loss of each of the three rows."""
    settings = {"temperature": T, **settings}
    loss = MixedLoss({"ocr": task}, **settings)
    return loss(A, B, torch.zeros(3).long(), NO_SCORES, **(inputs or {})).per_sample.tolist()


def nce(row: list[float], column: list[float]) -> float:
    """NCE of a row from its logits and its column's, the positive first in each."""
    return 0.5 * sum(math.log(sum(map(math.exp, logits))) - logits[0] for logits in (row, column))


# --- false negatives


def test_a_negative_more_similar_than_the_positive_by_the_margin_is_left_out() -> None:
    # By row: 0.8 > 0.6 + 0.1 in row 1. By column: 0.8 > 0.6 + 0.1 in columns 1 and 3.
    expected = [nce([3, 0], [3, 0]), nce([5, 4, 0], [5, 0, 0]), nce([3, 0, 0], [3, 0])]
    assert values(NCE, false_negative_margin=0.1) == near(expected)
    assert values(TRIPLET, false_negative_margin=0.1) == near([0, 0, 0])  # row 1: 0 - 3 + 0.2


def test_a_wide_margin_leaves_nothing_out() -> None:
    assert values(NCE, false_negative_margin=0.21) == near(values(NCE))
    assert values(TRIPLET, false_negative_margin=0.21) == near([4 - 3 + 0.2, 0, 0])


# --- groups


def test_semi_hard_negatives_are_chosen_by_name() -> None:
    hard = TaskLoss(triplet=1.0, triplet_margin=4.0)
    assert values(hard) == near([4 - 3 + 4, 4 - 5 + 4, 0 - 3 + 4])
    assert values(hard, triplet_negatives="semi_hard") == near([0 - 3 + 4, 4 - 5 + 4, 0 - 3 + 4])


def test_rows_of_one_group_are_no_negatives_and_rows_without_group_are() -> None:
    groups = torch.tensor([7, 0, 7])
    expected = [nce([3, 0], [3, 4]), nce([5, 4, 0], [5, 0, 0]), nce([3, 0], [3, 0])]
    assert values(NCE, {"groups": groups}) == near(expected)
    assert values(NCE, {"groups": torch.zeros(3).long()}) == near(values(NCE))
    assert values(NCE, {"groups": groups}, mask_groups=False) == near(values(NCE))


# --- hard negatives


def negatives(owners: list[int], keys: list[int] | None = None) -> HardNegatives:
    """One hard negative (0, 0.6, 0.8) for each owner: S = 0, 0.6, 0.8 and logits 0, 3, 4 against rows 1, 2, 3."""
    vectors = torch.tensor([[0.0, 0.6, 0.8]]).expand(len(owners), 3)
    return HardNegatives(vectors, torch.tensor(owners), None if keys is None else torch.tensor(keys))


def test_a_hard_negative_is_a_candidate_of_every_row_and_of_no_column() -> None:
    expected = [nce([3, 0, 4, 0], [3, 4, 0]), nce([5, 4, 0, 3], [5, 0, 0]), nce([3, 0, 0, 4], [3, 4, 0])]
    assert values(NCE, {"negatives": negatives([2])}) == near(expected)
    assert values(TRIPLET, {"negatives": negatives([2])}) == near([1.2, 0, 4 - 3 + 0.2])


def test_a_hard_negative_with_the_content_of_a_positive_is_no_negative_of_that_row() -> None:
    inputs = {"negatives": negatives([2], [11]), "b_keys": torch.tensor([10, 11, 12])}
    expected = [nce([3, 0, 4, 0], [3, 4, 0]), nce([5, 4, 0], [5, 0, 0]), nce([3, 0, 0, 4], [3, 4, 0])]
    assert values(NCE, inputs) == near(expected)


def test_a_hard_negative_counts_for_its_own_row_but_not_for_others_of_the_group() -> None:
    inputs = {"negatives": negatives([2]), "groups": torch.tensor([0, 7, 7])}
    expected = [nce([3, 0, 4, 0], [3, 4, 0]), nce([5, 4], [5, 0]), nce([3, 0, 4], [3, 4])]
    assert values(NCE, inputs) == near(expected)


# --- temperature


def test_each_row_has_the_temperature_of_its_own_pair_of_modalities() -> None:
    temperature = {"text-text": 0.2, "image-text": 0.1, "audio-text": 0.4}
    inputs = {"modalities": torch.tensor([0, 1, 2])}
    expected = [nce([3, 0, 4], [3, 4, 0]), nce([10, 8, 0], [10, 0, 0]), nce([1.5, 0, 0], [1.5, 2, 0])]
    assert values(NCE, inputs, temperature=temperature) == near(expected)
    assert values(TRIPLET, inputs, temperature=temperature) == near([1.2, 0, 0])


def test_a_pair_without_text_shares_a_temperature_unless_it_has_one() -> None:
    three = {"text-text": 0.2, "image-text": 0.1, "audio-text": 0.4}
    shared = {"image-image": 0.1, "audio-image": 0.4, "audio-audio": 0.4}
    inputs = {"modalities": torch.tensor([MODALITY_PAIRS.index(pair) for pair in shared])}
    wanted = values(NCE, inputs, temperature={**three, **shared})
    assert values(NCE, inputs, temperature=three) == near(wanted)
    assert values(NCE, inputs, temperature={**three, "audio-image": 0.3}) != near(wanted)
    learned = MixedLoss({"ocr": NCE}, three, learnable_temperature=True)
    assert learned.log_temperatures.shape == (3,)  # as in checkpoints of before
    assert learned.figures.names[-3:] == [f"temperature/{pair}" for pair in three]


def test_temperatures_by_pair_need_the_modalities() -> None:
    with pytest.raises(ValueError, match="give the loss `modalities`"):
        values(NCE, temperature={"text-text": 0.2, "image-text": 0.1, "audio-text": 0.4})


def test_a_learned_temperature_starts_there_and_gets_the_gradient_of_nce_alone() -> None:
    loss = MixedLoss({"ocr": TaskLoss(nce=1.0, triplet=1.0)}, temperature=T, learnable_temperature=True)
    output = loss(A, B, torch.zeros(3).long(), NO_SCORES)
    plain = MixedLoss({"ocr": TaskLoss(nce=1.0, triplet=1.0)}, temperature=T)(A, B, torch.zeros(3).long(), NO_SCORES)
    assert output.loss.item() == pytest.approx(plain.loss.item())
    output.loss.backward()

    def mean_nce(log_temperature: float) -> float:
        return sum(values(NCE, temperature=math.exp(log_temperature))) / 3

    slope = (mean_nce(math.log(T) + 1e-2) - mean_nce(math.log(T) - 1e-2)) / 2e-2
    assert loss.log_temperatures.grad.item() == pytest.approx(slope, rel=1e-3)
    assert loss.summarise(output)["temperature"] == pytest.approx(T)


def test_a_learned_temperature_stays_above_its_floor() -> None:
    loss = MixedLoss({"ocr": NCE}, temperature=0.01, learnable_temperature=True)
    loss.log_temperatures.data.fill_(math.log(1e-4))  # as an update may leave it
    learned = loss(A, B, torch.zeros(3).long(), NO_SCORES).per_sample.tolist()
    assert learned == near(values(NCE, temperature=0.01))


@pytest.mark.parametrize(("left", "bound"), [(1e-4, 0.01), (1e6, 100.0)])
def test_a_learned_temperature_comes_back_from_its_bounds(left: float, bound: float) -> None:
    loss = MixedLoss({"ocr": NCE}, learnable_temperature=True)
    loss.log_temperatures.data.fill_(math.log(left))
    loss.keep_bounds()
    output = loss(A, B, torch.zeros(3).long(), NO_SCORES)
    assert loss.summarise(output)["temperature"] == pytest.approx(bound)
    output.loss.backward()
    assert loss.log_temperatures.grad.item() != 0


# --- Matryoshka


def test_the_loss_is_the_mean_over_the_lengths_of_the_vectors_beginnings() -> None:
    # First two numbers at unit length: a = e1, e2, 0; b = (0.6, 0.8), (0, 1), (1, 0): S = [.6 0 1], [.8 1 0], [0 0 0]
    short = [nce([3, 0, 5], [3, 4, 0]), nce([5, 4, 0], [5, 0, 0]), nce([0, 0, 0], [0, 5, 0])]
    expected = [(one + other) / 2 for one, other in zip(short, values(NCE), strict=True)]
    assert values(NCE, matryoshka_dims=[2, 3]) == near(expected)


def test_the_whole_length_alone_is_the_plain_loss() -> None:
    assert values(NCE, matryoshka_dims=[3]) == near(values(NCE))


# --- all together

OPTIONS = {
    "temperature": {"text-text": 0.2, "image-text": 0.1, "audio-text": 0.3},
    "learnable_temperature": True,
    "false_negative_margin": 0.05,
    "triplet_negatives": "semi_hard",
    "matryoshka_dims": [8, 4],
    "weighting": "gradnorm",
}


def random_batch(rows: int, extra: int) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    a, b = (normalize(torch.randn(rows, 8, generator=generator), dim=1).requires_grad_() for _ in range(2))
    vectors = normalize(torch.randn(extra, 8, generator=generator), dim=1)
    task_ids, keys = torch.arange(rows) % 6, torch.arange(rows) // 2
    scores = torch.where(task_ids == 0, 0.8, math.nan)
    inputs = {
        "groups": torch.arange(rows) // 3,
        "modalities": torch.arange(rows) % 3,
        "negatives": HardNegatives(vectors, torch.arange(extra) % rows, torch.arange(extra)),
        "with_gradients": True,
    }
    return (a, b, task_ids, scores, keys, keys + 100), inputs


@pytest.mark.parametrize(
    "chosen", [names for size in (1, 2, len(OPTIONS)) for names in itertools.combinations(OPTIONS, size)], ids="+".join
)
def test_options_compose(chosen: tuple[str, ...]) -> None:
    settings: dict = {name: OPTIONS[name] for name in chosen}
    if "weighting" in settings:
        settings["weighting"] = build_weighting("gradnorm", list(LOSS_TABLES["dle"]))
    loss = MixedLoss(LOSS_TABLES["dle"], **settings)
    batch, inputs = random_batch(12, 5)
    output = loss(*batch, **inputs)
    output.loss.backward()
    assert batch[0].grad.isfinite().all() and batch[0].grad.any()
    assert output.loss.item() == pytest.approx((output.task_weights * output.parts).sum().item(), rel=1e-5)
    assert sum(value for name, value in loss.summarise(output).items() if name.startswith("gradient_share/")) == (
        pytest.approx(1.0)
    )


def test_row_order_does_not_matter_under_all_options() -> None:
    batch, inputs = random_batch(12, 5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    back = order.argsort()

    def run(change: Callable[[Tensor], Tensor], owners: Tensor) -> Tensor:
        loss = MixedLoss(LOSS_TABLES["dle"], **{name: OPTIONS[name] for name in OPTIONS if name != "weighting"})
        moved = {name: change(inputs[name]) for name in ("groups", "modalities")}
        given = inputs["negatives"]
        moved["negatives"] = HardNegatives(given.vectors, owners, given.keys)
        return loss(*(change(x) for x in batch), **moved).per_sample

    owners = inputs["negatives"].owners
    torch.testing.assert_close(run(lambda x: x[order], back[owners]), run(lambda x: x, owners)[order])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": {"text-text": 0.1}}, "missing image-text, audio-text; give one for text-text, "),
        ({"temperature": {"text-text": 0.1, "image": 0.1}}, "unknown image; give one for text-text, image-text, "),
        ({"temperature": {"text-text": 0.1, "image-text": 0, "audio-text": 1}}, "image-text: temperature is 0"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"triplet_negatives": "easy"}, "`triplet_negatives` is 'easy'"),
        ({"false_negative_margin": -0.1}, "false_negative_margin is -0.1"),
        ({"matryoshka_dims": []}, r"matryoshka_dims is \[\]"),
        ({"matryoshka_dims": [0, 8]}, r"matryoshka_dims is \[0, 8\]"),
        ({"matryoshka_dims": [2.5]}, r"matryoshka_dims is \[2.5\]"),
    ],
)
def test_options_are_validated(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixedLoss(LOSS_TABLES["dle"], **settings)


def test_a_matryoshka_length_beyond_the_vector_is_named() -> None:
    with pytest.raises(ValueError, match="matryoshka_dims has 4, but the vectors have 3"):
        values(NCE, matryoshka_dims=[4])
