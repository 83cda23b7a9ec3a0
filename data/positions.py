"""Positions of tokens in text and images, computed with the batch rather than by the model."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor


def token_positions(
    input_ids: Tensor, attention_mask: Tensor, grids: Sequence[Sequence[int]], image_token_id: int, merge_size: int
) -> Tensor:
    """Returns the positions of tokens in time, height and width, (3, rows, tokens), as `Qwen2VLModel.get_rope_index`.

    A text counts its tokens; an image stands at one time, its tokens at their row and column, and what follows it
    continues after its longer side (Qwen2-VL, Wang et al. 2024, §2.1). Padding has position 0.

    Args:
        input_ids: (rows, tokens) long.
        attention_mask: (rows, tokens), 1 for real tokens.
        grids: patches in time, height and width of the image in each slot, in their order.
        image_token_id: id of an image's tokens.
        merge_size: patches a side of the square that makes a token.
    """
    positions = input_ids.new_zeros(3, *input_ids.shape)
    slots = iter(grids)
    for row, real in enumerate(attention_mask.bool()):
        is_image = input_ids[row, real] == image_token_id
        positions[:, row, real] = torch.cat(list(_runs(is_image.tolist(), slots, merge_size)), dim=1)
    return positions


def _runs(is_image: list[bool], slots: Iterator[Sequence[int]], merge_size: int) -> Iterator[Tensor]:
    """Yields the positions of each text and each image of a row, (3, tokens); images that touch are apart."""
    yield torch.empty(3, 0, dtype=torch.long)
    start = 0
    for shown, run in groupby(is_image):
        count = len(list(run))
        while count > 0:
            size, positions, length = count, torch.arange(count).expand(3, -1), count
            if shown:
                time, height, width = next(slots)
                height, width = height // merge_size, width // merge_size
                size, length = time * height * width, max(height, width)
                positions = torch.cartesian_prod(*(torch.arange(side) for side in (time, height, width))).T
            yield positions + start
            start, count = start + length, count - size
