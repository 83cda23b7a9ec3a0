"""Negatives of a batch: hard negatives that rows name, and candidates that are none of a row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class HardNegatives:
    """Hard negatives: what rows of the batch name as wrong answers."""

    vectors: Tensor  # (N, D) float, unit vectors
    owners: Tensor  # (N,) long, the row that names each
    keys: Tensor | None = None  # (N,) int64, equal for equal content, comparable with the keys of side b


class Exclusions:
    """Candidates that are no negatives of a row, since they have its content or are of its group.

    Args:
        pairs: B, rows of the batch.
        a_keys: (B,) int64, equal for equal content of side a; `None` excludes no duplicates of it.
        b_keys: (B,) int64, the same for side b.
        groups: (B,) int64, equal for rows of one group, 0 for a row without; `None` excludes no groups.
        negatives: hard negatives, the candidates after the B sides b.
    """

    def __init__(
        self,
        pairs: int,
        a_keys: Tensor | None,
        b_keys: Tensor | None,
        groups: Tensor | None,
        negatives: HardNegatives | None,
    ) -> None:
        self.a_keys, self.b_keys, self.groups = a_keys, b_keys, groups
        self.owners = None if negatives is None else negatives.owners
        self.candidates = pairs + (0 if negatives is None else len(negatives.owners))
        self.candidate_keys = b_keys
        if b_keys is not None and negatives is not None and negatives.keys is not None:
            self.candidate_keys = torch.cat([b_keys, negatives.keys])

    def of_rows(self, first: int, last: int) -> Tensor | None:
        """Returns the mask of the candidates excluded for rows [first, last), (rows, C) bool; None without any.

        Hard negatives of an equal side a stay negatives. The positive of a row is among its excluded candidates.
        """
        rows = slice(first, last)
        masks = []
        if self.a_keys is not None:
            masks.append(self.a_keys[rows, None] == self.a_keys)
        if self.b_keys is not None:
            masks.append(self.b_keys[rows, None] == self.candidate_keys)
        if self.groups is not None:
            masks.append(self._same_group(rows))
        if not masks:
            return None
        masks.sort(key=lambda mask: mask.shape[1])
        widest = masks.pop()
        joined = nn.functional.pad(widest, (0, self.candidates - widest.shape[1]))
        for mask in masks:
            joined[:, : mask.shape[1]] |= mask
        return joined

    def _same_group(self, rows: slice) -> Tensor:
        """Returns which candidates are of the row's group; a row's hard negatives stay its negatives."""
        groups = self.groups[rows, None]
        same = (groups == self.groups) & (groups != 0)
        if self.owners is None:
            return same
        names_it = self.owners == torch.arange(rows.start, rows.stop, device=groups.device)[:, None]
        return torch.cat([same, same[:, self.owners] & ~names_it], dim=1)
