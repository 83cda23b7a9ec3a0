"""Losses in blocks are those of the whole matrix, to the gradient, on one rank and on several."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_on_two_ranks
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vipolyqwen.training import loss_blocks, mixed_loss
from vipolyqwen.training.distillation import Distillation, Teaching
from vipolyqwen.training.distributed import RowShare, gather_rows
from vipolyqwen.training.loss_figures import MixedLossOutput
from vipolyqwen.training.losses import LOSS_TABLES, TaskLoss
from vipolyqwen.training.mixed_loss import HardNegatives, MixedLoss
from vipolyqwen.training.weighting import build_weighting

ROWS, EXTRA, DIM, WIDTH = 13, 5, 8, 3
TASKS = list(LOSS_TABLES["mixed"])
TABLES = {name: LOSS_TABLES[name] for name in LOSS_TABLES}
TABLES["distil"] = dict.fromkeys(TASKS, TaskLoss(nce=1.0, triplet=0.5, distil=2.0))
OPTIONS = {
    "pairs": {"temperature": {"text-text": 0.2, "image-text": 0.1, "audio-text": 0.3}},
    "learnable": {"learnable_temperature": True},
    "margin": {"false_negative_margin": 0.05},
    "semi_hard": {"triplet_negatives": "semi_hard"},
    "matryoshka": {"matryoshka_dims": [8, 4]},
    "no_masks": {"mask_duplicates": False, "mask_groups": False},
    "uncertainty": {},
}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every task; duplicates of content and of vectors, groups, hard negatives, a teacher of some sides."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, ROWS, DIM, generator=generator, dtype=dtype)
    b = a + b
    b[7] = b[2]  # equal similarities, so that maxima are shared
    task_ids, keys = torch.arange(ROWS) % len(TASKS), torch.arange(ROWS) // 2
    sides = torch.tensor([*range(ROWS), ROWS + 1, ROWS + 2, ROWS + 9])
    scores = torch.where(task_ids == 0, torch.rand(ROWS, generator=generator, dtype=dtype), math.nan)
    return {
        "a": normalize(a, dim=1),
        "b": normalize(b, dim=1),
        "task_ids": task_ids,
        "scores": scores,
        "a_keys": keys,
        "b_keys": torch.arange(ROWS) % 11 + 100,
        "groups": torch.arange(ROWS) // 3 * (torch.arange(ROWS) % 4 > 0),
        "modalities": torch.arange(ROWS) % 3,
        "vectors": normalize(torch.randn(EXTRA, DIM, generator=generator, dtype=dtype), dim=1),
        "owners": torch.arange(EXTRA) * 2 % ROWS,
        "keys": torch.arange(EXTRA) + 100,
        "teacher": torch.randn(len(sides), WIDTH, generator=generator, dtype=dtype),
        "sides": sides,
    }


def build(table: str, *chosen: str, block_rows: int | None = None) -> MixedLoss:
    settings: dict[str, Any] = {key: value for name in chosen for key, value in OPTIONS[name].items()}
    if "uncertainty" in chosen:
        settings["weighting"] = build_weighting("uncertainty", TASKS)
    distillation = Distillation().connect(DIM, WIDTH) if table == "distil" else None
    return MixedLoss(TABLES[table], **settings, distillation=distillation, block_rows=block_rows)


def run(loss: MixedLoss, given: dict[str, Any], **more: Any) -> MixedLossOutput:
    names = ("a", "b", "task_ids", "scores", "a_keys", "b_keys", "groups", "modalities")
    negatives = HardNegatives(given["vectors"], given["owners"], given["keys"])
    teaching = Teaching(given["teacher"], given["sides"]) if loss.distillation is not None else None
    inputs = {name: given[name] for name in names}
    return loss(**inputs, negatives=negatives, teaching=teaching, with_gradients=True, **more)


def gradients(loss: MixedLoss, given: dict[str, Any]) -> tuple[MixedLossOutput, dict[str, Tensor]]:
    leaves = {name: given[name].clone().requires_grad_() for name in ("a", "b", "vectors")}
    output = run(loss, given | leaves)
    output.loss.backward()
    named = [*leaves.items(), *loss.named_parameters()]
    return output, {name: value.grad for name, value in named if value.grad is not None}


@pytest.mark.parametrize(
    "chosen",
    [(), *((name,) for name in OPTIONS), ("pairs", "learnable", "margin", "semi_hard", "matryoshka"), tuple(OPTIONS)],
    ids="+".join,
)
@pytest.mark.parametrize("table", TABLES)
def test_blocks_give_values_and_gradients_of_the_whole_matrix(table: str, chosen: tuple[str, ...]) -> None:
    given = batch()
    expected, wanted = gradients(build(table, *chosen), given)
    for rows in (1, 4, ROWS + 1):
        output, found = gradients(build(table, *chosen, block_rows=rows), given)
        torch.testing.assert_close(output.per_sample, expected.per_sample, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.components, expected.components, rtol=0, atol=1e-10, equal_nan=True)
        torch.testing.assert_close(output.gradient_gram, expected.gradient_gram, rtol=0, atol=1e-10)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            tolerance = 1e-6 if value.dtype == torch.float32 else 1e-10  # parameters of the loss are float32
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_blocks_agree_in_float32(temperature: float) -> None:
    given = batch(torch.float32)
    results = []
    for rows in (None, 4):
        loss = MixedLoss(LOSS_TABLES["dle"], temperature=temperature, block_rows=rows)
        output, found = gradients(loss, given)
        results.append((output.loss, output.per_sample / output.per_sample.detach().max(), found))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest floating-point tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("table", ["dle", "distil"])
def test_no_tensor_has_the_size_of_the_matrix(table: str) -> None:
    given = {name: value.repeat(8, *[1] * (value.ndim - 1)) for name, value in batch().items()}
    given["sides"] = torch.arange(len(given["sides"]))
    sizes = {}
    for rows in (None, 4):
        with LargestTensor() as largest:
            gradients(build(table, "margin", "semi_hard", block_rows=rows), given)
        sizes[rows] = largest.size
    candidates = 8 * (ROWS + EXTRA)
    assert sizes[4] <= max(4 * candidates, len(TASKS) * (16 * ROWS + 8 * EXTRA) * DIM) < sizes[None]


def test_only_large_batches_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int] = []
    contrast = mixed_loss.contrast
    monkeypatch.setattr(mixed_loss, "contrast", lambda *args: plans.append(args[-1].rows) or contrast(*args))
    gradients(build("mixed"), batch())
    assert plans == []
    monkeypatch.setattr(loss_blocks, "WHOLE", ROWS * (ROWS + EXTRA) - 1)
    monkeypatch.setitem(loss_blocks.BLOCK, "cpu", 3 * (ROWS + EXTRA))
    gradients(build("mixed"), batch())
    assert plans == [3]


def test_blocks_need_a_row() -> None:
    with pytest.raises(ValueError, match="`loss_block_rows` is 0"):
        MixedLoss(LOSS_TABLES["mixed"], block_rows=0)


# --- several ranks


def parts_of(given: dict[str, Any], rank: int, counts: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    """This rank's rows of a joined batch; its hard negatives and taught sides are the first ones or the rest."""
    for name, value in given.items():
        first = counts[0] if len(value) == ROWS else len(value) // 2
        yield name, value[:first] if rank == 0 else value[first:]


