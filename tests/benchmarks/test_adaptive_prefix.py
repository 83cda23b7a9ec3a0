"""Heads against the rule: a head that knows a source by its style fails when that source is left out."""

import numpy as np
from adaptive_prefix import Inputs, measure

TEXTS = {"text_pair": "A man is playing.", "instr": "Write a poem."}


def inputs(rows: list[tuple[str, str, list[float]]]) -> Inputs:
    """Rows of task, source and vector; the rule takes all for `text_pair`."""
    tasks, groups, vectors = (np.array(column) for column in zip(*rows, strict=True))
    return Inputs([TEXTS[task] for task in tasks], tasks, np.full(len(rows), "text_pair"), groups, vectors)


def test_a_task_shows_in_vectors_across_sources_or_only_within_them() -> None:
    across = [("text_pair", "s1", [1.0, 0.0]), ("text_pair", "s2", [0.9, 0.1])]
    across += [("instr", "s3", [0.0, 1.0]), ("instr", "s4", [0.1, 0.9])]
    found = measure(inputs(across * 3), inputs(across))
    assert found["rule"] == {"instr": 0.0, "text_pair": 1.0, "mean": 0.5}
    for head in ("centroid", "logistic"):
        assert found[head] == found[f"{head}, sources left out"] == {"instr": 1.0, "text_pair": 1.0, "mean": 1.0}
    within = [("text_pair", "s1", [1.0, 0.0]), ("instr", "s2", [0.0, 1.0]), ("instr", "s3", [0.9, 0.1])]
    within += [("text_pair", "s4", [0.1, 0.9])]
    found = measure(inputs(within * 3), inputs(within))
    assert found["centroid, sources left out"]["mean"] == 0.0
    assert found["groups"]["centroid, left out"] == {"s1": 0.0, "s2": 0.0, "s3": 0.0, "s4": 0.0}


def test_without_vectors_only_characters_and_the_rule_are_measured() -> None:
    rows = inputs([("text_pair", "s1", [0.0]), ("instr", "s2", [0.0])] * 3)
    rows.vectors = None
    assert {"rule", "ngrams"} <= measure(rows, rows).keys()
    assert not {"centroid", "logistic"} & measure(rows, rows).keys()


def test_nothing_is_left_out_without_groups() -> None:
    rows = inputs([("text_pair", "None", [1.0, 0.0]), ("instr", "None", [0.0, 1.0])] * 3)
    assert measure(rows, rows).keys() == {"rows", "rule", "centroid", "logistic", "ngrams"}
