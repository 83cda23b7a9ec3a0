"""Files and arguments as people have them: odd headers are read, truncated or ambiguous ones refused by name."""

import io
import os
import shutil
import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import chat_ids, ids_of, random_image, save_tiny_model, user
from PIL import Image
from transformers import AutoModel, AutoProcessor

from vipolyqwen.images_vipolyqwen import load_image
from vipolyqwen.media_vipolyqwen import Limits, check_is_text
from vipolyqwen.waveforms_vipolyqwen import MOST_STEPS, load_audio, ratio_of_rates, resample

RATE = 16_000
TONE = (0.5 * np.sin(np.arange(RATE // 4) * 0.2)).astype(np.float32)


def image_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def audio_file(kind: str = "WAV", **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, RATE, format=kind, **options)
    return buffer.getvalue()


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage"])
def test_damaged_exif_data_leaves_the_pixels(exif: bytes, rng: np.random.Generator) -> None:
    image = random_image(rng)
    np.testing.assert_array_equal(np.asarray(load_image(image_file(image, exif=exif))), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int, rng: np.random.Generator) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(random_image(rng, 60, 48))
    # how a camera stores it: which sides of the scene the first row and the first column are (EXIF 2.3, table 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    given = image_file(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(given)), upright)


def grey_png(pixels: np.ndarray, transparent: int) -> bytes:
    """A PNG of 16-bit grey with one transparent grey, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in [*chunks, (b"IEND", b"")])


def test_transparency_of_sixteen_bits_is_laid_on_white() -> None:
    pixels = np.full((48, 60), 60_000, np.uint16)
    pixels[:10], pixels[10:20] = 0, 1  # 1 is opaque, though its upper 8 bits are those of 0
    seen = np.asarray(load_image(grey_png(pixels, transparent=0)))
    assert [int(seen[row, 0, 0]) for row in (0, 10, 20)] == [255, 0, 60_000 >> 8]


def png(depth: int, kind: int, rows: list[bytes], transparent: bytes, width: int) -> bytes:
    """A PNG with a transparent colour, written by hand: Pillow writes none of these."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(("depth", "value"), [(2, 1), (2, 2), (4, 1), (4, 7), (4, 15)])
def test_a_transparent_grey_of_few_bits_is_laid_on_white(depth: int, value: int) -> None:
    ground = int(f"{value:0{depth}b}" * (8 // depth), 2)
    seen = np.asarray(
        load_image(png(depth, 0, [bytes([ground] * 8), bytes(8)], struct.pack(">H", value), 64 // depth))
    )
    assert (seen[0] == 255).all() and (seen[1] == 0).all()


def test_a_transparent_colour_of_sixteen_bits_is_laid_on_white() -> None:
    rows = [struct.pack(">HHH", 256, 512, 1000) * 8, struct.pack(">HHH", 2**15, 0, 0) * 8]
    seen = np.asarray(load_image(png(16, 2, rows, struct.pack(">HHH", 256, 512, 1000), 8)))
    assert (seen[0] == 255).all() and seen[1, 0].tolist() == [128, 0, 0]


def test_a_transparent_image_is_laid_on_white_in_strips(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    pixels = rng.integers(0, 256, (50, 40, 4), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels).quantize(16), Image.fromarray(pixels).convert("LA")]
    whole = [np.asarray(load_image(image)) for image in images]
    monkeypatch.setattr("vipolyqwen.images_vipolyqwen.STRIP", 120)
    for image, expected in zip(images, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(load_image(image)), expected)
    alpha = pixels[..., 3:] / 255
    np.testing.assert_allclose(whole[0], pixels[..., :3] * alpha + 255 * (1 - alpha), atol=1.5)


def test_eight_bits_in_sixteen_are_not_all_black(rng: np.random.Generator) -> None:
    eight = rng.integers(0, 256, (48, 60), dtype=np.uint8)
    sixteen = load_image(image_file(Image.fromarray(eight.astype(np.uint16))))
    np.testing.assert_array_equal(np.asarray(sixteen), np.asarray(load_image(eight)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
def test_an_array_of_zeros_and_ones_is_ambiguous(dtype: type, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="0 … 1 and would be divided by 255 again; multiply"):
        load_image(rng.integers(0, 2, (48, 60)).astype(dtype))


def test_open_files_and_file_urls_are_read(processor: Any, rng: np.random.Generator, tmp_path: Path) -> None:
    image = random_image(rng)
    for name, data in (("một ảnh #1.png", image_file(image)), ("tiếng 1.wav", audio_file(subtype="FLOAT"))):
        path = tmp_path / name
        path.write_bytes(data)
        load = load_image if name.endswith("png") else lambda source: load_audio(source)[0]
        buffer = io.BytesIO(data)
        with path.open("rb") as file:
            for source in (file, file, buffer, buffer, path.as_uri(), path.as_uri().replace("//", "//localhost", 1)):
                np.testing.assert_array_equal(np.asarray(load(source)), np.asarray(load(path)))
        with path.open(encoding="latin-1") as text, pytest.raises(ValueError, match="'rb'"):
            load(text)
    for name in ("một ảnh #1.png", "missing.png"):
        with pytest.raises(ValueError, match="looks like the path"):
            check_is_text((tmp_path / name).as_uri())


# --- audio -------------------------------------------------------------------------------------------------------

STATED = ["WAV", "WAVEX", "AIFF", "AU", "CAF", "RF64", "W64", "NIST", "FLAC", "MP3"]


@pytest.mark.parametrize("kind", STATED)
def test_a_truncated_file_is_refused_in_every_format_that_states_its_length(kind: str) -> None:
    data = audio_file(kind)
    assert len(load_audio(data)[0]) == pytest.approx(len(TONE), rel=0.6)  # MP3 pads
    with pytest.raises(ValueError, match="truncated|lost sync"):
        load_audio(data[: len(data) // 2])


def test_a_film_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream("aac", rate=RATE, layout="mono")
        for start in range(0, 4 * RATE, 1024):
            noise = np.random.default_rng(start).uniform(-0.5, 0.5, (1, 1024)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    data = Path(path).read_bytes()
    assert len(load_audio(data)[0]) == pytest.approx(4 * RATE, rel=0.05)
    with pytest.raises(ValueError, match="truncated: .* of 4.* s|cannot be read"):
        load_audio(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("riff", "samples"),
    [(len(audio_file()), None), (0, None), (2**32 - 1, 2**32 - 1), (2**31 - 4060, 2**31 - 4096), (None, 2**32 - 1)],
)
def test_sizes_that_careless_and_streaming_writers_state_are_no_truncation(riff: Any, samples: Any) -> None:
    data = bytearray(audio_file())
    for place, size in ((4, riff), (40, samples)):
        if size is not None:
            data[place : place + 4] = struct.pack("<I", size)
    np.testing.assert_allclose(load_audio(bytes(data))[0], TONE, atol=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "DOUBLE", "ULAW"])
def test_every_width_of_pcm_is_the_same_audio(subtype: str) -> None:
    found, _ = load_audio(audio_file(subtype=subtype))
    assert np.abs(found[: len(TONE)] - TONE).max() < 0.03


def test_other_formats_of_libsndfile_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is of the format XI; convert it to one of AIFF"):
        load_audio(audio_file("XI", subtype="DPCM_16"))
    with pytest.raises(ValueError, match="<11 bytes> cannot be read: Format not recognised"):
        load_audio(b"not a sound")


@pytest.mark.parametrize("rate", [383_987, 383_999, 299_993, 50_021])
def test_an_odd_rate_needs_no_long_filter(rate: int) -> None:
    ratio = ratio_of_rates(RATE, rate)
    assert max(ratio.as_integer_ratio()) <= MOST_STEPS
    assert abs(float(ratio) * rate / RATE - 1) < 1.2e-5
    heard = resample(np.sin(np.arange(rate // 4) * 2 * np.pi * 440 / rate).astype(np.float32), rate, RATE)
    expected = np.sin(np.arange(RATE // 4) * 2 * np.pi * 440 / RATE)
    assert np.abs(heard[100:3800] - expected[100:3800]).max() < 0.02


@pytest.mark.parametrize(
    "rate", [7_350, 8_000, 11_025, 22_050, 22_255, 44_056, 44_100, 47_999, 48_000, 96_000, 384_000]
)
def test_usual_rates_are_exact(rate: int) -> None:
    assert ratio_of_rates(RATE, rate) == Fraction(RATE, rate)


@pytest.mark.parametrize(
    "samples",
    [torch.from_numpy(TONE.copy()).to_sparse(), torch.zeros(500, device="meta"), torch.zeros(500, dtype=torch.bool)],
)
def test_tensors_without_plain_numbers_are_a_value_error(samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="audio"):
        load_audio({"array": samples, "sampling_rate": RATE})


def test_a_rate_stands_before_or_after_its_array() -> None:
    for given in ((RATE, TONE), (TONE, RATE), [RATE, TONE.tolist()], (TONE, float(RATE)), (TONE, np.int32(RATE))):
        found, rate = load_audio(given)
        assert rate == RATE
        np.testing.assert_array_equal(found, TONE)
    for shape in ((0, 5), (5, 0), (0,), (1, 0)):
        with pytest.raises(ValueError, match="empty: 0 samples"):
            load_audio(np.zeros(shape), RATE)
    with pytest.raises(ValueError, match="sampling rate is 1000000"):
        load_audio({"array": TONE, "sampling_rate": 10**400})


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "a.png"}, "no argument `image`, .* `images`"),
        ({"texts": ["a"]}, "no argument `texts`, .* `text`"),
        ({"sampling_rates": 8000}, "no argument `sampling_rates`, .* `sampling_rate`"),
        ({"text_kwargs": {"max_len": 5}}, "no argument `max_len` of `text_kwargs`"),
        ({"images_kwargs": {"max_pixel": 5}}, "no argument `max_pixel` of `images_kwargs`, .* `max_pixels`"),
        ({"common_kwargs": {"padding": True}}, "no argument `padding` of `common_kwargs`"),
        ({"audio_kwargs": 5}, "`audio_kwargs` is 5; pass a dict"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(given: dict, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        processor(text="a", **given)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(user("a"), tokenize=True, return_dict=True, **given)


@pytest.mark.parametrize("task", [5, [5], [["ocr"]], {"ocr": 1}, "", "OCR", "<ocr>", b"ocr", ["ocr", "ocr"]])
def test_a_task_that_is_no_name_is_a_value_error(task: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="task"):
        processor(text=["a"], task=task)


def test_a_text_beside_other_parts_is_a_text(processor: Any, rng: np.random.Generator) -> None:
    image, text = random_image(rng), "thư mục/không có.png"
    assert chat_ids(processor, user(image, text)) == ids_of(processor, text=text, images=[image])
    with pytest.raises(ValueError, match="plain_text"):
        chat_ids(processor, user(text))
    check_is_text("Xem ảnh tại https://example.org/a/b.png")
    with pytest.raises(ValueError, match="plain_text"):
        check_is_text("ảnh sản phẩm/áo thun.png")


@pytest.mark.parametrize(
    "path",
    [
        "a.hif",
        "b.ppm",
        "b.ico",
        "b.doc",
        "b.odt",
        "b.epub",
        "b.au",
        "b.wv",
        "b.3g2",
        "b.aifc",
        "b.eps",
        "b.apng",
        "b.CR2",
    ],
)
def test_an_existing_file_of_any_media_ending_is_no_text(path: str, tmp_path: Path) -> None:
    place = tmp_path / path
    for given in (str(place), f"thư mục/{path}", f"thư mục\\{path}\n", f" {place} "):
        place.write_bytes(b"")
        with pytest.raises(ValueError, match=r"looks like the path of .*plain_text"):
            check_is_text(given)


def test_lines_of_a_list_of_files_and_addresses_with_a_query_are_no_texts(tmp_path: Path) -> None:
    photo = tmp_path / "ảnh 1.png"
    photo.write_bytes(b"")
    lines = [f"{photo}\n", f"{photo}\r\n", f" {photo}", "a/b.png\n"]
    addresses = [
        "https://x.org/a.avif?w=200",
        "https://x.org/a.opus#t=3",
        "HTTPS://X.org/A.PNG",
        "http://x.org/ả b.png",
    ]
    for given in (*lines, *addresses):
        with pytest.raises(ValueError, match="plain_text"):
            check_is_text(given)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="plain_text"):
        check_is_text(str(tmp_path / "pipe.png"))


def test_addresses_of_pages_and_code_are_texts() -> None:
    for text in ("https://www.abc.net.au", "https://x.mov", "src/main.ts", "docs/readme.md", "https://x.org/?q=a.b/c"):
        check_is_text(text)
    check_is_text("https://x.org/a.avif? Có phải ảnh này không")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": "a.png", "text": "a"}, "type image also has text, which would be ignored"),
        ({"type": "text", "text": "a", "image": "a.png"}, "type text also has image, which would be ignored"),
        ({"type": "image", "image": "a.png", "url": "b.png"}, "has image and url; pass one"),
        ({"type": "audio", "audio": None, "path": None}, "audio part whose audio is None"),
    ],
)
def test_nothing_in_a_part_is_ignored(part: dict, message: str, processor: Any) -> None:
    with pytest.raises(ValueError, match=message):
        chat_ids(processor, [{"role": "user", "content": [part]}])


def test_a_part_as_arrow_stores_it_has_empty_fields(processor: Any, rng: np.random.Generator) -> None:
    data = image_file(random_image(rng))
    expected = chat_ids(processor, user("a", Image.open(io.BytesIO(data))))
    image = {"type": "image", "image": None, "text": None, "path": "elsewhere.png", "bytes": data}
    text = {"type": "text", "image": None, "text": "a", "path": None, "bytes": None}
    assert chat_ids(processor, [{"role": "user", "content": [image, text]}]) == expected


def test_a_second_folder_of_the_same_name_runs_its_code(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "a" / "model")
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "b" / "model")
    for name in ("a", "b"):
        for file in ("modeling", "processing"):
            with (tmp_path / name / "model" / f"{file}_vipolyqwen.py").open("a", encoding="utf-8") as lines:
                lines.write(f"\nMARK = {name!r}\n")
    for name in ("a", "b", "a"):
        for auto in (AutoModel, AutoProcessor):
            loaded = auto.from_pretrained(tmp_path / name / "model", trust_remote_code=True)
            assert sys.modules[type(loaded).__module__].MARK == name


def test_a_jpeg_of_very_many_scans_is_refused_before_they_are_decoded(rng: np.random.Generator) -> None:
    data = image_file(random_image(rng), "JPEG", progressive=True)  # a scan takes a pass over all pixels
    start = data.index(b"\xff\xda")

    def repeated(times: int) -> bytes:
        return data[:start] + data[start:-2] * times + b"\xff\xd9"

    for times in (1, 5):
        assert load_image(repeated(times)).size == (60, 48)
    with pytest.raises(ValueError, match="more than 100 scans"):
        load_image(repeated(20))
    with pytest.raises(ValueError, match="more than 22 scans"):
        load_image(repeated(3), limits=Limits(image_pixels=60 * 48 * 11 // 10))
    thumbnail = b"\xff\xe1" + (2 + 400).to_bytes(2) + b"\xff\xda" * 200  # bytes of a scan outside of one
    load_image(data[:2] + thumbnail + data[2:])


def test_channels_that_cancel_each_other_are_no_silence(rng: np.random.Generator) -> None:
    inverted = np.stack([TONE, -TONE], axis=1)
    file = io.BytesIO()
    soundfile.write(file, inverted, RATE, format="WAV", subtype="FLOAT")
    for source in (file.getvalue(), (inverted, RATE), (inverted.T, RATE), ((inverted * 32767).astype(np.int16), RATE)):
        with pytest.raises(ValueError, match="cancel each other.*pass one of the channels"):
            load_audio(source)
    noise = rng.uniform(-0.5, 0.5, inverted.shape).astype(np.float32)
    for channels in (noise, inverted * [1, 0.5], inverted * [1, 0], np.zeros_like(inverted)):
        mixed, _ = load_audio((channels, RATE))
        np.testing.assert_allclose(mixed, channels.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(("extra", "is_transparent"), [(0, False), (1, True), (2, True), (None, True)])
def test_only_an_unspecified_fourth_channel_of_a_tiff_is_no_transparency(
    extra: int | None, is_transparent: bool
) -> None:
    options = {} if extra is None else {338: (3, extra)}
    pixels = np.zeros((48, 60, 4), np.uint8)  # black, of which the fourth channel would make white
    tags = {256: (4, 60), 257: (4, 48), 258: (3, 8), 259: (3, 1), 262: (3, 2), 277: (3, 4), 278: (4, 48), **options}
    tags |= {273: (4, 10 + 12 * (len(tags) + 2) + 4), 279: (4, pixels.size)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels.tobytes()
    assert (np.asarray(load_image(file)) == (255 if is_transparent else 0)).all()


def test_an_mp3_whose_end_is_empty_is_not_half_heard() -> None:
    file = io.BytesIO()
    soundfile.write(file, np.tile(TONE, 4), RATE, format="MP3")  # 1 s
    whole = file.getvalue()
    assert len(load_audio(whole)[0]) == len(load_audio(whole + whole)[0]) == len(TONE) * 4
    for filler in (b"\0", b"\xff"):  # as a download leaves it that reserves its bytes and stops
        with pytest.raises(ValueError, match=r"truncated: \d+ of 16000 samples"):
            load_audio(whole[: len(whole) * 3 // 4] + filler * (len(whole) - len(whole) * 3 // 4))
