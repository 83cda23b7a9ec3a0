import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import random_image, save_tiny_model

pytest.importorskip("faiss")

from vipolyqwen.data.__main__ import main
from vipolyqwen.data.mining import MiningOptions, mine
from vipolyqwen.data.nearest import index_of, search
from vipolyqwen.data.recipes import read_data_recipe
from vipolyqwen.data.sides import Side
from vipolyqwen.data.sources import load_pairs

# A world on the circle: text "…@DEGREES" lies at that angle, so cosines are known.
Mined = dict[str, list[str]]


def encode(sides: Sequence[Side], task: str, side: str) -> np.ndarray:
    angles = np.radians([float(each.text.rpartition("@")[2]) for each in sides])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def write_recipe(folder: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [json.dumps({"id": str(number), "task": "instr", **row}) for number, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {"path": str(folder / "rows.jsonl"), "weight": 2.0}
    settings = {"train_data": [source], "eval_data": [{"path": str(folder / "rows.jsonl")}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


def mined_texts(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Mined:
    """The texts of the negatives of each row."""
    recipe = read_data_recipe(write_recipe(folder, rows))
    given = {"margin": 0.0, "same": 2.0, **options}
    mine(recipe, folder / "out", "m", encode, MiningOptions(**given))
    made = read_data_recipe(folder / "out/recipe.yaml")
    pairs = load_pairs(made.settings["train_data"], made.tasks, 400)
    return {
        row["id"]: [each["text"] for each in row["negatives"]] for row in map(pairs.__getitem__, range(len(pairs)))
    }


def pair(a: int, b: int, **more: Any) -> dict[str, Any]:
    return {"a": f"q@{a}", "b": f"d@{b}", **more}


ROWS = [pair(0, 5), pair(30, 40), pair(60, 65), pair(90, 120)]


def test_the_nearest_wrong_answers_below_the_right_one_come_first(tmp_path: Path) -> None:
    found = mined_texts(tmp_path, ROWS)
    assert found["0"] == ["d@40", "d@65", "d@120"]
    assert found["1"] == ["d@5", "d@65", "d@120"]  # 25, 35, 90 degrees against 10 of the right one
    assert found["3"] == ["d@40", "d@5"]  # d@65 is nearer than the right answer: maybe a right one


def test_count_and_rank_window(tmp_path: Path) -> None:
    assert mined_texts(tmp_path, ROWS, count=1)["0"] == ["d@40"]
    assert mined_texts(tmp_path, ROWS, skip=2)["0"] == ["d@65", "d@120"]  # the right one has rank 1
    assert mined_texts(tmp_path, ROWS, within=2)["0"] == ["d@40"]


def test_margin_and_sameness_against_false_negatives(tmp_path: Path) -> None:
    cosine = np.cos(np.radians([10, 25, 35]))
    assert mined_texts(tmp_path, ROWS, margin=float(cosine[0] - cosine[1]) + 0.01)["1"] == ["d@65", "d@120"]
    assert mined_texts(tmp_path, ROWS, same=float(np.cos(np.radians(30))))["1"] == ["d@5", "d@120"]


def test_groups_other_answers_and_copies_are_no_negatives(tmp_path: Path) -> None:
    rows = [pair(0, 5, group="g"), pair(30, 40, group="g"), pair(0, 65), pair(90, 120), pair(91, 5)]
    found = mined_texts(tmp_path, rows)
    assert found["0"] == ["d@120"]  # neither d@40 of its group, nor d@65 of its question, nor its copy of row 4
    assert "d@5" not in found["1"] and found["2"] == ["d@120"]


def test_other_tasks_and_low_scores_give_none(tmp_path: Path) -> None:
    rows = [pair(0, 5, task="text_pair", score=score) for score in (0.9, 0.2)] + [pair(2, 20)]
    rows[1] = pair(0, 50, task="text_pair", score=0.2)
    rows.append(pair(3, 70, task="text_pair", score=1.0))
    found = mined_texts(tmp_path, rows)
    assert found == {"0": ["d@70"], "1": [], "2": [], "3": []}


def test_negatives_that_rows_have_stay_first(tmp_path: Path) -> None:
    assert mined_texts(tmp_path, [pair(0, 5, negatives=["given@99"]), pair(30, 40)])["0"] == ["given@99", "d@40"]


def test_images_become_negatives_by_their_path(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in (1, 2):
        random_image(rng).save(tmp_path / f"{number}.png")
    rows = [{"a": "q@0", "b": "d@3", "images_b": ["1.png"]}, {"a": "q@40", "b": "d@50", "images_b": ["2.png"]}]
    recipe = read_data_recipe(write_recipe(tmp_path, rows))
    mine(recipe, tmp_path / "out", "m", encode, MiningOptions())
    made = read_data_recipe(tmp_path / "out/recipe.yaml")
    pairs = load_pairs(made.settings["train_data"], made.tasks, 400)
    (negative,) = pairs[0]["negatives"]
    assert negative["text"] == "d@50" and np.array_equal(negative["images"][0], pairs[1]["images_b"][0])
    stored = pq.read_table(tmp_path / "out/train/000")["negatives"].to_pylist()[0][0]["images"][0]
    assert stored["bytes"] is None and stored["path"].endswith("2.png")
    assert pairs.source_weights == [2.0]


def test_a_second_run_encodes_nothing_but_what_changed(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(sides: Sequence[Side], task: str, side: str) -> np.ndarray:
        calls.append(len(sides))
        return encode(sides, task, side)

    def run(rows: list[dict[str, Any]], model: str) -> list[Any]:
        calls.clear()
        options = MiningOptions(unit_rows=2, margin=0.0)
        mine(read_data_recipe(write_recipe(tmp_path, rows)), tmp_path / "out", model, counted, options)
        return pq.read_table(tmp_path / "out/train/000").to_pylist()

    first = run([*ROWS, pair(10, 11)], "m")
    assert sum(calls) == 10
    assert run([*ROWS, pair(10, 11)], "m") == first and calls == []
    assert len(run(ROWS, "m")) == 4 and calls == []  # the shard of the fifth row is gone
    run([*ROWS[:2], pair(10, 11)], "m")
    assert sum(calls) == 2
    run(ROWS[:2], "another model")
    assert sum(calls) == 4


def test_search_finds_the_nearest_of_float16_vectors() -> None:
    vectors = np.eye(4, 8, dtype=np.float16)
    ((first, cosines, found),) = search(index_of(vectors), vectors[2:], 1)
    assert first == 0 and found.tolist() == [[2], [3]] and cosines.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("given", "match"),
    [({"count": 0}, "count is 0"), ({"skip": 5, "within": 5}, "skip 5"), ({"margin": float("nan")}, "margin is nan")],
)
def test_impossible_options(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MiningOptions(**given)


def test_the_command_mines_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    random_image(np.random.default_rng(0)).save(tmp_path / "x.png")
    rows = [{"task": "ocr", "a": "đọc", "b": text, "images": ["x.png"], "group": text} for text in ("một", "hai")]
    rows += [{"a": f"câu {number}", "b": f"đáp {number}"} for number in range(3)]
    recipe, out = write_recipe(tmp_path, rows), tmp_path / "out"
    options = ["--model", str(tmp_path / "model"), "--out", str(out), "--margin", "-2", "--same", "2"]
    assert main(["mine", str(recipe), *options]) == 0
    assert "3 of 5 rows have 6 mined negatives" in capsys.readouterr().out
