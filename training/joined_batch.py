"""Joins the batches of all ranks into the one batch that the mixed loss sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distillation import Teaching
from .distributed import RowShare, gather_rows, gather_sizes
from .feed import move
from .negatives import HardNegatives

COLUMNS = ("data_type", "a_keys", "b_keys", "groups", "modalities")  # of a collated batch, int64, one value a pair
OTHERS = ("similarity_scores", "negative_owners", "negative_keys", "teacher_vectors", "teacher_sides")


def join_batches(embeddings: Tensor, batch: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Gathers what the mixed loss needs from all ranks, in three collectives and one more in the backward pass.

    Row counts are gathered once; then all embeddings, with gradient; then all integers. Scores travel among the
    integers by their bits. Vectors of a teacher, where the collator adds them, take a fourth collective.

    Args:
        embeddings: (2 · pairs + N, D) float, sides a, sides b, then hard negatives of this rank.
        batch: collated batch of this rank, on any device; see `MixedBatchCollator`.
        rank: index of this rank.

    Returns:
        The arguments of `MixedLoss.forward` that describe the joined batch, the same on every rank.
    """
    batch = {name: move(batch[name], embeddings.device) for name in (*COLUMNS, *OTHERS) if name in batch}
    pairs, count = len(batch["data_type"]), len(batch["negative_owners"])
    taught = batch.get("teacher_sides", batch["data_type"].new_empty(0))  # (M,)
    sizes = gather_sizes([pairs, count, len(taught)], embeddings.device)  # (ranks, 3)
    a, b, vectors = gather_rows(embeddings.split([pairs, pairs, count]), [[p, p, n] for p, n, _ in sizes])
    first = sum(p for p, *_ in sizes[:rank])  # of this rank's pairs in the joined batch
    scores = batch["similarity_scores"].float()
    integers = [batch[name] for name in COLUMNS] + [scores.view(torch.int32).long()]
    integers += [batch["negative_owners"] + first, batch["negative_keys"], _joined_sides(taught, sizes, rank)]
    counts = [[p] * (len(COLUMNS) + 1) + [n, n, m] for p, n, m in sizes]
    *integers, owners, keys, sides = gather_rows(integers, counts)
    task_ids, a_keys, b_keys, groups, modalities, bits = integers
    return {
        "a": a,
        "b": b,
        "task_ids": task_ids,
        "scores": bits.int().view(torch.float32),
        "a_keys": a_keys,
        "b_keys": b_keys,
        "groups": groups,
        "modalities": modalities,
        "negatives": HardNegatives(vectors, owners, keys) if len(owners) else None,
        "teaching": _join_teaching(batch, sides, sizes),
        "share": RowShare(rank, *zip(*((p, m) for p, _, m in sizes), strict=True)) if len(sizes) > 1 else None,
    }


def _joined_sides(sides: Tensor, sizes: Sequence[Sequence[int]], rank: int) -> Tensor:
    """Renumbers sides, i for a and pairs + i for b, from this rank's batch to the joined one."""
    pairs, total = sizes[rank][0], sum(p for p, *_ in sizes)
    return sides + sum(p for p, *_ in sizes[:rank]) + (sides >= pairs) * (total - pairs)


def _join_teaching(batch: Mapping[str, Any], sides: Tensor, sizes: Sequence[Sequence[int]]) -> Teaching | None:
    """Gathers the teacher's vectors; `None` if the collator adds none, as it then does on every rank."""
    if "teacher_vectors" not in batch:
        return None
    (vectors,) = gather_rows([batch["teacher_vectors"]], [[m] for *_, m in sizes])
    return Teaching(vectors, sides)
