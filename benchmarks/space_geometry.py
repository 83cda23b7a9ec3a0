"""Geometry of the space: alignment and uniformity (Wang & Isola 2020), gap between sides (Liang et al. 2022)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOST = 1000  # vectors of a task whose distances are taken


def geometry(vectors: Mapping[str, Tensor], tasks: Sequence[str], belong: Tensor) -> dict[str, dict[str, float]]:
    """Measures each task's pairs.

    Args:
        vectors: `a` and `b`, (pairs, D) float unit vectors.
        tasks: task of each pair.
        belong: (pairs,) bool, pairs that belong together.

    Returns:
        task -> alignment, the mean ‖a − b‖² of pairs that belong together (0 is best), uniformity, the log of the
        mean exp(−2‖x − y‖²) over all sides x ≠ y (−4 is best), and gap, ‖mean a − mean b‖.
    """
    found = {}
    for task in dict.fromkeys(tasks):
        of_task = torch.tensor([name == task for name in tasks])
        a, b = vectors["a"][of_task & belong], vectors["b"][of_task & belong]
        if len(a) > 1:
            found[task] = {
                "alignment": (a - b).square().sum(dim=1).mean().item(),
                "uniformity": uniformity(torch.cat([a[: MOST // 2], b[: MOST // 2]])),
                "gap": (a.mean(dim=0) - b.mean(dim=0)).norm().item(),
            }
    return found


def uniformity(vectors: Tensor) -> float:
    """Log of the mean Gaussian potential of all pairs of n >= 2 vectors, <= 0; (n, D) float."""
    return torch.pdist(vectors).square().mul(-2).exp().mean().log().item()
