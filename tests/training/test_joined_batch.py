"""The batches of two ranks joined for the loss: few collectives, the loss and gradients of one rank."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_on_two_ranks
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vipolyqwen.training.distillation import Distillation
from vipolyqwen.training.joined_batch import join_batches
from vipolyqwen.training.losses import LOSS_TABLES
from vipolyqwen.training.mixed_loss import MixedLoss

PAIRS, DIM, TEACHER_DIM = 9, 8, 5
DISTILLED = {task: replace(loss, distil=0.7) for task, loss in LOSS_TABLES["dle"].items()}
SPLITS = [(4, 5), (1, 8), (9, 0)]  # pairs of each rank


class CountCollectives(TorchDispatchMode):
    """Counts the collectives of torch.distributed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += str(func).startswith("c10d.")
        return func(*args, **(kwargs or {}))


def batch_of(first: int, last: int, with_negatives: bool, with_teacher: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """Embeddings and collated columns of pairs [first, last); pair n has n % 3 hard negatives.

    A teacher knows sides a of pairs 0 to 6 and sides b of pairs 5 to 8.
    """
    generator = torch.Generator().manual_seed(0)
    owners = torch.tensor([pair for pair in range(PAIRS) for _ in range(pair % 3)] if with_negatives else []).long()
    mine = (owners >= first) & (owners < last)
    sides = normalize(torch.randn(2, PAIRS, DIM, generator=generator), dim=-1)[:, first:last]
    negatives = normalize(torch.randn(len(owners), DIM, generator=generator), dim=-1)[mine]
    keys = torch.randint(-(2**62), 2**62, (PAIRS,), generator=generator)
    keys[4] = keys[0]
    task_ids = torch.arange(PAIRS) % 6  # 0, text_pair, is scored
    scores = torch.where(task_ids == 0, torch.rand(PAIRS, generator=generator), torch.nan)
    columns = {"data_type": task_ids, "similarity_scores": scores, "a_keys": keys, "b_keys": keys.flip(0)}
    columns |= {"groups": torch.arange(PAIRS) // 3, "modalities": torch.arange(PAIRS) % 3}
    batch = {name: column[first:last] for name, column in columns.items()}
    batch |= {"negative_owners": owners[mine] - first, "negative_keys": keys[owners[mine]] + 1}
    if with_teacher:
        taught = [(0, pair) for pair in range(7)] + [(1, pair) for pair in range(5, PAIRS)]
        mine = [number for number, (_, pair) in enumerate(taught) if first <= pair < last]
        places = [taught[number][0] * (last - first) + taught[number][1] - first for number in mine]
        batch["teacher_vectors"] = torch.randn(len(taught), TEACHER_DIM, generator=generator)[mine]
        batch["teacher_sides"] = torch.tensor(places).long()
    return torch.cat([*sides, negatives]).requires_grad_(), batch


def loss_of(embeddings: Tensor, batch: dict[str, Any], rank: int = 0) -> tuple[Tensor, Tensor | None]:
    """The loss, and the weights of the map to the teacher."""
    temperatures = {"text-text": 0.07, "image-text": 0.1, "audio-text": 0.2}
    if "teacher_vectors" not in batch:
        return MixedLoss(LOSS_TABLES["dle"], temperatures)(**join_batches(embeddings, batch, rank)).loss, None
    distillation = Distillation(temperature=0.2).connect(DIM, TEACHER_DIM)
    loss = MixedLoss(DISTILLED, temperatures, distillation=distillation)
    return loss(**join_batches(embeddings, batch, rank)).loss, distillation.map.weight


def losses_and_gradients() -> dict[tuple[bool, bool], tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """With and without negatives and teacher, on one rank: loss, gradients, and the pairs that own the negatives."""
    found = {}
    for case in itertools.product((False, True), repeat=2):
        embeddings, batch = batch_of(0, PAIRS, *case)
        loss, learned = loss_of(embeddings, batch)
        loss.backward()
        of_map = None if learned is None else learned.grad
        found[case] = loss.detach(), embeddings.grad, of_map, batch["negative_owners"]
    return found


def compare_with_one_rank(rank: int, alone: dict[tuple[bool, bool], tuple]) -> None:
    """Runs on each of two ranks."""
    for split in SPLITS:
        first, last = (0, split[0]) if rank == 0 else (split[0], PAIRS)
        for (with_negatives, with_teacher), (wanted, gradient, of_map, owners) in alone.items():
            embeddings, batch = batch_of(first, last, with_negatives, with_teacher)
            with CountCollectives() as forward:
                loss, learned = loss_of(embeddings, batch, rank)
            with CountCollectives() as backward:
                loss.backward()
            assert (forward.count, backward.count) == (3 + with_teacher, 1)
            torch.testing.assert_close(loss, wanted)
            if with_teacher:
                torch.testing.assert_close(learned.grad, of_map)  # the loss is the same on every rank
            a, b, negatives = gradient.split([PAIRS, PAIRS, 9 * with_negatives])
            expected = torch.cat([a[first:last], b[first:last], negatives[(owners >= first) & (owners < last)]])
            torch.testing.assert_close(embeddings.grad / 2, expected)  # DDP and FSDP divide by the number of ranks


def test_two_ranks_need_three_collectives_and_one_in_the_backward(tmp_path: Path) -> None:
    run_on_two_ranks(compare_with_one_rank, tmp_path, losses_and_gradients())


@pytest.mark.parametrize("with_negatives", [False, True])
def test_one_rank_joins_nothing(with_negatives: bool) -> None:
    embeddings, batch = batch_of(0, PAIRS, with_negatives)
    joined = join_batches(embeddings, batch, 0)
    assert torch.equal(torch.cat([joined["a"], joined["b"]]), embeddings[: 2 * PAIRS])
    assert (joined["negatives"] is None) != with_negatives
    torch.testing.assert_close(joined["scores"], batch["similarity_scores"], rtol=0, atol=0, equal_nan=True)
