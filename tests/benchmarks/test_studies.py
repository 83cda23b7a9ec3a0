"""Studies: power by the tables, verdicts, heads that equal the model they come from, and a study of two variants."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import study_report
import torch
import yaml
from demo_runs import write_look_alikes
from frozen_heads import Heads, head_vectors, tower_states
from helpers import load_with_prefixes
from pair_vectors import collate, embed
from paired_statistics import power, seeds_needed
from space_geometry import geometry, uniformity
from study_report import Question, answer, is_at_chance, verdict
from tiny_base import log_weights, start_from_teacher, whitened
from verdicts import from_recalls

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.demo.rows import Split
from vipolyqwen.demo.scenes import held_out_scenes
from vipolyqwen.demo.world import read_rows
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel


def test_power_is_that_of_the_tables_of_the_paired_t_test() -> None:
    # Cohen (1988), d = 1, two-sided 5 %: 10 pairs give 80.3 %; d = 0.5: 34 pairs give 80.8 %.
    assert power(0.02, 10, 0.02) == pytest.approx(0.803, abs=5e-4)
    assert seeds_needed(0.02, 0.02) == 10 and seeds_needed(0.02, 0.01) == 34
    assert power(0.02, 5, 0.0) == pytest.approx(0.05)  # nothing to show: the level of the test
    assert power(0.02, 1, 0.01) == 0.0 and power(0.0, 2, 0.01) == 1.0
    assert seeds_needed(10.0, 0.01) is None


def test_a_verdict_reads_the_interval_in_both_directions() -> None:
    assert verdict(0.001, 0.02) == "held" and verdict(-0.02, -0.001).startswith("contradicted")
    assert verdict(-0.009, 0.009) == "no difference of 0.01 or more" and verdict(-0.02, 0.02) == "not shown"
    assert verdict(None, None).startswith("not answered")


def results(hits: dict[str, list[int]]) -> dict[str, Any]:
    """Two cells of 100 queries and 50 candidates; hits of each seed in the first, one in the second."""

    def run(count: int) -> dict[str, Any]:
        cells = {"ocr/vi": [1] * count + [9] * (100 - count), "ocr/zh": [1, *[9] * 99]}
        return {view: {"ranks": cells, "rho": {}} for view in ("own", "bare")}

    sizes = {cell: (100, 0.02) for cell in ("ocr/vi", "ocr/zh")}
    return {
        "runs": {name: [run(count) for count in counts] for name, counts in hits.items()},
        "chance": {cell: chance for cell, (_, chance) in sizes.items()},
        "queries": {cell: queries for cell, (queries, _) in sizes.items()},
    }


def test_a_cell_at_chance_is_left_out_and_named() -> None:
    found = results({"one": [50, 52, 54], "other": [40, 43, 44]})
    assert is_at_chance(found, "one", "own", "ocr/zh") and not is_at_chance(found, "one", "own", "ocr/vi")
    said = answer(found, Question("H1", "one finds more", "one", "other"))
    assert said.excluded == ["ocr/zh"] and said.by_seed == pytest.approx([0.10, 0.09, 0.10])
    assert said.verdict == "held" and said.power == pytest.approx(power(np.std([10, 9, 10], ddof=1) / 100, 3, 0.01))
    assert answer(found, Question("H1", "Chinese", "one", "other", groups=["zh"])) is None
    single = answer(results({"one": [50], "other": [40]}), Question("H1", "one", "one", "other"))
    assert single.low is None and single.power == 0.0


def test_geometry_of_four_corners() -> None:
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    # Squared distances: 4 twice, 2 four times.
    assert uniformity(corners) == pytest.approx(math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6))
    vectors = {"a": corners[[0, 2]], "b": corners[[0, 3]]}
    found = geometry(vectors, ["ocr", "ocr"], torch.tensor([True, True]))["ocr"]
    assert found["alignment"] == pytest.approx((0 + 4) / 2) and found["gap"] == pytest.approx(1.0)
    assert geometry(vectors, ["ocr", "ocr"], torch.tensor([True, False])) == {}  # one pair has no spread


def test_heads_of_a_model_on_its_states_embed_as_the_model_does(world: Path) -> None:
    model, processor, tasks = load_with_prefixes(world / "base")
    pairs = load_pairs([{"path": str(world / "pairs.jsonl")}], tasks, processor.min_audio_samples)
    batches = list(collate(pairs, MixedBatchCollator(processor, tasks, prefix_dropout=0.0), 7))
    states = tower_states(model, batches)
    assert len(states) == len(pairs) and states.is_audio.any() and not states.is_audio.all()
    found, expected = head_vectors(Heads(model, {}, fresh=False), states, 5), embed(model, batches)
    for side in ("a", "b"):
        torch.testing.assert_close(found[side], expected[side], atol=2e-3, rtol=0)  # states are float16
    assert torch.equal(found["b_keys"], expected["b_keys"])
    fresh = head_vectors(Heads(model, {"pooling": "mean", "projection": "mlp"}, fresh=True), states)
    assert not torch.allclose(fresh["a"], expected["a"], atol=0.1)


def test_token_embeddings_start_from_a_teachers_vectors(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "counted.py").write_text(
        "import numpy as np\ncalls = []\n"
        "def embed(texts):\n    calls.append(len(texts))\n"
        "    return np.array([[len(t), ord(t[0]) % 7, ord(t[-1]) % 5, 1.0] for t in texts])\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, processor = ViPolyQwenModel(tiny[0].config).eval(), tiny[1]
    texts = ["một hai ba", "một hai", "một"]
    start_from_teacher(model, processor.tokenizer, texts, "counted:embed", None)
    weight = model.get_input_embeddings().weight
    known = weight[:, :-1].abs().sum(dim=1) > 0
    assert known.sum() > 100 and not known[processor.tokenizer.all_special_ids].any()
    assert weight[known, :3].square().mean(dim=0).tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert weight[:, 3:-1].abs().max() < 1e-6  # the fourth, constant column tells nothing
    # A text's weights are those of its tokens' frequencies, whatever the layers are.
    ids = torch.tensor([processor.tokenizer(texts[0])["input_ids"]])
    hidden = model.vlm(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, model.vlm.language_model.norm(weight[ids]))
    assert model.pooling.query.nonzero().tolist() == [[weight.shape[1] - 1]]
    start_from_teacher(model, processor.tokenizer, texts, "counted:embed", None)
    assert len(sys.modules["counted"].calls) == 1  # out of the cache


def test_frequent_tokens_weigh_less(tiny: Any) -> None:
    tokenizer = tiny[1].tokenizer
    often, seldom = tokenizer("a")["input_ids"][0], tokenizer("z")["input_ids"][0]
    found = log_weights(tokenizer, ["a"] * 998 + ["z"])
    total = 999 + len(tokenizer)  # every token counts once more
    assert found[often].item() == pytest.approx(math.log(1e-3 / (1e-3 + 999 / total)), rel=1e-4)
    assert found[often] < found[seldom] < 0


def test_whitened_components_are_uncorrelated() -> None:
    found = whitened(np.random.default_rng(0).normal(size=(50, 3)) @ np.array([[5.0, 1, 0], [0, 1, 2], [0, 0, 0.1]]))
    assert found.T @ found / 50 == pytest.approx(np.eye(3), abs=1e-6) and found.mean(axis=0) == pytest.approx(0)


def write_study(world: Path, folder: Path, **changes: Any) -> Path:
    """A study of two losses and of a pooling on the world's pairs."""
    pairs = [{"path": str(world / "pairs.jsonl"), "media_root": str(world)}]
    recipe = {"model": str(world / "base"), "train_data": pairs, "eval_data": pairs, "learning_rate": 0.001}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    question = {"hypothesis": "H2", "claim": "a loss for each task finds more", "ours": "mixed", "theirs": "nce"}
    study = {
        "recipe": str(folder / "recipe.yaml"),
        "base": str(world / "base"),
        "settings": {"max_steps": 2, "per_device_train_batch_size": 8, "prefix_dropout": 1.0, "check_media": False},
        "variants": {"mixed": {}, "nce": {"loss_table": "nce"}, "gradnorm": {"task_weighting": "gradnorm"}},
        "questions": [question],
    }
    path = folder / "small.yaml"
    path.write_text("# A small study\n" + yaml.safe_dump(study | changes, sort_keys=False), encoding="utf-8")
    return path


