import json
from pathlib import Path

import datasets
import pytest

from vipolyqwen.data.schema import declare_tasks
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
