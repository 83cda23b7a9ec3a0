"""Plans micro-batches: groups rows by length and by shared images, within limits on rows and tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch

MICROBATCH_COST = 64  # tokens; fixed cost of a forward and backward, compared in benchmarks/length_buckets.py
MAX_LENGTH_CLASSES = 256  # bounds the O(classes²) search of `length_buckets`


class RowSize(NamedTuple):
    """Size of one row, and the image that it may share with other rows."""

    tokens: int  # 0 for a row of audio only
    frames: int = 0  # that the speech encoder makes of the first, longest window of its audio
    image: int = -1  # index of its first image in the batch; −1 without images
    windows: int = 1  # of its audio


class MicrobatchSize(NamedTuple):
    """Size of one micro-batch."""

    rows: int = 0
    tokens: int = 0
    texts: int = 0  # rows with tokens; rows without tokens skip the language model
    longest_text: int = 0
    windows: int = 0
    longest_window: int = 0

    def plus(self, rows: Iterable[RowSize]) -> "MicrobatchSize":
        """Returns the size with `rows` added."""
        rows = list(rows)
        return MicrobatchSize(
            self.rows + len(rows),
            self.tokens + sum(row.tokens for row in rows),
            self.texts + sum(row.tokens > 0 for row in rows),
            max([self.longest_text, *(row.tokens for row in rows)]),
            self.windows + sum(row.windows for row in rows if row.frames > 0),
            max([self.longest_window, *(row.frames for row in rows)]),
        )

    def positions(self, packed: bool) -> int:
        """Returns the number of tokens and audio frames that the towers process, padding included."""
        texts = self.tokens if packed else self.texts * self.longest_text
        return texts + self.windows * self.longest_window


@dataclass(frozen=True)
class MicrobatchLimit:
    """Upper limits of a micro-batch; a single row that exceeds them forms a micro-batch alone.

    Attributes:
        rows: maximum number of rows; `None` means no limit.
        tokens: maximum number of tokens (image tokens included) and audio frames, padding included; `None` means no
            limit.
        packed: whether the model packs texts, so that their padding costs nothing.
    """

    rows: int | None = None
    tokens: int | None = None
    packed: bool = False

    def allows(self, size: MicrobatchSize) -> bool:
        """Returns whether a micro-batch of this size is within the limits."""
        return (self.rows is None or size.rows <= self.rows) and (
            self.tokens is None or size.positions(self.packed) <= self.tokens
        )

    def least_microbatches(self, rows: int, tokens: int) -> int:
        """Returns the minimum number of micro-batches for this many rows and tokens."""
        by_rows = 1 if self.rows is None else -(-rows // self.rows)
        return max(1, by_rows, 1 if self.tokens is None else -(-tokens // self.tokens))


def plan_microbatches(sizes: Sequence[RowSize], limit: MicrobatchLimit) -> list[list[int]]:
    """Assigns every row to one micro-batch and returns the row indices of each.

    Groups rows of similar length, since padding short answers to the longest question costs more than additional
    micro-batches. Packed texts have no padding and are not grouped by length. Keeps rows with the same first image
    together, so that the vision tower encodes it once, unless they exceed the limits.
    """
    units = sharing(sizes)
    longest = [max(sizes[row].tokens for row in unit) for unit in units]
    buckets = [list(range(len(units)))]
    if not limit.packed:
        buckets = length_buckets(longest, counts=[len(unit) for unit in units], limit=limit)
    microbatches = []
    for bucket in buckets:
        frames = {number: max(sizes[row].frames for row in units[number]) for number in bucket}
        bucket.sort(key=lambda number: (frames[number], longest[number]), reverse=True)
        microbatches += cut([units[number] for number in bucket], sizes, limit)
    return microbatches


def sharing(sizes: Sequence[RowSize]) -> list[list[int]]:
    """Groups the indices of rows that share their first image; any other row forms a group alone."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for row, size in enumerate(sizes):
        key = (True, size.image) if size.image >= 0 else (False, row)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def cut(units: Sequence[Sequence[int]], sizes: Sequence[RowSize], limit: MicrobatchLimit) -> list[list[int]]:
    """Fills micro-batches with groups of rows in order; splits a group that exceeds the limits."""
    microbatches: list[list[int]] = []
    size = MicrobatchSize()
    for unit in units:
        fits = limit.allows(MicrobatchSize().plus(sizes[row] for row in unit))
        for piece in [unit] if fits else [[row] for row in unit]:
            grown = size.plus(sizes[row] for row in piece)
            if microbatches and limit.allows(grown):
                microbatches[-1].extend(piece)
                size = grown
            else:
                microbatches.append(list(piece))
                size = MicrobatchSize().plus(sizes[row] for row in piece)
    return microbatches


