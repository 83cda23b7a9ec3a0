"""Opens the sources of images and audio within limits, and tells a text from a path."""

import base64
import binascii
import io
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from .download_vipolyqwen import download, is_url, show_url

MAX_ASPECT_RATIO = 200  # limit of Qwen2-VL's image processor
MAX_PATH = 4096  # characters; a longer string is not a path
MIN_BASE64 = 64  # characters; a shorter string that names no file is a wrong path

MEDIA_ENDINGS = (
    "png apng jpg jpeg jpe jfif gif bmp dib tif tiff webp heic heics heif hif avif jp2 j2k j2c jpx jpm jxl jxr ico "
    "icns psd tga dds pcx ppm pgm pbm pnm exr xcf emf wmf eps dng cr2 cr3 nef arw orf raf rw2 pef srw "
    "svg svgz pdf djvu xps epub doc docx ppt pptx xls xlsx odt ods odp rtf "
    "wav wave w64 rf64 mp3 mp2 mpga ogg oga spx opus flac aac m4a m4b aif aiff aifc au snd wma amr awb caf ape wv mka "
    "weba ac3 mp4 m4v avi mov wmv flv f4v mkv webm mpg mpeg m2ts vob ogv 3gp 3gpp 3g2"
).split()
MEDIA_PATH = re.compile(rf".+\.({'|'.join(MEDIA_ENDINGS)})", re.IGNORECASE)
FILE_URL = re.compile(r"file://(localhost)?(?=/)", re.IGNORECASE)
DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w.+=-]+)*,", re.IGNORECASE)
HOST_ALONE = re.compile(r"https?://[^/\\]*", re.IGNORECASE)  # its ending is that of a name, such as .au or .mov
ADDRESS_IN_TEXT = re.compile(r"\s\S*https?://", re.IGNORECASE)  # a sentence that ends with an address
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
# Endings by which sentence-transformers opens a bare string as an image or as audio.
SENTENCE_TRANSFORMERS_OPENS = tuple(".jpg .jpeg .png .gif .bmp .tiff .webp .mp3 .wav .ogg .flac .aac".split())
PLAIN_TEXT = 'processing_kwargs={"chat_template": {"plain_text": True}}'


@dataclass(frozen=True)
class Limits:
    """Bounds that hold before an input costs time or memory; `limits={name: value}` of the processor sets them.

    Attributes:
        text_characters: characters of a text.
        combining_marks: combining marks in a row (accents stacked on one letter); Unicode normalisation takes the
            square of their number in time.
        file_bytes: bytes of a file, of bytes in memory and of decoded base64.
        image_pixels: width × height of an image; the default is Pillow's bound.
        input_parts: texts, images and clips of one input.
        audio_seconds: length of a recording; the processor's is `max_audio_seconds` × `max_audio_windows`.
        audio_samples: samples of a channel at the rate of the recording (an hour at 48 kHz).
        audio_channels: channels of a recording.
        min_sampling_rate: lowest sampling rate in Hz.
        max_sampling_rate: highest sampling rate in Hz.
        download_bytes: bytes of a download.
        download_seconds: seconds of a download, redirects included.
    """

    text_characters: int = 1_000_000
    combining_marks: int = 100
    file_bytes: int = 2**30
    image_pixels: int = 178_956_970
    input_parts: int = 1024
    audio_seconds: float = 3600.0
    audio_samples: int = 3600 * 48_000
    audio_channels: int = 32
    min_sampling_rate: int = 1_000
    max_sampling_rate: int = 384_000
    download_bytes: int = 2**28
    download_seconds: float = 60.0

    @classmethod
    def of(cls, values: Mapping[str, float] | None) -> "Limits":
        """Returns the limits of `values`, the defaults elsewhere.

        Raises:
            ValueError: a name is unknown, or a value is not positive.
        """
        known = [field.name for field in fields(cls) if field.name != "audio_seconds"]
        for name, value in (values or {}).items():
            if name not in known:
                raise ValueError(f"`limits` has {name!r}; it may have {', '.join(known)}.")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"`limits` has {name}={value!r}; a limit is a number above 0.")
        return cls(**(values or {}))


LIMITS = Limits()


