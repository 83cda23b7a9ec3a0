"""Mean rank and chance levels of searches: from the vectors, also above the 1,000 candidates that mteb ranks."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

mteb = pytest.importorskip("mteb")

from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402

from vipolyqwen.evaluation import metrics  # noqa: E402
from vipolyqwen.evaluation.chance import search_chance, task_chance  # noqa: E402
from vipolyqwen.evaluation.custom_tasks import media_table  # noqa: E402
from vipolyqwen.evaluation.encoder import MeasuredEncoder  # noqa: E402
from vipolyqwen.evaluation.scorecard import write_scorecard  # noqa: E402
from vipolyqwen.evaluation.task_run import run_task  # noqa: E402

CANDIDATES, QUERIES = 1100, 30


class Numbered(AbsEncoder):
    """An encoder that knows each text and image by its number."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = rng.normal(size=(CANDIDATES, 8)).astype(np.float32)
        self.texts = rng.normal(size=(QUERIES, 8)).astype(np.float32)
        self.texts += self.images[: 2 * QUERIES : 2]
        self.mteb_model_meta = ModelMeta.create_empty({"modalities": ["text", "image"], "name": "local/numbered"})
        self.rows = 0

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """Returns the vectors of the rows."""
        self.rows += len(inputs.dataset)
        if "image" in inputs.dataset.features:
            pixels = [image.getpixel((0, 0)) for batch in inputs for image in batch["image"]]
            return self.images[[256 * red + green for red, green, _ in pixels]]
        return self.texts[[int(text) for batch in inputs for text in batch["text"]]]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (number // 256, number % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def flickr(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flickr30k's search for images of mteb, with 1,100 generated ones; every third text describes two."""
    task = mteb.get_task("Flickr30kT2IRetrieval")
    found = {f"q{i}": {f"d{2 * i}": 1} | ({f"d{2 * i + 1}": 1} if i % 3 == 0 else {}) for i in range(QUERIES)}

    def load_data(**kwargs: Any) -> None:
        queries = {"id": list(found), "text": [str(i) for i in range(QUERIES)]}
        corpus = {"id": [f"d{i}" for i in range(CANDIDATES)], "image": [png(i) for i in range(CANDIDATES)]}
        split = RetrievalSplitData(
            queries=datasets.Dataset.from_dict(queries),
            corpus=media_table(corpus, {"image": "image"}),
            relevant_docs=found,
            top_ranked=None,
        )
        task.dataset, task.data_loaded = {"default": {"test": split}}, True

    monkeypatch.setattr(task, "load_data", load_data)
    return task


def test_flickr_has_a_mean_rank_above_a_thousand_candidates(
    flickr: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_SIMILARITIES", 7 * CANDIDATES)  # five blocks of queries
    numbered = Numbered()
    encoder = MeasuredEncoder(numbered)
    row = run_task(encoder, flickr, tmp_path, 64, save_vectors=False)
    assert row["status"] == "run", row.get("reason")
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (numbered.texts, numbered.images)]
    cosines = unit[0] @ unit[1].T
    best = [max(cosines[i, 2 * i], cosines[i, 2 * i + 1] if i % 3 == 0 else -1) for i in range(QUERIES)]
    ranks = [1 + (cosines[i] > best[i]).sum() for i in range(QUERIES)]
    assert max(ranks) > 20  # the search is not trivial
    assert row["scores"]["mean_rank"] == pytest.approx(np.mean(ranks))
    assert row["scores"]["hit_rate_at_1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]), abs=1e-5)
    assert row["candidates"] == [CANDIDATES]
    assert row["chances"]["mean_rank"] == pytest.approx((CANDIDATES + 1) * (1 / 2 * 2 / 3 + 1 / 3 * 1 / 3))
    assert row["chances"]["hit_rate_at_1"] == pytest.approx((2 / 3 + 2 / 3) / CANDIDATES)
    assert row["chance"] == row["chances"]["ndcg_at_10"] > 0

    page = write_scorecard(tmp_path / "card", "papers", {"numbered": [row]})
    assert f"| Flickr30kT2IRetrieval | chance | {row['chances']['hit_rate_at_1']:.4f} |" in page
    assert f"| {row['scores']['mean_rank']:.2f} |" in page or f"| {row['scores']['mean_rank']:.4f} |" in page
    saved = json.loads((tmp_path / "card" / "summary.json").read_text())["models"]["numbered"][0]
    assert saved["scores"]["mean_rank"] == row["scores"]["mean_rank"]

    embedded = numbered.rows
    again = run_task(encoder, flickr, tmp_path, 64, save_vectors=False)
    assert (again["status"], numbered.rows) == ("cached", embedded)
    assert again["scores"]["mean_rank"] == row["scores"]["mean_rank"]
    assert again["chances"] == row["chances"]


def order_scores(gains: list[int], order: tuple[int, ...], k: int) -> dict[str, float]:
    """The scores of one order of the candidates, by their definitions."""
    found = [gains[place] for place in order]
    ideal = sum(gain / np.log2(place + 2) for place, gain in enumerate(sorted(gains, reverse=True)[:k]))
    return {
        f"hit_rate_at_{k}": float(any(found[:k])),
        f"recall_at_{k}": sum(gain > 0 for gain in found[:k]) / sum(gain > 0 for gain in gains),
        f"ndcg_at_{k}": sum(gain / np.log2(place + 2) for place, gain in enumerate(found[:k])) / ideal,
        "mean_rank": 1 + next(place for place, gain in enumerate(found) if gain),
    }


@pytest.mark.parametrize("gains", [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [2, 1, 1, 0, 0, 0]])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_chance_is_the_mean_over_all_orders(gains: list[int], k: int) -> None:
    scores = [order_scores(gains, order, k) for order in itertools.permutations(range(len(gains)))]
    judged = [gain for gain in gains if gain]
    for metric in scores[0]:
        expected = np.mean([of_order[metric] for of_order in scores])
        assert search_chance(metric, [judged], len(gains)) == pytest.approx(expected), metric


def test_chance_of_several_queries_is_their_mean_and_other_metrics_have_none() -> None:
    assert search_chance("hit_rate_at_1", [[1], [1, 1], [0]], 10) == pytest.approx(0.15)
    assert search_chance("map_at_10", [[1]], 10) is None
    assert search_chance("hit_rate_at_1", [[0], []], 10) is None


@pytest.mark.parametrize(
    ("name", "data", "metric", "chance"),
    [
        ("BIOSSES-VN", {"sentence1": ["a"], "sentence2": ["b"], "score": [1.0]}, "cosine_spearman", 0.0),
        ("ESC50", {"audio": [None] * 4, "target": [3, 1, 4, 1]}, "accuracy", 1 / 3),
        ("TwitterURLCorpus-VN", {"sentence1": ["a"] * 4, "label": [1, 0, 0, 0]}, "max_ap", 1 / 4),
    ],
)
def test_chance_of_other_tasks(name: str, data: dict[str, list[Any]], metric: str, chance: float) -> None:
    task = mteb.get_task(name)
    if metric == "max_ap":
        data = {task.label_column_name if key == "label" else key: values for key, values in data.items()}
    elif metric == "accuracy":
        data = {task.label_column_name if key == "target" else key: values for key, values in data.items()}
    task.dataset = {split: datasets.Dataset.from_dict(data) for split in task.eval_splits}
    assert task_chance(task, [metric, "v_measure"]) == {metric: chance}
