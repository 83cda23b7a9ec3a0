"""The study of the sides of the prefix: its scales of scores, and its page from figures known by hand."""

import math
from pathlib import Path
from typing import Any

import prefix_sides
import pytest
import torch
from prefix_sides import TASK, demo_texts, graded_rows, held_out, report

NAN = math.nan


def test_rho_is_measured_within_scales_of_enough_graded_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_sides, "FEWEST_GRADED", 3)
    scores = torch.tensor([0.1, 0.9, 0.5, NAN, 1.0, 0.0, 1.0, 0.2, 0.4])
    groups = ["sts", "sts", "sts", "sts", "binary", "binary", "binary", "few", "few"]
    assert {name: rows.tolist() for name, rows in graded_rows(scores, groups).items()} == {"sts": [0, 1, 2]}
    with pytest.raises(ValueError, match="3 graded pairs of more than two scores"):
        graded_rows(scores[4:], groups[4:])


def test_the_demo_texts_are_pairs_without_media_graded_in_part(tmp_path: Path) -> None:
    recipe = demo_texts(tmp_path)
    pairs, groups = held_out(recipe, None)
    assert pairs.task_counts() == {TASK: len(groups)}
    scores = torch.tensor([NAN if pairs[row]["score"] is None else pairs[row]["score"] for row in range(len(pairs))])
    assert len(graded_rows(scores, groups)["all"]) >= 160


def test_the_page_compares_trainings_with_the_prefix_on_both_sides() -> None:
    runs: list[dict[str, Any]] = []
    for seed, (both, a, none) in enumerate([(0.7, 0.6, 0.5), (0.8, 0.8, 0.4)]):
        for trained, rho in (("both", both), ("a", a), ("none", none)):
            runs.append({"trained": trained, "seed": seed, "spearman": {"both": rho, "a": rho - 0.1, "none": 0.0}})
    settings = {"pairs": {"sts": 10}, "steps": 1, "batch_size": 2, "minutes": 1, "machine": "x", "command": "y"}
    page = report({"runs": runs, **settings})
    assert "| both sides | 0.750 ± 0.071 | 0.650 ± 0.071 | 0.000 ± 0.000 | +0.000 ± 0.000 |" in page
    assert "| side a | 0.700 ± 0.141 | 0.600 ± 0.141 | 0.000 ± 0.000 | -0.150 ± 0.071 |" in page