def show_source(source: Any) -> str:
    """Returns a short name of a source for errors: its path, address, size or shape."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"<array of shape {tuple(source.shape)}>"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, str) and DATA_URL.match(source):
        return f"<data URL of {len(source)} characters>"
    if isinstance(source, os.PathLike):
        return repr(os.fspath(source))
    return repr(show_url(source))[:200] if is_url(source) else repr(source)[:200]


def unreadable(kind: str, source: Any, error: Exception) -> ValueError:
    """Returns the error of a source that cannot be read, with the first characters of the reason."""
    reason = str(error) or type(error).__name__
    return ValueError(f"The {kind} {show_source(source)} cannot be read: {reason.rstrip('.')[:400]}.")


def unwrap(source: Any) -> Any:
    """Returns the content of `{"bytes", "path"}`, as data sets of the Hub store media: the bytes if it has any."""
    if not isinstance(source, Mapping):
        return source
    found = [source[key] for key in ("bytes", "path") if source.get(key) is not None]
    if not found:
        raise ValueError("it has neither `bytes` nor `path` (nor, of audio, `array`); give one of them")
    return found[0]


def open_source(source: Any, allow_urls: bool | str = False, limits: Limits = LIMITS) -> BinaryIO:
    """Opens a path, an open file, the bytes of a file, base64, a data URL or, if allowed, a URL.

    Args:
        source: one of these.
        allow_urls: see `download`.
        limits: bounds of its size.

    Raises:
        ValueError: it is of another kind (a folder, a pipe, a device), too large or not allowed.
        OSError: it cannot be opened.
    """
    if is_url(source):
        source = download(source, allow_urls, limits.download_bytes, limits.download_seconds)
    elif isinstance(source, str):
        data = _decode_base64(source, limits)
        source = _local_path(source) if data is None else data
    elif is_open_file(source):
        source = _read_open_file(source, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > limits.file_bytes:
            raise ValueError(_too_large(len(source), limits))
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"a {type(source).__name__} is neither a path nor the bytes of a file; pass one of them")
    return open_file(source, limits)


def is_open_file(source: Any) -> bool:
    """Returns whether `source` is an open file or another object with its `read`, such as `io.BytesIO`."""
    return callable(getattr(source, "read", None)) and callable(getattr(source, "seek", None))


def _read_open_file(file: Any, limits: Limits) -> bytes:
    """Reads an open file from its beginning; it stays open."""
    file.seek(0)
    data = file.read(limits.file_bytes + 1)
    if not isinstance(data, bytes):
        raise ValueError(f"its `read` gives {type(data).__name__}, not bytes; open the file in mode 'rb'")
    return data


def _local_path(text: str) -> str:
    """Returns the path of a `file://` URL of this machine; any other text as it is."""
    return unquote(urlsplit(text).path) if FILE_URL.match(text) else text


def open_file(path: str | os.PathLike, limits: Limits = LIMITS) -> BinaryIO:
    """Opens a regular file.

    Raises:
        ValueError: it is a folder, a pipe or a device, or too large.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK keeps a named pipe from blocking until it is refused; each flag is missing on some systems.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("it is a folder, a pipe or a device; pass a regular file")
    if status.st_size > limits.file_bytes:
        os.close(descriptor)
        raise ValueError(_too_large(status.st_size, limits))
    return os.fdopen(descriptor, "rb")


def _too_large(size: int, limits: Limits) -> str:
    return f"it has {size} bytes; the limit `file_bytes` is {limits.file_bytes}: pass a smaller file or raise it"


def _decode_base64(text: str, limits: Limits) -> bytes | None:
    """Returns the bytes of base64 or of a data URL; `None` if `text` is neither."""
    header = DATA_URL.match(text)
    if header is None and (len(text) < MIN_BASE64 or is_file(text)):
        return None
    if len(text) > 2 * limits.file_bytes:
        raise ValueError(_too_large(len(text), limits))
    if header is None and not BASE64.fullmatch(text):
        return None
    if header is not None and ";base64," not in header.group().lower():
        raise ValueError("the data URL is not base64; encode it so")
    try:
        return base64.b64decode("".join(text[header.end() if header else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its base64 cannot be decoded: {error}") from error


def is_file(path: str) -> bool:
    """Returns whether a string names an existing file (or device), not a folder."""
    if len(path) > MAX_PATH or "\0" in path:
        return False
    path = _local_path(path)
    return os.path.exists(path) and not os.path.isdir(path)


def _is_opened(text: str, name: str) -> bool:
    """Returns whether sentence-transformers opens a bare string; `name` is that without the query of a URL."""
    address = text.startswith(("http://", "https://")) and " " not in text
    return name.lower().endswith(SENTENCE_TRANSFORMERS_OPENS) and (address or os.path.isfile(text))


def check_is_text(text: str) -> None:
    """Refuses a text that is a path or an address of a media file, which was hardly meant as a text.

    A string with the ending of a media file is one if it exists as a file or contains a separator.
    sentence-transformers opens a bare string that names an existing file with an ending it knows, and would embed the
    characters of any other path. (A path that it would open reaches this check only as an explicit `text`.)

    Raises:
        ValueError: `text` is such a path.
    """
    if DATA_URL.match(text[:200]) and ";base64," in text[:200]:
        raise ValueError(f"The text {text[:40]!r}… is a data URL. Pass {{'image': …}} or {{'audio': …}} of it.")
    path = text.strip()  # lines of a list of files end with a line break
    if len(path) > MAX_PATH or "\n" in path:
        return
    is_address = is_url(path) and not re.search(r"\s", path)
    name = re.split("[?#]", path, maxsplit=1)[0] if is_address else path
    if not MEDIA_PATH.fullmatch(name) or HOST_ALONE.fullmatch(name):
        return
    exists = is_file(path)
    if not exists and (ADDRESS_IN_TEXT.search(path) or ("/" not in path and "\\" not in path)):
        return
    if _is_opened(text, name):
        return
    reason = "sentence-transformers does not open it" if exists or is_url(path) else "no such file exists"
    raise ValueError(
        f"{text[:200]!r} looks like the path of an image, audio, video or document file, but {reason}. Pass "
        "{'image': path} or {'audio': path} of a file, and the pages of a document as images; to embed the characters "
        f"of the path, pass `plain_text=True` (in sentence-transformers `{PLAIN_TEXT}`)."
    )


__all__ = [
    "LIMITS",
    "MAX_ASPECT_RATIO",
    "Limits",
    "check_is_text",
    "is_file",
    "is_open_file",
    "open_file",
    "open_source",
    "show_source",
    "unreadable",
    "unwrap",
]
