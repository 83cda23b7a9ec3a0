import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import random_audio, random_image

from vipolyqwen.data.pair_units import PairRow, read_pair_rows
from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.source_config import SourceConfig
from vipolyqwen.data.sources import load_pairs


def write_archive(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return str(path)


def encoded(media: Any) -> bytes:
    buffer = BytesIO()
    if isinstance(media, dict):
        soundfile.write(buffer, media["array"], media["sampling_rate"], format="WAV")
    else:
        media.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> str:
    """Images with a text and a caption inside JSON; the second sample has no text."""
    rng = np.random.default_rng(0)
    members = {"./": b""}
    for number in range(3):
        members[f"shard/{number}.png"] = encoded(random_image(rng))
        members[f"shard/{number}.json"] = json.dumps({"caption": f"hình {number}", "n": number}).encode()
        if number != 1:
            members[f"shard/{number}.txt"] = f"hỏi {number}".encode()
    return write_archive(tmp_path / "x.tar", {name: content for name, content in members.items() if content})


def test_a_webdataset_archive_is_a_source(archive: str) -> None:
    source = {"path": archive, "task": "vqa_single"}
    source["columns"] = {"id": "__key__", "images_a": "png", "a": "txt", "b": "json.caption"}
    pairs = load_pairs([source], declare_tasks(), 400)
    rows = [pairs[number] for number in range(len(pairs))]
    assert [row["id"] for row in rows] == ["shard/0", "shard/1", "shard/2"]
    assert [row["a"] for row in rows] == ["hỏi 0", "", "hỏi 2"]
    assert [row["b"] for row in rows] == ["hình 0", "hình 1", "hình 2"]
    assert all(row["images_a"][0].size == (60, 48) for row in rows)
    looked = list(read_pair_rows(SourceConfig.from_dict(source), declare_tasks()))
    assert [row.row.b for row in looked if isinstance(row, PairRow)] == ["hình 0", "hình 1", "hình 2"]


def test_audio_of_an_archive_needs_no_decoder_of_datasets(tmp_path: Path) -> None:
    audio = random_audio(np.random.default_rng(0))
    members = {"a.wav": encoded(audio), "a.txt": "tiếng".encode(), "b.wav": encoded(audio), "b.txt": b"sound"}
    path = write_archive(tmp_path / "speech.tar", members)
    source = {"path": path, "task": "audio", "columns": {"audio_a": "wav", "b": "txt"}}
    pairs = load_pairs([source], declare_tasks(), 400)
    assert len(pairs[0]["audio_a"]["array"]) == 8000 and pairs[1]["b"] == "sound"


@pytest.mark.parametrize("content", [b"", b"no archive", b"\0" * 10240])
def test_damaged_and_empty_archives_are_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.tar"):
        load_pairs([{"path": str(tmp_path / "x.tar"), "task": "instr"}], declare_tasks(), 400)


@pytest.mark.parametrize(("name", "content"), [("0.json", b"{"), ("0.txt", b"\xff"), ("0.cls", b"one")])
def test_a_damaged_member_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar", {name: content})
    with pytest.raises(ValueError, match=f"a.tar: the member '{name}' cannot be read"):
        load_pairs([{"path": path, "task": "instr"}], declare_tasks(), 400)


def test_a_truncated_archive_is_an_error(archive: str, tmp_path: Path) -> None:
    content = Path(archive).read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: content.index(b"shard/2.png") + 700])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        load_pairs([{"path": str(tmp_path / "cut.tar"), "task": "ocr"}], declare_tasks(), 400)
