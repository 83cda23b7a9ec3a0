"""Runs that cannot learn anything say so before the first step, or after a few steps without gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from ..data.sources import PairDataset
from ..data.streamed_pairs import StreamedPairs
from .losses import COMPONENTS, POSITIVE_COMPONENTS, SCORE_COMPONENTS
from .mixed_loss import MixedLoss

logger = logging.get_logger(__name__)

PATIENCE = 10  # steps without any gradient after which a run ends
IN_BATCH = ("nce", "triplet")  # components that compare a pair with other rows


class LearningCallback(TrainerCallback):
    """Ends a run whose first steps have no gradient at all; measures on the device and reads it at logging steps."""

    def __init__(self) -> None:
        self.first_step = self.steps = 0
        self.learns = False  # whether a gradient was seen: later ones may be 0, when the loss is solved
        self.has_moved: Tensor | None = None  # the same, on the device

    def watch(self, embeddings: Tensor) -> None:
        """Records whether the gradient of a batch's embeddings is 0 everywhere."""

        def record(gradient: Tensor) -> None:
            moves = gradient.detach().count_nonzero() > 0  # NaN counts
            self.has_moved = moves if self.has_moved is None else self.has_moved | moves

        if embeddings.requires_grad and not self.learns:
            embeddings.register_hook(record)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the count."""
        self.first_step, self.steps, self.learns, self.has_moved = state.global_step, 0, False, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts steps; checks after a few of them, however rarely the run logs."""
        self.steps += 1
        if self.steps == PATIENCE:
            self.check()

    def check(self) -> None:
        """Raises ValueError if the first steps had no gradient."""
        if self.learns or self.has_moved is None:
            return
        self.learns = bool(self.has_moved)
        if not self.learns and self.steps >= PATIENCE:
            raise ValueError(
                f"The gradient of the first {self.steps} steps was exactly 0, so nothing is learned. Likely causes: "
                "all rows of a batch have equal sides or one `group` (`mask_duplicates`, `mask_groups`), all scores "
                "are below `nce_min_score`, or batches hold one pair (`per_device_train_batch_size`)."
            )


def check_that_it_learns(
    rates: Sequence[float], has_weights: bool, loss: MixedLoss, pairs: PairDataset | StreamedPairs | None, rows: int
) -> None:
    """Checks before the first step that a run can learn; warns of tasks that cannot.

    Args:
        rates: learning rates of the trained parameters, those of the loss among them.
        has_weights: whether any parameter of the model is trained.
        loss: the loss of each task.
        pairs: pairs to train on.
        rows: pairs of a batch of all ranks.

    Raises:
        ValueError: nothing can be learned; names the setting and the remedy.
    """
    if pairs is None:
        raise ValueError("`train_data` is missing, so nothing would be trained; name pairs in a recipe.")
    if not has_weights and not any(rates):
        raise ValueError(
            "Every parameter is frozen, so nothing would be trained; unfreeze a tower (`freeze`), poolings or "
            "projections."
        )
    if not any(rates):
        logger.warning("`learning_rate` is 0 for all parts, so no weight changes; give a number above 0.")
    if isinstance(pairs, StreamedPairs):
        return  # nothing is known of its rows yet; `LearningCallback` sees those of the first steps
    has_negatives = _names_negatives(pairs)
    if rows == 1 and not has_negatives:
        _refuse_single_pair(loss, pairs)
    reasons = {
        task: reason
        for number, task in enumerate(loss.tasks)
        if (reason := _obstacle(loss, pairs, number, has_negatives)) is not None
    }
    if reasons and set(reasons) >= set(pairs.task_counts()):
        raise ValueError(f"Nothing would be learned: {_listed(reasons)}.")
    for task, reason in reasons.items():
        logger.warning(f"{task} teaches nothing: {reason}.")


def _refuse_single_pair(loss: MixedLoss, pairs: PairDataset) -> None:
    """Raises ValueError if a task of these pairs needs other rows in a batch of one pair."""
    columns = [COMPONENTS.index(name) for name in IN_BATCH]
    for task in pairs.task_counts():
        if loss.weights[loss.tasks.index(task), columns].sum() > 0:
            raise ValueError(
                "`per_device_train_batch_size` is 1 on one rank, so a batch holds one pair without any negative: "
                f"InfoNCE of {task} is 0 for every row (accumulation does not join batches). Give 2 or more, such as "
                "64; where memory is short, `embed_chunk: 1` embeds them one by one and joins them in one loss."
            )


def _obstacle(loss: MixedLoss, pairs: PairDataset, task: int, has_negatives: bool) -> str | None:
    """Returns why the rows of a task teach nothing; `None` if they may, or if there are none."""
    chosen = [piece.task_ids == task for piece in pairs.pieces]
    if not any(rows.any() for rows in chosen):
        return None
    used = {name for name, weight in zip(COMPONENTS, loss.weights[task].tolist(), strict=True) if weight > 0}
    scores = _column(pairs, chosen, "score")
    if used & set(SCORE_COMPONENTS) and not np.isnan(scores).all():
        used -= {"rank"} if len(np.unique(scores[~np.isnan(scores)])) < 2 else set()
        if used & set(SCORE_COMPONENTS):
            return None
    used -= set(SCORE_COMPONENTS)
    if "distil" in used:
        return None
    least = loss.nce_min_score
    if least is not None and used & set(POSITIVE_COMPONENTS) and bool((scores < least).all()):
        highest = float(scores.max())
        return f"all scores are at most {highest:g}, below `nce_min_score` {least:g}; lower it, or map `score_range`"
    if not used:
        return "no component of its loss has a weight above 0 that applies to its rows; see `loss_table` and `tasks`"
    if used <= set(IN_BATCH) and not has_negatives:
        return _without_negatives(loss, pairs)
    return None


def _without_negatives(loss: MixedLoss, pairs: PairDataset) -> str | None:
    """Returns why no row is a negative of another one; `None` if some may be."""
    if len(pairs) == 1:
        return "there is one pair, which has no negatives; give more pairs"
    everything = [np.ones(len(piece.task_ids), bool) for piece in pairs.pieces]
    for name in ("a_key", "b_key") if loss.mask_duplicates else ():
        keys = _column(pairs, everything, name)
        if (keys == keys[0]).all():
            side = f"side {name[0]}"
            return f"{side} of all rows is the same, so no row is a negative (`mask_duplicates`); give other pairs"
    groups = _column(pairs, everything, "group_key") if loss.mask_groups else np.zeros(1)
    if groups[0] != 0 and (groups == groups[0]).all():
        return "all rows have one `group`, so no row is a negative (`mask_groups`); give groups of equal content only"
    return None


def _names_negatives(pairs: PairDataset) -> bool:
    """Returns whether any row names hard negatives."""
    return any(bool((_lengths(piece.values("negatives")) > 0).any()) for piece in pairs.pieces)


def _lengths(column: Any) -> np.ndarray:
    import pyarrow.compute as pc  # `datasets` brings it

    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _column(pairs: PairDataset, chosen: Sequence[np.ndarray], name: str) -> np.ndarray:
    """Returns a column of the chosen rows of every piece, (rows,)."""
    return np.concatenate([piece.column(name)[rows] for piece, rows in zip(pairs.pieces, chosen, strict=True)])


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{task}: {reason}" for task, reason in reasons.items())
