"""Which rows of a batch go through the model together: like lengths, shared images, at most so many rows or tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch

from ..data.collator import members

CALL_COST = 64  # tokens: what a call of the model costs beside its tokens; benchmarks/length_buckets.py compares
MOST_CLASSES = 256  # lengths that are told apart when rows are grouped


class RowSize(NamedTuple):
    """What a row costs, and what it could share with others."""

    tokens: int  # 0 for a sound alone
    frames: int = 0  # of its sound
    image: int = -1  # number of its first image in the batch; −1 without images


class CallSize(NamedTuple):
    """What rows cost in one call of the model."""

    rows: int = 0
    tokens: int = 0
    texts: int = 0  # rows that have tokens; the others skip the language model
    longest_text: int = 0
    sounds: int = 0
    longest_sound: int = 0

    def plus(self, rows: Iterable[RowSize]) -> "CallSize":
        """The size with more rows in the call."""
        rows = list(rows)
        return CallSize(
            self.rows + len(rows),
            self.tokens + sum(row.tokens for row in rows),
            self.texts + sum(row.tokens > 0 for row in rows),
            max([self.longest_text, *(row.tokens for row in rows)]),
            self.sounds + sum(row.frames > 0 for row in rows),
            max([self.longest_sound, *(row.frames for row in rows)]),
        )

    def positions(self, packed: bool) -> int:
        """Tokens and frames of sound that pass through the towers, padding among them."""
        texts = self.tokens if packed else self.texts * self.longest_text
        return texts + self.sounds * self.longest_sound


@dataclass(frozen=True)
class CallLimit:
    """The most that one call may hold; a row that is more alone gets a call of its own.

    Attributes:
        rows: rows of a call; `None`: any number.
        tokens: tokens (an image's among them) and frames of sound of a call, with their padding; `None`: any number.
        packed: the model drops the padding of texts.
    """

    rows: int | None = None
    tokens: int | None = None
    packed: bool = False

    def allows(self, size: CallSize) -> bool:
        """Whether a call may be of this size."""
        return (self.rows is None or size.rows <= self.rows) and (
            self.tokens is None or size.positions(self.packed) <= self.tokens
        )

    def least_calls(self, rows: int, tokens: int) -> int:
        """Into how many calls rows of so many tokens have to go at least."""
        by_rows = 1 if self.rows is None else -(-rows // self.rows)
        return max(1, by_rows, 1 if self.tokens is None else -(-tokens // self.tokens))


def plan_calls(sizes: Sequence[RowSize], limit: CallLimit) -> list[list[int]]:
    """Row numbers of each call of the model, every row once.

    Rows of like length go together, since padding short answers to the longest question costs more than further calls;
    packed texts have no padding and need no such care. Rows whose first image is the same stay together, so that it
    passes through the vision tower once; unless they are more than a call may hold.
    """
    units = sharing(sizes)
    longest = [max(sizes[row].tokens for row in unit) for unit in units]
    buckets = [list(range(len(units)))]
    if not limit.packed:
        buckets = length_buckets(longest, counts=[len(unit) for unit in units], limit=limit)
    calls = []
    for bucket in buckets:
        frames = {number: max(sizes[row].frames for row in units[number]) for number in bucket}
        bucket.sort(key=lambda number: (frames[number], longest[number]), reverse=True)
        calls += cut([units[number] for number in bucket], sizes, limit)
    return calls


def sharing(sizes: Sequence[RowSize]) -> list[list[int]]:
    """Groups of row numbers: rows of one image together, any other row alone."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for row, size in enumerate(sizes):
        key = (True, size.image) if size.image >= 0 else (False, row)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def cut(units: Sequence[Sequence[int]], sizes: Sequence[RowSize], limit: CallLimit) -> list[list[int]]:
    """Groups of rows in their order, as many to a call as it may hold; a group that is too large is divided."""
    calls: list[list[int]] = []
    size = CallSize()
    for unit in units:
        whole = limit.allows(CallSize().plus(sizes[row] for row in unit))
        for piece in [unit] if whole else [[row] for row in unit]:
            grown = size.plus(sizes[row] for row in piece)
            if calls and limit.allows(grown):
                calls[-1].extend(piece)
                size = grown
            else:
                calls.append(list(piece))
                size = CallSize().plus(sizes[row] for row in piece)
    return calls


def length_buckets(
    lengths: Sequence[int],
    call_cost: int = CALL_COST,
    counts: Sequence[int] | None = None,
    limit: CallLimit = CallLimit(),
) -> list[list[int]]:
    """Groups items by length, longest first, so that the tokens of all calls and the cost of the calls are least.

    That is the least Σ (longest · rows + call_cost · calls) over all ways to divide the items in order of length.
    Items without any token (sounds alone) go with the shortest ones: they take no part in the language model.

    Args:
        lengths: tokens of each item.
        call_cost: what a call costs on top of its tokens, in tokens.
        counts: rows of each item; `None`: one each.
        limit: what a call may hold; a group that is larger takes several.
    """
    order = sorted(range(len(lengths)), key=lambda item: lengths[item], reverse=True)
    step = max(1, lengths[order[0]] // MOST_CLASSES if order else 1)
    classes = [list(items) for _, items in groupby(order, key=lambda item: -(-lengths[item] // step))]
    without = classes.pop() if classes and not lengths[classes[-1][0]] else []
    ends = [0, *accumulate(sum(1 if counts is None else counts[item] for item in items) for items in classes)]

    def cost(start: int, end: int) -> int:
        rows = ends[end] - ends[start]
        tokens = rows * lengths[classes[start][0]]
        return tokens + call_cost * limit.least_calls(rows, tokens)

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
    """The model inputs of some rows of a collated batch, without the padding that none of them needs.

    Args:
        batch: what `MixedBatchCollator` returns.
        rows: (rows,) long, numbers in [0, 2B) in the order wanted, on the batch's device.
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
        mask = batch["audio_attention_mask"][clips]  # (clips, samples)
        used = mask.any(dim=0)
        inputs["audio_features"] = batch["audio_features"][clips][:, used]
        inputs["audio_attention_mask"] = mask[:, used]
        inputs["has_audio"] = batch["has_audio"][rows]
    return inputs


def row_lengths(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of tokens of each row of a collated batch, (2B,) long; 0 for a sound alone."""
    return batch["attention_mask"].sum(dim=1)


def first_images(batch: Mapping[str, Any]) -> torch.Tensor:
    """Number of the first image of each row of a collated batch, (2B,) long; −1 for a row without images."""
    counts = batch["images_per_row"]
    first = torch.full_like(counts, -1)
    if "image_indices" in batch:
        first[counts > 0] = batch["image_indices"][(counts.cumsum(0) - counts)[counts > 0]]
    return first
