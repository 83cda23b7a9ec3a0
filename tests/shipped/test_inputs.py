"""Inputs as people have them: ordinary files are read, ambiguous ones refused, and limits stand before the work."""

import base64
import copy
import io
import json
import logging
import os
import re
import struct
import threading
import time
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import chat_ids, ids_of, random_audio, random_image, user
from PIL import Image, ImageDraw

from vipolyqwen.images_vipolyqwen import load_image
from vipolyqwen.media_vipolyqwen import Limits, check_is_text
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor
from vipolyqwen.waveforms_vipolyqwen import load_audio

RATE = 16_000


def image_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def audio_file(samples: np.ndarray, rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=options.pop("format", "WAV"), **options)
    return buffer.getvalue()


def sign(word: str, mode: str) -> Image.Image:
    """Black text on a transparent ground."""
    alpha = Image.new("L", (60, 48), 0)
    ImageDraw.Draw(alpha).text((5, 15), word, fill=255)
    black = Image.new("RGBA", (60, 48))
    black.putalpha(alpha)
    if mode == "P":
        palette = Image.fromarray(np.asarray(alpha) // 255)
        palette = palette.convert("P")
        palette.putpalette([0, 0, 0] * 256)
        palette.info["transparency"] = 0
        return palette
    return black.convert(mode)


def tone(seconds: float = 0.2) -> np.ndarray:
    return (0.5 * np.sin(np.arange(int(seconds * RATE)) * 0.2)).astype(np.float32)


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_black_text_on_a_transparent_ground_is_seen_on_white(mode: str, processor: Any) -> None:
    for given in (sign("Huế", mode), image_file(sign("Huế", mode))):
        seen = np.asarray(load_image(given))
        assert seen.shape == (48, 60, 3)
        assert (seen[0, 0] == 255).all()
        assert (seen == 0).any()
    first, second = (processor(images=[[image_file(sign(word, mode))]])["pixel_values"] for word in ("Huế", "abc"))
    assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1


def test_an_opaque_image_keeps_its_pixels(rng: np.random.Generator) -> None:
    image = random_image(rng)
    for mode in ("RGBA", "RGBa"):
        np.testing.assert_array_equal(np.asarray(load_image(image.convert("RGBA").convert(mode))), np.asarray(image))


def test_arrays_of_one_to_four_channels_are_the_images_that_they_show(rng: np.random.Generator) -> None:
    for mode in ("L", "LA", "RGB", "RGBA"):
        image = Image.fromarray(rng.integers(0, 256, (48, 60, 4), dtype=np.uint8), "RGBA").convert(mode)
        array, expected = np.asarray(image), np.asarray(load_image(image))
        last = array[..., None] if mode == "L" else array
        for given in (array, last, np.moveaxis(last, -1, 0), torch.from_numpy(array.copy()), array.astype(np.int64)):
            np.testing.assert_array_equal(np.asarray(load_image(given)), expected)
        np.testing.assert_allclose(np.asarray(load_image(array.astype(np.float64)), float), expected, atol=1)
        np.testing.assert_allclose(load_image(array / 255, rescale=False), expected / 255, atol=0.005)
    for shape in ((3, 60, 4), (48, 60, 5), (2, 3, 48, 60)):
        with pytest.raises(ValueError, match="channels|pass"):
            load_image(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="dtype is complex128"):
        load_image(np.zeros((48, 60, 3), complex))


@pytest.mark.parametrize("kind", ["float32", "F"])
def test_fractions_of_a_pixel_are_rounded(kind: str, processor: Any, rng: np.random.Generator) -> None:
    pixels = np.asarray(random_image(rng))
    pixels = pixels[..., :1].repeat(3, axis=-1) if kind == "F" else pixels
    fractions = np.clip(pixels + rng.uniform(-0.49, 0.49, pixels.shape), 0, 255).astype(np.float32)
    fractions = fractions[..., :1].repeat(3, axis=-1) if kind == "F" else fractions
    given = Image.fromarray(fractions[..., 0]) if kind == "F" else fractions
    np.testing.assert_array_equal(
        processor(images=[[given]])["pixel_values"], processor(images=[[pixels]])["pixel_values"]
    )


def test_media_as_data_sets_of_the_hub_store_them(processor: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    image, samples = random_image(rng), tone()
    (tmp_path / "ảnh của tôi.png").write_bytes(image_file(image))
    (tmp_path / "tiếng.wav").write_bytes(audio_file(samples, subtype="FLOAT"))
    for name, data, key in (
        ("ảnh của tôi.png", image_file(image), "image"),
        ("tiếng.wav", audio_file(samples, subtype="FLOAT"), "audio"),
    ):
        code = base64.b64encode(data).decode()
        forms = [{"bytes": data, "path": name}, {"bytes": None, "path": str(tmp_path / name)}, memoryview(data), code]
        forms += [f"data:{key}/x;base64,{code}", base64.encodebytes(data).decode(), tmp_path / name]
        expected = load_image(data) if key == "image" else load_audio(data)[0]
        for given in forms:
            found = load_image(given) if key == "image" else load_audio(given)[0]
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
            content = [{"type": key, key: given}]
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


def test_a_heic_photo_is_read_upright(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer, quality=-1)
    np.testing.assert_allclose(np.asarray(load_image(buffer.getvalue())), np.asarray(image), atol=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    heif.from_pillow(image.transpose(Image.Transpose.ROTATE_90)).save(buffer, quality=-1, exif=exif.tobytes())
    np.testing.assert_allclose(np.asarray(load_image(buffer.getvalue())), np.asarray(image), atol=3)
    with pytest.raises(ValueError, match="64×48 is more than 100 pixels"):
        load_image(heic(heif, image), limits=Limits(image_pixels=100))
    monkeypatch.setattr("vipolyqwen.images_vipolyqwen.is_pillow_heif_available", lambda: False)
    with pytest.raises(ValueError, match="HEIC file, which needs the pillow-heif package"):
        load_image(buffer.getvalue())


def heic(heif: Any, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    heif.from_pillow(image).save(buffer)
    return buffer.getvalue()


def test_only_a_stated_list_of_formats_is_opened(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 48\n%%EndComments\nshowpage\n"
    path = tmp_path / "photo.png"
    path.write_bytes(postscript)
    others = [image_file(Image.new("RGB", (60, 48)), kind) for kind in ("PPM", "ICO", "TGA", "PCX", "PDF")]
    for given in (postscript, path, b"<svg xmlns='http://www.w3.org/2000/svg'/>", *others):
        with pytest.raises(ValueError, match="it is of none of the formats AVIF, BMP"):
            load_image(given)


def test_a_tiff_of_several_pages_is_refused_and_its_pages_are_taken(rng: np.random.Generator) -> None:
    pages = [random_image(rng), random_image(rng)]
    one = image_file(pages[0], "TIFF")
    np.testing.assert_array_equal(np.asarray(load_image(one)), np.asarray(pages[0]))
    both = image_file(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="2 pages; pass the pages"):
        load_image(both)
    opened = Image.open(io.BytesIO(both))
    for number, page in enumerate(pages):
        opened.seek(number)
        np.testing.assert_array_equal(np.asarray(load_image(opened.copy())), np.asarray(page))


# --- room --------------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(processor: ViPolyQwenProcessor) -> ViPolyQwenProcessor:
    """A processor with Qwen2-VL's bounds of pixels, up to 16,384 tokens an image, and 8,192 tokens an input."""
    other = copy.copy(processor)
    other.image_processor = copy.deepcopy(processor.image_processor)
    other.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    other.tokenizer = copy.deepcopy(processor.tokenizer)
    other.tokenizer.model_max_length = 8192
    return other


def test_images_are_scaled_to_the_room_that_is_left(roomy: Any) -> None:
    photo, question = Image.new("RGB", (4032, 3024), "grey"), "Trên biển ghi gì?"
    assert roomy._get_num_multimodal_tokens(image_sizes=[(3024, 4032)]).num_image_tokens == [15552]
    (ids,) = ids_of(roomy, images=[photo], text=question, task="ocr")
    text = len(ids_of(roomy, text=question)[0]) - 1
    images = ids.count(roomy.image_token_id)
    assert 0.97 * 8192 < len(ids) <= 8192
    assert images == len(ids) - text - 4  # prefix, both marks of the slot, end
    batch = roomy(images=[[photo], [photo.resize((56, 56))]], text=[question, question])
    assert len(batch["pixel_values"]) == 4 * sum(row.count(roomy.image_token_id) for row in batch["input_ids"])
    height, width = batch["image_grid_thw"][0][1:]
    assert width / height == pytest.approx(4 / 3, rel=0.02)
    alone = roomy(images=[[photo]], text=[question])
    np.testing.assert_array_equal(alone["pixel_values"], batch["pixel_values"][: len(alone["pixel_values"])])


def test_the_page_of_inputs_tells_the_tokens_of_images(roomy: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/inputs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) ?\S* ?\|((?: [\d,]+ \|){4}) ([\d,]+) ms \([\d.]+ TFLOP\) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    computed = json.loads((Path(__file__).parents[2] / "benchmarks/results/image_tokens.json").read_text("utf-8"))
    times = {row["max_pixels"]: row["4032 x 3024"]["ms"] for row in computed["table"]}
    for bound, cells, milliseconds in rows:
        assert milliseconds == f"{times[int(bound.replace(',', ''))]:,.0f}"
        size = {"min_pixels": 56 * 56, "max_pixels": int(bound.replace(",", ""))}
        sizes = [(480, 640), (1080, 1920), (3024, 4032), (3508, 2480)]
        counted = roomy._get_num_multimodal_tokens(image_sizes=sizes, images_kwargs=size).num_image_tokens
        assert [f"{count:,}" for count in counted] == cells.strip(" |").split(" | ")


def test_many_images_leave_room_for_their_question(roomy: Any, plain_ids: Any, caplog: Any) -> None:
    images, question = [Image.new("RGB", (800, 600), "grey")] * 28, "Ảnh nào có biển số? " * 3
    (ids,) = ids_of(roomy, images=images, text=question, max_length=512)
    asked = plain_ids(question)
    assert ids[-1 - len(asked) : -1] == asked
    assert len(ids) <= 512
    shared = roomy.apply_chat_template(
        user(*images, question), tokenize=True, return_dict=True, share_images=True, max_length=512
    )
    assert shared["input_ids"] == [ids]
    assert len(shared["image_grid_thw"]) == 1
    with pytest.raises(ValueError, match="take [0-9]+ tokens; the limit is 1") as caught:
        roomy(images=images, text=question, max_length=1)
    fixed = int(re.findall("take ([0-9]+) tokens", str(caught.value))[0])  # 28 images as small as they can be
    with caplog.at_level(logging.WARNING):
        (ids,) = ids_of(roomy, images=images, text=question, max_length=fixed + 3)
    assert ids[-4:-1] == asked[:3]
    with pytest.raises(ValueError, match=rf"{fixed} tokens and leave none of {fixed} for the text"):
        roomy(images=images, text=question, max_length=fixed)
    with pytest.raises(ValueError, match=f"take {fixed} tokens; the limit is {fixed - 1}"):
        roomy(images=images, text=question, max_length=fixed - 1)


def test_a_text_that_is_cut_is_named_in_one_warning(processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    long = "Ngày xưa " + "a b c " * 600
    total = len(ids_of(processor, text=long, truncation=False)[0])
    ids_of(processor, text=["ngắn", long])
    (record,) = caplog.records
    assert f"Input 1 of a batch of 2 ('{long[:40]}'…): {total - 512} of {total} tokens" in record.message


# --- audio -------------------------------------------------------------------------------------------------------


def test_whole_numbers_of_an_unknown_range_are_refused() -> None:
    samples = (tone() * 2**15).astype(np.int64)
    for given in (
        samples,
        samples.tolist(),
        samples.astype(np.int32),
        samples.astype(np.uint32),
        samples.astype(bool),
    ):
        with pytest.raises(ValueError, match="whose full range is unknown. Pass floats in"):
            load_audio(given, RATE)
    expected = tone()
    for given in (samples.astype(np.int16), list(samples.astype(np.int16)), samples.astype(np.int32) * 2**16):
        np.testing.assert_allclose(load_audio(given, RATE)[0], expected, atol=1e-4)
    np.testing.assert_allclose(load_audio((tone() * 2**7).astype(np.int8), RATE)[0], expected, atol=0.01)
    assert not load_audio(np.zeros(800, np.int32), RATE)[0].any()
    with pytest.raises(ValueError, match="samples up to 1e.20; scale them"):
        load_audio(np.array([1e20, 0.0]), RATE)


def test_an_array_with_its_rate_is_one_clip(processor: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(audio_file(tone(), subtype="FLOAT"))
    samples, rate = soundfile.read(path)
    expected = np.asarray(processor(audio={"array": tone(), "sampling_rate": RATE})["audio_features"])
    for given in ((samples, rate), [samples, rate], (torch.from_numpy(samples), rate), (list(samples), rate)):
        np.testing.assert_allclose(processor(audio=given)["audio_features"], expected, atol=1e-6)
        np.testing.assert_allclose(processor(audio=[given])["audio_features"], expected, atol=1e-6)
    apart = [{"role": "user", "content": [{"type": "audio", "audio": samples}, {"type": "audio", "audio": rate}]}]
    batch = processor.apply_chat_template(apart, tokenize=True, return_dict=True)  # as sentence-transformers hands it
    np.testing.assert_allclose(batch["audio_features"], expected, atol=1e-6)


CODECS = {"m4a": ("mp4", "aac"), "aac": ("adts", "aac"), "mka": ("matroska", "aac"), "caf": ("caf", "alac")}


def encode(kind: str, samples: np.ndarray, with_video: bool = False) -> bytes:
    """An audio file, or a film, of a kind that libsndfile does not read."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    container, codec = CODECS[kind]
    with av.open(buffer, "w", format=container) as output:
        if with_video:
            video = output.add_stream("mpeg4", rate=5)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        stream = output.add_stream(codec, rate=RATE, layout="mono")
        if with_video:
            for _ in range(3):
                output.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
            output.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(stream.format.name, "mono", RATE, frame_size=stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", CODECS)
def test_what_libsndfile_does_not_know_is_read_with_pyav(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tone(1.0)
    data = encode(kind, samples)
    found, rate = load_audio(data)
    assert rate == RATE
    assert len(found) == pytest.approx(len(samples), abs=4096)  # a codec's delay and padding
    power = np.abs(np.fft.rfft(found, 2**15))
    assert power.argmax() == pytest.approx(0.2 / (2 * np.pi) * 2**15, abs=5)
    with pytest.raises(ValueError, match="more than 100 samples, the limit `audio_samples`"):
        load_audio(data, limits=Limits(audio_samples=100))
    monkeypatch.setattr("vipolyqwen.waveforms_vipolyqwen.is_av_available", lambda: False)
    with pytest.raises(ValueError, match="of the kind .*, which needs the av package: pip install av"):
        load_audio(data)


def test_the_audio_of_a_film_is_heard() -> None:
    found, rate = load_audio(encode("m4a", tone(1.0), with_video=True))
    assert rate == RATE
    assert np.abs(found).max() > 0.3


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.aac"
    secret.write_bytes(encode("aac", tone()))
    lists = [f"#EXTM3U\n#EXTINF:1,\n{secret}\n", f"ffconcat version 1.0\nfile '{secret}'\n"]
    for text in lists:
        with pytest.raises(ValueError, match="cannot be read"):
            load_audio(text.encode())


# --- limits ------------------------------------------------------------------------------------------------------


def wav_header(rate: int, channels: int = 1, samples: int = 800) -> bytes:
    data = bytes(2 * samples)
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * 2, 2**32 - 1), 2 * channels, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_of(frames: int) -> bytes:
    """A FLAC file whose header claims `frames` samples."""
    data = bytearray(audio_file(np.zeros(64, np.int16), format="FLAC"))
    place = data.index(b"fLaC") + 8 + 10
    packed = int.from_bytes(data[place : place + 8], "big")
    data[place : place + 8] = ((packed >> 36 << 36) | frames).to_bytes(8, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav_header(9_999_991), "sampling rate is 9999991; the limits are 1000 and 384000 Hz"),
        (wav_header(2**31 - 1), "sampling rate is 2147483647"),
        (wav_header(999), "sampling rate is 999"),
        (wav_header(RATE, channels=200), "200 channels; the limit `audio_channels` is 32|cannot be read"),
        (flac_of(2**35), "longer than 3600 s, the limit `audio_seconds`"),
        (flac_of(2**27), "cannot be read"),
    ],
)
def test_a_header_cannot_ask_for_time_or_memory(data: bytes, message: str, processor: Any) -> None:
    started = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        processor(audio=data)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("rate", [9_999_991, 2**31 - 1, 0, -RATE, 999, 16_000.5, "16000", True, float("nan"), None])
def test_a_rate_outside_the_limits_is_refused(rate: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="sampling rate"):
        processor(audio={"array": tone(), "sampling_rate": rate})


def test_pipes_folders_and_devices_are_refused(tmp_path: Path, processor: Any) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.wav").mkdir()
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path / "folder.wav"):
        for given in ({"images": [[path]]}, {"audio": path}, {"images": [[str(path)]]}, {"audio": str(path)}):
            with pytest.raises(ValueError, match="it is a folder, a pipe or a device; pass a regular file"):
                processor(**given)


def test_text_is_bounded_before_it_is_normalised(processor: Any) -> None:
    stacked = "a" + "\u0316\u0301" * 80_000
    started = time.monotonic()
    with pytest.raises(ValueError, match="160000 combining marks in a row; the limit `combining_marks` is 100"):
        processor(text=stacked)
    with pytest.raises(ValueError, match="1000001 characters; the limit `text_characters` is 1000000"):
        processor(text="a" * 1_000_001)
    assert time.monotonic() - started < 3
    zalgo = "a" + "\u0301" * 100
    assert len(ids_of(processor, text=zalgo)) == 1
    accented = unicodedata.normalize("NFD", "Đường phố Huế đẹp tuyệt, ữ ặ ỹ. " * 20)
    assert ids_of(processor, text=accented) == ids_of(processor, text=unicodedata.normalize("NFC", accented))


def test_files_and_parts_are_bounded(processor: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    other = copy.copy(processor)
    other.limits = {"file_bytes": 100, "input_parts": 2}
    data = image_file(random_image(rng))
    (tmp_path / "a.png").write_bytes(data)
    for given in (data, tmp_path / "a.png", base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match="the limit `file_bytes` is 100"):
            other(images=[[given]])
    grey = Image.new("RGB", (60, 48))
    with pytest.raises(ValueError, match="the limit `input_parts` is 2"):
        other(images=[[grey] * 3])
    with pytest.raises(ValueError, match="the limit `input_parts` is 2"):
        chat_ids(other, user(grey, "a", "b"))


def test_limits_are_settings_that_are_saved(processor: Any, tmp_path: Path) -> None:
    other = copy.copy(processor)
    other.limits = {"image_pixels": 5000}
    other.save_pretrained(tmp_path)
    assert ViPolyQwenProcessor.from_pretrained(tmp_path).limits == {"image_pixels": 5000}
    for limits, message in (
        ({"pixels": 5}, "'pixels'; it may have text_characters"),
        ({"image_pixels": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ViPolyQwenProcessor.from_pretrained(tmp_path, limits=limits)


# --- what is no input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs", [{"images": [None]}, {"images": [[]]}, {"images": []}, {"audio": [None]}, {"text": []}, {"audio": []}]
)
def test_a_vector_of_nothing_is_an_error(inputs: dict, processor: Any) -> None:
    with pytest.raises(ValueError, match="nothing to embed|batch is empty"):
        processor(**inputs)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "batch is empty"),
        ([[]], "nothing to embed"),
        ([{"role": "user", "content": []}], "nothing to embed"),
        ([{"role": "system", "content": "<ocr>"}], "nothing to embed"),
        ([{"content": "a"}], "Message 0 has the role None; pass a string"),
        ([{"role": "user"}], "Message 0 has the content None; pass a string or a list of parts"),
        ([{"role": "user", "content": 5}], "content 5"),
        ([{"role": 5, "content": "a"}], "role 5"),
        ([{"role": "user", "content": ["a"]}], "message part is a str, 'a'; pass a dict"),
        ([{"role": "user", "content": [["a"]]}], "message part is a list"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "a"}]}], r"type \['text'\]"),
        ([{"role": "user", "content": [{"type": "image", "image": None}]}], "image part whose image is None"),
        ([{"role": "user", "content": [{"type": "audio", "audio": None}]}], "audio part whose audio is None"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "content {'type'"),
        (["a"], "Message 0 is a str, 'a'"),
        ([[["a"]]], "Message 0 is a list"),
        ([5], "Message 0 is a int"),
        ([[5], {"role": "user", "content": "a"}], "Entry 1 is a message beside conversations"),
        ("a", "conversation is a str"),
        (None, "conversation is a NoneType"),
        (5, "conversation is a int"),
    ],
)
def test_a_message_of_the_wrong_shape_is_a_value_error(conversation: Any, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


def test_an_error_names_the_input_of_a_batch_and_its_file(processor: Any, rng: Any, tmp_path: Path) -> None:
    (tmp_path / "kém.png").write_bytes(image_file(random_image(rng))[:100])
    (tmp_path / "kém.wav").write_bytes(audio_file(tone())[:100])
    for key in ("png", "wav"):
        path = str(tmp_path / f"kém.{key}")
        inputs = {"images": [None, [path]]} if key == "png" else {"audio": [None, path]}
        with pytest.raises(ValueError, match=rf"Input 1 of a batch of 2: .*kém\.{key}' cannot be read"):
            processor(text=["a", "b"], **inputs)
    with pytest.raises(ValueError, match=r"Input 1 of a batch of 2: .*type 'video'"):
        chat_ids(processor, user("a"), [{"role": "user", "content": [{"type": "video", "video": "x"}]}])


def test_the_order_of_parts_is_defined_unless_a_message_gives_it(processor: Any, rng: np.random.Generator) -> None:
    image, text, audio = random_image(rng), "ghi gì?", random_audio(rng, 0.2)
    defined = chat_ids(processor, user(image, text))
    assert chat_ids(processor, user(text, image)) == defined
    assert chat_ids(processor, user(text, audio, image)) == defined
    assert chat_ids(processor, user(text, image, system="<ocr>")) == chat_ids(
        processor, user(image, text, system="<ocr>")
    )
    kept = [{**user(text, image)[0], "keep_order": True}]
    assert chat_ids(processor, kept) != defined
    two = [*user(text), *user(image)]
    assert chat_ids(processor, two) == chat_ids(processor, kept)
    assert chat_ids(processor, user(text, image, text)) != chat_ids(processor, user(image, text, text))
    for conversation in (user(text, image), kept):
        string = processor.apply_chat_template(conversation, tokenize=False)
        assert (string.index(text) > string.index("<|image_pad|>")) == (conversation is not kept)


def test_a_sentence_is_not_a_path(tmp_path: Path) -> None:
    for text in ("如何打开.webp", "IMG_1234.jpg", "setup.mp4", "x" * 5000 + "/a.png", "một\ndòng/a.png", "a\0/b.png?"):
        check_is_text(text)
    (tmp_path / "scan.pdf").write_bytes(b"%PDF")
    for path in (
        tmp_path / "scan.pdf",
        "a/ảnh 1.svg",
        "a/x.jp2",
        "a/x.jfif",
        "a\\x.tif",
        "data:audio/wav;base64,UklGRg==",
    ):
        with pytest.raises(ValueError, match="Pass"):
            check_is_text(str(path))


# --- threads -----------------------------------------------------------------------------------------------------


def test_a_thread_that_uses_the_tokenizer_changes_no_vector(processor: Any, rng: np.random.Generator) -> None:
    texts = ["Huế <ocr> <|image_pad|>", "Hà Nội, Đà Nẵng. " * 5, "x<|im_start|>y"]
    image = random_image(rng)
    expected = [ids_of(processor, text=text, images=[image]) for text in texts]
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            processor.tokenizer(texts, padding="max_length", truncation=True, max_length=7)
            processor.tokenizer(texts, split_special_tokens=True)

    different: list[int] = []

    def encode() -> None:
        for number in range(50):
            place = number % len(texts)
            if ids_of(processor, text=texts[place], images=[image]) != expected[place]:
                different.append(number)

    threads = [threading.Thread(target=encode) for _ in range(4)]
    other = threading.Thread(target=disturb)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert different == []
