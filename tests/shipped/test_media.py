"""Images and audio: every form gives the same tensors, and bad input is an error that names the remedy."""

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import chat_ids, random_audio, random_image, user
from PIL import Image

from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.waveforms_vipolyqwen import load_audio

NAN, INF = float("nan"), float("inf")


def sine(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def spectrum(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz and amplitudes of 16 kHz samples."""
    middle = samples[len(samples) // 8 : -len(samples) // 8] * np.hanning(len(samples) - 2 * (len(samples) // 8))
    return np.fft.rfftfreq(len(middle), 1 / 16_000), np.abs(np.fft.rfft(middle)) / len(middle) * 4


def limited(processor: ViPolyQwenProcessor, **limits: float) -> ViPolyQwenProcessor:
    """The processor with other limits."""
    other = copy.copy(processor)
    other.limits = limits
    return other


def heard(processor: ViPolyQwenProcessor, audio: Any, **kwargs: Any) -> np.ndarray:
    return np.asarray(processor(audio=audio, **kwargs)["audio_features"])[0]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_a_tone_keeps_its_pitch_loudness_and_length_at_every_rate(rate: int, processor: Any) -> None:
    merged = processor._merge({})
    samples = processor._prepare_audio({"array": sine(1000, rate), "sampling_rate": rate}, merged)
    assert len(samples) == pytest.approx(8000, abs=1)
    frequencies, amplitudes = spectrum(samples)
    assert frequencies[amplitudes.argmax()] == pytest.approx(1000, abs=5)
    assert amplitudes.max() == pytest.approx(0.5, rel=0.02)
    assert amplitudes[np.abs(frequencies - 1000) > 50].max() < 0.005
    features = heard(processor, {"array": sine(1000, rate), "sampling_rate": rate})
    assert (features.mean(), features.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_a_tone_above_half_the_encoder_s_rate_vanishes_instead_of_folding_down(processor: Any) -> None:
    samples = processor._prepare_audio({"array": sine(10_000, 48_000), "sampling_rate": 48_000}, processor._merge({}))
    assert spectrum(samples)[1].max() < 0.005


@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_stereo_is_mixed_down_in_either_channel_order(order: str, processor: Any) -> None:
    stereo = np.stack([sine(500, 16_000), sine(2000, 16_000)])
    stereo = stereo if order == "channels first" else stereo.T
    mono = heard(processor, {"array": stereo.mean(axis=np.argmin(stereo.shape)), "sampling_rate": 16_000})
    np.testing.assert_allclose(heard(processor, {"array": stereo, "sampling_rate": 16_000}), mono, atol=1e-5)
    frequencies, amplitudes = spectrum(mono)
    for tone in (500, 2000):
        assert amplitudes[np.abs(frequencies - tone) < 10].max() > 0.5 * amplitudes.max()


@pytest.mark.parametrize(("dtype", "scale"), [(np.int16, 2**15), (np.int32, 2**31), (np.uint8, 2**7), (np.float64, 1)])
def test_samples_of_every_dtype_give_the_same_audio(dtype: type, scale: int, processor: Any) -> None:
    tone = sine(440, 16_000).astype(np.float64)
    array = (tone * scale + (scale if dtype == np.uint8 else 0)).astype(dtype)
    samples, rate = load_audio(array, 16_000)
    assert (samples.dtype, rate) == (np.float32, 16_000)
    np.testing.assert_allclose(samples, tone, atol=1.5 / scale if scale > 1 else 1e-6)


def wav_bytes(samples: np.ndarray, rate: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=options.pop("format", "WAV"), **options)
    return buffer.getvalue()


def test_audio_is_the_same_however_it_is_given(processor: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    array = random_audio(rng, 0.2, 22_050)["array"]
    data = wav_bytes(array, 22_050, subtype="FLOAT")
    path = tmp_path / "tiếng.wav"
    path.write_bytes(data)
    decoder = SimpleNamespace(
        metadata=SimpleNamespace(duration_seconds=0.2, sample_rate=22_050),
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(array)[None], sample_rate=22_050),
    )
    given = [
        {"array": array, "sampling_rate": 22_050},
        {"array": array.tolist(), "sampling_rate": 22_050},
        {"array": torch.from_numpy(array), "sampling_rate": 22_050, "path": None},
        {"path": str(path), "bytes": None},
        {"path": "elsewhere.wav", "bytes": data},
        data,
        bytearray(data),
        path,
        str(path),
        decoder,
    ]
    expected = heard(processor, given[0])
    for audio in given:
        np.testing.assert_array_equal(heard(processor, audio), expected)
        np.testing.assert_array_equal(heard(processor, [audio]), expected)
        conversation = [{"role": "user", "content": [{"type": "audio", "audio": audio}]}]
        batch = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)
        np.testing.assert_array_equal(np.asarray(batch["audio_features"])[0], expected)
    for array_like in (array, array.tolist(), torch.from_numpy(array), array[None], array[:, None]):
        np.testing.assert_array_equal(heard(processor, array_like, sampling_rate=22_050), expected)
    np.testing.assert_allclose(heard(processor, wav_bytes(array, 22_050, format="FLAC")), expected, atol=1e-3)
    stereo = wav_bytes(np.stack([array, array], axis=1), 22_050, subtype="FLOAT")
    np.testing.assert_allclose(heard(processor, stereo), expected, atol=1e-5)


def test_a_streamed_wav_without_a_size_is_complete(processor: Any, rng: np.random.Generator) -> None:
    data = bytearray(wav_bytes(random_audio(rng, 0.2)["array"], 16_000))
    data[4:8] = b"\xff\xff\xff\xff"  # what ffmpeg writes to a pipe
    assert heard(processor, bytes(data)).shape == (3200,)


WAV = wav_bytes(sine(440, 16_000), 16_000)


AUDIO = {"array": sine(440, 16_000), "sampling_rate": 16_000}


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (WAV[: len(WAV) // 2], rf"<{len(WAV) // 2} bytes>.*truncated: {len(WAV) // 2} of {len(WAV)} bytes"),
        (WAV[:100], "truncated"),
        (WAV[:20], "truncated"),
        (b"RIFF", "4 bytes.*cannot be read"),
        (b"", "0 bytes.*cannot be read"),
        (wav_bytes(sine(440, 16_000), 16_000, format="FLAC")[:3000], "3000 bytes.*cannot be read"),
        (b"not audio at all" * 100, "1600 bytes.*cannot be read"),
        (wav_bytes(sine(440, 16_000)[:0], 16_000), "empty: 0 samples.*pass a recording"),
        ("no/such/file.wav", r"'no/such/file\.wav' cannot be read.*No such file"),
        (Path("no/such/file.wav"), r"no/such/file\.wav.*cannot be read"),
        ("https://example.org/a.wav", r"https://example\.org/a\.wav.*URL.*download"),
        ({**AUDIO, "array": []}, "empty: 0 samples.*pass a recording"),
        ({**AUDIO, "array": AUDIO["array"][:50]}, "50 samples at 16000 Hz; the speech encoder needs at least.*Pad it"),
        ({"array": AUDIO["array"][:100], "sampling_rate": 48_000}, "34 samples at 16000 Hz; the speech encoder"),
        ({**AUDIO, "array": np.append(AUDIO["array"], [NAN, INF])}, "2 NaN or infinite samples of 8002; repair or"),
        ({**AUDIO, "array": np.append(AUDIO["array"], -INF)}, "1 NaN or infinite samples of 8001"),
        ({"array": AUDIO["array"]}, "without a sampling rate.*Pass"),
        ({**AUDIO, "sampling_rate": None}, "without a sampling rate.*Pass"),
        ({**AUDIO, "sampling_rate": 0}, "sampling.rate"),
        ({**AUDIO, "sampling_rate": -16_000}, "sampling.rate.*-16000"),
        (AUDIO["array"], "without a sampling rate.*Pass"),
        ({**AUDIO, "array": np.zeros((2, 2, 4000))}, r"shape \(2, 2, 4000\); pass"),
        ({**AUDIO, "array": np.float32(0.5)}, r"shape \(\); pass"),
        ({**AUDIO, "array": "abc"}, "abc"),
        ({}, "audio.*bytes.*path"),
        ({"bytes": None, "path": None}, "audio.*bytes.*path"),
        (12, "without a sampling rate|audio"),
    ],
)
def test_bad_audio_is_an_error_that_names_the_value_and_the_remedy(audio: Any, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        processor(audio=[audio], text=["Huế"])


def test_two_clips_in_one_input_are_an_error(processor: Any) -> None:
    with pytest.raises(ValueError, match="2 audio clips in one input; the limit is 1"):
        chat_ids(processor, user(AUDIO, AUDIO))


def image_bytes(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def seen(processor: ViPolyQwenProcessor, image: Any) -> np.ndarray:
    return np.asarray(processor(images=[[image]], return_tensors="np")["pixel_values"])


def test_an_image_is_the_same_however_it_is_given(processor: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    image = random_image(rng)
    path = tmp_path / "ảnh.png"
    path.write_bytes(image_bytes(image))
    array = np.asarray(image)
    expected = seen(processor, image)
    data = image_bytes(image)
    for given in (path, str(path), data, bytearray(data), array, torch.from_numpy(array.copy())):
        np.testing.assert_array_equal(seen(processor, given), expected)
        batch = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": given}]}], tokenize=True, return_dict=True
        )
        np.testing.assert_array_equal(np.asarray(batch["pixel_values"]), expected)
    np.testing.assert_array_equal(seen(processor, np.moveaxis(array, -1, 0)), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_images_of_every_mode_are_seen(mode: str, processor: Any, rng: np.random.Generator) -> None:
    image = random_image(rng)
    image = image.convert("L").convert("I").convert(mode) if mode in ("I;16", "F") else image.convert(mode)
    pixels = seen(processor, image)
    assert pixels.shape == seen(processor, random_image(rng)).shape
    assert np.isfinite(pixels).all()


def test_sixteen_bits_are_scaled_to_eight_not_clipped(processor: Any, rng: np.random.Generator) -> None:
    eight = rng.integers(0, 256, (48, 60), dtype=np.uint8)
    sixteen = Image.fromarray(eight.astype(np.uint16) * 256 + 77)
    expected = seen(processor, Image.fromarray(eight))
    np.testing.assert_array_equal(seen(processor, sixteen), expected)
    np.testing.assert_array_equal(seen(processor, image_bytes(sixteen)), expected)


def test_an_array_of_zero_to_one_is_taken_if_nothing_rescales_it(processor: Any, rng: np.random.Generator) -> None:
    array = np.asarray(random_image(rng))
    batch = processor(images=[[array / 255]], images_kwargs={"do_rescale": False}, return_tensors="np")
    np.testing.assert_allclose(batch["pixel_values"], seen(processor, array), atol=0.05)
    np.testing.assert_array_equal(seen(processor, array.astype(np.float64)), seen(processor, array))


def test_a_photo_is_turned_upright(processor: Any, rng: np.random.Generator) -> None:
    upright = random_image(rng, 60, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    turned = image_bytes(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    np.testing.assert_array_equal(seen(processor, turned), seen(processor, upright))


GREY = Image.new("RGB", (60, 48), "grey")


NOISE = random_image(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 5)), "0×5.*needs pixels"),
        (Image.new("RGB", (0, 0)), "0×0.*needs pixels"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "5×0|0×5|needs pixels"),
        (Image.new("RGB", (2001, 10)), "2001×10.*aspect ratio up to 200.*crop"),
        (Image.new("RGB", (10, 2001)), "10×2001.*aspect ratio up to 200.*crop"),
        (np.zeros((2, 500, 3), dtype=np.uint8), "500×2.*aspect ratio up to 200.*crop"),
        (np.full((48, 60, 3), NAN), "NaN"),
        (np.full((48, 60, 3), 0.5), r"0 … 0\.5 and would be divided by 255 again; multiply them by 255"),
        (np.ones((48, 60, 3), dtype=bool), "divided by 255 again"),
        (np.linspace(-1, 1, 48 * 60 * 3).reshape(48, 60, 3), "-1 … 1; they must be 0 … 255"),
        (np.full((48, 60, 3), 256, dtype=np.uint16), "0 … 256; they must be 0 … 255"),
        (Image.fromarray(np.full((48, 60), 0.5, dtype=np.float32)), "divided by 255 again"),
        (image_bytes(NOISE)[:2000], "2000 bytes.*cannot be read"),
        (image_bytes(NOISE, "JPEG")[:500], "500 bytes.*cannot be read"),
        (b"", "0 bytes.*cannot be read"),
        (b"not an image" * 10, "120 bytes.*cannot be read"),
        ("no/such/file.png", r"no/such/file\.png.*cannot be read"),
        (Path("no/such/file.png"), r"no/such/file\.png.*cannot be read"),
        ("https://example.org/a.png", r"https://example\.org/a\.png.*URL; download it"),
        (Path(__file__), "test_media.*cannot be read"),
        (Path(__file__).parent, "shipped.*cannot be read"),
        (5, "5.*cannot be read"),
        (np.zeros(7), r"shape \(7,\)|cannot be read"),
    ],
)
def test_a_bad_image_is_an_error_that_names_the_value_and_the_remedy(image: Any, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        processor(images=[[GREY], [image]], text=["a", "b"])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        chat_ids(processor, [{"role": "user", "content": [{"type": "image", "image": image}]}])


def test_a_decompression_bomb_is_refused(processor: Any) -> None:
    small = limited(processor, image_pixels=100)
    with pytest.raises(ValueError, match="60×48 is more than 100 pixels, the limit `image_pixels`; scale it down"):
        small(images=[[GREY]])