def compare_with_one_process(rank: int) -> None:
    """Runs in each of two processes: their mean gradient must be that of one process with all rows."""
    given = batch()
    chosen = ("learnable", "pairs", "margin", "matryoshka", "uncertainty")
    for table, count in itertools.product(("dle", "distil"), (9, 1, ROWS)):  # with 13, rank 1 has no row
        expected, wanted = gradients(build(table, *chosen), given)
        counts = (count, ROWS - count)
        mine = dict(parts_of(given, rank, counts))
        joined, leaves = {}, {}
        for name, value in mine.items():
            sizes: list[Any] = [None, None]
            dist.all_gather_object(sizes, [len(value)])
            if name in ("a", "b", "vectors"):
                value = leaves[name] = value.clone().requires_grad_()
            joined[name] = gather_rows([value], sizes)[0]
        share = RowShare(rank, counts, (len(given["sides"]) // 2, -(-len(given["sides"]) // 2)))
        loss = build(table, *chosen, block_rows=4)
        output = run(loss, joined, share=share)
        output.loss.backward()
        torch.testing.assert_close(output.per_sample, expected.per_sample, rtol=0, atol=1e-10)
        torch.testing.assert_close(output.gradient_gram, expected.gradient_gram, rtol=0, atol=1e-10)
        for name, of_rank in parts_of({name: wanted[name] for name in leaves}, rank, counts):
            torch.testing.assert_close(leaves[name].grad / 2, of_rank, rtol=0, atol=1e-10, msg=name)
        for name, parameter in loss.named_parameters():  # the mean over ranks, as DDP and `LossOptimizer` take it
            dist.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad / 2, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def test_two_ranks_compute_their_rows_alone_with_the_gradient_of_one(tmp_path: Path) -> None:
    run_on_two_ranks(compare_with_one_process, tmp_path)
