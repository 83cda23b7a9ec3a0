"""Shorter and coarser vectors: the two steps of bits by hand, what a combination keeps, the command and its files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEXTS, save_tiny_model

from vipolyqwen.evaluate_vipolyqwen import main
from vipolyqwen.evaluation import dimensions
from vipolyqwen.evaluation.dimensions import measure, two_step_similarity


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model/` as a run leaves it, and pairs.jsonl: each text finds itself."""
    folder = tmp_path_factory.mktemp("dimensions")
    save_tiny_model(folder / "model")
    (folder / "model/trainer_state.json").write_text(json.dumps({"global_step": 7}))
    rows = [{"task": "instr", "a": text, "b": text} for text in TEXTS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def few_timed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dimensions, "TIMED_ROWS", 50)
    monkeypatch.setattr(dimensions, "TIMED_QUERIES", 2)


def test_bits_select_and_the_query_orders_what_they_selected() -> None:
    query = torch.tensor([[0.9, 0.1, 0.3, 0.3]])
    candidates = torch.tensor([[1, 1, 1, -1], [-1, 1, 1, 1], [1, -1, 1, 1], [-1, -1, -1, -1.0]]) / 2
    similarity = two_step_similarity(query, candidates, kept=3)[0]
    # three candidates differ in one bit each; the query's values tell them apart
    assert similarity[:3].tolist() == pytest.approx([0.5, -0.1, 0.7])
    assert similarity[3] == pytest.approx(-1 - 3)
    few = two_step_similarity(query, candidates, kept=1)[0]
    assert (few > -2).sum() == 1 and few.argmin() == 3


def test_a_combination_measures_what_it_keeps(rng: np.random.Generator) -> None:
    b = np.array([[0.6, 0.0, 0.8, 0.0] * 2, [0.6, 0.0, 0.0, 0.8] * 2], np.float32) / 2**0.5
    embedded = [("mine", b, b, [{0}, {1}])]
    rows = {kept: measure(embedded, kept, "float32") for kept in (8, 2)}
    assert (rows[8]["recall@1"], rows[8]["mrr"], rows[8]["bytes"]) == (1.0, 1.0, 32)
    assert (rows[2]["recall@1"], rows[2]["mrr"], rows[2]["bytes"]) == (0.0, 0.5, 8)  # what is left is equal: a tie
    assert measure(embedded, 8, "int8")["bytes"] == 12 and measure(embedded, 8, "int8")["recall@1"] == 1
    assert measure(embedded, 8, "binary")["bytes"] == 1
    assert measure(embedded, 8, "binary")["recall@1 by task"] == {"mine": 1.0}


def test_the_command_writes_one_table(folder: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--dims", "1024,64", "--pairs", str(folder / "pairs.jsonl"), "--out", str(folder / "out")]
    assert main([str(folder / "model"), *flags]) == 0
    result = json.loads((folder / "out/dimensions.json").read_text(encoding="utf-8"))
    assert [(row["dimensions"], row["precision"], row["bytes"]) for row in result["rows"]] == [
        *[(1024, "float32", 4096), (1024, "int8", 1028), (1024, "binary", 128)],
        *[(64, "float32", 256), (64, "int8", 68), (64, "binary", 8)],
    ]
    assert result["step"] == 7 and result["rows"][0]["recall@1"] == 1.0
    page = (folder / "out/dimensions.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out and "| 1024 | float32 | 4,096 |" in page


@pytest.mark.parametrize(
    ("flags", "error", "match"),
    [
        (["--dims", "1024,2048"], ValueError, "2048.*1024"),
        (["--dims", "0"], ValueError, "dimensions is 0"),
        (["--dims", "12", "--precision", "binary"], ValueError, "12.*multiple of 8"),
        (["--dims", "64", "--precision", "int4"], ValueError, "int4.*float32"),
        (["--dims", "many"], SystemExit, "2"),
        (["--dims", "64", "--explain", "a"], SystemExit, "2"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, flags: list[str], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        main([str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"), *flags])
