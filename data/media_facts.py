"""Facts of image and audio files: size, duration, content hash, perceptual hash, and why one cannot be read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .media_paths import read_media

HASH_SIDE = 16  # a perceptual hash compares 16 × 16 neighbouring pixels: 256 bits
SILENT = 1e-3  # peak of samples in [-1, 1]
FLAT = 2.0  # standard deviation of the grey values, 0 … 255, of an image that shows nothing


@dataclass(frozen=True)
class MediaFacts:
    """What is known of one file.

    Attributes:
        key: hash of the bytes, 0 if they cannot be read.
        error: why it cannot be decoded, else `None`.
        width: of an image, in pixels.
        height: likewise.
        look: perceptual hash of an image, (32,) uint8; `None` for an image that shows nothing.
        seconds: duration of audio.
        rate: sampling rate of audio in Hz.
        is_empty: whether an image is one colour or audio silent.
    """

    key: int = 0
    error: str | None = None
    width: int = 0
    height: int = 0
    look: np.ndarray | None = None
    seconds: float = 0.0
    rate: int = 0
    is_empty: bool = False


class MediaReader:
    """Opens every file once, however many rows name it."""

    def __init__(self) -> None:
        self.known: dict[str, MediaFacts] = {}

    def image(self, source: str | bytes) -> MediaFacts:
        """Returns the facts of an image."""
        return self._facts(source, _image_facts)

    def audio(self, source: str | bytes | dict[str, Any]) -> MediaFacts:
        """Returns the facts of audio."""
        if isinstance(source, dict):
            return _audio_facts(source["array"].tobytes(), source)
        return self._facts(source, _audio_facts)

    def _facts(self, source: str | bytes, read: Callable[[bytes, Any], MediaFacts]) -> MediaFacts:
        if isinstance(source, bytes):
            return read(source, source)
        if source not in self.known:
            try:
                content = read_media(source)
            except (OSError, ValueError) as error:
                self.known[source] = MediaFacts(error=f"{type(error).__name__}: {error}")
            else:
                self.known[source] = read(content, content)
        return self.known[source]


def content_hash(content: bytes) -> int:
    """Returns a hash of bytes, in [1, 2⁶³)."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1 | 1


def _image_facts(content: bytes, source: bytes) -> MediaFacts:
    key = content_hash(content)
    try:
        image = load_image(source)
    except ValueError as error:
        return MediaFacts(key, str(error))
    is_empty = float(np.asarray(image.convert("L")).std()) < FLAT
    return MediaFacts(key, None, *image.size, look=None if is_empty else perceptual_hash(image), is_empty=is_empty)


def _audio_facts(content: bytes, source: bytes | dict[str, Any]) -> MediaFacts:
    key = content_hash(content)
    try:
        samples, rate = load_audio(source)
    except ValueError as error:
        return MediaFacts(key, str(error))
    is_empty = float(np.abs(samples).max(initial=0.0)) < SILENT
    return MediaFacts(key, seconds=len(samples) / rate, rate=rate, is_empty=is_empty)


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """Returns the difference hash of an image, (32,) uint8: is each pixel brighter than its left neighbour?

    Source: N. Krawetz, "Kind of Like That" (2013), with 16 × 16 in place of 8 × 8 differences.
    """
    grey = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.LANCZOS))
    return np.packbits(grey[:, 1:] > grey[:, :-1])
