"""Brings images and audio to the form that training reads fastest: small enough, upright, at the model's rate."""

import math
from io import BytesIO
from typing import Any

import soundfile
from PIL import Image

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio, resample
from .schema import ENCODER_RATE

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG"
LOSSLESS = (PNG, b"GIF8", b"BM", b"II*\0", b"MM\0*")  # files of these kinds become PNG, all others JPEG
QUALITY = 95
ORIENTATION = 0x0112  # tag of EXIF


def prepare_image(content: bytes, max_pixels: int) -> bytes:
    """Returns an image file of at most `max_pixels` pixels, upright RGB or grey; unchanged if it is that already.

    Args:
        content: bytes of an image file.
        max_pixels: width × height; a larger image is scaled down, its aspect ratio kept.

    Raises:
        ValueError: it cannot be decoded.
    """
    image = load_image(content)
    if image.width * image.height <= max_pixels and _is_plain(content):
        return content
    scale = min(1.0, math.sqrt(max_pixels / (image.width * image.height)))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = BytesIO()
    if content.startswith(LOSSLESS):
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


def _is_plain(content: bytes) -> bool:
    """Returns whether a file is a JPEG or PNG that decodes to RGB or grey as it is."""
    if not content.startswith((JPEG, PNG)):
        return False
    with Image.open(BytesIO(content)) as image:
        is_upright = image.getexif().get(ORIENTATION, 1) == 1
        return is_upright and image.mode in ("RGB", "L") and not image.has_transparency_data


def prepare_audio(content: bytes | dict[str, Any]) -> tuple[bytes, float]:
    """Returns audio as FLAC of 16 bits, mono at 16 kHz, and its duration in seconds.

    Raises:
        ValueError: it cannot be decoded.
    """
    samples, rate = load_audio(content)
    buffer = BytesIO()
    soundfile.write(buffer, resample(samples, rate, ENCODER_RATE), ENCODER_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(samples) / rate
