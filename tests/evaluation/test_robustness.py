"""Queries under the spelling rules: drops by hand, the real model's equality under NFD, what is searched by what."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_audio, random_image, save_tiny_model
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.vietnamese import RULES, strip_diacritics
from vipolyqwen.evaluate_vipolyqwen import main
from vipolyqwen.evaluation.metrics import retrieval_metrics
from vipolyqwen.evaluation.robustness import drops, interval, robustness
from vipolyqwen.evaluation.search import read_pairs, searches

QUERIES = [
    "Hai ngôi sao đỏ lớn trên bãi cỏ.",
    "Thuỷ thủ khoẻ mạnh nghe hoà nhạc.",
    "Hà Nội, Đà Nẵng, Huế",
    "một chiếc thuyền vàng nhỏ",
    "Three small blue circles.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model/`, and pairs.jsonl: texts, an image with a question, audio."""
    folder = tmp_path_factory.mktemp("robustness")
    save_tiny_model(folder / "model")
    rng = np.random.default_rng(0)
    rows = [{"task": "text_pair", "a": a, "b": f"answer {i}", "score": 1.0} for i, a in enumerate(QUERIES)]
    rows.append({"task": "text_pair", "a": QUERIES[0], "b": "wrong", "score": 0.2})
    for number in range(2):
        random_image(rng).save(folder / f"{number}.png")
        soundfile.write(folder / f"{number}.wav", random_audio(rng, 0.2)["array"], 16_000)
        rows.append({"task": "ocr", "a": "<image>Biển ghi gì?", "b": f"số {number}", "images": [f"{number}.png"]})
        rows.append({"task": "audio", "a": "", "b": f"tiếng {number}", "audio": f"{number}.wav"})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder / "model"), trust_remote_code=True)


@pytest.fixture(scope="module")
def result(folder: Path, embedder: SentenceTransformer) -> dict:
    return robustness(embedder, folder / "pairs.jsonl")


def test_drops_of_a_worked_example() -> None:
    measured = drops(torch.tensor([1.0, 1.0, 5.0, 11.0]), torch.tensor([1.0, 2.0, 20.0, 10.0]))
    assert {name: measured["recall@1"][name] for name in ("value", "drop")} == {"value": 0.25, "drop": 0.25}
    assert {name: measured["recall@10"][name] for name in ("value", "drop")} == {"value": 0.75, "drop": 0.0}
    assert measured["mrr"]["drop"] == pytest.approx((1 + 1 + 1 / 5 + 1 / 11 - 1 - 1 / 2 - 1 / 20 - 1 / 10) / 4)
    assert measured["recall@10"]["low"] < 0 < measured["recall@10"]["high"]  # one query lost, one gained


def test_the_interval_is_that_of_paired_differences() -> None:
    assert interval(np.zeros(50)) == (0.0, 0.0)
    assert interval(np.full(50, 0.5)) == (0.5, 0.5)  # as large for every query: no doubt, however much queries differ
    low, high = interval(np.array([1.0] * 20 + [0.0] * 80))
    assert low == pytest.approx(0.2 - 1.96 * 0.04, abs=0.011)  # the normal approximation of a share of 0.2 of 100
    assert high == pytest.approx(0.2 + 1.96 * 0.04, abs=0.011)


def test_nfd_loses_nothing_at_all(result: dict) -> None:
    assert [search["task"] for search in result["searches"]] == ["text_pair", "ocr", "audio"]
    for search in result["searches"]:
        nfd = search["spellings"]["NFD"]
        assert nfd["changed"] == 1.0
        for metric in ("recall@1", "recall@10", "mrr"):
            assert nfd[metric]["value"] == search["spellings"]["as written"][metric]["value"]
            assert (nfd[metric]["drop"], nfd[metric]["low"], nfd[metric]["high"]) == (0.0, 0.0, 0.0)


