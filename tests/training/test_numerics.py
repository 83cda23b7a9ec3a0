"""Extreme batches through every pooling and every loss: values and gradients stay finite."""

import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.pooling_vipolyqwen import POOLING_CLASSES, LinearProjection, unit_vectors
from vipolyqwen.training.distillation import Distillation, Teaching
from vipolyqwen.training.losses import LOSS_TABLES, TEMPERATURES, TaskLoss
from vipolyqwen.training.mixed_loss import LOWEST_TEMPERATURE, MixedLoss
from vipolyqwen.training.weighting import WEIGHTINGS, UncertaintyWeighting, build_weighting

NAN = math.nan
ROWS, POSITIONS, WIDTH = 6, 5, 8
TASKS = list(LOSS_TABLES["dle"])
LOSSES = {name: LOSS_TABLES[name] for name in ("dle", "nce", "sum")}  # every component, alone and in sums
LOSSES |= {name: dict.fromkeys(TASKS, TaskLoss(**{name: 1.0})) for name in ("cosine", "triplet", "distil")}
LOSSES |= {name: dict.fromkeys(TASKS, TaskLoss(**{name: 1.0}, score_optional=True)) for name in ("mse", "rank")}
WAYS = ((torch.float32, False), (torch.float16, True), (torch.bfloat16, False))  # dtype, whether packed
COLDEST, HOTTEST = TEMPERATURES


class Batch:
    """Hidden states (2 · ROWS, POSITIONS, WIDTH) of sides a, then b; mask, task ids, scores, settings of the loss."""

    def __init__(self, **settings: object) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(2 * ROWS, POSITIONS, WIDTH, generator=generator)
        self.mask = torch.rand(2 * ROWS, POSITIONS, generator=generator) > 0.3
        self.mask[:, 0] = True
        self.task_ids = torch.arange(ROWS) % len(TASKS)
        self.scores = torch.rand(ROWS, generator=generator)
        self.settings, self.inputs = settings, {}

    def set(self, **values: object) -> "Batch":
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def first(self, rows: int) -> "Batch":
        """The first pairs alone."""
        chosen = torch.cat([torch.arange(rows), ROWS + torch.arange(rows)])
        parts = {"hidden": self.hidden[chosen], "mask": self.mask[chosen]}
        return self.set(task_ids=self.task_ids[:rows], scores=self.scores[:rows], **parts)


def masked(rows: slice) -> Batch:
    batch = Batch()
    batch.mask[rows] = False
    return batch


def same(content: float | None = None) -> Batch:
    """Every position of every row alike."""
    batch = Batch()
    batch.hidden[:] = batch.hidden[0, 0].clone() if content is None else content
    return batch


def everything_masked() -> Batch:
    """No row has a negative."""
    keys = torch.ones(ROWS, dtype=torch.long)
    return Batch().set(inputs={"a_keys": keys, "b_keys": keys, "groups": keys})


CASES = {
    "one side without any position": lambda: masked(slice(0, 1)),
    "no row has a position": lambda: masked(slice(None)),
    "coldest temperature": lambda: Batch(temperature=COLDEST),
    "coldest learnable temperature": lambda: Batch(temperature=LOWEST_TEMPERATURE, learnable_temperature=True),
    "hottest temperature": lambda: Batch(temperature=HOTTEST, learnable_temperature=True),
    "zero vectors": lambda: same(0.0),
    "zero vectors, lengths of Matryoshka": lambda: same(0.0).set(settings={"matryoshka_dims": [WIDTH, 2]}),
    "all rows alike": same,
    "all rows alike and cold": lambda: same().set(settings={"temperature": COLDEST}),
    "large states": lambda: same(3e4),
    "every negative masked": everything_masked,
    "every negative a false one": lambda: same().set(settings={"false_negative_margin": 0.0}),
    "one task, five absent": lambda: Batch().set(task_ids=torch.full((ROWS,), 2)),
    "equal scores: no ordered pair": lambda: Batch().set(scores=torch.full((ROWS,), 0.5)),
    "the score is the threshold": lambda: Batch(nce_min_score=0.7).set(scores=torch.full((ROWS,), 0.7)),
    "every score below the threshold": lambda: Batch(nce_min_score=1.0).set(scores=torch.zeros(ROWS)),
    "one row": lambda: Batch().first(1),
    "one row without any position": lambda: masked(slice(None)).first(1),
}


