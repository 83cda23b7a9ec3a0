"""What the pooling attends to in one input: its weights α put back on characters, patches and seconds."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..audio_vipolyqwen import receptive_field
from .search import Side

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level BPE writes a byte


@dataclass(frozen=True)
class Piece:
    """Neighbouring positions of the text route that are shown as one.

    Attributes:
        kind: `text`, `special` (a token that text cannot contain: prefix, end, borders of an image) or `image`.
        text: whole characters, the name of the special token, or the image's number.
        weight: sum of α over its positions.
    """

    kind: str
    text: str
    weight: float


@dataclass(frozen=True)
class Sound:
    """α over the frames of the audio route.

    Attributes:
        samples: (samples,) float32, what the speech encoder heard: zero mean, unit variance.
        rate: of the samples, in Hz.
        weights: (frames,) float32, sums to 1.
        starts: (frames,) float64, second at which the stretch of each frame begins.
        seconds: length of that stretch.
    """

    samples: np.ndarray
    rate: int
    weights: np.ndarray
    starts: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Attention:
    """One input's vector and α.

    Attributes:
        vector: (D,) float32 unit vector.
        pieces: the text route from first to last position, their weights sum to 1; empty for a sound alone.
        positions: of the text route; a piece may have several.
        images: per image (rows, columns) float32, α of its merged patches.
        sound: the audio route, if there is one.
    """

    vector: torch.Tensor
    pieces: list[Piece] = field(default_factory=list)
    positions: int = 0
    images: list[np.ndarray] = field(default_factory=list)
    sound: Sound | None = None

    def shares(self) -> dict[str, float]:
        """{`text`, `image 1`, …, `special tokens`: its part of the text route's α}."""
        names = {"text": "text", "special": "special tokens"}
        found: dict[str, float] = {}
        for piece in self.pieces:
            name = names.get(piece.kind, f"image {piece.text}")
            found[name] = found.get(name, 0.0) + piece.weight
        return found


@torch.no_grad()
def look_inside(model: Any, processor: Any, side: Side, task: str | None = None) -> Attention:
    """Embeds one input and asks where its pooling looked.

    Args:
        model: a `ViPolyQwenModel` in evaluation mode.
        processor: its processor.
        side: the input.
        task: name of the task whose prefix stands before it.
    """
    given = side.as_input()
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    batch = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", task=task, plain_text=True
    ).to(model.device)
    output = model(**batch, output_pooling_weights=True)
    pieces, positions, images, sound = [], 0, [], None
    if output.pooling_weights is not None:
        grids = batch["image_grid_thw"] if "image_grid_thw" in batch else torch.empty(0, 3, dtype=torch.long)
        merged = grids[:, 1:].cpu() // processor.image_processor.merge_size
        weights = output.pooling_weights[0].cpu()
        slots = (batch["input_ids"][0] == processor.image_token_id).cpu()
        parts = weights[slots].split(merged.prod(dim=-1).tolist())
        images = [part.reshape(*grid).numpy() for part, grid in zip(parts, merged.tolist(), strict=True)]
        positions = len(weights)
        sizes = [image.size for image in images]
        pieces = list(_pieces(batch["input_ids"][0].tolist(), weights.tolist(), sizes, processor))
    if output.audio_pooling_weights is not None:
        sound = _sound(model, processor, batch, output.audio_pooling_weights[0].cpu().numpy())
    return Attention(output.embeddings[0].cpu(), pieces, positions, images, sound)


def _pieces(ids: list[int], weights: list[float], image_sizes: list[int], processor: Any) -> Iterator[Piece]:
    """Ids and their α as pieces; tokens that share a character (a Vietnamese letter has up to 3 bytes) are one."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    place, number, text, weight = 0, 0, "", 0.0
    while place < len(ids):
        if ids[place] == processor.image_token_id:
            size = image_sizes[number]
            number += 1
            yield Piece("image", str(number), sum(weights[place : place + size]))
            place += size
            continue
        if ids[place] in added:
            yield Piece("special", added[ids[place]].content, weights[place])
        else:
            content = bytes(BYTE_OF[character] for character in tokenizer.convert_ids_to_tokens(ids[place]))
            ends_here = place + 1 == len(ids) or ids[place + 1] in added
            text, weight = text + decoder.decode(content, final=ends_here), weight + weights[place]
            if not decoder.getstate()[0]:
                yield Piece("text", text, weight)
                text, weight = "", 0.0
        place += 1


def _sound(model: Any, processor: Any, batch: Any, weights: np.ndarray) -> Sound:
    rate = processor.feature_extractor.sampling_rate
    config = model.config.audio_config
    stride = int(np.prod(config.conv_stride))
    lead = (receptive_field(config) - stride) / 2  # a frame sees a little more than its stretch, on both sides
    starts = (np.arange(len(weights)) * stride + lead) / rate
    return Sound(batch["audio_features"][0].float().cpu().numpy(), rate, weights, starts, stride / rate)
