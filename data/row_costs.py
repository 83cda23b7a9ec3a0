"""Measures the tokens and pixels of each row, for batches that are filled to a budget of them."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from ..download_vipolyqwen import is_url
from ..images_vipolyqwen import ImageScaler, image_size
from ..processing_vipolyqwen import TEXT_SHARE, ViPolyQwenProcessor
from ..waveforms_vipolyqwen import audio_length
from .atomic import write_atomically
from .collator import interleave
from .files import cache_folder
from .media_paths import read_media
from .schema import ENCODER_RATE, Content, Row
from .sources import PairDataset

KINDS = ("tokens", "pixels")  # columns of the costs
CODE = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=8).hexdigest()  # a new version measures anew
FRAME = 320  # samples at 16 kHz of one frame of the speech encoder (HuBERT, Hsu et al. 2021: 20 ms)
REMEMBERED = 2**16  # media files of which the cost is kept: some stand in many rows


def row_costs(pairs: PairDataset, processor: ViPolyQwenProcessor) -> np.ndarray:
    """Returns the costs of each row, (rows, 2) uint32, read from the cache if they were measured before.

    Tokens are those of both sides and of hard negatives, as texts are written: prefix, text up to the limit of an
    input, images and end token, and the frames of audio; respelled by `augment_vietnamese`, a text may have more.
    Pixels are those that the vision tower is given. Of a row whose lists are `random`, the most that any of its
    entries has. A file that cannot be read costs nothing, a URL is fetched once.

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
    marks = [source.image_placeholder for source in pairs.sources]
    facts = repr((CODE, pairs.fingerprints(), choices, marks, settings, processor.audio_prefix))
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    return hashlib.blake2b((facts + tokenizer).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _measured(pairs: PairDataset, processor: ViPolyQwenProcessor) -> np.ndarray:
    """Measures all rows, those of random lists entry by entry."""
    every = pairs.unfolded()
    meter = CostMeter(processor)
    found = [np.zeros((0, len(KINDS)), np.uint32)]
    with datasets.utils.tqdm(total=len(every), desc="Measuring rows", unit=" rows") as progress:
        for source, rows in every.chunks_of_sources():
            found.append(meter.measure(rows, source.image_placeholder))
            progress.update(len(rows))
    costs = np.concatenate(found)
    counts = np.concatenate([piece.choice_counts() for piece in pairs.pieces])
    return costs if every is pairs else np.maximum.reduceat(costs, np.cumsum(counts) - counts)


class CostMeter:
    """Measures rows.

    Args:
        processor: the model's processor.
    """

    def __init__(self, processor: ViPolyQwenProcessor) -> None:
        self.processor = processor
        self.scaler = ImageScaler(processor.image_processor, {})
        self._image_size = lru_cache(REMEMBERED)(partial(_or_nothing, image_size))
        self._frames = lru_cache(REMEMBERED)(partial(_or_nothing, _frames))

    def measure(self, rows: Sequence[Row], image_placeholder: str) -> np.ndarray:
        """Returns the costs of rows, (rows, 2) uint32.

        Args:
            rows: rows of one source.
            image_placeholder: marks the place of an image in its texts.
        """
        contents = [list(_contents(row)) for row in rows]
        texts = [_texts(content, image_placeholder) for of_row in contents for content in of_row]
        lengths = iter([sum(map(len, ids)) for ids in self.processor.tokenize_texts(texts)])
        costs = [[self._input(content, next(lengths)) for content in of_row] for of_row in contents]
        return np.array([np.sum(of_row, axis=0) for of_row in costs], np.uint32).reshape(-1, len(KINDS))

    def _input(self, content: Content, text: int) -> tuple[int, int]:
        """Returns the tokens and pixels of an input whose text has `text` tokens."""
        limit = self.processor.tokenizer.model_max_length
        sizes = [size for image in content.images if (size := self._of(image, self._image_size)) is not None]
        bound = self.scaler.bound(sizes, _room(limit, text, len(sizes)))
        images = self.scaler.count_tokens(sizes, self.scaler.pixel_range[1] if bound is None else bound)
        tokens = 0
        if text or sizes or content.audio is None or self.processor.audio_prefix == "fuse":
            tokens = min(2 + text + images + 2 * len(sizes), limit)
        if content.audio is not None:
            tokens += self._of(content.audio, self._frames) or 0
        return tokens, images * (self.processor.image_processor.patch_size * self.scaler.merge_size) ** 2

    def _of(self, source: Any, measure: Any) -> Any:
        """Returns what is measured of a file; of one whose path is known, most often from memory."""
        return measure(source) if isinstance(source, str) else measure.__wrapped__(source)


def _texts(content: Content, image_placeholder: str) -> list[str]:
    """Returns the texts between the images of an input."""
    parts = interleave(content.text, content.images, image_placeholder)
    return [part["text"] for part in parts if part["type"] == "text"]


def _room(limit: int, text: int, images: int) -> int:
    """Returns the tokens that images may take, as the processor gives them room, of an input without a prefix."""
    return limit - min(text, int(limit * TEXT_SHARE)) - 1 - 2 * images


def _contents(row: Row) -> Iterator[Content]:
    """Yields what a row gives the model: both sides and its hard negatives."""
    yield from (row.side("a"), row.side("b"), *row.negatives)


def _frames(source: Any) -> int:
    samples, rate = audio_length(source)
    return math.ceil(samples * ENCODER_RATE / (rate * FRAME))


def _or_nothing(measure: Callable[[Any], Any], source: Any) -> Any:
    """Returns what is measured of a file; `None` if it cannot be read, which the row itself reports or replaces."""
    try:
        return measure(read_media(source) if isinstance(source, str) and is_url(source) else source)
    except (OSError, ValueError):
        return None
