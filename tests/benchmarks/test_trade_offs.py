"""One vector against many: MaxSim, sizes and ranks by their definitions; vectors of the positions of a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_image
from torch.nn import functional

pytest.importorskip("mteb")

import trade_offs  # noqa: E402

from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel  # noqa: E402
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor  # noqa: E402


@pytest.fixture(scope="module")
def loaded(world: Path) -> tuple[Any, Any]:
    """The tiny model and its processor."""
    model = ViPolyQwenModel.from_pretrained(world / "base").eval()
    return model, ViPolyQwenProcessor.from_pretrained(world / "base", config=model.config)


def test_max_sim_is_the_sum_of_each_tokens_best_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 8, generator=generator)
    pages = [torch.randn(count, 8, generator=generator) for count in (2, 5, 1)]
    expected = [sum(max(float(token @ patch) for patch in page) for token in query) for page in pages]
    found = trade_offs.max_sim(query, trade_offs.stack_patches(pages))
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_positions_are_the_projections_of_the_states_that_were_pooled(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    image = random_image(np.random.default_rng(0), 84, 56)
    inputs = [[{"type": "text", "text": "Huế"}], [{"type": "image", "image": image}]]
    vectors, positions = trade_offs.embed(model, processor, inputs)
    _, patches = trade_offs.embed(model, processor, inputs[1:], patches_only=True)
    batch = processor(text=["Huế"], return_tensors="pt")
    with torch.no_grad():
        hidden = model.vlm(**batch).last_hidden_state
        pooled, weights = model.pooling(hidden, batch["attention_mask"].bool())
        each = functional.normalize(model.projection(hidden[0]).float(), dim=-1)
        one = functional.normalize(model.projection(pooled).float(), dim=-1)[0]
    torch.testing.assert_close(positions[0], each, rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors[0], one, rtol=0, atol=1e-5)
    start = (processor(images=[[image]], return_tensors="pt")["input_ids"][0] == processor.image_token_id).nonzero()
    torch.testing.assert_close(patches[0], positions[1][start.flatten()], rtol=0, atol=1e-5)


def test_quality_counts_ties_against_and_costs_count_bytes() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    found = trade_offs.quality(similarities, torch.eye(3, dtype=torch.bool))
    assert found == pytest.approx({"acc@1": 1 / 3, "acc@5": 1.0, "mean_rank": 2.0})
    pages = [torch.zeros(2, 8), torch.zeros(6, 8)]
    assert trade_offs.costs(pages, lambda row: row, 3)["index_bytes_per_page"] == (2 + 6) * 8 * 4 / 2


def test_every_figure_stands_beside_chance_and_candidates(
    loaded: tuple[Any, Any], world: Path, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    rows = []
    for number in range(6):
        random_image(np.random.default_rng(number)).save(tmp_path / f"{number}.png")
        rows.append({"task": "ocr", "a": "Biển ghi gì?", "b": f"số {number}", "images": f"{number}.png"})
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    figures = trade_offs.measure(*loaded, trade_offs.page_task(tmp_path / "eval.jsonl"), copies=3)
    assert (figures["candidates"], figures["queries"], figures["timed_pages"]) == (6, 6, 18)
    chance = {"acc@1": 1 / 6, "acc@5": 5 / 6, "mean_rank": 3.5, "acc@1_limit": 3 / 6}  # P(4 of 6 hits) < 1 %
    assert figures["chance"] == pytest.approx(chance)
    text = trade_offs.page("python x", figures)
    assert "| chance | 0.167 | 0.833 | 3.5 | – | – |" in text and "6 queries, 6 candidates" in text
    one, many = figures["one_vector"], figures["many_vectors"]
    assert many["index_bytes_per_page"] == one["index_bytes_per_page"] * figures["patches_per_page"]
    assert one["index_bytes_per_page"] == 4 * figures["dimension"]
    for kind in (one, many):
        assert 1 <= kind["mean_rank"] <= 6 and kind["cpu_ms_per_query"] >= 0 and kind["acc@1"] <= kind["acc@5"]
