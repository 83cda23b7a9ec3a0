"""The newcomer's path: what it embeds, the order of its commands, and failures that are not hidden."""

import json
from pathlib import Path

import newcomer
import pytest
import result_files
from helpers import random_image


def test_every_image_and_recording_is_a_row(tmp_path: Path, rng: object) -> None:
    random_image(rng).save(tmp_path / "a.png")
    (tmp_path / "a.flac").write_bytes(b"")
    assert newcomer.write_corpus(tmp_path, tmp_path / "rows.jsonl") == {"images": 1, "recordings": 1}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"id", "image"}, {"id", "audio"}]
    with pytest.raises(FileNotFoundError, match="make demo"):
        newcomer.write_corpus(tmp_path / "none", tmp_path / "rows.jsonl")


def test_the_commands_run_in_order_and_their_result_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(newcomer, "run", lambda command, *arguments: ran.append(command) or "0.9  00000.png\n")
    monkeypatch.setattr(newcomer, "write_corpus", lambda media, corpus: {"images": 240, "recordings": 240})
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    newcomer.main(["--query", "bốn bông hoa"])
    result = json.loads((tmp_path / "newcomer.json").read_text(encoding="utf-8"))
    assert ran == ["embed", "index", "search"] and result["found"] == ["0.9  00000.png"]
    assert result["claims"]["seconds_to_the_first_result"]["holds"] is True


def test_a_failed_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newcomer.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="vipolyqwen embed ended with 1"):
        newcomer.run("embed", "MODEL")
