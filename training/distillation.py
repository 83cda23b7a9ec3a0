"""Distillation from a teacher's vectors of either side (Reimers & Gurevych 2020): one value for each row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, log_softmax, normalize

from ..pooling_vipolyqwen import unit_vectors
from .loss_blocks import BlockPlan, divergence_in_blocks
from .losses import check_temperature, check_weight


@dataclass
class Teaching:
    """Teacher's vectors of some sides of a batch of B pairs."""

    vectors: Tensor  # (M, W) float, of any length above 0
    sides: Tensor  # (M,) long, i for side a and B + i for side b of pair i; no side twice


class Distillation(nn.Module):
    """Cosine to the teacher through a learned map, and KL of in-batch similarities.

    For the vector x_m of a side with a teacher's vector t_m (both of unit length), over the M such sides of the batch:

        Distil_m = cosine · (1 − cos(W x_m, t_m)) + kl · KL(softmax_n(t_m·t_n / T) ‖ softmax_n(x_m·x_n / T)), n ≠ m.

    The map W is linear, since the teacher's space and width are others than the student's; KL needs no map. W starts
    from the same random orthogonal rows on every rank and with every seed.

    Args:
        temperature: T in `TEMPERATURES` of both distributions; the lower, the more the nearest sides count.
        cosine: weight of the cosine, >= 0.
        kl: weight of KL, >= 0.
    """

    def __init__(self, temperature: float = 0.05, cosine: float = 1.0, kl: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature, "teacher_temperature")
        check_weight(cosine, "distil_cosine")
        check_weight(kl, "distil_kl")
        if cosine == 0 and kl == 0:
            raise ValueError("distil_cosine and distil_kl are both 0; give one of them a weight > 0.")
        self.temperature, self.cosine, self.kl = temperature, cosine, kl
        self.map: nn.Linear | None = None

    def connect(self, dim: int, width: int) -> "Distillation":
        """Creates the map, as soon as the teacher is known; returns this module.

        Args:
            dim: D, dimensions of the student's vectors.
            width: W, dimensions of the teacher's vectors.
        """
        self.map = nn.Linear(dim, width, bias=False)
        nn.init.orthogonal_(self.map.weight, generator=torch.Generator().manual_seed(0))
        self.map.requires_grad_(self.cosine > 0)
        return self

    def forward(self, a: Tensor, b: Tensor, teaching: Teaching, plan: BlockPlan | None = None) -> Tensor:
        """Returns the mean of Distil over the sides of each pair that have a teacher, (B,) >= 0; 0 without any.

        Args:
            a: (B, d) float, unit vectors of sides a; d may be less than D (Matryoshka), which takes W's first columns.
            b: (B, d) float, the same of sides b.
            teaching: the teacher's vectors of some of these sides.
            plan: blocks of a large batch.
        """
        if self.map is None:
            raise ValueError("The distillation has no map to the teacher yet; call `connect(dim, width)` first.")
        if teaching.vectors.shape[1] != self.map.out_features:
            raise ValueError(
                f"The teacher's vectors have {teaching.vectors.shape[1]} dimensions, the learned map "
                f"{self.map.out_features}; take one teacher for all rows."
            )
        if not len(teaching.sides):
            return a.new_zeros(len(a))
        students = torch.cat([a, b])[teaching.sides]  # (M, d)
        teachers = normalize(teaching.vectors.to(students), dim=1)  # (M, W)
        values = self.cosine * self._distances(self.map, students, teachers)
        values = values + self.kl * self._divergences(students, teachers, plan)
        rows = teaching.sides % len(a)
        counts = values.new_zeros(len(a)).index_add(0, rows, torch.ones_like(values))
        return values.new_zeros(len(a)).index_add(0, rows, values) / counts.clamp(min=1)

    def _distances(self, matrix: nn.Linear, students: Tensor, teachers: Tensor) -> Tensor:
        """Cosine distances of mapped student and teacher, (M,) in [0, 2]."""
        mapped = linear(students, matrix.weight[:, : students.shape[1]].to(students))
        return 1 - (unit_vectors(mapped) * teachers).sum(dim=1)

    def _divergences(self, students: Tensor, teachers: Tensor, plan: BlockPlan | None) -> Tensor:
        """KL from the teacher's to the student's similarities with all other sides, (M,) >= 0."""
        if plan is not None:
            return divergence_in_blocks(students, teachers, self.temperature, plan)
        wanted, found = (log_softmax(_others(x @ x.T) / self.temperature, dim=1) for x in (teachers, students))
        return kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)


def _others(matrix: Tensor) -> Tensor:
    """Drops the diagonal: (M, M) -> (M, M - 1), M >= 1; without a mask, which would wait for the device."""
    size = len(matrix)
    return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