def test_a_study_of_heads_reports_and_uses_what_it_has_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    original = studies.FrozenBase.run

    def run(self: studies.FrozenBase, name: str, seed: int) -> dict[str, Any]:
        made.append((name, seed))
        return original(self, name, seed)

    monkeypatch.setattr(studies.FrozenBase, "run", run)
    monkeypatch.setattr(study_report, "AT_CHANCE", 1.0)  # four queries a cell
    study = write_study(world, tmp_path)
    arguments = [str(study), "--output_dir", str(tmp_path / "runs"), "--out", str(tmp_path / "r"), "--seeds"]
    for seeds in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["studies.py", *arguments, seeds])
        studies.main()
    assert made == [(name, seed) for seed in (0, 1) for name in ("mixed", "nce", "gradnorm")]
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    [found] = figures["answers"]
    assert len(found["by_seed"]) == 2 and found["hypothesis"] == "H2" and 0 <= found["power"] <= 1
    assert figures["seeds"] == 2 and set(figures["runs"]["nce"][0]["own"]["recall@1"]) == set(figures["chance"])
    report = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert report.startswith("# A small study") and "**H2**" in report and "gradnorm: gradient share" in report
    assert (tmp_path / "r.svg").read_text(encoding="utf-8").startswith("<svg xmlns")


