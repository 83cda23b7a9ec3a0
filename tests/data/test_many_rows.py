import json
import sys
from pathlib import Path

import datasets
import pytest

from vipolyqwen.data import readers, sources
from vipolyqwen.data.schema import RowError, declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.data.tables import BATCH


@pytest.mark.parametrize("shows_progress", [True, False])
@pytest.mark.parametrize("count", [BATCH, 2 * BATCH + 1])
def test_files_longer_than_a_batch_are_read_to_their_end(
    count: int, shows_progress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (datasets.enable_progress_bars if shows_progress else datasets.disable_progress_bars)()
    lines = [json.dumps({"a": f"a{number}", "b": f"b{number}"}) for number in range(count)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    try:
        pairs = load_pairs([{"path": str(tmp_path / "rows.jsonl"), "task": "instr"}], declare_tasks(), 400)
    finally:
        datasets.enable_progress_bars()
    assert len(pairs) == count
    assert [pairs.row(number).a for number in (0, BATCH - 1, count - 1)] == ["a0", f"a{BATCH - 1}", f"a{count - 1}"]


def write_files(folder: Path, bad: int | None = None) -> dict[str, str]:
    """Four files of three rows; row `bad` of the last one is empty."""
    for file in range(4):
        rows = [{"a": f"{file} {number}", "b": "x"} for number in range(3)]
        if bad is not None and file == 3:
            rows[bad] = {"a": "", "b": ""}
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"path": str(folder), "task": "instr"}


@pytest.fixture
def parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files count as large ones; the cache is empty."""
    monkeypatch.setattr(readers, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"


def test_several_processes_store_the_same_rows(parallel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_files(parallel)
    pairs = load_pairs([source], declare_tasks(), 400, workers=2)
    assert [pairs.row(number).a for number in range(12)] == [f"{file} {row}" for file in range(4) for row in range(3)]
    monkeypatch.setattr(readers, "_write", None)  # all is stored: nothing is written again
    assert len(load_pairs([source], declare_tasks(), 400, workers=2)) == 12
    assert len(load_pairs([source], declare_tasks(), 400, workers=1)) == 12


def test_a_bad_row_in_another_process_is_an_error_or_skipped(parallel: Path) -> None:
    source = write_files(parallel, bad=1)
    with pytest.raises(RowError, match=r"3\.jsonl, row 2"):
        load_pairs([source], declare_tasks(), 400, workers=2)
    skipped = load_pairs([source], declare_tasks(), 400, workers=2, on_bad_row="skip", max_bad_rows=0.2)
    assert len(skipped) == 11 and [row.row for row in skipped.bad_rows] == [2]


def test_rows_of_a_batch_are_read_together_and_are_the_same(parallel: Path) -> None:
    pairs = load_pairs([write_files(parallel)], declare_tasks(), 400, without_tasks=["ocr"])
    order = [11, 0, 5, 5, 3, 10]
    assert pairs.__getitems__(order) == [pairs[number] for number in order]
    assert pairs.__getitems__([]) == []
    assert list(pairs.texts()) == [(pairs.row(number).a, "x") for number in range(12)]
    with pytest.raises(IndexError, match="Row 12 of 12"):
        pairs.__getitems__([0, 12])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells which pages are resident")
def test_pages_of_a_large_index_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [json.dumps({"a": f"{number} " * 50, "b": "b"}) for number in range(2 * BATCH)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pairs = load_pairs([{"path": str(tmp_path / "rows.jsonl"), "task": "instr"}], declare_tasks(), 400)
    read = [pairs.row(number).a for number in range(0, 2 * BATCH, 100)]
    assert resident(tmp_path / "cache") > 0
    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(sources, "RELEASED", 1)
    assert [pairs.row(number).a for number in range(0, 2 * BATCH, 100)] == read
    assert resident(tmp_path / "cache") == 0


def resident(folder: Path) -> int:
    """Returns the resident kilobytes of the mapped files below a folder."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.startswith(tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
