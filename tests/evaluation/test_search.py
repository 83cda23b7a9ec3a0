"""Searches over pairs whose sides are of any modality."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from vipolyqwen.data.sides import embed
from vipolyqwen.evaluation.explain import Neighbours
from vipolyqwen.evaluation.search import read_pairs, searches


@pytest.fixture
def pairs(world: Path) -> Path:
    """Images said, sentences drawn, audio written down."""
    rows = [
        *({"task": "vqa_single", "images_a": f"{number}.png", "audio_b": f"{number}.wav"} for number in range(3)),
        *({"task": "instr", "a": f"vẽ số {number}", "images_b": f"{number}.png"} for number in range(3)),
        *({"task": "audio", "audio_a": f"{number}.wav", "b": f"tiếng {number}"} for number in range(3)),
    ]
    rows = [{f"{name}": str(world / value) if "_" in name else value for name, value in row.items()} for row in rows]
    path = world / "sides.jsonl"  # beside the media: files elsewhere are refused
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_each_side_searches_the_other_whatever_its_modality(pairs: Path) -> None:
    found = {search.task: search for search in searches(read_pairs(pairs)[0], None)}
    kinds = {task: (search.queries[0].kind, search.candidates[0].kind) for task, search in found.items()}
    assert kinds == {"vqa_single": ("image", "audio"), "instr": ("text", "image"), "audio": ("audio", "text")}
    assert found["vqa_single"].relevant == [{0}, {1}, {2}]


def test_sides_are_swapped_only_where_side_b_alone_has_text(pairs: Path) -> None:
    found = {search.task: search for search in searches(read_pairs(pairs)[0], None, text_asks=True)}
    asked = {task: (search.queries[0].kind, search.side_a) for task, search in found.items()}
    assert asked == {
        "vqa_single": ("image", "queries"),
        "instr": ("text", "queries"),
        "audio": ("text", "candidates"),
    }


def test_media_of_side_b_are_neighbours_with_the_text_of_side_a(world: Path, pairs: Path) -> None:
    embedder = SentenceTransformer(str(world / "base"), trust_remote_code=True, device="cpu")
    neighbours = Neighbours(embedder, pairs)
    assert {kind: len(sides) for kind, sides in neighbours.sides.items()} == {"image": 3, "audio": 3, "text": 6}
    side, _ = neighbours.sides["audio"][1]
    [(cosine, shown, said), *_] = neighbours.of(embed(embedder, [side])[0])["audio, of 3"]
    assert cosine == pytest.approx(1, abs=1e-5) and "<audio" in shown
    found = searches(read_pairs(pairs)[0], None)[1]
    assert torch.equal(found.embed_candidates(embedder), embed(embedder, found.candidates))
