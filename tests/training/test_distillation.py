"""Distillation: the formula by hand, who is compared with whom, and that it composes with the other options."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from vipolyqwen.training.distillation import Distillation, Teaching
from vipolyqwen.training.losses import TaskLoss
from vipolyqwen.training.mixed_loss import MixedLoss

TASKS = {"text_pair": TaskLoss(mse=1.0, distil=2.0), "instr": TaskLoss(nce=1.0)}
B, D, W = 4, 6, 5


def example(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of each task; the first row has no teacher on side b, the last none at all."""
    generator = torch.Generator().manual_seed(seed)
    a, b = normalize(torch.randn(2, B, D, generator=generator, dtype=torch.float64), dim=-1)
    scores = torch.tensor([0.2, 0.9, math.nan, math.nan], dtype=torch.float64)
    vectors = 3 * torch.randn(5, W, generator=generator, dtype=torch.float64)
    teaching = Teaching(vectors, torch.tensor([0, 1, 2, B + 1, B + 2]))
    return {"a": a, "b": b, "task_ids": torch.tensor([0, 0, 1, 1]), "scores": scores, "teaching": teaching}


def by_hand(batch: dict, distillation: Distillation, dim: int = D) -> list[float]:
    """Distil of each row, in loops."""
    students = normalize(torch.cat([batch["a"], batch["b"]])[:, :dim], dim=1)
    taught = batch["teaching"].sides.tolist()
    teachers = normalize(batch["teaching"].vectors, dim=1)
    matrix = distillation.map.weight.detach().double()[:, :dim]
    values: dict[int, list[float]] = {row: [] for row in range(B)}
    for m, side in enumerate(taught):
        mapped = matrix @ students[side]
        distance = 1 - float(mapped @ teachers[m] / mapped.norm())
        others = [n for n in range(len(taught)) if n != m]
        p = [math.exp(float(teachers[m] @ teachers[n]) / distillation.temperature) for n in others]
        q = [math.exp(float(students[side] @ students[taught[n]]) / distillation.temperature) for n in others]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        divergence = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        values[side % B].append(distillation.cosine * distance + distillation.kl * divergence)
    return [sum(found) / len(found) if found else 0.0 for found in values.values()]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.3, "cosine": 0.5, "kl": 2.0}, {"kl": 0.0}, {"cosine": 0.0}]
)
def test_distil_is_the_mean_over_the_sides_with_a_teacher(settings: dict) -> None:
    distillation, batch = Distillation(**settings).connect(D, W), example()
    found = distillation(batch["a"], batch["b"], batch["teaching"])
    assert found.tolist() == pytest.approx(by_hand(batch, distillation), rel=1e-9, abs=1e-12)


def test_a_student_that_agrees_with_its_teacher_has_no_loss() -> None:
    batch = example()
    students = torch.cat([batch["a"], batch["b"]])
    teaching = Teaching(7 * students, torch.arange(2 * B))
    distillation = Distillation().connect(D, D)
    distillation.map.weight.data.copy_(torch.eye(D))
    assert distillation(batch["a"], batch["b"], teaching).abs().max() < 1e-7
    assert distillation(batch["a"], batch["b"].flip(0), teaching).min() > 0.1


def test_the_map_starts_the_same_everywhere_and_a_single_side_has_nothing_to_compare() -> None:
    torch.manual_seed(1)
    first = Distillation().connect(D, W)
    torch.manual_seed(2)
    assert torch.equal(first.map.weight, Distillation().connect(D, W).map.weight)
    torch.testing.assert_close(first.map.weight @ first.map.weight.T, torch.eye(W))
    batch = example()
    only = Distillation(cosine=0.0).connect(D, W)(
        batch["a"], batch["b"], Teaching(torch.ones(1, W), torch.tensor([2]))
    )
    assert only.tolist() == [0.0] * B
    none = first(batch["a"], batch["b"], Teaching(torch.ones(0, W), torch.ones(0).long()))
    assert none.tolist() == [0.0] * B


@pytest.mark.parametrize("min_score", [None, 0.5])
def test_a_row_scored_low_still_follows_its_teacher(min_score: float | None) -> None:
    batch, distillation = example(), Distillation().connect(D, W)
    output = MixedLoss(TASKS, nce_min_score=min_score, distillation=distillation)(**batch)
    first, second, *_ = by_hand(batch, distillation)
    assert output.components["distil"][:2].tolist() == pytest.approx([first, second])
    assert output.components["distil"][2:].isnan().all()  # instr has no weight for it
    errors = ((batch["a"] * batch["b"]).sum(dim=1)[:2] + 1) / 2 - batch["scores"][:2]
    expected = errors.square() + 2 * torch.tensor([first, second], dtype=torch.float64)
    torch.testing.assert_close(output.per_sample[:2].detach(), expected)
    assert "loss/text_pair/distil" in MixedLoss(TASKS, distillation=distillation).summarise(output)


def test_matryoshka_takes_the_first_columns_of_the_map() -> None:
    batch, distillation = example(), Distillation().connect(D, W)
    output = MixedLoss(TASKS, matryoshka_dims=[D, 3], distillation=distillation)(**batch)
    full, half = by_hand(batch, distillation), by_hand(batch, distillation, 3)
    expected = [(x + y) / 2 for x, y in zip(full, half, strict=True)][:2]
    assert output.components["distil"][:2].tolist() == pytest.approx(expected)


def test_the_map_learns_and_only_if_it_is_used() -> None:
    for cosine, learns in ((1.0, True), (0.0, False)):
        loss = MixedLoss(TASKS, distillation=Distillation(cosine=cosine).connect(D, W))
        batch = example()
        batch["a"].requires_grad_()
        loss(**batch).loss.backward()
        assert (loss.distillation.map.weight.grad is not None) == learns
        assert batch["a"].grad.norm() > 0


def test_rows_without_a_teacher_are_refused() -> None:
    batch = example()
    batch["task_ids"][3] = 0
    batch["scores"][3] = 0.5
    with pytest.raises(ValueError, match=r"\['text_pair'\] need a teacher \(distil > 0\), but rows \[3\]"):
        MixedLoss(TASKS, distillation=Distillation().connect(D, W))(**batch)
    with pytest.raises(ValueError, match=r"rows \[0, 1, 3\]"):
        MixedLoss(TASKS)(**batch)
    with pytest.raises(ValueError, match="vectors have 5 dimensions, the learned map 9"):
        MixedLoss(TASKS, distillation=Distillation().connect(D, 9))(**example())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "teacher_temperature is 0; it must be > 0"),
        ({"temperature": math.nan}, "teacher_temperature is nan"),
        ({"kl": -1.0}, "distil_kl is -1.0"),
        ({"cosine": 0.0, "kl": 0.0}, "distil_cosine and distil_kl are both 0"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)