def embed(batch: Batch, pooling: torch.nn.Module, projection: torch.nn.Module, states: Tensor, packed: bool) -> Tensor:
    pooled, weights = pooling(states[batch.mask] if packed else states, batch.mask)
    assert pooled.dtype == states.dtype and weights.isfinite().all()
    return unit_vectors(projection(pooled).float())


def leaves(
    batch: Batch, pooling: str, table: str, dtype: torch.dtype, packed: bool, block_rows: int | None
) -> Iterator[tuple[str, Tensor]]:
    """Name and gradient of everything that the loss of a batch moves, after a check of the loss itself."""
    torch.manual_seed(0)
    pool, projection = POOLING_CLASSES[pooling](WIDTH), LinearProjection(WIDTH, WIDTH).to(dtype)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    states = batch.hidden.to(dtype).requires_grad_()
    a, b = embed(batch, pool.to(dtype), projection, states, packed).chunk(2)
    options: dict = {"block_rows": block_rows}
    if table == "distil":
        options["distillation"] = Distillation().connect(WIDTH, 3)
        batch.inputs["teaching"] = Teaching(torch.ones(2 * len(a), 3), torch.arange(2 * len(a)))
    loss = MixedLoss(LOSSES[table], **{**options, **batch.settings})
    output = loss(a, b, batch.task_ids, batch.scores, **batch.inputs, with_gradients=True)
    assert output.loss.isfinite()
    measured, figures = loss.measure(output)
    assert measured.isfinite() and not figures.isinf().any()
    output.loss.backward()
    yield "states", states.grad
    for module in (pool, projection, loss):
        yield from ((name, value.grad) for name, value in module.named_parameters() if value.grad is not None)


@pytest.mark.parametrize("table", LOSSES)
@pytest.mark.parametrize("pooling", POOLING_CLASSES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_extreme_batches_are_finite(case: str, pooling: str, table: str) -> None:
    way = list(LOSSES).index(table) + list(POOLING_CLASSES).index(pooling)  # each loss and each pooling in every way
    dtype, packed = WAYS[way % len(WAYS)]
    block_rows = (None, 4)[way % 2]
    for name, gradient in leaves(CASES[case](), pooling, table, dtype, packed, block_rows):
        assert gradient.isfinite().all(), f"{name} in {dtype}, packed: {packed}, blocks: {block_rows}"


@pytest.mark.parametrize("pooling", POOLING_CLASSES)
def test_a_row_without_positions_is_pooled_to_zeros_and_changes_no_other(pooling: str) -> None:
    batch = masked(slice(0, 1))
    pool = POOLING_CLASSES[pooling](WIDTH)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    for packed in (False, True):
        pooled, weights = pool(batch.hidden[batch.mask] if packed else batch.hidden, batch.mask)
        assert not pooled[0].any() and not weights[0].any()
        others, _ = pool(batch.hidden[1:][batch.mask[1:]] if packed else batch.hidden[1:], batch.mask[1:])
        assert torch.equal(pooled[1:], others)


@pytest.mark.parametrize("pooling", POOLING_CLASSES)
def test_pooling_computes_in_float32_under_autocast(pooling: str) -> None:
    batch = Batch()
    pool = POOLING_CLASSES[pooling](WIDTH)
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter)
    wanted = pool(batch.hidden, batch.mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = pool(batch.hidden, batch.mask)
    assert all(map(torch.equal, found, wanted))


def test_attention_scores_do_not_overflow_float16() -> None:
    pool = POOLING_CLASSES["attention"](WIDTH).half()
    torch.nn.init.constant_(pool.query, 300.0)
    hidden = torch.full((1, 2, WIDTH), 300.0, dtype=torch.float16)  # scores of 720,000; float16 ends at 65,504
    pooled, weights = pool(hidden, torch.ones(1, 2, dtype=torch.bool))
    assert weights.tolist() == [[0.5, 0.5]] and torch.equal(pooled, hidden[:, 0])


def test_a_zero_vector_stays_zero_without_gradient_and_others_get_length_1() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1e-9, 0.0]], requires_grad=True)
    found = unit_vectors(vectors)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]))
    found.sum().backward()
    assert vectors.grad[0].tolist() == [0, 0] == vectors.grad[2].tolist() and vectors.grad[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("threshold", "score", "is_positive"), [(0.7, 0.7, True), (0.3, 0.3, True), (0.7, 0.69, False)]
)
def test_a_score_of_the_threshold_is_positive(
    threshold: float, score: float, is_positive: bool, dtype: torch.dtype
) -> None:
    loss = MixedLoss({"ocr": TaskLoss(cosine=1.0)}, nce_min_score=threshold)
    a, b = torch.eye(2, dtype=dtype), torch.eye(2, dtype=dtype).flip(0)
    values = loss(a, b, torch.zeros(2).long(), torch.full((2,), score)).per_sample
    assert values.tolist() == [float(is_positive)] * 2


