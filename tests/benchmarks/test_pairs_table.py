"""The table of held-out pairs: cells, searches and correlations against numbers made another way."""

import json
import sys
from pathlib import Path

import pairs_table
import pytest
import tiny_base
import torch
import yaml
from helpers import TEXTS
from pair_vectors import cells, load_grouped, search
from sklearn.feature_extraction.text import TfidfVectorizer

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.evaluation.metrics import pair_retrieval
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

NAN = float("nan")


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    """The world's pairs with a language each, the same words in two languages, as held-out data."""
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "language": ("vi", "en")[n % 12 // 6], "origin": "made"} for n, row in enumerate(rows)]
    path = tmp_path / "dev.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    settings = {"model": str(world / "base"), "eval_data": [{"path": str(path), "media_root": str(world)}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_the_table_has_each_task_and_language_and_its_numbers_are_those_of_the_n_grams(
    world: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(world / "base"), str(recipe), "--group_by", "language", "--out", str(tmp_path / "table")]
    monkeypatch.setattr(sys, "argv", ["pairs_table.py", *arguments])
    pairs_table.main()
    result = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert result["command"].split() == ["python", "pairs_table.py", *arguments]
    rows = {(row["task"], row["group"]): row for row in result["rows"]}
    assert len(rows) == 6 * 3  # two languages and all
    assert rows["ocr", "vi"]["pairs"] == 2 and rows["ocr", "all"]["pairs"] == 4
    assert rows["instr", "vi"]["chance"] == 0.5
    texts = [f"Nói lại: {text}" for text in TEXTS[:4]], [f"{number} {TEXTS[number]}" for number in range(4)]
    dev = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit([row[side] for row in dev for side in "ab"])
    a, b = (torch.from_numpy(grams.transform(side).toarray()) for side in texts)
    expected = pair_retrieval(a, b, torch.arange(4), torch.arange(4))
    assert rows["instr", "all"]["ngrams_recall@1"] == expected["recall@1"] == 1.0
    assert rows["audio", "all"]["ngrams_recall@1"] is None  # no side a has text
    assert rows["instr", "all"]["spearman"] is None  # nothing is scored
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| audio | vi | 2 | 2 | 0.5000 |" in markdown and markdown.count("\n| ") == 1 + 18


def test_a_recipe_without_held_out_pairs_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text(f"model: {world / 'base'}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no `eval_data`; name there"):
        pairs_table.measure(str(world / "base"), str(tmp_path / "bare.yaml"), (None, None), 8)


def test_a_task_of_one_language_has_one_row_and_all_comes_last() -> None:
    found = cells(["ocr", "ocr", "instr", "ocr"], ["vi", "en", "vi", "vi"])
    assert found == {("ocr", "en"): [1], ("ocr", "vi"): [0, 3], ("ocr", "all"): [0, 1, 3], ("instr", "vi"): [2]}
    assert list(found)[:3] == [("ocr", "en"), ("ocr", "vi"), ("ocr", "all")]
    assert cells(["ocr", "ocr"], [None, None]) == {("ocr", "all"): [0, 1]}


def test_a_search_is_that_of_pair_retrieval() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    columns = {
        "a_keys": torch.tensor([1, 2, 3, 4, 4, 5, 6, 7, 8]),
        "b_keys": torch.tensor([1, 1, 2, 3, 4, 5, 6, 7, 8]),
        "similarity_scores": torch.tensor([NAN, NAN, 0.2, 1.0, NAN, NAN, 0.9, 0.1, NAN]),
    }
    rows = [0, 1, 2, 3, 4, 6, 7]
    found = search(columns, rows, 0.5)
    ranks = found.ranks(vectors[0][found.queries] @ vectors[1][found.candidates].T)
    whole = pair_retrieval(
        vectors[0][rows], vectors[1][rows], *(columns[name][rows] for name in columns), min_score=0.5
    )
    assert (ranks <= 1).double().mean().item() == whole["recall@1"]
    assert found.chance == pytest.approx(whole["chance"]) and len(found.candidates) == whole["candidates"]


def test_correlation_is_that_of_each_scale() -> None:
    cosines = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.8, 0.0, 0.5])
    scores = torch.tensor([0.2, 0.3, 0.4, 0.6, 0.7, 1.0, NAN])
    scales = ["x", "x", "x", "y", "y", "z", "z"]
    # x agrees (ρ = 1, 3 pairs), y is turned round (ρ = −1, 2 pairs), z has one score alone
    assert pairs_table.correlation(cosines, scores, scales) == pytest.approx((3 * 1 - 2 * 1) / 5)
    assert pairs_table.correlation(cosines, torch.full((7,), 0.5), scales) is None
    assert pairs_table.correlation(torch.zeros(7), scores, scales) == 0.0


def test_a_group_is_read_from_any_column(recipe: Path) -> None:
    sources = yaml.safe_load(recipe.read_text(encoding="utf-8"))["eval_data"]
    pairs, groups = load_grouped(sources, "origin", declare_tasks(None), 1)
    assert groups == ["made"] * 24 == ["made"] * len(pairs)
    with pytest.raises(ValueError, match="'langage' is missing"):
        load_grouped(sources, "langage", declare_tasks(None), 1)


def test_a_base_is_built_on_the_texts_of_a_recipe(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 64, "layers": 1, "vision_size": 32, "audio_size": 32, "vocab_size": 400}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["tiny_base.py", str(world / "recipe.yaml"), str(tmp_path / "base"), *flags])
    tiny_base.main()
    model = ViPolyQwenModel.from_pretrained(tmp_path / "base")
    assert model.get_input_embeddings().embedding_dim == 64
    processor = ViPolyQwenProcessor.from_pretrained(tmp_path / "base")
    assert len(processor.tokenizer("tiếng")["input_ids"]) < len("tiếng".encode())  # its words are merged
