"""Errors of the demo's model: counted by the attribute that is wrong."""

import pytest
import torch
from demo_errors import differing, errors, worst

from vipolyqwen.demo.scenes import Scene

SCENES = [Scene.from_code(f"{count}-red-star-{size}-grass") for count, size in ((1, "big"), (2, "big"), (2, "small"))]


def test_a_wrong_first_hit_names_the_attributes_that_differ() -> None:
    queries = torch.eye(3)
    candidates = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0.5, 0.2]])  # query 1 finds scene 2, query 2 scene 1
    found = errors(queries, candidates)
    assert [(row, hit) for row, hit, _ in found] == [(1, 2), (2, 1)]
    assert [lead for _, _, lead in found] == pytest.approx([0.5, 0.8])
    shares = differing([(1, 2), (0, 2)], SCENES)
    assert shares == {"count": 0.5, "colour": 0, "thing": 0, "size": 1, "place": 0, "one": 0.5}
    assert worst({"x": found, "y": [(2, 0, 0.1)]}) == [("x", 2), ("x", 1)]  # no query twice
