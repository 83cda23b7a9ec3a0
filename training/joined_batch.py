"""Joins the batches of all ranks into the one batch that the mixed loss sees."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distributed import gather_rows, gather_sizes
from .mixed_loss import HardNegatives

COLUMNS = ("data_type", "a_keys", "b_keys", "groups", "modalities")  # of a collated batch, int64, one value a pair


def join_batches(embeddings: Tensor, batch: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Gathers what the mixed loss needs from all ranks, in three collectives and one more in the backward pass.

    Row counts are gathered once; then all embeddings, with gradient; then all integers. Scores travel among the
    integers by their bits.

    Args:
        embeddings: (2 · pairs + N, D) float, sides a, sides b, then hard negatives of this rank.
        batch: collated batch of this rank; see `MixedBatchCollator`.
        rank: index of this rank.

    Returns:
        The arguments of `MixedLoss.forward` that describe the joined batch, the same on every rank.
    """
    pairs, count = len(batch["data_type"]), len(batch["negative_owners"])
    sizes = gather_sizes([pairs, count], embeddings.device)  # (ranks, 2)
    a, b, vectors = gather_rows(embeddings.split([pairs, pairs, count]), [[p, p, n] for p, n in sizes])
    first = sum(p for p, _ in sizes[:rank])  # of this rank's pairs in the joined batch
    scores = batch["similarity_scores"].float()
    integers = [batch[name] for name in COLUMNS] + [scores.view(torch.int32).long()]
    integers += [batch["negative_owners"] + first, batch["negative_keys"]]
    *integers, owners, keys = gather_rows(integers, [[p] * (len(COLUMNS) + 1) + [n] * 2 for p, n in sizes])
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
    }
