"""Measures the tokens and pixels of each row, for batches that are filled to a budget of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from ..images_vipolyqwen import ImageScaler, image_size
from ..processing_vipolyqwen import ViPolyQwenProcessor
from ..waveforms_vipolyqwen import audio_length
from .atomic import write_atomically
from .files import cache_folder
from .schema import ENCODER_RATE, Content, Row
from .sources import PairDataset

KINDS = ("tokens", "pixels")  # columns of the costs
CODE = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # a new version measures anew
FRAME = 320  # samples at 16 kHz of one frame of the speech encoder (HuBERT, Hsu et al. 2021: 20 ms)


def row_costs(pairs: PairDataset, processor: ViPolyQwenProcessor) -> np.ndarray:
    """Returns the costs of each row, (rows, 2) uint32, read from the cache if they were measured before.

    Tokens are those of both sides and of hard negatives, as texts are written: prefix, text up to the limit of an
    input, images and end token, and the frames of audio. Pixels are those that the vision tower is given. Of a row
    whose lists are `random`, the most that any of its entries has. A file that cannot be read costs nothing.

    Args:
        pairs: the rows.
        processor: the model's processor; its settings select the cache, which also depends on the content of the rows
            (media in files count by their path).
    """
    path = cache_folder() / f"costs-{_key(pairs, processor)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # the first rank of a machine measures
        if not path.is_file():
            costs = _measured(pairs, processor)
            write_atomically(path, partial(_save, costs))
    return np.load(path, mmap_mode="r")


def _save(costs: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # given a name, `np.save` would add a suffix
        np.save(file, costs)


def _key(pairs: PairDataset, processor: ViPolyQwenProcessor) -> str:
    images = processor.image_processor
    settings = (dict(images.size), images.patch_size, images.merge_size, processor.tokenizer.model_max_length)
    choices = [piece.choices is not None for piece in pairs.pieces]
    facts = repr((CODE, pairs.fingerprints(), choices, settings))
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b((facts + tokenizer).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _measured(pairs: PairDataset, processor: ViPolyQwenProcessor) -> np.ndarray:
    """Measures all rows, those of random lists entry by entry."""
    every = pairs.unfolded()
    meter = CostMeter(processor)
    found = [np.zeros((0, len(KINDS)), np.uint32)]
    with datasets.utils.tqdm(total=len(every), desc="Measuring rows", unit=" rows") as progress:
        for rows in every.chunks():
            found.append(meter.measure(rows))
            progress.update(len(rows))
    costs = np.concatenate(found)
    counts = np.concatenate([piece.choice_counts() for piece in pairs.pieces])
    return costs if every is pairs else np.maximum.reduceat(costs, np.cumsum(counts) - counts)


@dataclass
class CostMeter:
    """Measures rows.

    Attributes:
        processor: the model's processor.
    """

    processor: ViPolyQwenProcessor
    _of_path: dict[str, int] = field(default_factory=dict)  # tokens of an image file, frames of an audio file

    def measure(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the costs of rows, (rows, 2) uint32."""
        contents = [list(_contents(row)) for row in rows]
        texts = [content.text for of_row in contents for content in of_row]
        lengths = iter([len(ids) for (ids,) in self.processor.tokenize_texts([[text] for text in texts])])
        return np.array([self._row(of_row, lengths) for of_row in contents], np.uint32).reshape(-1, len(KINDS))

    def _row(self, contents: Sequence[Content], lengths: Iterator[int]) -> tuple[int, int]:
        limit = self.processor.tokenizer.model_max_length
        tokens = pixels = 0
        for content in contents:
            images = [self._cached(image, self._image_tokens) for image in content.images]
            text = next(lengths)
            if text or images or content.audio is None:
                tokens += min(2 + text + sum(images) + 2 * len(images), max(limit, sum(images)))
            if content.audio is not None:
                tokens += self._cached(content.audio, _frames)
            pixels += sum(images) * self._token_pixels
        return tokens, pixels

    def _cached(self, source: Any, measure: Callable[[Any], int]) -> int:
        """Returns what a file costs; one of which the path is known is opened once."""
        if not isinstance(source, str):
            return _or_nothing(measure, source)
        if source not in self._of_path:
            self._of_path[source] = _or_nothing(measure, source)
        return self._of_path[source]

    @property
    def _scaler(self) -> ImageScaler:
        return ImageScaler(self.processor.image_processor, {})

    @property
    def _token_pixels(self) -> int:
        """Returns the pixels that become one token."""
        return (self.processor.image_processor.patch_size * self._scaler.merge_size) ** 2

    def _image_tokens(self, source: str | bytes) -> int:
        width, height = image_size(source)
        return self._scaler.count_tokens([(height, width)], self._scaler.pixel_range[1])


def _contents(row: Row) -> Iterator[Content]:
    """Yields what a row gives the model: both sides and its hard negatives."""
    yield from (row.side("a"), row.side("b"), *row.negatives)


def _frames(source: Any) -> int:
    samples, rate = audio_length(source)
    return samples * ENCODER_RATE // (rate * FRAME)


def _or_nothing(measure: Callable[[Any], int], source: Any) -> int:
    """Returns what a file costs; nothing if it cannot be read, which the row itself reports or replaces."""
    try:
        return measure(source)
    except ValueError:
        return 0