def test_values_are_those_of_the_metrics_on_the_same_texts(result: dict, embedder: SentenceTransformer) -> None:
    texts = QUERIES[:4]  # the fifth has no Vietnamese letter
    candidates = embedder.encode([f"answer {i}" for i in range(5)] + ["wrong"], convert_to_tensor=True)
    search = result["searches"][0]
    for name, typed in (("as written", texts), ("no diacritics", [strip_diacritics(text) for text in texts])):
        queries = embedder.encode(typed, prompt_name="text_pair", convert_to_tensor=True)
        expected = retrieval_metrics(queries, candidates, [{i} for i in range(4)])
        assert search["spellings"][name]["mrr"]["value"] == pytest.approx(expected["mrr"])
        assert search["spellings"][name]["recall@1"]["value"] == expected["recall@1"]
    assert (search["queries"], search["candidates"], search["chance"]) == (4, 6, pytest.approx(1 / 6))


def test_every_rule_is_there_and_says_how_many_queries_it_changes(result: dict) -> None:
    spellings = result["searches"][0]["spellings"]
    assert list(spellings) == ["as written", *RULES]
    changed = {name: spellings[name]["changed"] for name in RULES}
    assert changed["no diacritics"] == changed["Telex"] == changed["VNI"] == 1.0
    assert changed["old tone placement"] == 0.25  # Thuỷ, khoẻ, hoà in one of four
    assert changed["new tone placement"] == 0.0
    assert changed["code-switching"] == 0.5
    # ngôi sao, đỏ, lớn, bãi cỏ and thuyền, vàng, nhỏ of 8 + 7 + 5 + 5 syllables
    assert spellings["code-switching"]["switched_words"] == pytest.approx(9 / 25)


def test_audio_is_searched_by_its_text(folder: Path) -> None:
    pairs, min_score = read_pairs(folder / "pairs.jsonl")
    found = {search.task: search for search in searches(pairs, min_score, text_asks=True)}
    assert [side.kind for side in found["audio"].candidates] == ["audio", "audio"]
    assert found["audio"].queries[0].text == "tiếng 0"
    assert found["audio"].side_a == "candidates"
    assert [side.kind for side in found["ocr"].queries] == ["text + image"] * 2
    asking = {search.task: search for search in searches(pairs, min_score)}
    assert [side.kind for side in asking["audio"].queries] == ["audio", "audio"]


def test_a_pair_scored_low_is_a_candidate_and_not_right(folder: Path) -> None:
    pairs, min_score = read_pairs(folder / "pairs.jsonl")
    search = searches(pairs, min_score)[0]
    assert search.relevant == [{0}, {1}, {2}, {3}, {4}]
    assert search.candidates[5].text == "wrong"


def test_pairs_without_vietnamese_are_an_error(tmp_path: Path, embedder: SentenceTransformer) -> None:
    path = tmp_path / "english.jsonl"
    path.write_text(json.dumps({"task": "instr", "a": "Say yes.", "b": "yes"}))
    with pytest.raises(ValueError, match="none of the 1 pairs has a query with a Vietnamese letter"):
        robustness(embedder, path)


def test_a_recipe_without_held_out_pairs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train_data: []")
    with pytest.raises(ValueError, match="no `eval_data`"):
        read_pairs(tmp_path / "recipe.yaml")


def test_the_command_writes_a_table_and_says_itself(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    source = {"path": str(folder / "pairs.jsonl")}
    recipe.write_text(json.dumps({"eval_data": [source], "nce_min_score": 0.1}))  # JSON is YAML
    main([str(folder / "model"), "--robustness", str(recipe), "--out", str(tmp_path / "out")])
    written = json.loads((tmp_path / "out" / "robustness.json").read_text(encoding="utf-8"))
    page = (tmp_path / "out" / "robustness.md").read_text(encoding="utf-8")
    assert written["min_score"] == 0.1
    assert written["rows_per_second"] > 0
    assert written["peak_memory_bytes"] > 2**20
    assert f"{recipe} --out" in written["command"]
    assert written["command"] in page
    assert page.count("| NFD | 100% |") == 3
    assert "| 0.000 [0.000, 0.000] |" in page
