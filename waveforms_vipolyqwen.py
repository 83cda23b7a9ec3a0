"""Decodes audio piece by piece as mono samples, within limits that hold before the decoding, and resamples it."""

import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers.utils import is_av_available, is_scipy_available, is_soundfile_available

from .headers_vipolyqwen import MP3_SHARE, check_is_complete, states_mp3_frames
from .media_vipolyqwen import LIMITS, Limits, is_open_file, open_source, show_source, unreadable, unwrap

if is_av_available():
    import av
if is_soundfile_available():
    import soundfile

PIECE = 2**16  # samples of a channel that are decoded at a time
MP3_PADDING = 3 * 1152  # samples that an encoder puts around a recording
UNKNOWN_LENGTH = 2**40  # samples; a header that claims as many states no length
MOST_STEPS = 50_000  # of a ratio of rates; the filter that resamples has 20 coefficients a step
CANCELLED = 1e-3  # power of the mix by that of its channels; of two voices or instruments it is about 0.5
LOUDEST = 2.0**32  # of floating-point samples; louder ones overflow float32 in the feature extractor
# Formats of libsndfile that are read; of its others many state no length or rate.
SOUNDFILE_FORMATS = ("AIFF", "AU", "CAF", "FLAC", "MP3", "NIST", "OGG", "RF64", "W64", "WAV", "WAVEX")
# What FFmpeg (PyAV) may open: offset, first bytes, name of the demuxer. Playlists and others, which open further files
# or addresses, are not among them.
CONTAINERS = (
    (4, b"ftyp", "mp4"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"#!AMR", "amr"),
    (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"),
    (0, b"ADIF", "aac"),
    (0, b"OggS", "ogg"),
    (8, b"AVI ", "avi"),
    (0, b"FLV", "flv"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (0, b"caff", "caf"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
)

ESTIMATED = ("aac", "amr", "mpeg")  # demuxers that compute a length from the size of the file
TOLERANCE = 0.5  # s by which a stream may end before its container says


def load_audio(
    source: Any, sampling_rate: int | None = None, allow_urls: bool | str = False, limits: Limits = LIMITS
) -> tuple[np.ndarray, int]:
    """Loads audio and mixes its channels down to mono.

    Args:
        source: a path, an open file, the bytes of a file, base64, a data URL, `(array, rate)` or `(rate, array)`,
            `{"array", "sampling_rate"}`, `{"bytes", "path"}`, a decoder with `get_all_samples()`, or an array of
            samples, (samples,), (channels, samples) or (samples, channels), float in [-1, 1] or integers over the
            range of their dtype (8, 16 or 32 bits); a URL with `allow_urls`.
        sampling_rate: rate in Hz of an array that comes without one.
        allow_urls: fetch `http(s)://` sources; see `download`.
        limits: bounds of file, samples, channels and rate.

    Returns:
        (samples,) float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        ValueError: the audio cannot be read, is empty, truncated or ambiguous, exceeds the limits, lacks a sampling
            rate, has non-finite samples, or is a URL without `allow_urls`.
        ImportError: a file was passed and soundfile is not installed.
    """
    if isinstance(source, Mapping) and source.get("array") is not None:
        return load_audio(source["array"], source.get("sampling_rate", sampling_rate), limits=limits)
    if is_array_with_rate(source):
        array, rate = source if _is_array(source[0]) else reversed(source)
        return load_audio(array, rate, limits=limits)
    if hasattr(source, "get_all_samples"):  # torchcodec's AudioDecoder, which `datasets` returns
        return _load_decoder(source, limits)
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Mapping)) or is_open_file(source):
        return _load_file(source, allow_urls, limits)
    return _mono_samples(_as_numpy(source), sampling_rate, limits)


def is_array_with_rate(source: Any) -> bool:
    """Returns whether `source` is `(array, rate)`, as soundfile returns it, or `(rate, array)`, as scipy does."""
    if not isinstance(source, (tuple, list)) or len(source) != 2 or _is_array(source[0]) == _is_array(source[1]):
        return False
    return any(isinstance(entry, numbers.Real) and not isinstance(entry, bool) for entry in source)


def _is_array(source: Any) -> bool:
    return isinstance(source, (np.ndarray, torch.Tensor)) or is_samples(source)


def is_samples(source: Any) -> bool:
    """Returns whether `source` is a list of numbers."""
    return isinstance(source, (list, tuple)) and bool(source) and isinstance(source[0], (numbers.Real, np.generic))


def _as_numpy(source: Any) -> np.ndarray:
    try:
        if isinstance(source, torch.Tensor):
            return source.detach().cpu().float().numpy() if source.is_floating_point() else source.cpu().numpy()
        return np.asarray(source)
    except (ValueError, TypeError, NotImplementedError) as error:  # lists of unequal lengths, sparse and meta tensors
        raise ValueError(f"The audio {source!r:.80} is not an array of samples: {error}.") from error


def _load_decoder(decoder: Any, limits: Limits) -> tuple[np.ndarray, int]:
    metadata = decoder.metadata
    if metadata.duration_seconds and metadata.sample_rate:
        check_length(metadata.duration_seconds * metadata.sample_rate, metadata.sample_rate, limits)
    decoded = decoder.get_all_samples()
    return _mono_samples(_as_numpy(decoded.data), decoded.sample_rate, limits)


# --- arrays ------------------------------------------------------------------------------------------------------


def _mono_samples(samples: np.ndarray, sampling_rate: Any, limits: Limits) -> tuple[np.ndarray, int]:
    if sampling_rate is None:
        raise ValueError(
            "The audio is an array without a sampling rate. Pass {'array': …, 'sampling_rate': …} or `sampling_rate=`."
        )
    rate = check_rate(sampling_rate, limits)
    if samples.size == 0:
        raise ValueError("The audio is empty: 0 samples. Leave it out or pass a recording.")
    if samples.ndim == 2:
        if min(samples.shape) > limits.audio_channels:
            raise ValueError(
                f"The audio has shape {samples.shape}; the limit `audio_channels` is {limits.audio_channels}: "
                "pass (samples,) or (channels, samples)."
            )
        mixer = _Mixer()
        samples = mixer.mix(_as_float(samples), axis=int(np.argmin(samples.shape)))
        mixer.check()
    if samples.ndim != 1:
        raise ValueError(f"The audio has shape {samples.shape}; pass (samples,) or (channels, samples).")
    check_length(samples.size, rate, limits)
    samples = _as_float(samples)
    loudest = max(float(samples.max()), -float(samples.min()))
    if not math.isfinite(loudest):
        count = int((~np.isfinite(samples)).sum())
        raise ValueError(f"The audio has {count} NaN or infinite samples of {samples.size}; repair or drop it.")
    if loudest > LOUDEST:
        raise ValueError(f"The audio has samples up to {loudest:g}; scale them to [-1, 1].")
    return samples, rate


class _Mixer:
    """Mixes channels down to mono; two of opposite polarity would become silence."""

    def __init__(self) -> None:
        self.of_channels = self.of_mix = 0.0  # sums of squares, of channels their mean

    def mix(self, samples: np.ndarray, axis: int) -> np.ndarray:
        """Returns the mean of float samples over the axis of the channels."""
        if samples.shape[axis] == 1:
            return samples.squeeze(axis)
        mixed = samples.mean(axis=axis)
        self.of_channels += float(np.vdot(samples, samples)) / samples.shape[axis]
        self.of_mix += float(np.vdot(mixed, mixed))
        return mixed

    def check(self) -> None:
        """Raises ValueError if the channels cancelled each other."""
        if self.of_mix < CANCELLED * self.of_channels:
            raise ValueError(
                f"the channels of the audio cancel each other: their mean has {self.of_mix / self.of_channels:.1g} of "
                f"their power, the limit is {CANCELLED:g}; pass one of the channels"
            )


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Returns samples as float32; whole numbers are divided by the range of their dtype.

    Raises:
        ValueError: the range is unknown: 64 bits, or 32 bits of which only 16 are used.
    """
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # an infinite sample is refused afterwards
            return samples.astype(np.float32, copy=False)
    peak = int(np.abs(samples).max(initial=0)) if kind == "i" and size == 4 else None
    if kind not in "ui" or size == 8 or (kind == "u" and size == 4) or (peak is not None and 0 < peak < 2**15):
        shown = f" up to {peak}" if peak is not None else ""
        raise ValueError(
            f"The audio has samples of dtype {samples.dtype}{shown}, whose full range is unknown. Pass floats in "
            "[-1, 1], or whole numbers as int16 (or uint8, int32 for recordings of 8 and 32 bits)."
        )
    limits = np.iinfo(samples.dtype)
    middle = (limits.max + 1 + limits.min) / 2  # 128 for uint8, 0 for signed types
    return ((samples - middle) / (limits.max + 1 - middle)).astype(np.float32)


def check_rate(rate: Any, limits: Limits = LIMITS) -> int:
    """Returns a sampling rate in Hz.

    Raises:
        ValueError: it is not an integer, or outside the limits.
    """
    is_number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    inside = is_number and limits.min_sampling_rate <= rate <= limits.max_sampling_rate
    if not inside or not float(rate).is_integer():
        raise ValueError(
            f"The audio's sampling rate is {rate!r:.40}; the limits are {limits.min_sampling_rate} and "
            f"{limits.max_sampling_rate} Hz (`min_sampling_rate`, `max_sampling_rate`): pass the rate that it was "
            "recorded at."
        )
    return int(rate)


def check_length(samples: float, rate: int, limits: Limits) -> None:
    """Refuses more samples than the limits allow at this rate."""
    if samples > limits.audio_seconds * rate:
        raise ValueError(
            f"the recording is longer than {limits.audio_seconds:g} s, the limit `audio_seconds` (of a processor "
            "`max_audio_seconds` × `max_audio_windows`); split it or raise the limit"
        )
    if samples > limits.audio_samples:
        raise ValueError(
            f"the recording has more than {limits.audio_samples} samples, the limit `audio_samples`; split it, or "
            "resample it to the 16 kHz that are heard"
        )


# --- files -------------------------------------------------------------------------------------------------------


def _load_file(source: Any, allow_urls: bool | str, limits: Limits) -> tuple[np.ndarray, int]:
    try:
        source = unwrap(source)
        with open_source(source, allow_urls, limits) as file:
            samples, rate = _decode_file(file, limits)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  libsndfile and FFmpeg raise various kinds for damaged files
        raise unreadable("audio", source, error) from error
    if samples.size == 0:
        raise ValueError(f"The audio {show_source(source)} is empty: 0 samples. Leave it out or pass a recording.")
    return _mono_samples(samples, rate, limits)


def _decode_file(file: BinaryIO, limits: Limits) -> tuple[np.ndarray, int]:
    """Decodes with libsndfile or, for the containers that it does not know, with FFmpeg."""
    if not is_soundfile_available():
        raise ImportError("Reading audio files needs the soundfile package: pip install soundfile.")
    check_is_complete(file)
    head = file.read(16)
    file.seek(0)
    container = next((name for at, first, name in CONTAINERS if head[at:].startswith(first)), None)
    try:
        return _decode_with_soundfile(file, limits)
    except soundfile.LibsndfileError as error:
        if container is None:
            raise ValueError(error.error_string) from error
        if not is_av_available():
            raise ValueError(f"it is of the kind {container}, which needs the av package: pip install av") from error
    file.seek(0)
    return _decode_with_av(file, container, limits)


def _decode_with_soundfile(file: BinaryIO, limits: Limits) -> tuple[np.ndarray, int]:
    with soundfile.SoundFile(_SeekableFile(file)) as clip:
        if clip.format not in SOUNDFILE_FORMATS:
            raise ValueError(f"it is of the format {clip.format}; convert it to one of {', '.join(SOUNDFILE_FORMATS)}")
        rate = check_rate(clip.samplerate, limits)
        _check_channels(clip.channels, limits)
        if clip.frames < UNKNOWN_LENGTH:
            check_length(clip.frames, rate, limits)
        mixer = _Mixer()
        samples = _join((mixer.mix(piece, axis=1) for piece in _pieces(clip)), rate, limits)
        mixer.check()
        stated = clip.frames
        if clip.format == "MP3":  # an estimate, unless its first frame counts the others
            stated = int(MP3_SHARE * stated) - MP3_PADDING if states_mp3_frames(file) else 0
        if len(samples) < stated < UNKNOWN_LENGTH:
            raise ValueError(f"the file is truncated: {len(samples)} of {clip.frames} samples")
    return samples, rate


class _SeekableFile:
    """Stays where it is when a damaged header sends libsndfile to a place before the file.

    An exception in its callback would be printed, not raised.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self.file.seek(offset, whence)
        except (OSError, ValueError):  # before the beginning, or beyond 64 bits
            return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)

    def read(self, size: int) -> bytes:
        return self.file.read(size)

    def tell(self) -> int:
        return self.file.tell()


