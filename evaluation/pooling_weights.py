"""Maps the pooling weights α of one input back to its characters, image patches and seconds."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..audio_vipolyqwen import receptive_field
from ..data.sides import Side

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # byte-level BPE's symbol -> byte


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive positions of the text route that are displayed as one unit.

    Attributes:
        kind: `text`, `special` (a token that text cannot contain: prefix, end, borders of an image) or `image`.
        text: complete characters, the name of the special token, or the image's number.
        weight: sum of α over its positions.
    """

    kind: str
    text: str
    weight: float


@dataclass(frozen=True)
class FrameWeights:
    """α over the frames of the audio route.

    Attributes:
        samples: (samples,) float32, the speech encoder's input: zero mean, unit variance.
        rate: sampling rate in Hz.
        weights: (frames,) float32, sums to 1.
        starts: (frames,) float64, second at which each frame begins.
        seconds: length of a frame.
    """

    samples: np.ndarray
    rate: int
    weights: np.ndarray
    starts: np.ndarray
    seconds: float


@dataclass(frozen=True)
class PoolingWeights:
    """The vector of one input and its pooling weights α.

    Attributes:
        vector: (D,) float32 unit vector.
        spans: the text route from first to last position, weights sum to 1; empty for audio alone.
        positions: number of positions of the text route; a span may cover several.
        images: per image (rows, columns) float32, α of its merged patches.
        audio: the audio route, if the input has audio.
    """

    vector: torch.Tensor
    spans: list[TokenSpan] = field(default_factory=list)
    positions: int = 0
    images: list[np.ndarray] = field(default_factory=list)
    audio: FrameWeights | None = None

    def shares(self) -> dict[str, float]:
        """Returns {`text`, `image 1`, …, `special tokens`: its part of the text route's α}."""
        names = {"text": "text", "special": "special tokens"}
        found: dict[str, float] = {}
        for span in self.spans:
            name = names.get(span.kind, f"image {span.text}")
            found[name] = found.get(name, 0.0) + span.weight
        return found


@torch.no_grad()
def inspect_pooling(model: Any, processor: Any, side: Side, task: str | None = None) -> PoolingWeights:
    """Embeds one input and returns its vector with the pooling weights.

    Args:
        model: a `ViPolyQwenModel` in evaluation mode.
        processor: its processor.
        side: the input.
        task: name of the task whose prefix precedes it.
    """
    given = side.as_input()
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    batch = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", task=task, plain_text=True
    ).to(model.device)
    output = model(**batch, output_pooling_weights=True)
    spans, positions, images, audio = [], 0, [], None
    if output.pooling_weights is not None:
        grids = batch["image_grid_thw"] if "image_grid_thw" in batch else torch.empty(0, 3, dtype=torch.long)
        merged = grids[:, 1:].cpu() // processor.image_processor.merge_size
        weights = output.pooling_weights[0].cpu()
        slots = (batch["input_ids"][0] == processor.image_token_id).cpu()
        parts = weights[slots].split(merged.prod(dim=-1).tolist())
        images = [part.reshape(*grid).numpy() for part, grid in zip(parts, merged.tolist(), strict=True)]
        positions = len(weights)
        sizes = [image.size for image in images]
        spans = list(_token_spans(batch["input_ids"][0].tolist(), weights.tolist(), sizes, processor))
    if output.audio_pooling_weights is not None:
        audio = _frame_weights(model, processor, batch, output.audio_pooling_weights[0].cpu().numpy())
    return PoolingWeights(output.embeddings[0].cpu(), spans, positions, images, audio)


def _token_spans(ids: list[int], weights: list[float], image_sizes: list[int], processor: Any) -> Iterator[TokenSpan]:
    """Yields ids and their α as spans; merges tokens that share a character (up to 3 bytes in Vietnamese)."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    place, number, text, weight = 0, 0, "", 0.0
    while place < len(ids):
        if ids[place] == processor.image_token_id:
            size = image_sizes[number]
            number += 1
            yield TokenSpan("image", str(number), sum(weights[place : place + size]))
            place += size
            continue
        if ids[place] in added:
            yield TokenSpan("special", added[ids[place]].content, weights[place])
        else:
            content = bytes(BYTE_OF[character] for character in tokenizer.convert_ids_to_tokens(ids[place]))
            ends_here = place + 1 == len(ids) or ids[place + 1] in added
            text, weight = text + decoder.decode(content, final=ends_here), weight + weights[place]
            if not decoder.getstate()[0]:
                yield TokenSpan("text", text, weight)
                text, weight = "", 0.0
        place += 1


def _frame_weights(model: Any, processor: Any, batch: Any, weights: np.ndarray) -> FrameWeights:
    """Places the frames of the only clip of a batch, which may have several windows."""
    rate = processor.feature_extractor.sampling_rate
    config = model.config.audio_config
    stride = int(np.prod(config.conv_stride))
    lead = (receptive_field(config) - stride) / 2  # the receptive field extends past the stride on both sides
    real = batch["audio_attention_mask"].bool()  # (windows, samples)
    lengths = real.sum(dim=1)
    frames = model.audio_tower._get_feat_extract_output_lengths(lengths).tolist()
    begins = (lengths.cumsum(dim=0) - lengths).tolist()
    places = [begin + np.arange(count) * stride for begin, count in zip(begins, frames, strict=True)]
    samples = batch["audio_features"][real].float().cpu().numpy()
    return FrameWeights(samples, rate, weights, (np.concatenate(places) + lead) / rate, stride / rate)
