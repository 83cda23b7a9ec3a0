"""Loads images and audio from files, bytes, arrays, decoders and, if allowed, URLs, and checks them."""

import io
import math
import os
import re
import struct
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import get_image_size
from transformers.image_utils import load_image as load_image_string
from transformers.utils import is_scipy_available, is_soundfile_available

if is_soundfile_available():
    import soundfile
if is_scipy_available():
    from scipy.signal import resample_poly

MAX_ASPECT_RATIO = 200  # limit of Qwen2-VL's image processor
MAX_IMAGE_PIXELS = 2**28  # width × height; refuses decompression bombs before decoding
MAX_DOWNLOAD_BYTES = 2**28
DOWNLOAD_SECONDS = 30  # timeout of a connection and of each read

MEDIA_FILE = re.compile(
    r".+\.(png|jpe?g|gif|bmp|tiff?|webp|heic|avif|wav|mp3|ogg|oga|opus|flac|aac|m4a|aiff?|wma|mp4|avi|mov|wmv|flv|mkv|webm)",
    re.IGNORECASE,
)
# Endings by which sentence-transformers opens a bare string as an image or as audio.
SENTENCE_TRANSFORMERS_OPENS = tuple(".jpg .jpeg .png .gif .bmp .tiff .webp .mp3 .wav .ogg .flac .aac".split())


def load_image(source: Any, allow_urls: bool = False, rescale: bool = True) -> Any:
    """Opens an image and checks its size and, for an array, the range of its pixels.

    Args:
        source: a path, the bytes of a file, base64, a PIL image, or an array or tensor of 0 … 255, (height, width,
            channels) or (channels, height, width); a URL with `allow_urls`.
        allow_urls: fetch `http(s)://` sources.
        rescale: whether the image processor divides by 255; if not, an array may be of 0 … 1.

    Returns:
        An RGB PIL image, turned as its EXIF orientation says; an array or a tensor as it was given.

    Raises:
        ValueError: the image cannot be read, exceeds `MAX_IMAGE_PIXELS` or `MAX_ASPECT_RATIO`, has pixels outside
            the range, or is a URL without `allow_urls`.
    """
    is_array = isinstance(source, (np.ndarray, torch.Tensor))
    name = f"<array of shape {tuple(source.shape)}>" if is_array else repr(source)[:120]
    name = f"<{len(source)} bytes>" if isinstance(source, (bytes, bytearray)) else name
    if is_url(source):
        source = download(source, allow_urls)
    try:
        if isinstance(source, (bytes, bytearray)):
            source = Image.open(io.BytesIO(source))
        elif isinstance(source, os.PathLike) or (isinstance(source, str) and os.path.isfile(source)):
            source = Image.open(source)
        width, height = source.size if isinstance(source, Image.Image) else (1, 1)
        if is_array:
            height, width = get_image_size(np.asarray(source))
            _check_range(np.asarray(source), rescale)
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{width}×{height} is more than {MAX_IMAGE_PIXELS} pixels; scale it down first")
        if min(width, height) == 0 or max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ValueError(
                f"it is {width}×{height}; an image needs pixels and an aspect ratio up to {MAX_ASPECT_RATIO}: crop it"
            )
        return source if is_array else load_image_string(_eight_bits(source))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {name} cannot be read: {error}.") from error


def _check_range(pixels: np.ndarray, rescale: bool) -> None:
    """Refuses pixels that the image processor would misread: non-finite, outside 0 … 255 or already rescaled."""
    if not np.isfinite(pixels).all():
        raise ValueError("it has NaN or infinite pixels; repair or drop it")
    low, high = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if rescale and (low < 0 or high > 255):
        raise ValueError(
            f"its pixels are {low:g} … {high:g}; they must be 0 … 255: scale them, or undo a normalisation"
        )
    if rescale and pixels.dtype.kind in "fb" and 0 < high <= 1:
        raise ValueError(f"its pixels are {low:g} … {high:g} and would be divided by 255 again; multiply them by 255")


def _eight_bits(image: Any) -> Any:
    """Scales an image of 16-bit pixels to 8 bits, because conversion to RGB would clip all values above 255."""
    if not isinstance(image, Image.Image) or image.mode[0] not in "IF":
        return image
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    _check_range(pixels.astype(np.float64), rescale=True)
    return Image.fromarray(pixels.astype(np.uint8))


