"""Mixed loss: one loss per row, chosen by its task, over the joined batch of all tasks and ranks."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.schema import MODALITY_PAIRS
from ..pooling_vipolyqwen import unit_vectors
from .distillation import Distillation, Teaching
from .distributed import RowShare, mean_over_ranks
from .loss_blocks import BlockPlan, block_rows, contrast, rank_in_blocks
from .loss_figures import LossFigures, MixedLossOutput
from .losses import (
    COMPONENTS,
    POSITIVE_COMPONENTS,
    SCORE_COMPONENTS,
    TEMPERATURES,
    TRIPLET_NEGATIVES,
    TaskLoss,
    check_temperature,
    check_weight,
    cosine_distance,
    hardest_triplet,
    info_nce,
    pairwise_rank,
    score_mse,
)
from .negatives import Exclusions, HardNegatives
from .weighting import TaskWeighting, UniformWeighting

LOWEST_TEMPERATURE = 0.01  # of a learnable temperature, as in CLIP: below, one pair dominates the gradient
LEARNED_RANGE = (math.log(LOWEST_TEMPERATURE), math.log(TEMPERATURES[1]))  # of its logarithm


class MixedLoss(nn.Module):
    """One loss per row, chosen by the row's task, over one mixed batch (STW paper §4.2, trimodal paper §4.2).

    NCE and Triplet see all rows of the batch, whatever their task. On several ranks it takes the joined batch of
    `join_batches`. All options can be combined.

    Args:
        tasks: task name -> its loss; the order gives the task ids.
        temperature: T in `TEMPERATURES`, or {pair of `MODALITY_PAIRS`: T}, by the modalities of each row's pair. Pairs
            with text are all given; one without text that is not given shares the T of its first modality with text
            (audio-image and audio-audio that of audio-text, image-image that of image-text).
        learnable_temperature: train T from this value, at least `LOWEST_TEMPERATURE`, by the gradient of NCE alone
            (Triplet would only raise it).
        weighting: λ per task over the same task names; None is λ = 1.
        mask_duplicates: exclude rows whose a or b has the same content as the positive's from the negatives.
        mask_groups: exclude rows of the same group from each other's negatives.
        nce_min_score: a row scored below this is not a positive: its nce, cosine and triplet are 0, though it stays a
            negative of other rows. None disables the threshold.
        false_negative_margin: exclude negatives more similar than the positive by more than this. None keeps all.
        matryoshka_dims: the loss is the mean of those of the vectors' first dims, each brought to unit length
            (Kusupati et al. 2022). None uses the full vector.
        distillation: loss against a teacher, for tasks with a weight of distil.
        triplet_negatives: negative of Triplet: hardest, or semi_hard (less similar than the positive).
        block_rows: rows whose similarities are held at once (training/loss_blocks.py); None chooses by size, and takes
            all of a small batch.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskLoss],
        temperature: float | Mapping[str, float] = 0.07,
        weighting: TaskWeighting | None = None,
        mask_duplicates: bool = True,
        nce_min_score: float | None = 0.5,
        mask_groups: bool = True,
        false_negative_margin: float | None = None,
        matryoshka_dims: Sequence[int] | None = None,
        learnable_temperature: bool = False,
        distillation: Distillation | None = None,
        triplet_negatives: str = "hardest",
        block_rows: int | None = None,
    ) -> None:
        super().__init__()
        if nce_min_score is not None and not 0 <= nce_min_score <= 1:
            raise ValueError(f"nce_min_score is {nce_min_score}; it must lie in [0, 1], or be None for off.")
        if false_negative_margin is not None:
            check_weight(false_negative_margin, "false_negative_margin")
        if triplet_negatives not in TRIPLET_NEGATIVES:
            raise ValueError(
                f"`triplet_negatives` is {triplet_negatives!r}; it must be one of {', '.join(TRIPLET_NEGATIVES)}."
            )
        if block_rows is not None and block_rows < 1:
            raise ValueError(f"`loss_block_rows` is {block_rows}; give a number of rows >= 1, or leave it out.")
        self.semi_hard, self.block_rows = triplet_negatives == "semi_hard", block_rows
        self.tasks = list(tasks)
        self.weighting = UniformWeighting(self.tasks) if weighting is None else weighting
        if self.weighting.tasks != self.tasks:
            raise ValueError(f"The weighting is for tasks {self.weighting.tasks}, the loss for {self.tasks}.")
        self.mask_duplicates, self.mask_groups, self.nce_min_score = mask_duplicates, mask_groups, nce_min_score
        self.false_negative_margin, self.matryoshka_dims = false_negative_margin, _checked_dims(matryoshka_dims)
        self.distillation = distillation
        self.temperature_by_pair = isinstance(temperature, Mapping)
        temperatures = _checked_temperatures(temperature, learnable_temperature)
        log_temperatures = torch.tensor(list(temperatures.values())).log()  # (1,) or (pairs given,)
        if learnable_temperature:
            self.log_temperatures = nn.Parameter(log_temperatures)
        else:
            self.register_buffer("log_temperatures", log_temperatures, persistent=False)
        names = [f"temperature/{pair}" for pair in temperatures] if self.temperature_by_pair else ["temperature"]
        self.figures = LossFigures(self.tasks, names if learnable_temperature else ())
        places = [_sharing(pair, list(temperatures)) if self.temperature_by_pair else 0 for pair in MODALITY_PAIRS]
        losses = tasks.values()
        self.used = {name for name in COMPONENTS if any(getattr(loss, name) > 0 for loss in losses)}
        constants = {  # derived from the settings, so not saved
            "weights": [[getattr(loss, name) for name in COMPONENTS] for loss in losses],  # (T, 6)
            "triplet_margins": [loss.triplet_margin for loss in losses],  # (T,)
            "rank_margins": [loss.rank_margin for loss in losses],  # (T,)
            "by_score": [name in SCORE_COMPONENTS for name in COMPONENTS],  # (6,)
            "by_positive": [name in POSITIVE_COMPONENTS for name in COMPONENTS],  # (6,)
            "by_teacher": [name == "distil" for name in COMPONENTS],  # (6,)
            "temperature_places": places,  # (pairs,) long, of each pair's T in `log_temperatures`
        }
        # (T,) bool, on the host, where batches are checked
        self.needs_score = torch.tensor([loss.mse + loss.rank > 0 and not loss.score_optional for loss in losses])
        self.needs_teacher = torch.tensor([loss.distil > 0 for loss in losses])
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        task_ids: Tensor,
        scores: Tensor,
        a_keys: Tensor | None = None,
        b_keys: Tensor | None = None,
        epoch: float = 0.0,
        *,
        groups: Tensor | None = None,
        modalities: Tensor | None = None,
        negatives: HardNegatives | None = None,
        teaching: Teaching | None = None,
        share: RowShare | None = None,
        with_gradients: bool = False,
        checked: bool = False,
    ) -> MixedLossOutput:
        """Computes the loss of one batch.

        Args:
            a: (B, D) float, unit vectors.
            b: (B, D) float, unit vectors.
            task_ids: (B,) long, positions in `tasks`.
            scores: (B,) float in [0, 1], NaN where absent.
            a_keys: (B,) int64, equal for equal content of side a; without keys, its duplicates are not masked.
            b_keys: (B,) int64, the same for side b.
            epoch: epochs since the start of training, for the weighting.
            groups: (B,) int64, equal for rows of one group, 0 for a row without a group.
            modalities: (B,) long, positions in `MODALITY_PAIRS`; needed for temperatures by pair.
            negatives: hard negatives, candidates of every row.
            teaching: teacher's vectors; at least one for each row of a task with a weight of distil.
            share: rows of the joined batch that this rank computes where the batch is computed in blocks; the gradient
                of the batch is then the mean over ranks. None: every rank computes the batch.
            checked: whether `check_rows` has seen the rows already; on a device, looking at them waits for it.
            with_gradients: whether to measure the tasks' gradients; always on for a weighting that needs them.
        """
        sides = None if teaching is None else teaching.sides
        taught = self._taught(task_ids, sides)
        _check_shapes(a, b, task_ids, scores)
        if not checked:
            self.check_rows(task_ids, scores, sides)
        dtype = torch.promote_types(a.dtype, torch.float32)
        scores = scores.to(dtype)
        with torch.autocast(a.device.type, enabled=False):  # autocast would run the matmul in bfloat16
            temperatures = self._temperatures(len(a), modalities).to(dtype)
            keys = (a_keys, b_keys) if self.mask_duplicates else (None, None)
            excluded = Exclusions(len(a), *keys, groups if self.mask_groups else None, negatives)
            candidates = b if negatives is None else torch.cat([b, negatives.vectors])
            rows = block_rows(len(a), len(candidates), self.block_rows, a.device)
            plan = None
            if rows is not None:
                triplets = "triplet" in self.used
                plan = BlockPlan(excluded, rows, share, self.false_negative_margin, triplets, self.semi_hard)
            mask = excluded.of_rows(0, len(a)) if plan is None else None
            values = torch.stack(  # (dims, B, 6)
                [
                    self._values(*sides, task_ids, scores, temperatures, plan or mask, teaching)
                    for sides in self._prefixes(a.to(dtype), candidates.to(dtype))
                ]
            ).mean(dim=0)
            weights = self.weights.to(dtype)[task_ids]  # (B, 6)
            per_sample = (weights * values).sum(dim=1)
            counts = per_sample.new_zeros(len(self.tasks)).index_add(0, task_ids, torch.ones_like(per_sample))
            parts = per_sample.new_zeros(len(self.tasks)).index_add(0, task_ids, per_sample) / len(a)
            task_weights = self.weighting(epoch).to(parts)
            loss = (task_weights * parts).sum() + (self.weighting.penalty().to(parts) * counts).sum() / len(a)
            wanted = with_gradients or self.weighting.needs_gradient_norms
            embeddings = [x for x in (a, b, *([] if negatives is None else [negatives.vectors])) if x.requires_grad]
            shared = plan is not None and share is not None
            gram = gradient_gram(parts, embeddings, shared) if wanted and embeddings else None
        uses = (weights > 0) & ~(self.by_score & scores.isnan()[:, None]) & (taught[:, None] | ~self.by_teacher)
        shown = dict(zip(COMPONENTS, values.detach().where(uses, torch.nan).unbind(dim=1), strict=True))
        self._observe(parts.detach(), counts, gram)
        return MixedLossOutput(loss, per_sample, shown, parts, task_weights.detach(), task_ids, gram)

    def _observe(self, parts: Tensor, counts: Tensor, gram: Tensor | None) -> None:
        """Shows the weighting a training batch; one that is not finite counts as a batch without any task."""
        if self.training:
            norms = None if gram is None else gram.diagonal().clamp(min=0).sqrt()
            present = (counts > 0) & parts.isfinite().all()  # no branch: it would wait for the device at every step
            with torch.no_grad():
                self.weighting.observe(parts * counts.sum() / counts.clamp(min=1), present, norms)

    def _temperatures(self, rows: int, modalities: Tensor | None) -> Tensor:
        """Returns T of each row, (B,) float."""
        logs = self.log_temperatures
        if isinstance(logs, nn.Parameter):  # clamps the logarithm, so that the bound itself has a gradient
            logs = logs.clamp(*LEARNED_RANGE)
        temperatures = logs.exp()
        if not self.temperature_by_pair:
            return temperatures.expand(rows)
        if modalities is None:
            raise ValueError("The temperature differs by pair of modalities; give the loss `modalities` of each row.")
        return temperatures[self.temperature_places[modalities]]

    @torch.no_grad()
    def keep_bounds(self) -> None:
        """Moves learned parameters back into their bounds, after an update; outside they have no gradient."""
        if isinstance(self.log_temperatures, nn.Parameter):
            self.log_temperatures.clamp_(*LEARNED_RANGE)
        self.weighting.keep_bounds()

    def _prefixes(self, a: Tensor, candidates: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Truncates both sides to each Matryoshka length, as unit vectors."""
        if self.matryoshka_dims is None:
            return [(a, candidates)]
        if self.matryoshka_dims[0] > a.shape[1]:
            raise ValueError(
                f"matryoshka_dims has {self.matryoshka_dims[0]}, but the vectors have {a.shape[1]} dimensions; "
                "leave it out."
            )
        return [(unit_vectors(a[:, :dim]), unit_vectors(candidates[:, :dim])) for dim in self.matryoshka_dims]

    def _taught(self, task_ids: Tensor, sides: Tensor | None) -> Tensor:
        """Returns which rows have a teacher's vector of a side, (B,) bool."""
        taught = torch.zeros_like(task_ids, dtype=torch.bool)
        if self.distillation is not None and sides is not None and len(sides):
            taught[sides % len(task_ids)] = True
        return taught

    def _values(
        self,
        a: Tensor,
        candidates: Tensor,
        task_ids: Tensor,
        scores: Tensor,
        temperatures: Tensor,
        compared: Tensor | BlockPlan | None,
        teaching: Teaching | None,
    ) -> Tensor:
        """Computes every component of every row, (B, 6) float, unweighted and finite, used or not.

        In blocks, as `compared` may say in place of a mask, components that no task uses are 0.
        """
        ranked = scores.where(self.weights[task_ids, COMPONENTS.index("rank")] > 0, torch.nan)
        rank_margins = self.rank_margins.to(scores)[task_ids]
        triplet_margins = self.triplet_margins.to(scores)[task_ids]
        if isinstance(compared, BlockPlan):
            cosines = torch.bmm(a[:, None], candidates[: len(a), :, None]).flatten()
            nce, hardest = contrast(a, candidates, cosines, temperatures, compared)
            uses_rank = "rank" in self.used
            rank = rank_in_blocks(cosines, ranked, rank_margins, compared) if uses_rank else torch.zeros_like(cosines)
            triplet = ((hardest - cosines) / temperatures.detach() + triplet_margins).relu()
        else:
            similarities = a @ candidates.T
            cosines = similarities.diagonal()
            mask, column_mask = self._with_false_negatives(similarities.detach(), compared)
            nce = info_nce(similarities, temperatures, mask, column_mask)
            rank = pairwise_rank(cosines, ranked, rank_margins)
            triplet = hardest_triplet(similarities, temperatures.detach(), triplet_margins, mask, self.semi_hard)
        values = {
            "nce": nce,
            "mse": score_mse(cosines, scores),
            "rank": rank,
            "cosine": cosine_distance(cosines),
            "triplet": triplet,
            "distil": torch.zeros_like(cosines),
        }
        if self.distillation is not None and teaching is not None:
            plan = compared if isinstance(compared, BlockPlan) else None
            values["distil"] = self.distillation(a, candidates[: len(a)], teaching, plan)
        stacked = torch.stack([values[name] for name in COMPONENTS], dim=1)
        if self.nce_min_score is None:
            return stacked
        no_positive = scores.float() < self.nce_min_score  # (B,); False for NaN, and for the threshold itself
        return stacked.masked_fill(no_positive[:, None] & self.by_positive, 0.0)

    def _with_false_negatives(self, similarities: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Adds candidates more similar than positive + margin to the masks for rows (B, C) and for columns (B, B)."""
        rows = len(similarities)
        if self.false_negative_margin is None:
            return mask, None if mask is None else mask[:, :rows]
        limit = similarities.diagonal() + self.false_negative_margin
        by_row, by_column = similarities > limit[:, None], similarities[:, :rows] > limit[None, :]
        return (by_row, by_column) if mask is None else (by_row | mask, by_column | mask[:, :rows])

    def check_rows(self, task_ids: Tensor, scores: Tensor, sides: Tensor | None = None) -> None:
        """Checks a batch, best while it is still on the host.

        Args:
            task_ids: (B,) long, positions in `tasks`.
            scores: (B,) float, NaN where absent.
            sides: (M,) long, sides with a teacher's vector, see `Teaching`.

        Raises:
            ValueError: a task id is unknown, or a row lacks the score or the teacher that its task needs.
        """
        taught = self._taught(task_ids, sides)
        needs_score, needs_teacher = (flags.to(task_ids.device) for flags in (self.needs_score, self.needs_teacher))
        unknown = (task_ids < 0) | (task_ids >= len(self.tasks))
        known_ids = task_ids.clamp(0, len(self.tasks) - 1)
        missing = needs_score[known_ids] & scores.isnan()
        untaught = needs_teacher[known_ids] & ~taught
        if not (unknown | missing | untaught).any():
            return
        if unknown.any():
            raise ValueError(f"task_ids {task_ids.tolist()} must lie in [0, {len(self.tasks)}): {self.tasks}.")
        needs, faulty = (
            ("a score (mse or rank > 0)", missing) if missing.any() else ("a teacher (distil > 0)", untaught)
        )
        names = sorted({self.tasks[task] for task in task_ids[faulty].tolist()})
        positions = faulty.nonzero().flatten().tolist()
        raise ValueError(
            f"Tasks {names} need {needs}, but rows {positions} of the batch have none; "
            "give it to these rows, or set these weights of the task to 0."
        )

    def measure(self, output: MixedLossOutput) -> tuple[Tensor, Tensor]:
        """Measures a batch for the log, without a transfer to the host; see `LossFigures.measure`."""
        learnable = isinstance(self.log_temperatures, nn.Parameter)
        return self.figures.measure(output, self.log_temperatures.detach().exp()[: None if learnable else 0])

    def summarise(self, output: MixedLossOutput) -> dict[str, float]:
        """Returns the figures of one batch by name; see `LossFigures`."""
        return self.figures.average([self.measure(output)[1]])


def _check_shapes(a: Tensor, b: Tensor, task_ids: Tensor, scores: Tensor) -> None:
    """Raises ValueError for shapes that do not fit."""
    rows = a.shape[:1]
    if a.ndim != 2 or a.shape != b.shape or task_ids.shape != rows or scores.shape != rows or not a.numel():
        shapes = [tuple(x.shape) for x in (a, b, task_ids, scores)]
        raise ValueError(f"a, b, task_ids, scores have shapes {shapes}; they must be (B, D), (B, D), (B,), (B,).")


def gradient_gram(parts: Tensor, embeddings: Sequence[Tensor], shared: bool = False) -> Tensor:
    """Computes (T, T) inner products of the gradients of T scalars by the embeddings, and leaves every `.grad` alone.

    The backward ends at the embeddings: it costs a few products of (B, B) with (B, D), but no backward of the model.

    Args:
        parts: (T,) float, with gradient.
        embeddings: the tensors from which `parts` was computed.
        shared: whether the gradient is the mean over ranks of theirs, see training/loss_blocks.py.
    """
    flat = parts.new_empty(len(parts), sum(x.numel() for x in embeddings))
    for row, part in zip(flat, parts, strict=True):  # in turn: a batched backward would hold T matrices of (B, B)
        gradients = torch.autograd.grad(part, tuple(embeddings), retain_graph=True, materialize_grads=True)
        torch.cat([gradient.flatten().to(flat.dtype) for gradient in gradients], out=row)
    if shared:
        flat = mean_over_ranks(flat)
    return flat @ flat.T


def _checked_temperatures(temperature: float | Mapping[str, float], learnable: bool) -> dict[str, float]:
    """Returns the temperatures by pair of modalities, or one; raises ValueError for invalid values."""
    if not isinstance(temperature, Mapping):
        temperature = {"temperature": temperature}
    else:
        unknown = [pair for pair in temperature if pair not in MODALITY_PAIRS]
        missing = [pair for pair in MODALITY_PAIRS if "text" in pair and pair not in temperature]
        if unknown or missing:
            fault = f"unknown {', '.join(map(str, unknown))}" if unknown else f"missing {', '.join(missing)}"
            raise ValueError(f"temperature is {dict(temperature)}: {fault}; give one for {', '.join(MODALITY_PAIRS)}.")
        temperature = {pair: temperature[pair] for pair in MODALITY_PAIRS if pair in temperature}
    for name, value in temperature.items():
        check_temperature(value, f"{name}: temperature", LOWEST_TEMPERATURE if learnable else TEMPERATURES[0])
    return {name: float(value) for name, value in temperature.items()}


def _sharing(pair: str, given: list[str]) -> int:
    """Returns the place in `given` of the pair whose temperature `pair` has; see `MixedLoss`."""
    return given.index(pair if pair in given else pair.split("-")[0] + "-text")


def _checked_dims(dims: Sequence[int] | None) -> list[int] | None:
    """Returns the Matryoshka lengths, longest first; raises ValueError for invalid lengths."""
    if dims is None:
        return None
    if not dims or any(isinstance(dim, bool) or not isinstance(dim, int) or dim < 1 for dim in dims):
        raise ValueError(f"matryoshka_dims is {dims!r}; give integers >= 1, such as [1024, 512, 256].")
    return sorted(set(dims), reverse=True)
