"""Numbers of a batch for the log: measured on the device at every step, moved to the host when they are logged."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .losses import COMPONENTS


@dataclass
class MixedLossOutput:
    """Loss of one batch and its parts."""

    loss: Tensor  # scalar with gradient, (1/B) Σ_i λ_type(i) L_type(i), plus the penalty of learned weights
    per_sample: Tensor  # (B,) with gradient, L_type(i) before λ
    components: dict[str, Tensor]  # per component (B,) without gradient, unweighted; NaN where a row does not use it
    parts: Tensor  # (T,) with gradient, p_t = (1/B) Σ_{i of t} L_i, so that the loss is Σ_t λ_t p_t
    task_weights: Tensor  # (T,) λ_t
    task_ids: Tensor  # (B,) long, as given
    gradient_gram: Tensor | None  # (T, T) ⟨∇_E p_s, ∇_E p_t⟩ over all embeddings E, or None if not asked for


class LossFigures:
    """Measures F figures of every batch and averages them over the batches since the last log.

    `loss/TASK` and `loss/TASK/COMPONENT` (unweighted means over the task's rows), `weight/TASK` (λ), `rows/TASK`,
    `share/TASK` (its share of the weighted loss); where gradients were measured `gradient_norm/TASK` (of λ_t p_t with
    respect to the embeddings), `gradient_share/TASK` (its share of the sum of these norms) and
    `gradient_cosine/TASK/TASK`; then the learnable temperatures. `share_per_row/TASK` and
    `gradient_share_per_row/TASK` are shares of the same loss and norm divided by the task's rows, so that the mixture
    does not count. A figure that a batch does not have is NaN: its task is absent, or nothing was measured.

    Args:
        tasks: names of the T tasks, in the order of the task ids.
        temperatures: names of the learnable temperatures.
    """

    def __init__(self, tasks: Sequence[str], temperatures: Sequence[str] = ()) -> None:
        kinds = ("loss/{}", *(f"loss/{{}}/{name}" for name in COMPONENTS), "weight/{}", "rows/{}", "share/{}")
        kinds += ("share_per_row/{}", "gradient_norm/{}", "gradient_share/{}", "gradient_share_per_row/{}")
        self.names = [kind.format(task) for kind in kinds for task in tasks]
        self.names += [f"gradient_cosine/{s}/{t}" for place, s in enumerate(tasks) for t in tasks[place + 1 :]]
        self.names += temperatures

    def measure(self, output: MixedLossOutput, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """Measures one batch without a transfer to the host.

        Args:
            output: of the mixed loss.
            temperatures: (number of learnable temperatures,) float.

        Returns:
            The loss, a scalar, but NaN unless it and all figures are finite; and the figures, (F,) float.
        """
        means, rows = _means_by_task(output)
        present, at_least_one = rows > 0, rows.clamp(min=1)
        measured = torch.full_like(present, output.gradient_gram is not None)
        weighted = output.task_weights * output.parts.detach()
        norms, cosines = _gradients(output)
        norms = output.task_weights * norms
        blocks = [  # (values, whether the batch has them)
            *means,
            (output.task_weights, present),
            (rows, present),
            (_shares(weighted), present),
            (_shares(weighted / at_least_one), present),
            (norms, present & measured),
            (_shares(norms), present & measured),
            (_shares(norms / at_least_one), present & measured),
            cosines,
            (temperatures.to(weighted), torch.ones_like(temperatures, dtype=torch.bool)),
        ]
        values, wanted = (torch.cat(block) for block in zip(*blocks, strict=True))
        finite = (values.isfinite() | ~wanted).all() & output.loss.isfinite()
        return output.loss.detach().where(finite, torch.nan), values.where(wanted, torch.nan)

    def average(self, batches: Sequence[Tensor]) -> dict[str, float]:
        """Averages each figure over the batches that have it, in one transfer to the host."""
        means = torch.stack(list(batches)).cpu().double().nanmean(dim=0)
        return {name: mean for name, mean in zip(self.names, means.tolist(), strict=True) if mean == mean}


def _means_by_task(output: MixedLossOutput) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Means of the loss and of each component over the rows of each task, (T,) each, and (T,) their numbers."""
    values = torch.stack([output.per_sample.detach(), *output.components.values()], dim=1)  # (B, 1 + components)
    used = ~values.isnan()
    used[:, 0] = True  # a loss of NaN is a fault; a component of NaN is not used
    empty = values.new_zeros(len(output.parts), values.shape[1])
    sums = empty.index_add(0, output.task_ids, values.where(used, 0.0))
    counts = empty.index_add(0, output.task_ids, used.to(values))
    means = sums / counts.clamp(min=1)
    return list(zip(means.unbind(dim=1), (counts > 0).unbind(dim=1), strict=True)), counts[:, 0]


def _gradients(output: MixedLossOutput) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Norms of the unweighted gradients, (T,), and their cosines, (T · (T − 1) / 2,), known where no norm is 0."""
    gram = output.gradient_gram
    if gram is None:
        gram = output.parts.new_zeros(len(output.parts), len(output.parts))
    norms = gram.diagonal().clamp(min=0).sqrt()
    rows, columns = torch.triu_indices(*gram.shape, offset=1, device=gram.device)
    products = norms[rows] * norms[columns]
    return norms.to(output.parts), ((gram[rows, columns] / products).to(output.parts), products > 0)


def _shares(values: Tensor) -> Tensor:
    """Each value over the sum of all; 0 where the sum is 0."""
    total = values.sum()
    return torch.where(total == 0, 0.0, values / total)