def is_url(source: Any) -> bool:
    """Returns whether `source` is an `http(s)://` URL."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def download(url: str, allow_urls: bool) -> bytes:
    """Returns the bytes at `url`.

    Raises:
        ValueError: URLs are not allowed, it cannot be fetched, or it has more than `MAX_DOWNLOAD_BYTES`.
    """
    if not allow_urls:
        raise ValueError(
            f"{url!r} is a URL; download it and pass the path or the bytes, or load the processor with "
            "`allow_urls=True`. (Then the author of an input decides which addresses this machine opens.)"
        )
    try:
        with urlopen(Request(url, headers={"User-Agent": "vipolyqwen"}), timeout=DOWNLOAD_SECONDS) as response:
            data = response.read(MAX_DOWNLOAD_BYTES + 1)
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(f"{url!r} cannot be fetched: {error}.") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url!r} has more than {MAX_DOWNLOAD_BYTES} bytes; download it and pass a smaller file.")
    return data


def check_is_text(text: str) -> None:
    """Refuses a text that is the path of an image, audio or video file, which was hardly meant as a text.

    sentence-transformers opens a bare string that names an existing file with an ending it knows. It would silently
    embed the characters of any other path. (A path that it would open reaches this check only as an explicit `text`.)

    Raises:
        ValueError: `text` looks like such a path.
    """
    exists = os.path.isfile(text)
    if not MEDIA_FILE.fullmatch(text) or (len(text.split()) > 1 and not exists):
        return
    if (exists or is_url(text)) and text.lower().endswith(SENTENCE_TRANSFORMERS_OPENS):
        return
    reason = "sentence-transformers does not open that ending" if exists or is_url(text) else "no such file exists"
    raise ValueError(
        f"{text!r} looks like the path of an image, audio or video file, but {reason}. Pass {{'image': path}} or "
        "{'audio': path} of a file; to embed the characters of the path, pass `plain_text=True`."
    )


def load_audio(source: Any, sampling_rate: int | None = None, allow_urls: bool = False) -> tuple[np.ndarray, int]:
    """Loads audio and mixes its channels down to mono.

    Args:
        source: a path, the bytes of a file, `{"array", "sampling_rate"}`, `{"path"}` or `{"bytes"}`, a decoder with
            `get_all_samples()`, or an array of samples, (samples,), (channels, samples) or (samples, channels), float
            in [-1, 1] or integers over the range of their dtype; a URL with `allow_urls`.
        sampling_rate: rate in Hz of an array that comes without one.
        allow_urls: fetch `http(s)://` sources.

    Returns:
        (samples,) float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        ValueError: the audio cannot be read, is empty or truncated, lacks a sampling rate, has non-finite samples, or
            is a URL without `allow_urls`.
        ImportError: a file was passed and soundfile is not installed.
    """
    if isinstance(source, dict):
        if source.get("array") is not None:
            return load_audio(source["array"], source.get("sampling_rate", sampling_rate))
        found = [source[key] for key in ("bytes", "path") if source.get(key) is not None]
        if not found:
            raise ValueError(f"The audio {source!r:.80} has neither `array` nor `bytes` nor `path`; give one of them.")
        return load_audio(found[0], allow_urls=allow_urls)
    if hasattr(source, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` returns
        decoded = source.get_all_samples()
        return load_audio(decoded.data, decoded.sample_rate)
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        return load_audio(*_decode_audio_file(download(source, allow_urls) if is_url(source) else source))
    return _mono_samples(np.asarray(source), sampling_rate)


def _mono_samples(samples: np.ndarray, sampling_rate: int | None) -> tuple[np.ndarray, int]:
    if sampling_rate is None:
        raise ValueError(
            "The audio is an array without a sampling rate. Pass {'array': …, 'sampling_rate': …} or `sampling_rate=`."
        )
    if sampling_rate <= 0:
        raise ValueError(f"The audio's sampling rate is {sampling_rate}; pass the rate in Hz that it was recorded at.")
    if np.issubdtype(samples.dtype, np.integer):
        limits = np.iinfo(samples.dtype)
        middle = (limits.max + 1 + limits.min) / 2  # 128 for uint8, 0 for signed types
        samples = (samples - middle) / (limits.max + 1 - middle)
    samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1:
        raise ValueError(f"The audio has shape {samples.shape}; pass (samples,) or (channels, samples).")
    if samples.size == 0:
        raise ValueError("The audio is empty: 0 samples. Leave it out or pass a recording.")
    if not np.isfinite(samples).all():
        count = int((~np.isfinite(samples)).sum())
        raise ValueError(f"The audio has {count} NaN or infinite samples of {samples.size}; repair or drop it.")
    return samples, int(sampling_rate)


def _decode_audio_file(source: str | os.PathLike | bytes) -> tuple[np.ndarray, int]:
    if not is_soundfile_available():
        raise ImportError("Reading audio files needs the soundfile package: pip install soundfile.")
    is_bytes = isinstance(source, (bytes, bytearray))
    name = f"<{len(source)} bytes>" if is_bytes else repr(os.fspath(source))
    try:
        with io.BytesIO(source) if is_bytes else open(source, "rb") as file:
            check_wav_is_complete(file)
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, ValueError, soundfile.SoundFileError) as error:
        raise ValueError(f"The audio {name} cannot be read: {error}.") from error
    return samples.mean(axis=1), rate  # (samples, channels) -> (samples,)


def check_wav_is_complete(file: Any) -> None:
    """Refuses a truncated WAV file, because libsndfile would silently read the rest.

    Args:
        file: a binary file, open at its beginning; it is left there.

    Raises:
        ValueError: the file is shorter than its header declares.
    """
    header = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if header[:4] == b"RIFF" and len(header) == 8:
        declared = struct.unpack("<I", header[4:])[0] + 8
        if size < declared < 2**32 - 2**16:  # streaming writers declare about 2**32 bytes
            raise ValueError(f"the file is truncated: {size} of {declared} bytes")


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples with a polyphase filter.

    Args:
        samples: (samples,) float32.
        rate: sampling rate of `samples` in Hz.
        target: sampling rate to return, in Hz.

    Returns:
        (⌈samples · target / rate⌉,) float32.

    Raises:
        ImportError: the rates differ and scipy is not installed.
    """
    if rate == target:
        return samples
    if not is_scipy_available():
        raise ImportError(f"Resampling from {rate} to {target} Hz needs the scipy package: pip install scipy.")
    common = math.gcd(rate, target)
    return resample_poly(samples, target // common, rate // common).astype(np.float32)


__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_IMAGE_PIXELS",
    "check_is_text",
    "check_wav_is_complete",
    "download",
    "is_url",
    "load_audio",
    "load_image",
    "resample",
]
