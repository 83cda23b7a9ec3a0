"""Task weightings against numbers derived by hand."""

import math
from dataclasses import replace

import pytest
import torch

from vipolyqwen.training.losses import LOSS_TABLES, TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss, gradient_gram
from vipolyqwen.training.weighting import (
    WEIGHTINGS,
    GradNormWeighting,
    InverseLossWeighting,
    TableWeighting,
    TaskWeighting,
    UncertaintyWeighting,
    build_weighting,
)

NAN = math.nan
TASKS = ["text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio"]
PAPER_TASKS = TASKS[:5]


def near(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-5, abs=1e-6)


def observe(weighting: TaskWeighting, losses: list[float], norms: list[float] | None = None) -> None:
    """Shows a batch; NaN marks a task that has no rows in it."""
    values = torch.tensor(losses)
    given = None if norms is None else torch.tensor(norms)
    weighting.observe(values.nan_to_num(), ~values.isnan(), given)


# --- table


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, [0.25, 1.2, 1.0, 1.0, 0.8, 1.0]),
        (0.99, [0.25, 1.2, 1.0, 1.0, 0.8, 1.0]),
        (1, [0.22, 1.3, 1.2, 1.0, 0.8, 1.0]),
        (2.5, [0.22, 1.3, 1.2, 1.0, 0.8, 1.0]),
    ],
)
def test_published_weights_by_epoch(epoch: float, expected: list[float]) -> None:
    assert WEIGHTINGS["table"](TASKS)(epoch).tolist() == near(expected)


def test_no_weighting_and_tasks_the_table_does_not_name_have_weight_one() -> None:
    assert WEIGHTINGS["none"](TASKS)(0).tolist() == [1.0] * 6
    assert TableWeighting(["photo_caption", "instr"])(1).tolist() == near([1.0, 1.3])