def _pieces(clip: Any) -> Iterator[np.ndarray]:
    """Yields (samples, channels) of an open audio file until its end."""
    while len(piece := clip.read(PIECE, dtype="float32", always_2d=True)):
        yield piece


def _decode_with_av(file: BinaryIO, container: str, limits: Limits) -> tuple[np.ndarray, int]:
    with av.open(file, format=container, metadata_errors="ignore") as opened:
        if not opened.streams.audio:
            raise ValueError(f"it is of the kind {container} and has no audio; pass frames of a film as images")
        stream = opened.streams.audio[0]
        rate = check_rate(stream.rate, limits)
        _check_channels(stream.channels, limits)
        to_float = av.AudioResampler(format="fltp", rate=rate)  # (channels, samples) in [-1, 1]
        heard, mixer = _Heard(stream), _Mixer()
        frames = (frame for decoded in heard.frames(opened) for frame in to_float.resample(decoded))
        samples = _join((mixer.mix(frame.to_ndarray(), axis=0) for frame in frames), rate, limits)
        heard.check()
        mixer.check()
        return samples, rate


class _Heard:
    """Compares where the decoded frames of a stream end with where its container says that it ends."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.end = 0.0  # s

    def frames(self, opened: Any) -> Iterator[Any]:
        """Yields the frames of the stream."""
        for frame in opened.decode(self.stream):
            if frame.time is not None:
                self.end = max(self.end, frame.time + frame.samples / frame.sample_rate)
            yield frame

    def check(self) -> None:
        """Raises ValueError if the stream ended too early; a container may state no end."""
        if not self.stream.duration or self.stream.container.format.name in ESTIMATED:
            return
        stated = float(((self.stream.start_time or 0) + self.stream.duration) * self.stream.time_base)
        if self.end < stated - TOLERANCE:
            raise ValueError(f"the file is truncated: {self.end:.1f} of {stated:.1f} s")


def _check_channels(channels: int, limits: Limits) -> None:
    if channels > limits.audio_channels:
        raise ValueError(f"it has {channels} channels; the limit `audio_channels` is {limits.audio_channels}")


def _join(pieces: Iterable[np.ndarray], rate: int, limits: Limits) -> np.ndarray:
    """Joins (samples,) pieces; stops at the limit."""
    kept: list[np.ndarray] = []
    total = 0
    for piece in pieces:
        kept.append(piece.astype(np.float32, copy=False))
        total += len(piece)
        check_length(total, rate, limits)
    if len(kept) == 1:
        return kept[0]
    return np.concatenate(kept) if kept else np.zeros(0, np.float32)


def audio_length(source: Any, limits: Limits = LIMITS) -> tuple[int, int]:
    """Returns the samples of a channel and the sampling rate in Hz, from the header of a file if it has one.

    Raises:
        ValueError: the audio cannot be read or exceeds the limits.
    """
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        samples, rate = load_audio(source, limits=limits)
        return len(samples), rate
    try:
        with open_source(source, False, limits) as file:
            check_is_complete(file)
            info = soundfile.info(file)
            return info.frames, check_rate(info.samplerate, limits)
    except soundfile.LibsndfileError:
        samples, rate = load_audio(source, limits=limits)  # a container of which libsndfile knows nothing
        return len(samples), rate
    except (OSError, ValueError) as error:
        raise unreadable("audio", source, error) from error


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
    if is_scipy_available():
        from scipy.signal import resample_poly  # takes half a second, which only other rates need
    else:
        raise ImportError(f"Resampling from {rate} to {target} Hz needs the scipy package: pip install scipy.")
    ratio = ratio_of_rates(target, rate)
    return resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)


def ratio_of_rates(target: int, rate: int) -> Fraction:
    """Returns target / rate with neither term above `MOST_STEPS`, since a short clip would take 350 MB at odd rates.

    Rates up to 50 kHz and all usual ones are exact; others change the length of an hour by 0.04 s at most.
    """
    exact = Fraction(target, rate)
    if exact <= 1:
        return exact.limit_denominator(MOST_STEPS)
    return 1 / (1 / exact).limit_denominator(MOST_STEPS)


__all__ = [
    "audio_length",
    "check_rate",
    "is_array_with_rate",
    "is_samples",
    "load_audio",
    "ratio_of_rates",
    "resample",
]
