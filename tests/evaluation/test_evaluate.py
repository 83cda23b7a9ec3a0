"""The command on local pairs and a tiny model: mteb's numbers against numpy and scipy, and what is said of a run."""

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import yaml
from helpers import TEXTS, random_audio, random_image
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("mteb")

from vipolyqwen.evaluate_vipolyqwen import main  # noqa: E402

ROWS = 12
RANDOM = "mteb/baseline-random-encoder"  # of mteb: made of hashes, needs no download


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes in three modalities, captions of which two are right, and graded pairs of texts."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    for number in range(ROWS):
        random_image(rng).save(folder / f"{number}.png")
        rate = (16_000, 22_050)[number % 2]  # one batch holds audio of both rates
        soundfile.write(folder / f"{number}.wav", random_audio(rng, 0.2 + 0.02 * number, rate)["array"], rate)
    words = [f"{TEXTS[number % 5]} {number}" for number in range(ROWS)]
    media = [{"image": f"{number}.png", "audio": f"{number}.wav"} for number in range(ROWS)]
    write_rows(folder / "scenes.jsonl", [{"text": text, **row} for text, row in zip(words, media, strict=True)])
    captions = [
        {"task": "vqa_single", "a": "Ở đâu?", "b": f"{word} {row['image']}", "images": row["image"]}
        for row in media
        for word in ("đây", "here")
    ]
    write_rows(folder / "captions.jsonl", captions)
    scored = [
        {"a": text, "b": other, "score": i / ROWS}
        for i, (text, other) in enumerate(zip(words[:-1], words[1:], strict=True))
    ]
    write_rows(folder / "sts.jsonl", scored)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def write_suite(folder: Path, **content: Any) -> str:
    (folder / "suite.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(folder / "suite.yaml")


def scenes(pairs: Path) -> dict[str, Any]:
    columns = {"b": "text", "images": "image"}
    return {"task": "trimodal", "name": "Scenes", "path": str(pairs / "scenes.jsonl"), "columns": columns}


def captions(pairs: Path, **more: Any) -> dict[str, Any]:
    return {"task": "retrieval", "name": "Captions", "path": str(pairs / "captions.jsonl"), **more}


def sts(pairs: Path) -> dict[str, Any]:
    return {"task": "sts", "name": "Graded", "path": str(pairs / "sts.jsonl")}


def summary(out: Path) -> dict[str, list[dict[str, Any]]]:
    (path,) = out.glob("suite/*/summary.json")
    return json.loads(path.read_text(encoding="utf-8"))["models"]


@pytest.fixture(scope="module")
def evaluated(world: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of a suite of all kinds of custom tasks."""
    out = tmp_path_factory.mktemp("evaluation")
    suite = write_suite(
        out, tasks=[scenes(pairs), captions(pairs, both_directions=True), sts(pairs)], prompts={"STS": "text_pair"}
    )
    assert main([str(world / "base"), "--suite", suite, "--out", str(out), "--save_vectors", "--device", "cpu"]) == 0
    return out


def mteb_scores(out: Path, task: str) -> dict[str, float]:
    (path,) = (out / "custom" / "results").glob(f"local__base/*/{task}.json")
    return json.loads(path.read_text(encoding="utf-8"))["scores"]["test"][0]


def saved_vectors(out: Path, task: str) -> dict[str, np.ndarray]:
    (path,) = (out / "vectors").glob(f"local__base/*/{task}/default-test.npz")
    return dict(np.load(path))


DIRECTIONS = [f"Scenes-{a}2{b}" for a in ("text", "image", "audio") for b in ("text", "image", "audio") if a != b]


@pytest.mark.parametrize("task", [*DIRECTIONS, "Captions-vqa_single", "Captions-vqa_single-reverse"])
def test_retrieval_scores_are_those_that_numpy_finds_in_the_saved_vectors(evaluated: Path, task: str) -> None:
    saved, scores = saved_vectors(evaluated, task), mteb_scores(evaluated, task)
    query, document = (saved[side].astype(np.float64) for side in ("query", "document"))
    cosines = (query @ document.T) / np.outer(np.linalg.norm(query, axis=1), np.linalg.norm(document, axis=1))
    relevant = np.zeros(cosines.shape, dtype=bool)
    relevant[tuple(saved["relevant"].T)] = True
    ranked = np.take_along_axis(relevant, np.argsort(-cosines, axis=1), axis=1)
    discounts = 1 / np.log2(np.arange(2, ranked.shape[1] + 2))
    for k in (1, 5, 10):
        found, ideal = ranked[:, :k], np.sort(ranked, axis=1)[:, ::-1][:, :k]
        assert scores[f"recall_at_{k}"] == pytest.approx((found.sum(1) / ranked.sum(1)).mean(), abs=1e-6)
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(found.any(1).mean(), abs=1e-6)
        gain = (found * discounts[:k]).sum(1) / (ideal * discounts[:k]).sum(1)
        assert scores[f"ndcg_at_{k}"] == pytest.approx(gain.mean(), abs=1e-6)
    (row,) = (row for row in next(iter(summary(evaluated).values())) if row["task"] == task)
    assert row["scores"]["mean_rank"] == pytest.approx((1 + ranked.argmax(1)).mean(), abs=1e-6)
    assert row["chances"]["hit_rate_at_1"] == pytest.approx(scores["chance"], abs=1e-6)
    assert scores["main_score"] == scores["hit_rate_at_1"]


def test_spearman_is_the_one_that_scipy_finds_in_the_saved_vectors(evaluated: Path) -> None:
    saved = saved_vectors(evaluated, "Graded")
    a, b = (saved[side].astype(np.float64) for side in ("query", "document"))  # sides a and b have other prompts
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    expected = spearmanr(cosines, saved["score"]).statistic
    assert mteb_scores(evaluated, "Graded")["cosine_spearman"] == pytest.approx(expected, abs=1e-6)


def test_every_result_says_prompts_chance_speed_memory_and_device(evaluated: Path) -> None:
    (rows,) = summary(evaluated).values()
    assert [row["task"] for row in rows] == [
        *DIRECTIONS,
        "Captions-vqa_single",
        "Captions-vqa_single-reverse",
        "Graded",
    ]
    for row in rows:
        assert row["status"] == "run"
        assert row["rows"] > 0 and row["rows_per_second"] > 0 and row["peak_host_bytes"] > 2**20
        assert row["device"].startswith("cpu") and row["dtype"] == "float32"
    by_task = {row["task"]: row for row in rows}
    assert by_task["Captions-vqa_single"]["prompts"] == {"query": "<vqa_single>", "document": ""}
    assert by_task["Captions-vqa_single-reverse"]["prompts"] == {"query": "", "document": "<vqa_single>"}
    assert by_task["Graded"]["prompts"] == {"query": "<text_pair>", "document": ""}  # sides of the base: a
    assert by_task["Scenes-text2image"]["chance"] == pytest.approx(1 / ROWS)
    assert by_task["Captions-vqa_single"]["chance"] == pytest.approx(2 / (2 * ROWS))
    page = next(evaluated.glob("suite/*/summary.md")).read_text(encoding="utf-8")
    assert "| Captions-vqa_single | hit_rate_at_1 |" in page
    assert "query `<vqa_single>`, document none" in page


def test_what_is_known_is_not_run_again_until_prompts_or_pairs_change(
    world: Path, pairs: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (pairs / "sts.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(tmp_path / "sts.jsonl", rows)

    def status(prompts: dict[str, str]) -> tuple[str, float]:
        suite = write_suite(tmp_path, tasks=[sts(tmp_path)], prompts=prompts)
        assert main([str(world / "base"), "--suite", suite, "--out", str(tmp_path), "--device", "cpu"]) == 0
        (of_model,) = summary(tmp_path).values()
        return of_model[0]["status"], of_model[0]["score"]

    first = status({})
    assert first[0] == "run"
    assert status({}) == ("cached", pytest.approx(first[1], abs=1e-6))
    with_prompt = status({"STS": "text_pair"})
    assert with_prompt[0] == "run" and with_prompt[1] != first[1]
    write_rows(tmp_path / "sts.jsonl", rows[::-1][:6])
    assert status({"STS": "text_pair"})[0] == "run"


def test_models_stand_side_by_side_and_what_one_cannot_take_is_said(
    world: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "Hai", "đỏ", "small", "the"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)]).save(str(tmp_path / "words"))
    suite = write_suite(tmp_path, tasks=[sts(pairs), captions(pairs)], baselines=[RANDOM])
    against = ["--against", str(tmp_path / "words"), "baselines", str(tmp_path / "nowhere")]
    assert main([str(world / "base"), "--suite", suite, "--out", str(tmp_path), "--device", "cpu", *against]) == 1
    rows = summary(tmp_path)
    assert [[row["status"] for row in of_model] for of_model in rows.values()] == [
        ["run", "run"],
        ["run", "skipped"],
        ["run", "run"],
        ["failed", "failed"],
    ]
    words, nowhere = str(tmp_path / "words"), str(tmp_path / "nowhere")
    assert list(rows) == [str(world / "base"), words, RANDOM, nowhere]
    assert rows[words][1]["reason"] == "it needs image; the model supports text"
    assert f"{nowhere} cannot be loaded" in rows[nowhere][0]["reason"]
    page = capsys.readouterr().out
    assert f"| Captions-vqa_single | {words} | skipped | it needs image; the model supports text |" in page


def test_a_data_set_that_cannot_be_reached_is_skipped_by_name(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    suite = write_suite(tmp_path, tasks=["BIOSSES-VN", {"task": "sts", "name": "Mine", "path": "nowhere.jsonl"}])
    assert main([str(world / "base"), "--suite", suite, "--out", str(tmp_path), "--device", "cpu"]) == 0
    (rows,) = summary(tmp_path).values()
    assert [row["status"] for row in rows] == ["skipped", "skipped"]
    assert "the data set GreenNode/biosses-sts-vn at revision 1dae4a6df91c" in rows[0]["reason"]
    assert rows[1]["reason"].startswith("nowhere.jsonl: no such file")


def test_a_row_that_is_wrong_fails_its_entry_alone(world: Path, pairs: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "wrong.jsonl", [{"a": "x", "b": "y", "score": 7}])
    wrong = {"task": "sts", "name": "Wrong", "path": str(tmp_path / "wrong.jsonl")}
    suite = write_suite(tmp_path, tasks=[wrong, sts(pairs)])
    assert main([str(world / "base"), "--suite", suite, "--out", str(tmp_path), "--device", "cpu"]) == 1
    (rows,) = summary(tmp_path).values()
    assert [row["status"] for row in rows] == ["failed", "run"]
    assert "wrong.jsonl, row 1, column 'score' is 7.0: a score is in [0, 1]" in rows[0]["reason"]
