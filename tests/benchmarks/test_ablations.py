"""The ablation study: statistics by hand and by scipy, cache keys, verdicts, and a study of two variants."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import ablation_runs
import ablations
import numpy as np
import pytest
import yaml
from ablation_report import QUESTIONS, Question, answer, languages, sentence, verdict
from ablation_runs import VARIANTS, Stage, Study
from demo_runs import write_parallel
from paired_statistics import Comparison, compare, interval, paired_t, sign_flips
from scipy.stats import ttest_rel

from vipolyqwen.data.schema import declare_tasks
from vipolyqwen.data.sources import load_pairs
from vipolyqwen.evaluation.charts import interval_chart
from vipolyqwen.training.trainer import ViPolyQwenTrainer

# --- statistics


def test_the_interval_and_the_test_over_seeds_are_those_of_student() -> None:
    ours, theirs = [0.50, 0.62, 0.55], [0.40, 0.58, 0.50]  # differences 0.10, 0.04, 0.05
    low, high = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    # mean 0.19/3, standard deviation 0.032146, t(0.975, 2) = 4.302653
    assert (low, high) == pytest.approx((0.0633333 - 4.302653 * 0.0321455 / 3**0.5, 0.1431874), abs=1e-6)
    reference = ttest_rel(ours, theirs)
    assert paired_t([a - b for a, b in zip(ours, theirs, strict=True)]) == pytest.approx(reference.pvalue)
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert interval([0.1]) == (-math.inf, math.inf) and math.isnan(paired_t([0.1]))
    assert paired_t([0.0, 0.0]) == 1.0 and paired_t([0.1, 0.1]) == 0.0


def test_random_signs_count_every_way_to_turn_a_few_queries() -> None:
    # Six queries that all gain: of 2^6 = 64 signs, only all + and all - are as far from 0.
    assert sign_flips([np.ones(6)]) == pytest.approx(2 / 64)
    assert sign_flips([np.zeros(5)]) == 1.0
    assert sign_flips([np.array([1.0, -1.0])]) == sign_flips([np.array([0.0, 1.0])]) == 1.0


def test_a_comparison_is_paired_by_seed_and_all_cells_count_alike() -> None:
    one, none, half = np.ones(4), np.zeros(4), np.array([1.0, 0.0])
    found = compare([[one, half], [one, half]], [[none, half], [one, half]])
    assert found.by_seed == [0.5, 0.0] and found.difference == 0.25  # the cell of two counts as that of four
    assert (found.ours, found.theirs) == (0.75, 0.5)
    # The mean over seeds of every query's difference is 0.5 in one cell and 0 in the other: nothing varies by query.
    assert found.queries == (0.25, 0.25)
    unpaired = compare([[half]], [[half]], same_queries=False)
    assert unpaired.queries[0] < 0 < unpaired.queries[1] and unpaired.p_queries is None


def test_the_bootstrap_interval_is_near_the_normal_one() -> None:
    ours = (np.arange(400) % 4 == 0).astype(float)  # mean 0.25, standard error of the mean 0.02165
    low, high = compare([[ours]], [[np.zeros(400)]]).queries
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.005)


# --- sentences


def comparison(seeds: tuple[float, float], queries: tuple[float, float] = (-1.0, 1.0), count: int = 3) -> Comparison:
    middle = sum(seeds) / 2
    return Comparison(0.5 + middle, 0.5, [middle] * count, seeds, 0.25, queries, 0.5)


QUESTION = Question("H1", "one finds more than two", ("base", "own"), ("mean pooling", "own"))


def test_sentences_say_held_did_not_hold_and_not_shown() -> None:
    assert verdict(comparison((0.01, 0.05)), 0.0) == "held"
    assert verdict(comparison((-0.05, -0.01)), 0.0) == "did NOT hold"
    assert verdict(comparison((-0.01, 0.05)), 0.0) == "not shown"
    held = sentence(QUESTION, comparison((0.01, 0.05)))
    assert held.startswith("**H1**, one finds more than two: **held**. recall@1 0.530 against 0.500: +0.030, 95 %")
    assert "interval +0.010 … +0.050 over seeds (paired t, p = 0.250)" in held
    assert "**did NOT hold**" in sentence(QUESTION, comparison((-0.05, -0.01)))
    undecided = sentence(QUESTION, comparison((-0.01, 0.05)))
    assert "**not shown with 3 seeds**" in undecided and "models of other seeds may not" not in undecided
    assert sentence(QUESTION, comparison((-0.01, 0.05), (0.01, 0.03))).endswith("models of other seeds may not.")
    alone = sentence(
        QUESTION,
        comparison((-math.inf, math.inf), count=1).__class__(
            0.6, 0.5, [0.1], (-math.inf, math.inf), math.nan, (0.0, 0.2), None
        ),
    )
    assert "**not shown with 1 seed**" in alone and "no interval from one seed" in alone


def test_a_claim_of_keeping_up_may_lose_its_margin() -> None:
    assert verdict(comparison((-0.04, 0.01)), 0.05) == "held"
    assert verdict(comparison((-0.09, -0.06)), 0.05) == "did NOT hold"
    assert verdict(comparison((-0.09, -0.01)), 0.05) == "not shown"
    question = Question("H3", "it keeps up", *[("base", "own")] * 2, tasks="text", margin=0.05)
    assert "tasks: text, may lose 0.05:" in sentence(question, comparison((-0.04, 0.01)))


def results(ranks: dict[str, dict[str, list[int]]], left_out: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """Figures of one seed each: variant -> cell -> ranks."""
    cells = ranks["base"]
    return {
        "runs": {name: [{view: {"ranks": of_name} for view in ("own", "bare")}] for name, of_name in ranks.items()},
        "left_out": {name: (left_out or {}).get(name, []) for name in ranks},
        "tasks": {cell.split("/")[0]: {"audio": cell.startswith("audio"), "text": False} for cell in cells},
        "chance": dict.fromkeys(cells, 0.25),
        "candidates": {cell: len(of_cell) for cell, of_cell in cells.items()},
        "ngrams": {},
    }


def test_audio_is_asked_about_apart_from_the_other_tasks() -> None:
    base = {"ocr/vi": [1, 1, 2, 2], "audio/vi": [1, 1, 1, 1]}
    without = {"ocr/vi": [1, 2, 2, 2], "audio/vi": [2, 2, 2, 2]}
    found = answer(results({"base": base, "no audio": without}, {"no audio": ["audio"]}))
    assert {question.tasks: answered.by_seed for question, answered in found if question.hypothesis == "H5"} == {
        "audio": [1.0],
        "others than audio": [0.25],
    }
    assert not [question for question, _ in found if question.hypothesis == "H1"]  # no such run


def test_languages_are_compared_where_they_search_as_many_candidates() -> None:
    cells = {"ocr/vi": [1, 1, 2, 2], "ocr/en": [1, 2, 2, 2], "ocr/zh": [1], "audio/vi": [1, 1]}
    [(question, found)] = languages(results({"base": cells}))
    assert question.claim == "vi is found as well as en" and question.tasks == "ocr"
    assert found.by_seed == [0.25] and found.p_queries is None


def test_every_variant_is_asked_about_and_has_a_recipe_of_valid_settings() -> None:
    asked = {side[0] for question in QUESTIONS for side in (question.ours, question.theirs)}
    assert set(VARIANTS) <= asked
    for variant in VARIANTS.values():
        assert variant.recipe is None or (ablation_runs.ROOT / f"recipes/ablations/{variant.recipe}.yaml").is_file()


def test_the_plot_has_a_dot_for_each_row_and_a_line_for_each_finite_interval() -> None:
    drawn = interval_chart({"a<b": (0.1, -0.1, 0.3), "c": (-0.2, -math.inf, math.inf)}, "change")
    assert drawn.count("<circle") == 2 and drawn.count('stroke-width="2"') == 1
    assert "a&lt;b" in drawn and "inf" not in drawn
    centres = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    zero = float(re.search(r'<line x1="([\d.]+)" y1="24"', drawn)[1])
    assert centres[0] > zero > centres[1] and (zero - centres[1]) / (centres[0] - zero) == pytest.approx(2, abs=0.01)


# --- runs


def test_a_run_is_named_by_its_settings_and_data_not_by_their_order(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}", encoding="utf-8")
    settings = {"model": str(world / "base"), "seed": 1, "loss_table": "nce", "train_data": [{"path": str(data)}]}
    stage = Stage(settings)
    key = stage.key
    assert Stage(dict(reversed(settings.items()))).key == key
    others = {Stage(settings | {"seed": 2}).key, Stage(settings | {"loss_table": "sum"}).key}
    others |= {Stage(settings, start=stage).key, Stage(settings, start=Stage(settings | {"seed": 2})).key}
    assert len(others | {key}) == 5
    data.write_text('{"a": 1}', encoding="utf-8")
    ablation_runs.data_digest.cache_clear()
    assert Stage(settings).key not in others | {key}
    ablation_runs.data_digest.cache_clear()


def test_variants_share_a_warm_up_unless_their_setting_holds_there_already(world: Path) -> None:
    recipe = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["task_weighting"] = "none"
    study = Study(recipe, (), world, text_steps=1, warm_steps=1)
    stages = {name: study.stage(name, 0) for name in VARIANTS}
    warm = {name: stage.start.key for name, stage in stages.items()}
    own = {name for name, key in warm.items() if key != warm["base"]}
    assert own == {"mean pooling", "last token", "no audio", "text only"}
    assert len({warm[name] for name in own}) == 4
    assert stages["no audio"].start.start.key == stages["base"].start.start.key  # texts come first for both
    assert len({stage.key for stage in stages.values()}) == len(VARIANTS)
    # Of 32 pairs, 4 are sounds and 8 are texts alone: batches of 8 become 7 and 2.
    rows = {name: stages[name].settings["per_device_train_batch_size"] for name in ("base", "no audio", "text only")}
    assert rows == {"base": 8, "no audio": 7, "text only": 2}
    assert stages["NCE only"].settings["tasks"]["caption"]["loss"]["cosine"] == 0.0
    assert stages["base"].settings["tasks"]["caption"]["loss"]["cosine"] == 0.5
    assert ablations.applies(study, "STW weights") and ablations.applies(study, "no audio")
    weighted = Study(recipe | {"task_weighting": "table"}, (), world)
    assert not ablations.applies(weighted, "STW weights")  # the base is that already


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load((world / "recipe.yaml").read_text(encoding="utf-8"))  # saves every second step
    original, steps = ViPolyQwenTrainer.compute_loss, []

    def loss(self: ViPolyQwenTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ViPolyQwenTrainer, "compute_loss", loss)
    stage = Study(recipe, (), tmp_path).stage("base", 0)
    with pytest.raises(KeyboardInterrupt):
        stage.train(tmp_path)
    assert not (tmp_path / stage.key / "finished").is_file()
    stage.train(tmp_path)
    assert steps == [0, 1, 2, 3, 2, 3]
    stage.train(tmp_path)
    assert len(steps) == 6


def test_left_out_tasks_are_not_trained_and_rows_keep_their_places(world: Path) -> None:
    sources = [
        {"path": str(world / "pairs.jsonl")},
        {"path": str(world / "captions.jsonl"), "task": "caption", "columns": {"images": "picture", "b": "said"}},
    ]
    tasks = declare_tasks({"caption": {"prefix": "<caption>"}})
    pairs = load_pairs(sources, tasks, 1, without_tasks=["audio", "caption", "ocr"])
    assert pairs.task_counts() == {"text_pair": 4, "instr": 4, "vqa_single": 4, "vqa_multi": 4}
    assert len(pairs.sources) == 1 and pairs.source_lengths == [16]
    whole = load_pairs(sources[:1], tasks, 1)
    assert [pairs[row]["id"] for row in (0, 2, 15)] == [whole[row]["id"] for row in (0, 3, 22)]
    with pytest.raises(ValueError, match="unknown task 'sound'"):
        load_pairs(sources, tasks, 1, without_tasks=["sound"])
    with pytest.raises(ValueError, match="no row is left"):
        load_pairs(sources, tasks, 1, without_tasks=list(tasks))


def test_a_study_writes_its_report_and_uses_what_it_has_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []

    def train(argv: list[str]) -> None:
        trained.append(Path(argv[0]))
        if len(trained) == 3:
            raise KeyboardInterrupt  # the study is stopped in its third run
        original(argv)

    def loss(self: ViPolyQwenTrainer, model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        batches[self.args.output_dir] = inputs["ids"]
        return original_loss(self, model, inputs, **kwargs)

    batches: dict[str, list[str]] = {}
    original, original_loss = ablation_runs.train_main, ViPolyQwenTrainer.compute_loss
    monkeypatch.setattr(ablation_runs, "train_main", train)
    monkeypatch.setattr(ViPolyQwenTrainer, "compute_loss", loss)
    arguments = ["--recipe", str(world / "recipe.yaml"), "--steps", "1", "--warm_steps", "1", "--seeds", "1"]
    arguments += [
        "--variants",
        "base",
        "NCE only",
        "--output_dir",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        ablations.main()
    assert len(list((tmp_path / "runs/figures").glob("*.json"))) == 1
    ablations.main()
    assert len(trained) == 4  # a warm-up and the base, the run that was stopped, and that run again
    ablations.main()
    assert len(trained) == 4
    _, base, nce_only = batches.values()  # after the warm-up
    assert base == nce_only  # the same rows in the same order
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert figures["left_out"] == {"base": [], "NCE only": []} and set(figures["chance"]) == {
        f"{task}/all" for task in ("text_pair", "instr", "ocr", "vqa_single", "vqa_multi", "audio")
    }
    [h2] = [found for found in figures["answers"] if found["hypothesis"] == "H2"]
    assert h2["seeds"] is None and h2["verdict"] == "not shown" and h2["by_seed"] == [h2["difference"]]
    report = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| NCE only | `nce_only.yaml` | 6 of 6 |" in report and "**H2**" in report and "**H7**" not in report
    assert (tmp_path / "r.svg").read_text(encoding="utf-8").startswith("<svg xmlns")
    # The report counts the ranks that are kept.
    [run] = [
        json.loads(file.read_text())
        for file in (tmp_path / "runs/figures").glob("*.json")
        if json.loads(file.read_text())["variant"] == "base"
    ]
    assert figures["recall@1"]["base"]["ocr/all"][0] == np.mean([rank == 1 for rank in run["own"]["ranks"]["ocr/all"]])


def test_parallel_rows_tell_of_the_same_scenes_in_three_languages(tmp_path: Path) -> None:
    path = write_parallel(tmp_path, scenes=2)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    scenes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        graded = row["score"] is not None and row["score"] < 1
        scenes.setdefault((f"{row['task']}{'/graded' * graded}", row["language"]), []).append(row["scene"])
    assert len(scenes) == 8 * 3 and len({tuple(of_cell) for of_cell in scenes.values()}) == 1
    assert all((tmp_path / file).is_file() for row in rows for file in [*row["images"], row["audio"]] if file)
    with pytest.raises(ValueError, match="0 scenes; there are 240 held-out ones"):
        write_parallel(tmp_path, scenes=0)