def length_buckets(
    lengths: Sequence[int],
    microbatch_cost: int = MICROBATCH_COST,
    counts: Sequence[int] | None = None,
    limit: MicrobatchLimit = MicrobatchLimit(),
) -> list[list[int]]:
    """Groups items by length, longest first, at the lowest total cost.

    Minimises Σ (longest · rows + microbatch_cost · micro-batches) over all partitions of the items sorted by length.
    Items without tokens (audio only) join the group of the shortest items: they skip the language model.

    Args:
        lengths: tokens of each item.
        microbatch_cost: fixed cost of a micro-batch, in tokens.
        counts: rows of each item; `None` means one row each.
        limit: limits of a micro-batch; a group that exceeds them takes several.
    """
    order = sorted(range(len(lengths)), key=lambda item: lengths[item], reverse=True)
    step = max(1, lengths[order[0]] // MAX_LENGTH_CLASSES if order else 1)
    classes = [list(items) for _, items in groupby(order, key=lambda item: -(-lengths[item] // step))]
    without = classes.pop() if classes and not lengths[classes[-1][0]] else []
    ends = [0, *accumulate(sum(1 if counts is None else counts[item] for item in items) for items in classes)]

    def cost(start: int, end: int) -> int:
        rows = ends[end] - ends[start]
        tokens = rows * lengths[classes[start][0]]
        return tokens + microbatch_cost * limit.least_microbatches(rows, tokens)

    best, starts = [0], [0]
    for end in range(1, len(classes) + 1):
        least, start = min((best[start] + cost(start, end), start) for start in range(end))
        best.append(least)
        starts.append(start)
    buckets: list[list[int]] = []
    end = len(classes)
    while end:
        buckets.insert(0, [item for items in classes[starts[end] : end] for item in items])
        end = starts[end]
    return [*buckets[:-1], (buckets[-1] if buckets else []) + without] if order else []


def take_rows(batch: Mapping[str, Any], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Selects the model inputs of some rows of a collated batch and trims the padding that none of them needs.

    Args:
        batch: output of `MixedBatchCollator`.
        rows: (rows,) long, row indices in the order wanted, on the batch's device.
    """
    inputs = {}
    mask = batch["attention_mask"][rows]  # (rows, tokens)
    used = mask.any(dim=0)
    if used.any():
        inputs["input_ids"] = batch["input_ids"][rows][:, used]
        inputs["attention_mask"] = mask[:, used]
    if batch["images_per_row"][rows].any():
        slots = members(batch["images_per_row"], rows)
        images, inputs["image_indices"] = batch["image_indices"][slots].unique(return_inverse=True)
        patches = members(batch["image_grid_thw"].prod(dim=-1), images)
        inputs["pixel_values"] = batch["pixel_values"][patches]
        inputs["image_grid_thw"] = batch["image_grid_thw"][images]
    if "has_audio" in batch and batch["has_audio"][rows].any():
        clips = members(batch["has_audio"].long(), rows)
        windows = clips
        if "audio_windows" in batch:
            inputs["audio_windows"] = batch["audio_windows"][clips]
            windows = members(batch["audio_windows"], clips)
        mask = batch["audio_attention_mask"][windows]  # (windows, samples)
        used = mask.any(dim=0)
        inputs["audio_features"] = batch["audio_features"][windows][:, used]
        inputs["audio_attention_mask"] = mask[:, used]
        inputs["has_audio"] = batch["has_audio"][rows]
    return inputs


def members(counts: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Positions of the members of `groups` where group g has `counts[g]` members, all groups one after another."""
    sizes = counts[groups]
    starts = (counts.cumsum(0) - counts)[groups]
    within = torch.arange(int(sizes.sum()), device=counts.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return starts.repeat_interleave(sizes) + within


def row_lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the number of tokens of each row of a collated batch, (rows,) long; 0 for audio only."""
    return batch["attention_mask"].sum(dim=1)


def first_images(batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns the index of each row's first image in a collated batch, (rows,) long; −1 without images."""
    counts = batch["images_per_row"]
    first = torch.full_like(counts, -1)
    if "image_indices" in batch:
        first[counts > 0] = batch["image_indices"][(counts.cumsum(0) - counts)[counts > 0]]
    return first