def test_kept_batches_are_those_of_the_processor(world: Path, tmp_path: Path) -> None:
    held_out = studies.Cells(studies.read_study(write_study(world, tmp_path), None, tmp_path))
    _, processor, tasks = load_with_prefixes(world / "base")
    texts = {}
    for setting in ("none", "fuse", "none"):  # what the prefix of audio alone does
        processor.audio_prefix = setting
        batches = list(held_out.batches(processor, tasks))
        texts.setdefault(setting, []).append(sum(int(batch["attention_mask"].sum()) for batch in batches))
    assert texts["none"][0] == texts["none"][1] < texts["fuse"][0]


def test_faulty_studies_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"train": "towers"}, "`train` is 'towers'"),
        ({"seeds": 3}, "unknown keys \\['seeds'\\]"),
        ({"questions": [{"ours": "mixed", "theirs": "dle"}]}, "theirs 'dle' is none of mixed"),
        ({"questions": [{"ours": "mixed", "theirs": "nce", "figure": "mrr"}]}, "`figure` is 'mrr'; .* rho"),
    ):
        with pytest.raises(ValueError, match=message):
            studies.read_study(write_study(world, tmp_path, **changes), None, tmp_path)


@pytest.mark.parametrize("path", sorted(Path(studies.__file__).parent.parent.glob("recipes/studies/*.yaml")))
def test_the_studies_of_the_repository_build_their_losses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent.parent.parent)
    study = studies.read_study(path, None, Path("unused"))
    for name in study.variants:
        settings = study.settings(name)
        data = studies.DataArguments(**studies._known(studies.DataArguments, settings))
        loss = studies.LossArguments(**studies._known(studies.LossArguments, settings))
        assert list(studies.build_loss(loss, data.tasks, list(studies.build_tasks(data))).tasks)


def test_verdicts_of_the_quick_ablations_count_the_hits_of_each_seed() -> None:
    given = {
        "recall@1": {
            "base": {"instr/vi": [0.5, 0.625], "ocr/zh": [0.0, 0.0]},
            "other": {"instr/vi": [0.25, 0.5], "ocr/zh": [0.0, 0.0]},
        },
        "chance": {"instr/vi": 0.02, "ocr/zh": 0.02},
        "candidates": {"instr/vi": 50, "ocr/zh": 50},
    }
    found = from_recalls(given)
    assert found["queries"] == {"instr/vi": 8, "ocr/zh": 8}
    assert found["runs"]["other"][1]["own"]["ranks"]["instr/vi"].count(1) == 4
    said = answer(found, Question("H1", "more", "base", "other"))
    assert said.excluded == ["ocr/zh"] and said.by_seed == pytest.approx([0.25, 0.125])


def test_look_alikes_are_two_tasks_on_one_image(tmp_path: Path) -> None:
    split = Split("held out", held_out_scenes(0))
    rows = read_rows(write_look_alikes(tmp_path, "look_alikes", split, 2))
    assert len(rows) == 2 * 3 * 4 and len({row["images"][0] for row in rows}) == 6
    assert all((tmp_path / row["images"][0]).is_file() for row in rows)
    rivals = studies.rivals_of([row["rivals"] for row in rows])
    for number, row in enumerate(rows):
        other = rows[rivals[number]]
        assert {row["task"], other["task"]} == {"ocr", "vqa_single"} and row["images"] == other["images"]
        assert row["b"] != other["b"] and (row["a"] == other["a"]) == (row["asked"] == "unasked")
    with pytest.raises(ValueError, match=r"1 pairs have the value 'x'"):
        studies.rivals_of(["y", "y", "x"])


def test_rivals_count_queries_nearer_to_their_answer() -> None:
    corners = torch.eye(3)
    cells = object.__new__(studies.Cells)
    cells.rivals = {0: 1, 1: 0, 2: 3, 3: 2}
    # Rows 0 and 1 answer each other's question, row 2 its own, row 3 is as near to both.
    vectors = {"a": corners[[0, 1, 2, 2]], "b": corners[[1, 0, 2, 2]]}
    assert cells._above_rivals(vectors, [0, 1]) == 0 and cells._above_rivals(vectors, [2, 3]) == 0
    vectors["b"] = corners[[0, 1, 2, 0]]
    assert cells._above_rivals(vectors, [0, 1]) == 1 and cells._above_rivals(vectors, [2, 3]) == 0.5
