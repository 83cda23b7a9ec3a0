"""Plans micro-batches: groups rows by length and by shared images, within limits on rows and tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..microbatches_vipolyqwen import MICROBATCH_COST, length_buckets, sharing


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


def plan_microbatches(
    sizes: Sequence[RowSize], limit: MicrobatchLimit, cost: int = MICROBATCH_COST
) -> list[list[int]]:
    """Assigns every row to one micro-batch and returns the row indices of each; `cost` tokens are its fixed cost.

    Groups rows of similar length, since padding short answers to the longest question costs more than additional
    micro-batches. Packed texts have no padding and are not grouped by length. Keeps rows with the same first image
    together, so that the vision tower encodes it once, unless they exceed the limits.
    """
    units = sharing([size.image for size in sizes])
    longest = [max(sizes[row].tokens for row in unit) for unit in units]
    buckets = [list(range(len(units)))]
    if not limit.packed:
        buckets = length_buckets(
            longest, cost, counts=[len(unit) for unit in units], least_microbatches=limit.least_microbatches
        )
    microbatches = []
    for bucket in buckets:
        frames = {number: max(sizes[row].frames for row in units[number]) for number in bucket}
        bucket.sort(key=lambda number: (frames[number], longest[number]), reverse=True)
        microbatches += cut([units[number] for number in bucket], sizes, limit)
    return microbatches


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