def test_own_table_with_aliases_and_text_keys() -> None:
    weighting = TableWeighting(["text_pair", "ocr"], {"0": {"contrastive_with_score": 0.5}, "3": {"ocr": 2}})
    assert weighting(2.9).tolist() == [0.5, 1.0]
    assert weighting(3).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({0: {"orc": 1.0}}, r"epoch 0: unknown task 'orc'; known: \['text_pair', 'instr', "),
        ({0: {}, 1: {"ocr": -1.0}}, r"epoch 1: 'ocr' is -1.0"),
        ({0: {"ocr": NAN}}, r"epoch 0: 'ocr' is nan"),
        ({-1: {}}, r"epoch -1 must be an integer"),
        ({1: {}}, r"rows for epochs \[1\]; it needs a row for epoch 0"),
    ],
)
def test_own_table_is_validated(table: dict[int, dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableWeighting(TASKS, table)


# --- inverse_loss


def test_the_published_formula_gives_0_137_for_text_pair_and_not_the_published_0_25() -> None:
    # mean of 4.25, 0.9, 1.1, 1.3, 1.3 is 1.77; 1.77 / 4.25 * 0.30 * 1.1 = 0.13743
    weights = InverseLossWeighting(PAPER_TASKS)(0).tolist()
    assert weights[0] == pytest.approx(0.137, abs=5e-4)
    instr = 1.77 / 0.9 * 1.2 * 1.1  # 2.596
    ocr = 1.77 / 1.1 * 1.05 * 1.1  # 1.8585
    vqa = 1.77 / 1.3 * 1.05 * 1.1  # 1.5726
    assert weights[1:] == near([instr, ocr, vqa, vqa])
    assert TableWeighting(PAPER_TASKS)(0)[0].item() == 0.25


def test_from_epoch_one_beta_is_0_9() -> None:
    weighting = InverseLossWeighting(PAPER_TASKS)
    assert (weighting(1) / weighting(0.99)).tolist() == near([0.9 / 1.1] * 5)


def test_a_task_that_the_paper_does_not_know_has_weight_one_and_moves_no_other() -> None:
    assert InverseLossWeighting(TASKS)(0).tolist() == near([*InverseLossWeighting(PAPER_TASKS)(0).tolist(), 1.0])


def test_measured_losses_replace_the_published_ones() -> None:
    weighting = InverseLossWeighting(["ocr", "mine", "late"], "ema", decay=0.5, alpha={"ocr": 2.0}, beta=(1.0, 1.0))
    assert weighting(0).tolist() == [1.0, 1.0, 1.0]  # nothing measured yet
    observe(weighting, [4.0, 1.0, NAN])
    # mean 2.5: 2.5 / 4 * 2 and 2.5 / 1
    assert weighting(0).tolist() == near([1.25, 2.5, 1.0])
    observe(weighting, [2.0, NAN, NAN])
    # running losses 0.5 * 4 + 0.5 * 2 = 3 and 1, mean 2: 2 / 3 * 2 and 2 / 1
    assert weighting(0).tolist() == near([4 / 3, 2.0, 1.0])


def test_a_loss_of_zero_gives_a_finite_weight() -> None:
    weighting = InverseLossWeighting(["ocr", "mine"], "ema", beta=(1.0, 1.0), alpha={"ocr": 1.0})
    observe(weighting, [0.0, 2.0])
    assert weighting(0).tolist() == near([100.0, 0.5])  # ocr counts as mean / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "median"}, "baseline is 'median'"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"alpha": {"orc": 1.0}}, "alpha: unknown task 'orc'"),
        ({"alpha": {"ocr": -1.0}}, "alpha: 'ocr' is -1.0"),
        ({"losses": {"ocr": NAN}}, "losses: 'ocr' is nan"),
        ({"beta": [1.0]}, r"beta is \[1.0\]; give two numbers"),
        ({"baseline": "ema", "losses": {"ocr": 1.0}}, "'ema' measures them"),
        ({"bseline": "ema"}, "options` for 'inverse_loss'.*bseline"),
    ],
)
def test_options_of_inverse_loss_are_validated(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_weighting("inverse_loss", TASKS, options)


def test_an_unknown_weighting_is_named() -> None:
    with pytest.raises(
        ValueError, match="`task_weighting` is 'gradnrom'; it must be one of none, table, inverse_loss"
    ):
        build_weighting("gradnrom", TASKS)


# --- uncertainty


def test_uncertainty_starts_at_one_and_its_gradient_is_that_of_the_formula() -> None:
    # L = (2/3) [e^-s1 l1 + s1/2] + (1/3) [e^-s2 l2 + s2/2]; at s = 0 dL/ds1 = 2/3 (1/2 - l1)
    weighting = UncertaintyWeighting(["ocr", "mine"])
    loss = MixedLoss({"ocr": TaskLoss(cosine=1.0), "mine": TaskLoss(cosine=1.0)}, weighting=weighting)
    a, b = torch.eye(3), torch.tensor([[0.6, 0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    output = loss(a, b, torch.tensor([0, 0, 1]), torch.full((3,), NAN))
    assert weighting(0).tolist() == [1.0, 1.0]
    assert output.loss.item() == pytest.approx(0.8 / 3)  # cosine losses 0.4, 0.4, 0
    output.loss.backward()
    assert weighting.log_variances.grad.tolist() == near([2 / 3 * (0.5 - 0.4), 1 / 3 * 0.5])


def test_uncertainty_settles_where_the_weight_is_half_the_inverse_loss() -> None:
    weighting = UncertaintyWeighting(["ocr"])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (weighting(0) * 4.0 + weighting.penalty()).sum().backward()
        optimizer.step()
    assert weighting(0).tolist() == near([1 / 8])


# --- gradnorm


def test_one_gradnorm_step_is_the_hand_derived_one() -> None:
    weighting = GradNormWeighting(["x", "y"], alpha=0.0, learning_rate=0.1)
    observe(weighting, [1.0, 1.0], [3.0, 1.0])
    # G = (3, 1), mean 2: signs (+, -), steps 0.1 * (1.5, -0.5): weights e^-0.15, e^0.05, scaled to sum 2
    one, other = math.exp(-0.15), math.exp(0.05)
    assert weighting(0).tolist() == near([2 * one / (one + other), 2 * other / (one + other)])


def test_gradnorm_with_alpha_favours_the_task_that_trains_slowly() -> None:
    weighting = GradNormWeighting(["slow", "fast"], alpha=1.5, learning_rate=0.1)
    observe(weighting, [1.0, 1.0], [1.0, 1.0])  # equal in all: no step
    assert weighting(0).tolist() == near([1.0, 1.0])
    observe(weighting, [1.0, 0.25], [1.0, 1.0])  # rates (1, 0.25) / 0.625: targets 1.6^1.5, 0.4^1.5
    one, other = math.exp(0.1), math.exp(-0.1)
    assert weighting(0).tolist() == near([2 * one / (one + other), 2 * other / (one + other)])


def test_gradnorm_leaves_an_absent_task_alone_and_equalises_the_others() -> None:
    weighting = GradNormWeighting(["x", "absent", "y"], alpha=0.0, learning_rate=0.05)
    for _ in range(300):
        observe(weighting, [1.0, NAN, 1.0], [20.0, 0.0, 1.0])
    x, absent, y = weighting(0).tolist()
    assert absent == 1.0
    assert x * 20 == pytest.approx(y, rel=0.15)
    assert x + y == pytest.approx(2.0)


def test_gradnorm_needs_gradients() -> None:
    with pytest.raises(ValueError, match="no gradient norms"):
        observe(GradNormWeighting(["x"]), [1.0])


# --- gradients of tasks


def test_the_gram_matrix_is_that_of_each_tasks_own_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(8, 5, generator=generator), dim=1) for _ in range(2))
    task_ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    scores = torch.tensor([0.9, NAN, NAN, NAN, NAN, NAN, 0.2, NAN])
    loss = MixedLoss(LOSS_TABLES["dle"])
    gradients = []
    for task in range(len(TASKS)):
        one, other = a.clone().requires_grad_(), b.clone().requires_grad_()
        loss(one, other, task_ids, scores).parts[task].backward()
        gradients.append(torch.cat([one.grad, other.grad]).flatten())
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    output = loss(a.requires_grad_(), b.requires_grad_(), task_ids, scores, with_gradients=True)
    torch.testing.assert_close(output.gradient_gram, expected, rtol=1e-5, atol=1e-7)
    assert a.grad is None  # measuring leaves no trace


def test_shares_norms_and_cosines_of_a_case_done_by_hand() -> None:
    # parts 3 x and (y1 + y2) of embeddings x = (x1, x2), y = (y1, y2): gradients (3, 0, 0, 0) and (0, 0, 1, 1)
    x, y = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    gram = gradient_gram(torch.stack([3 * x[0, 0], y.sum()]), (x, y))
    assert gram.tolist() == [[9.0, 0.0], [0.0, 2.0]]
    loss = MixedLoss({"ocr": TaskLoss(nce=1.0), "mine": TaskLoss(nce=1.0)})
    unit = torch.eye(3, requires_grad=True)
    output = loss(unit, unit, torch.tensor([0, 1, 1]), torch.full((3,), NAN))
    output = replace(output, gradient_gram=gram, task_weights=torch.tensor([1.0, 2.0]))
    both, by_row = 3 + 2 * math.sqrt(2), 3 + math.sqrt(2)
    assert {name: value for name, value in loss.summarise(output).items() if name.startswith("gradient_")} == {
        "gradient_norm/ocr": 3.0,
        "gradient_norm/mine": pytest.approx(2 * math.sqrt(2)),
        "gradient_share/ocr": pytest.approx(3 / both),
        "gradient_share/mine": pytest.approx(2 * math.sqrt(2) / both),
        "gradient_share_per_row/ocr": pytest.approx(3 / by_row),
        "gradient_share_per_row/mine": pytest.approx(math.sqrt(2) / by_row),
        "gradient_cosine/ocr/mine": 0.0,
    }


@pytest.mark.parametrize("name", ["inverse_loss", "uncertainty", "gradnorm"])
def test_a_weighting_in_the_mixed_loss_goes_on_from_its_saved_state(name: str) -> None:
    options = {"baseline": "ema"} if name == "inverse_loss" else {}

    def build() -> MixedLoss:
        return MixedLoss(LOSS_TABLES["mixed"], weighting=build_weighting(name, TASKS, options))

    def step(loss: MixedLoss, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1) for _ in range(2))
        output = loss(a.requires_grad_(), b, torch.arange(12) % 6, torch.full((12,), 0.7))
        output.loss.backward()
        for parameter in loss.parameters():
            parameter.data -= parameter.grad
            parameter.grad = None
        return output.loss.item()

    whole = build()
    for seed in range(4):
        step(whole, seed)
    expected = step(whole, 4)
    stopped, resumed = build(), build()
    for seed in range(4):
        step(stopped, seed)
    resumed.load_state_dict(stopped.state_dict())
    assert step(resumed, 4) == expected
    assert step(build(), 4) != pytest.approx(expected, rel=1e-6)


def test_evaluation_and_a_batch_that_is_not_finite_teach_a_weighting_nothing() -> None:
    loss = MixedLoss(
        {"ocr": TaskLoss(nce=1.0)}, weighting=build_weighting("inverse_loss", ["ocr"], {"baseline": "ema"})
    )
    a, b = torch.eye(3), torch.eye(3).roll(1, 0)
    batch = (torch.zeros(3).long(), torch.full((3,), NAN))
    loss.eval()
    loss(a, b, *batch)
    loss.train()
    loss(a * NAN, b, *batch)
    assert loss.weighting.losses.isnan().all()
    loss(a, b, *batch)
    assert loss.weighting.losses.isfinite().all()
