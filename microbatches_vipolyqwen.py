"""Divides a batch into micro-batches of like length: the plan of least cost, and the inputs of some rows."""

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np
import torch

MICROBATCH_COST = 100  # tokens; fixed cost of a forward and backward, compared in benchmarks/length_buckets.py
INFERENCE_COST = 45  # tokens; of a forward alone on a CPU, which reads all weights: 49 with 108M parameters, and
SMALL_LAYER = 2_600_000  # divided by the square of the width, for the calls of small layers: 215 with 2M
CUDA_INFERENCE_COST = 1024  # tokens; on CUDA the launches of a forward take as long as many tokens do
MAX_LENGTH_CLASSES = 256  # bounds the O(classes²) search of `length_buckets`


def length_buckets(
    lengths: Sequence[int],
    microbatch_cost: int = MICROBATCH_COST,
    counts: Sequence[int] | None = None,
    least_microbatches: Callable[[int, int], int] = lambda rows, tokens: 1,
) -> list[list[int]]:
    """Groups items by length, longest first, at the lowest total cost.

    Minimises Σ (longest · rows + microbatch_cost · micro-batches) over all partitions of the items sorted by length.
    Items without tokens (audio only) join the group of the shortest items: they skip the language model.

    Args:
        lengths: tokens of each item.
        microbatch_cost: fixed cost of a micro-batch, in tokens.
        counts: rows of each item; `None` means one row each.
        least_microbatches: rows and tokens of a group -> the fewest micro-batches that it takes.
    """
    order = sorted(range(len(lengths)), key=lambda item: lengths[item], reverse=True)
    step = max(1, lengths[order[0]] // MAX_LENGTH_CLASSES if order else 1)
    classes = [list(items) for _, items in groupby(order, key=lambda item: -(-lengths[item] // step))]
    without = classes.pop() if classes and not lengths[classes[-1][0]] else []
    ends = [0, *accumulate(sum(1 if counts is None else counts[item] for item in items) for items in classes)]

    def cost(start: int, end: int) -> int:
        rows = ends[end] - ends[start]
        tokens = rows * lengths[classes[start][0]]
        return tokens + microbatch_cost * least_microbatches(rows, tokens)

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
        batch: output of `MixedBatchCollator`, or of `divide_batch`. Media may lie on the host while the rest is on a
            device; those of the rows are moved to it.
        rows: (rows,) long, row indices in the order wanted, on the batch's device.
    """
    inputs = {}
    mask = batch["attention_mask"][rows]  # (rows, tokens)
    used = mask.any(dim=0)
    if used.any():
        inputs["input_ids"] = batch["input_ids"][rows][:, used]
        inputs["attention_mask"] = mask[:, used]
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"][:, rows][:, :, used]
    if batch["images_per_row"][rows].any():
        slots = members(batch["images_per_row"], rows)
        images, places = batch["image_indices"][slots].unique(return_inverse=True)
        by_size = batch["image_grid_thw"][images].prod(dim=-1).argsort(stable=True)  # attention takes runs of one size
        images, inputs["image_indices"] = images[by_size], by_size.argsort()[places]
        patches = members(batch["image_grid_thw"].prod(dim=-1), images)
        inputs["pixel_values"] = select_media(batch["pixel_values"], patches)
        inputs["image_grid_thw"] = batch["image_grid_thw"][images]
    if "has_audio" in batch and batch["has_audio"][rows].any():
        clips = members(batch["has_audio"].long(), rows)
        windows = clips
        if "audio_windows" in batch:
            inputs["audio_windows"] = batch["audio_windows"][clips]
            windows = members(batch["audio_windows"], clips)
        mask = select_media(batch["audio_attention_mask"], windows)  # (windows, samples)
        used = mask.any(dim=0)
        inputs["audio_features"] = select_media(batch["audio_features"], windows)[:, used]
        inputs["audio_attention_mask"] = mask[:, used]
        inputs["has_audio"] = batch["has_audio"][rows]
    return inputs


def select_media(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Returns `values[indices]` on the device of `indices`; only these values move."""
    return values[indices.to(values.device)].to(indices.device, non_blocking=True)


def members(counts: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Returns the positions of the members of `groups`, one after another, where group g has `counts[g]` members."""
    sizes = counts[groups]
    starts = (counts.cumsum(0) - counts)[groups]
    within = torch.arange(int(sizes.sum()), device=counts.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return starts.repeat_interleave(sizes) + within


class Division(NamedTuple):
    """Micro-batches of a batch.

    Attributes:
        batch: tensors of the batch, right-padded, as `take_rows` takes them.
        microbatches: row indices of each micro-batch; of rows with the same inputs only the first.
        sources: (rows,) the row whose vector each row gets: itself or an earlier one with the same inputs.
    """

    batch: dict[str, torch.Tensor]
    microbatches: list[list[int]]
    sources: list[int]


class Tokens(NamedTuple):
    """Tokens of a batch on the host: (rows, tokens) ids, and the real ones of each row."""

    ids: np.ndarray
    lengths: list[int]


def training_cost(hidden_size: int) -> int:
    """Returns the fixed cost of a forward and backward, in tokens (benchmarks/length_buckets.py)."""
    return MICROBATCH_COST + SMALL_LAYER // hidden_size**2


def inference_cost(hidden_size: int, device: torch.device) -> int:
    """Returns the fixed cost of a forward in inference, in tokens: its fixed time over the time of a token."""
    return CUDA_INFERENCE_COST if device.type == "cuda" else INFERENCE_COST + SMALL_LAYER // hidden_size**2


def divide_batch(
    inputs: Mapping[str, torch.Tensor | None],
    image_token_id: int,
    merge_size: int,
    samples_per_frame: int,
    fewest_samples: int = 1,
    cost: int | None = INFERENCE_COST,
) -> Division | None:
    """Divides a batch by length and finds rows with the same inputs.

    Args:
        inputs: tensors of a batch under the names of `ViPolyQwenModel.forward`.
        image_token_id: id of an image's tokens.
        merge_size: patches a side of the square that makes a token.
        samples_per_frame: samples of audio that make a frame of the speech encoder.
        fewest_samples: samples of a window that give one frame.
        cost: fixed cost of a micro-batch, in tokens; `None` finds equal rows only, for a model that packs rows
            without padding.

    Returns:
        The division; `None` if the inputs contradict each other, of which `forward` raises the error.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if ids is not None and mask is not None and ids.shape != mask.shape:
        return None
    batch, tokens = _right_padded(inputs)
    rows = len(tokens.lengths)
    images = _images_of_rows(inputs, tokens, image_token_id, merge_size)
    clips = _clip_of_row(inputs, rows)
    if images is None or clips is None or not all(map(max, tokens.lengths, (clip + 1 for clip in clips))):
        return None
    sources = _equal_rows(inputs, tokens, images, clips)
    batch |= _media(inputs, images, clips)
    chosen = [row for row in range(rows) if sources[row] == row]
    samples = _samples(batch, clips)
    if any(clip >= 0 and count < fewest_samples for clip, count in zip(clips, samples, strict=True)):
        return None
    if cost is None:
        return Division(batch, [chosen], sources)
    frames = [-(-count // samples_per_frame) for count in samples]
    silent = [row for row in chosen if clips[row] < 0]
    heard = [row for row in chosen if clips[row] >= 0]  # apart, since their lengths are those of audio
    units = sharing([images[row][0] if images[row] else -1 for row in silent])
    microbatches = _buckets([[silent[item] for item in unit] for unit in units], tokens.lengths, cost)
    return Division(batch, microbatches + _buckets([[row] for row in heard], frames, cost), sources)


def sharing(images: Sequence[int]) -> list[list[int]]:
    """Groups the indices of rows that share their first image; any row without one, −1, forms a group alone."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault((True, image) if image >= 0 else (False, row), []).append(row)
    return list(groups.values())


def _buckets(units: list[list[int]], lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Groups units of rows by length."""
    longest = [max(lengths[row] for row in unit) for unit in units]
    counts = [len(unit) for unit in units]
    padding = max(longest, default=0) * sum(counts) - sum(map(operator.mul, longest, counts))
    if units and padding <= cost:  # a second micro-batch would cost as much
        return [[row for unit in units for row in unit]]
    buckets = length_buckets(longest, cost, counts=counts)
    return [[row for number in bucket for row in units[number]] for bucket in buckets]


def _right_padded(inputs: Mapping[str, torch.Tensor | None]) -> tuple[dict[str, torch.Tensor], Tokens]:
    """Returns ids and mask with all padding on the right, and what the host needs of them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if ids is None:
        mask = None
        windows = inputs["audio_windows"]
        rows = len(inputs["audio_features"] if windows is None else windows)
        ids = torch.zeros(rows, 0, dtype=torch.long, device=inputs["audio_features"].device)
    if mask is None:
        mask = torch.ones_like(ids)
    on_host, real = ids.cpu().numpy(), mask.bool().cpu().numpy()
    if (real[:, 1:] > real[:, :-1]).any():
        order = np.argsort(~real, axis=1, kind="stable")
        on_host = np.take_along_axis(on_host, order, axis=1)
        order = torch.from_numpy(order).to(ids.device)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    return {"input_ids": ids, "attention_mask": mask}, Tokens(on_host, real.sum(axis=1).tolist())


def _images_of_rows(
    inputs: Mapping[str, torch.Tensor | None], tokens: Tokens, image_token_id: int, merge_size: int
) -> list[list[int]] | None:
    """Returns the images of each row, equal ones under the index of the first; `None` if images and slots differ."""
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    if (pixels is None) != (grids is None):
        return None
    columns = np.arange(tokens.ids.shape[1]) < np.asarray(tokens.lengths)[:, None]
    slots = ((tokens.ids == image_token_id) & columns).sum(axis=1).tolist()
    if pixels is None and inputs["image_indices"] is None and not any(slots):
        return [[] for _ in slots]
    patches = [] if grids is None else grids.prod(dim=-1).tolist()
    if sum(patches) != (0 if pixels is None else len(pixels)):
        return None
    first = first_equal(pixels.split(patches), grids.tolist()) if patches else []
    shown = inputs["image_indices"]
    numbers = iter(range(len(patches)) if shown is None else shown.tolist())
    images: list[list[int]] = []
    for count in slots:
        images.append([])
        while count > 0:
            number = next(numbers, None)
            if number is None or not 0 <= number < len(patches):
                return None
            images[-1].append(first[number])
            count -= patches[number] // merge_size**2
        if count < 0:
            return None
    return images if next(numbers, None) is None else None


def _clip_of_row(inputs: Mapping[str, torch.Tensor | None], rows: int) -> list[int] | None:
    """Returns the clip of each row, −1 without; `None` if clips, rows and windows differ."""
    features, windows, has_audio = inputs["audio_features"], inputs["audio_windows"], inputs["has_audio"]
    if features is None:
        return [-1] * rows if has_audio is None or not has_audio.any() else None
    clips = len(features) if windows is None else len(windows)
    given = [True] * clips if has_audio is None else has_audio.bool().tolist()
    wrong = windows is not None and (windows.sum() != len(features) or (windows < 1).any())
    if wrong or len(given) != rows or sum(given) != clips:
        return None
    numbers = iter(range(clips))
    return [next(numbers) if has else -1 for has in given]


def _equal_rows(
    inputs: Mapping[str, torch.Tensor | None], tokens: Tokens, images: list[list[int]], clips: list[int]
) -> list[int]:
    """Returns for each row the first row with the same tokens, images and audio."""
    of_clips: list[int] = []
    if inputs["audio_features"] is not None:
        values, mask = inputs["audio_features"], inputs["audio_attention_mask"]
        windows = [1] * len(values) if inputs["audio_windows"] is None else inputs["audio_windows"].tolist()
        masked = values if mask is None else torch.stack([values, mask.to(values.dtype)], dim=1)
        of_clips = first_equal(masked.split(windows), windows)
    firsts: dict[tuple, int] = {}
    sources = []
    for row, (ids, length) in enumerate(zip(tokens.ids, tokens.lengths, strict=True)):
        clip = of_clips[clips[row]] if clips[row] >= 0 else -1
        sources.append(firsts.setdefault((ids[:length].tobytes(), tuple(images[row]), clip), row))
    return sources


def first_equal(items: Sequence[torch.Tensor], kinds: Sequence[Any]) -> list[int]:
    """Returns for each tensor the index of the first one that equals it and has the same kind."""
    if len(items) < 2:
        return list(range(len(items)))
    sums = torch.stack([item.sum(dtype=torch.float64) for item in items]).tolist()
    alike: dict[tuple, list[int]] = {}  # only tensors of equal sum are compared
    first = []
    for number, (item, kind, total) in enumerate(zip(items, kinds, sums, strict=True)):
        candidates = alike.setdefault((str(kind), total), [])
        found = next((other for other in candidates if torch.equal(items[other], item)), number)
        if found == number:
            candidates.append(number)
        first.append(found)
    return first


def _media(
    inputs: Mapping[str, torch.Tensor | None], images: list[list[int]], clips: list[int]
) -> dict[str, torch.Tensor]:
    """Returns the tensors of images and audio as `take_rows` takes them."""
    device = (inputs["input_ids"] if inputs["audio_features"] is None else inputs["audio_features"]).device
    media = {"images_per_row": torch.tensor([len(of_row) for of_row in images], device=device)}
    if inputs["pixel_values"] is not None:
        shown = [image for of_row in images for image in of_row]
        media["image_indices"] = torch.tensor(shown, dtype=torch.long, device=device)
        media |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    if inputs["audio_features"] is not None:
        mask = inputs["audio_attention_mask"]
        media["has_audio"] = torch.tensor([clip >= 0 for clip in clips], device=device)
        media["audio_features"] = inputs["audio_features"]
        media["audio_attention_mask"] = torch.ones_like(media["audio_features"]) if mask is None else mask
        if inputs["audio_windows"] is not None:
            media["audio_windows"] = inputs["audio_windows"]
    return media


def _samples(batch: Mapping[str, torch.Tensor], clips: list[int]) -> list[int]:
    """Returns the samples of the longest window of each row's audio, 0 without."""
    if "audio_features" not in batch:
        return [0] * len(clips)
    samples = batch["audio_attention_mask"].sum(dim=1)
    if "audio_windows" in batch:
        counts = batch["audio_windows"]
        samples = samples[counts.cumsum(0) - counts]  # the first is the longest
    of_clips = samples.tolist()
    return [0 if clip < 0 else int(of_clips[clip]) for clip in clips]


__all__ = [
    "MICROBATCH_COST",
    "Division",
    "divide_batch",
    "inference_cost",
    "length_buckets",
    "members",
    "select_media",
    "sharing",
    "take_rows",
    "training_cost",
]