@pytest.mark.parametrize("value", [0, -1.0, 1e-38, COLDEST / 2, HOTTEST * 2, 1e30, math.inf, NAN, True, "0.1"])
def test_temperatures_out_of_range_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=rf"temperature is {re.escape(repr(value))}.*from 0.001 to 100"):
        MixedLoss(LOSS_TABLES["dle"], temperature=value)
    with pytest.raises(ValueError, match=rf"teacher_temperature is {re.escape(repr(value))}.*from 0.001 to 100"):
        Distillation(value)


def test_a_learnable_temperature_below_its_floor_is_named() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0.005.*from 0.01 to 100"):
        MixedLoss(LOSS_TABLES["dle"], temperature=0.005, learnable_temperature=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_weighting_breaks_on_a_task_without_loss_or_rows(weighting: str) -> None:
    """Identical pairs: the loss of every row, and so every gradient, is 0."""
    options = {"baseline": "ema"} if weighting == "inverse_loss" else {}
    chosen = build_weighting(weighting, TASKS, options)
    loss = MixedLoss(dict.fromkeys(TASKS, TaskLoss(cosine=1.0)), weighting=chosen)
    optimizer = torch.optim.SGD(loss.parameters(), lr=100.0) if list(loss.parameters()) else None
    for _ in range(5):
        vectors = torch.eye(2, WIDTH).requires_grad_()
        output = loss(vectors, vectors, torch.zeros(2).long(), torch.full((2,), NAN), with_gradients=True)
        output.loss.backward()
        assert output.loss.isfinite() and vectors.grad.isfinite().all() and output.task_weights.isfinite().all()
        if optimizer is not None:
            optimizer.step()
            loss.keep_bounds()
    assert chosen(0).isfinite().all() and (chosen(0) > 0).all()


def test_learned_variances_stay_in_their_bounds_and_come_back() -> None:
    weighting = UncertaintyWeighting(["ocr"])
    weighting.log_variances.data.fill_(-200.0)  # exp(200) is infinite in float32
    weighting.keep_bounds()
    assert weighting(0).item() == pytest.approx(1000, rel=1e-5)
    (weighting(0) * 4.0 + weighting.penalty()).sum().backward()
    assert weighting.log_variances.grad.item() < 0  # up: its loss is large again


def test_clips_without_a_frame_are_named(tiny: tuple) -> None:
    model: ViPolyQwenModel = tiny[0]
    samples, mask = torch.zeros(2, 4000), torch.ones(2, 4000)
    mask[1] = 0
    with torch.no_grad(), pytest.raises(ValueError, match=r"Clips \[1\] of the 2.*min_audio_samples"):
        model(audio_features=samples, audio_attention_mask=mask)
