"""Bad input and its outcome: a named error, or a row that is skipped and counted; never a hang."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from helpers import random_image
from PIL import Image

from vipolyqwen.data.checks import TokenRoom
from vipolyqwen.data.schema import RowError, declare_tasks
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.images_vipolyqwen import load_image

GOOD = {"task": "instr", "a": "x", "b": "y"}
MEDIA = {"task": "vqa_single", "a": "x", "b": "y"}
HEARD = {"task": "audio", "b": "y"}
SCORED = {"task": "text_pair", "a": "x", "b": "y", "score": 0.5}
TASKS = declare_tasks(None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(width: int, height: int) -> bytes:
    """Returns a PNG file of this size without its pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder with media of many kinds, good and bad."""
    inside = tmp_path / "media"
    (inside / "folder.png").mkdir(parents=True)
    image = random_image(rng)
    for place in (tmp_path, inside):
        image.save(place / "good.png")
    (inside / "link.png").symlink_to(tmp_path / "good.png")
    (inside / "inner.png").symlink_to(inside / "good.png")
    content = (inside / "good.png").read_bytes()
    files = {
        "empty.png": b"",
        "text.png": b"no image",
        "half.png": content[: len(content) // 2],
        "huge.png": png(20_000, 20_000),
        "thin.png": png(20_000, 50),
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "empty.wav": b"",
        "text.wav": b"no audio",
    }
    for name, written in files.items():
        (inside / name).write_bytes(written)
    image.save(inside / "pages.tif", save_all=True, append_images=[image])
    samples = rng.uniform(-0.5, 0.5, 4000)
    soundfile.write(inside / "good.wav", samples, 8000)
    wav = (inside / "good.wav").read_bytes()
    (inside / "half.wav").write_bytes(wav[:4000])
    size = wav.index(b"data") + 4
    (inside / "lies.wav").write_bytes(wav[:size] + struct.pack("<I", 10**6) + wav[size + 4 :])
    soundfile.write(inside / "none.wav", np.zeros(0), 8000)
    soundfile.write(inside / "short.wav", np.zeros(99), 8000)
    soundfile.write(inside / "long.wav", np.zeros(8 * 8001), 8000)
    soundfile.write(inside / "nan.wav", np.array([0.1] * 800 + [np.nan]), 8000, subtype="FLOAT")
    soundfile.write(inside / "loud.wav", np.array([0.1] * 800 + [1e30]), 8000, subtype="FLOAT")
    return tmp_path


def load(path: Path, on_bad_row: str = "error", room: TokenRoom | None = None, **config: Any) -> PairDataset:
    source = {"path": str(path), "media_root": str(path.parent / "media"), **config}
    return load_pairs([source], TASKS, 400, "full", (), 8.0, room, on_bad_row, 0.5)


ROWS: list[tuple[str, dict | bytes, str, str]] = [
    ("truncated line", b'{"a": "x", "b": ', "invalid JSON", "invalid JSON"),
    ("array", b"[1]", "is not a JSON object", "invalid JSON"),
    ("number", b"7", "is not a JSON object", "invalid JSON"),
    ("nested too deeply", b"[" * 100_000, "invalid JSON", "invalid JSON"),
    ("two objects", b"{} {}", "invalid JSON", "invalid JSON"),
    ("invalid UTF-8", b'{"task": "instr", "a": "\xff", "b": "y"}', "'a' is .*lone surrogate .*UTF-8", "invalid a"),
    ("lone surrogate", {**GOOD, "b": "\ud800"}, "'b' .*lone surrogate at position 0", "invalid b"),
    ("empty object", {}, "'task' is '': the task is unknown", "invalid task"),
    ("number as text", {**GOOD, "a": 3}, "'a' is 3: a text is expected, not int", "invalid a"),
    ("truth as text", {**GOOD, "a": True}, "'a' is True: a text is expected", "invalid a"),
    ("list as text", {**GOOD, "b": ["x"]}, "not list; choose with `lists: {b: all}`", "invalid b"),
    ("object as text", {**GOOD, "b": {"x": "y"}}, "a text is expected, not dict", "invalid b"),
    ("both sides empty", {**GOOD, "a": "", "b": None}, "side a and side b are both empty", "invalid a"),
    ("blank side", {**GOOD, "b": " \n"}, "side b has no text, image or audio", "invalid b"),
    ("text beyond the limit", {**GOOD, "a": "x" * 1_000_001}, "the limit `text_characters` is 1000000", "invalid a"),
    ("stacked accents", {**GOOD, "b": "a" + "\u0301" * 500}, "500 combining marks in a row; the limit", "invalid b"),
    ("unknown task", {**GOOD, "task": "sts"}, "'task' is 'sts': the task is unknown", "invalid task"),
    ("word as score", {**SCORED, "score": "high"}, "'score' is 'high': a number in", "invalid score"),
    ("score above 1", {**SCORED, "score": 1.5}, "'score' is 1.5: a score is in", "invalid score"),
    ("NaN as score", {**SCORED, "score": float("nan")}, "'score' is nan: a score is in", "invalid score"),
    ("infinite score", {**SCORED, "score": float("inf")}, "'score' is inf: a score is in", "invalid score"),
    ("no score", {**SCORED, "score": None}, "'score' is None: text_pair needs a score", "invalid score"),
    ("list as group", {**GOOD, "group": ["x"]}, "'group' is .*a group is a text or a number", "invalid group"),
    ("negative like b", {**GOOD, "negatives": ["y"]}, "a negative is empty or equals side b", "invalid negatives"),
    ("number as negative", {**GOOD, "negatives": [7]}, "'negatives' is 7: a text is expected", "invalid negatives"),
    ("key of a negative", {**GOOD, "negatives": [{"x": "y"}]}, "unknown keys", "invalid negatives"),
    ("marks", {**MEDIA, "a": "<image>", "images": ["good.png"] * 2}, "1 placeholders <image> for 2 im", "invalid a"),
    ("no image", {**MEDIA, "images": None}, "vqa_single needs an image on side a", "invalid images_a"),
    ("missing image", {**MEDIA, "images": "gone.png"}, "gone.png': no such file", "missing images_a"),
    ("folder as image", {**MEDIA, "images": "folder.png"}, "is a folder; name a file", "missing images_a"),
    ("address as image", {**MEDIA, "images": "https://x.org/x.png"}, "URLs are not fetched", "URL in images_a"),
    ("NUL in a path", {**MEDIA, "images": "x\0.png"}, "no such file", "missing images_a"),
    ("path too long", {**MEDIA, "images": "x" * 9999}, "no such file", "missing images_a"),
    ("number as image", {**MEDIA, "images": [3]}, "a path or the bytes of a file", "invalid images_a"),
    ("blank image", {**MEDIA, "images": [""]}, "a path or the bytes of a file", "invalid images_a"),
    ("0-byte image", {**MEDIA, "images": "empty.png"}, "empty.png' cannot be read", "unreadable images_a"),
    ("text as image", {**MEDIA, "images": "text.png"}, "text.png' cannot be read", "unreadable images_a"),
    ("SVG", {**MEDIA, "images": "vector.png"}, "vector.png' cannot be read", "unreadable images_a"),
    ("PostScript", {**MEDIA, "images": "script.png"}, "script.png' cannot be read", "unreadable images_a"),
    ("half an image", {**MEDIA, "images": "half.png"}, "half.png' cannot be read", "unreadable images_a"),
    ("20,000 pixels", {**MEDIA, "images": "huge.png"}, "400000000 pixels. exceeds", "unreadable images_a"),
    ("thin image", {**MEDIA, "images": "thin.png"}, "aspect ratio up to 200", "unreadable images_a"),
    ("pages", {**MEDIA, "images": "pages.tif"}, "it has 2 pages", "unreadable images_a"),
    ("path with ..", {**MEDIA, "images": "../good.png"}, "leads out of `media_root`", "images_a outside media_root"),
    ("link outside", {**MEDIA, "images": "link.png"}, "leads out of `media_root`", "images_a outside media_root"),
    ("image b missing", {**GOOD, "images_b": "gone.png"}, "'images_b' is '.*no such file", "missing images_b"),
    ("image b outside", {**GOOD, "images_b": "../good.png"}, "leads out", "images_b outside media_root"),
    ("negative missing", {**GOOD, "negative_images": ["gone.png"]}, "'negatives' is '.*no such", "missing negatives"),
    ("no audio", {**HEARD, "audio": None, "a": "x"}, "audio needs audio on side a", "invalid audio_a"),
    ("missing audio", {**HEARD, "audio": "gone.wav"}, "gone.wav': no such file", "missing audio_a"),
    ("audio outside", {**HEARD, "audio": "../good.png"}, "leads out of `media_root`", "audio_a outside media_root"),
    ("0-byte audio", {**HEARD, "audio": "empty.wav"}, "empty.wav' cannot be read", "unreadable audio_a"),
    ("text as audio", {**HEARD, "audio": "text.wav"}, "text.wav' cannot be read", "unreadable audio_a"),
    ("half a recording", {**HEARD, "audio": "half.wav"}, "the file is truncated", "unreadable audio_a"),
    ("header that lies", {**HEARD, "audio": "lies.wav"}, "the file is truncated", "unreadable audio_a"),
    ("no samples", {**HEARD, "audio": "none.wav"}, "the audio has 0 samples", "too short audio_a"),
    ("short audio", {**HEARD, "audio": "short.wav"}, "speech encoder needs at least 400", "too short audio_a"),
    ("long audio", {**HEARD, "audio": "long.wav"}, "the limit is 8 s", "too long audio_a"),
    ("NaN samples", {**HEARD, "audio": "nan.wav"}, "1 NaN or infinite samples", "unreadable audio_a"),
    ("loud samples", {**HEARD, "audio": "loud.wav"}, "samples up to 1e", "unreadable audio_a"),
    ("long audio b", {**GOOD, "audio_b": "long.wav"}, "'audio_b' is .*the limit is 8 s", "too long audio_b"),
    ("number as audio", {**HEARD, "audio": 3}, "a path or the bytes of a file", "invalid audio_a"),
    ("samples alone", {**HEARD, "audio": [0.1] * 900}, "an array without a sampling rate", "invalid audio_a"),
    ("integers", {**HEARD, "audio": {"array": [1, 2], "sampling_rate": 8000}}, "integer samples", "invalid audio_a"),
    ("rate of 0", {**HEARD, "audio": {"array": [0.1], "sampling_rate": 0}}, "sampling rate is 0", "invalid audio_a"),
    (
        "NaN in an array",
        {**HEARD, "audio": {"array": [float("nan")], "sampling_rate": 8000}},
        "NaN",
        "invalid audio_a",
    ),
    ("NaN vector", {**GOOD, "teacher_a": [float("nan")]}, "is not a finite float32", "invalid teacher_a"),
    ("vector of 0", {**GOOD, "teacher_b": [0.0]}, "the vector is 0", "invalid teacher_b"),
    ("text as vector", {**GOOD, "teacher_b": "x"}, "a list of numbers", "invalid teacher_b"),
]


@pytest.mark.parametrize(("row", "message", "cause"), [case[1:] for case in ROWS], ids=[case[0] for case in ROWS])
def test_a_bad_row_is_named_or_skipped_and_counted(folder: Path, row: dict | bytes, message: str, cause: str) -> None:
    lines = [json.dumps({**GOOD, "id": "1"}).encode(), b"", json.dumps({**GOOD, "id": "3"}).encode()]
    lines[1] = row if isinstance(row, bytes) else json.dumps(row).encode()
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(RowError, match=rf"(?s)^{folder}/a.jsonl, (row|line) 2.*{message}"):
        load(folder / "a.jsonl")
    pairs = load(folder / "a.jsonl", "skip")
    assert [row["id"] for row in pairs] == ["1", "3"]
    assert [(bad.row, bad.cause) for bad in pairs.bad_rows] == [(2, cause)]
    with pytest.raises(RowError, match=rf"(?s)^{folder}/a.jsonl, (row|line) 2.*{message}"):
        load(folder / "a.jsonl")  # also when the rows are in the cache


def test_an_absolute_path_is_refused_outside_media_root_alone(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_text(json.dumps({**MEDIA, "images": str(folder / "good.png")}))
    with pytest.raises(RowError, match="leads out of `media_root`.*`outside_media_root: true`"):
        load(path)
    assert len(load(path, outside_media_root=True)) == 1
    for name in (str(folder / "media" / "good.png"), "inner.png", "folder.png/../good.png"):
        path.write_text(json.dumps({**MEDIA, "images": name}))
        assert len(load(path)) == 1


def test_images_that_leave_no_room_for_tokens_are_named(folder: Path, tiny: tuple) -> None:
    room = TokenRoom(tiny[1])
    (folder / "a.jsonl").write_text(json.dumps({**MEDIA, "images": ["good.png"] * (room.limit // 3 + 1)}))
    with pytest.raises(RowError, match=f"images, prefix and end take .* tokens .*limit `max_length` is {room.limit}"):
        load(folder / "a.jsonl", room=room)
    assert len(load(folder / "a.jsonl")) == 1


def save_image(mode: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, (60, 40)).save(path, **options)


def save_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    Image.new("RGB", (60, 40)).save(path, exif=exif)


def save_animated(path: Path) -> None:
    Image.new("RGB", (60, 40)).save(path, save_all=True, append_images=[Image.new("RGB", (60, 40), "red")])


@pytest.mark.parametrize(
    ("name", "save", "size"),
    [
        ("cmyk.jpg", save_image("CMYK"), (60, 40)),
        ("deep.png", save_image("I;16"), (60, 40)),
        ("grey.png", save_image("LA"), (60, 40)),
        ("bits.png", save_image("1"), (60, 40)),
        ("palette.gif", save_image("P"), (60, 40)),
        ("clear.webp", save_image("RGBA"), (60, 40)),
        ("rotated.jpg", save_rotated, (40, 60)),
        ("animated.gif", save_animated, (60, 40)),
    ],
)
def test_images_of_other_kinds_are_read_as_upright_rgb(folder: Path, name: str, save: Callable, size: tuple) -> None:
    save(folder / "media" / name)
    (folder / "a.jsonl").write_text(json.dumps({**MEDIA, "images": name}))
    image = load(folder / "a.jsonl")[0]["images_a"][0]
    assert (image.mode, image.size) == ("RGB", size)
    again = load_image(image)  # as the processor does with what a reader has decoded
    assert again.size == size and np.array_equal(np.asarray(again), np.asarray(image))


FILES: list[tuple[str, str, bytes, str]] = [
    ("JSON array cut off", "a.json", b'[{"a": "x"', "invalid JSON"),
    ("no rows", "a.jsonl", b"\n\n", "has no rows"),
    ("header alone", "a.csv", b"a,b\n", "has no rows"),
    ("empty array", "a.json", b"[]", "has no rows"),
    ("quote never closed", "a.csv", b'a,b\nx,"y\nx,y\n', "invalid CSV: unexpected end of data.*`quotes: false`"),
    ("cell too many", "a.csv", b"a,b\nx,y,z\n", "line 2: invalid CSV: .*beyond the last column"),
    ("columns of one name", "a.csv", b"a,a,b\nx,y,z\n", r"the columns \['a'\] occur twice"),
    ("missing column", "a.csv", b"a,c\nx,y\n", "the column 'b' is missing"),
    ("UTF-16 cut off", "a.jsonl", b"\xff\xfe" + '{"a"'.encode("utf-16-le") + b"\0", "name its `encoding`"),
    ("not Parquet", "a.parquet", b"PAR1", "not readable as a table"),
    ("not Arrow", "a.arrow", b"ARROW1", "not readable as a table"),
    ("unknown format", "a.xml", b"<a/>", "the format is unknown; known: .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_bad_file_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)^{folder}/{name}.*{message}"):
        load(folder / name, task="instr")


def test_a_truncated_parquet_file_is_named(folder: Path) -> None:
    pq.write_table(pa.table({"a": ["x" * 99] * 99, "b": ["y"] * 99}), folder / "a.parquet", compression="none")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="a.parquet: not readable as a table"):
        load(folder / "a.parquet", task="instr")
    (folder / "a.parquet").write_bytes(content[:20] + b"\xff" * 50 + content[70:])
    with pytest.raises(ValueError, match="a.parquet"):
        list(load(folder / "a.parquet", task="instr"))


def test_shards_may_drift_in_type_and_not_in_columns(folder: Path) -> None:
    shards = folder / "shards"
    shards.mkdir()
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "score": [0.5]}), shards / "0.parquet")
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "score": ["0,25"]}), shards / "1.parquet")
    pairs = load(shards, task="text_pair")
    assert [pairs.row(number).score for number in range(2)] == [0.5, 0.25]
    pq.write_table(pa.table({"a": ["x"], "answer": ["y"], "score": [0.5]}), shards / "1.parquet")
    with pytest.raises(ValueError, match="1.parquet: the column 'b' is missing"):
        load(shards, task="text_pair")


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "a.jsonl")
    os.mkfifo(folder / "media" / "pipe.png")
    with pytest.raises(ValueError, match="a.jsonl.*not a regular file"):
        load(folder / "a.jsonl")
    (folder / "b.jsonl").write_text(json.dumps({**MEDIA, "images": "pipe.png"}))
    with pytest.raises(RowError, match="pipe.png': no such file"):
        load(folder / "b.jsonl")
    (folder / "b.jsonl").write_text(json.dumps({**MEDIA, "images": "good.png"}))
    pairs = load(folder / "b.jsonl")
    (folder / "media" / "good.png").unlink()
    os.mkfifo(folder / "media" / "good.png")
    with pytest.raises(RowError, match="good.png': it cannot be read: .*a pipe"):
        pairs[0]


def test_more_bad_rows_than_the_limit_stop_the_run_with_their_list(folder: Path) -> None:
    rows = [{**GOOD, "id": str(number), "b": "y" if number % 10 else ""} for number in range(300)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(folder / "a.jsonl")}
    with pytest.raises(
        ValueError, match=r"(?s)30 of 300 rows .*\(30 invalid b\).*`max_bad_rows` is 0.01.*id '0'.*and 10"
    ):
        load_pairs([source], TASKS, 400, on_bad_row="skip")
    assert len(load_pairs([source], TASKS, 400, on_bad_row="skip", max_bad_rows=0.1)) == 270
    for option, value in (("on_bad_row", "drop"), ("check_media", "deep"), ("max_bad_rows", 2)):
        with pytest.raises(ValueError, match=f"`{option}` is {value!r}"):
            load_pairs([source], TASKS, 400, **{option: value})
