"""Turns local pairs into searches: queries, candidates and relevance judgements, embedded by a model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from ..data.names import rename_old_keys
from ..data.schema import Row, declare_tasks, with_ready_tasks
from ..data.sides import MIN_AUDIO_SAMPLES, Side, embed, prompt_name, sides_of
from ..data.sources import PairDataset, load_pairs
from ..data.yaml_files import read_yaml
from .metrics import pair_search


@dataclass(frozen=True)
class Search:
    """Queries, candidates and relevance judgements.

    Attributes:
        task: the task of the pairs.
        queries: distinct, each with at least one relevant candidate.
        candidates: distinct.
        relevant: per query the positions of its relevant candidates.
        side_a: `queries` or `candidates`, whichever is side a of the pairs; prompts stand on the sides of training.
    """

    task: str
    queries: list[Side]
    candidates: list[Side]
    relevant: list[set[int]]
    side_a: str = "queries"

    def embed_queries(self, embedder: SentenceTransformer, sides: Sequence[Side] | None = None) -> torch.Tensor:
        """Returns (Q, D) vectors of the queries, or of variants of them, with their prompt."""
        return embed(embedder, self.queries if sides is None else sides, self._prompt(embedder, "queries"))

    def embed_candidates(self, embedder: SentenceTransformer) -> torch.Tensor:
        """Returns (C, D) vectors of the candidates, with their prompt."""
        return embed(embedder, self.candidates, self._prompt(embedder, "candidates"))

    def _prompt(self, embedder: SentenceTransformer, name: str) -> str | None:
        return prompt_name(embedder, self.task, "a" if name == self.side_a else "b")


def read_pairs(path: Path) -> tuple[PairDataset, float | None]:
    """Reads the pairs of a file or of a recipe's `eval_data`, and the lowest relevant score (None: no limit).

    Raises:
        ValueError: the recipe has no `eval_data`.
    """
    recipe: Mapping[str, Any] = {"eval_data": [{"path": str(path)}]}
    if path.suffix in (".yaml", ".yml"):
        recipe = rename_old_keys(read_yaml(path), str(path))
        if "eval_data" not in recipe:
            raise ValueError(f"{path} has no `eval_data`; it has {sorted(recipe)}. Name the held-out pairs there.")
    tasks = declare_tasks(with_ready_tasks(recipe.get("tasks"), recipe["eval_data"]))
    bad = {name: recipe[name] for name in ("on_bad_row", "max_bad_rows", "check_media") if name in recipe}
    return load_pairs(recipe["eval_data"], tasks, MIN_AUDIO_SAMPLES, **bad), recipe.get("nce_min_score", 0.5)


def read_sides(pairs: PairDataset) -> Iterator[tuple[Row, Side, Side]]:
    """Yields every row with its two sides."""
    ends = [0, *pairs.ends]
    for number, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        placeholder = pairs.sources[pairs.piece_sources[number]].image_placeholder
        for index in range(start, end):
            row = pairs.row(index)
            yield row, *sides_of(row, placeholder)


def searches(pairs: PairDataset, min_score: float | None, text_asks: bool = False) -> list[Search]:
    """Builds one search per task: each distinct side a with a relevant side b searches all distinct sides b.

    Args:
        pairs: the rows.
        min_score: a pair scored below is not relevant, but its sides stay candidates; None: all pairs are relevant.
        text_asks: swaps the sides of a task whose side a has no text but whose side b has, such as audio and its
            transcript.
    """
    rows: dict[str, list[tuple[Row, Side, Side]]] = {}
    for row, a, b in read_sides(pairs):
        rows.setdefault(row.task, []).append((row, a, b))
    found = (
        _search(task, group, min_score, swapped=text_asks and _only_b_has_text(group)) for task, group in rows.items()
    )
    return [search for search in found if search is not None]


def _only_b_has_text(rows: list[tuple[Row, Side, Side]]) -> bool:
    return any("text" in b.modalities for _, _, b in rows) and not any("text" in a.modalities for _, a, _ in rows)


def _search(task: str, rows: list[tuple[Row, Side, Side]], min_score: float | None, swapped: bool) -> Search | None:
    """Builds the search of one task; `None` if no pair is relevant."""
    scores = torch.tensor([math.nan if row.score is None else row.score for row, _, _ in rows])
    if min_score is not None and (scores < min_score).all():
        return None
    asking, found = ([pair[place] for pair in rows] for place in ((2, 1) if swapped else (1, 2)))
    keys = (torch.tensor([side.key() for side in sides]) for sides in (asking, found))
    queries, candidates, relevant = pair_search(*keys, scores, min_score)
    side_a = "candidates" if swapped else "queries"
    return Search(task, [asking[i] for i in queries], [found[i] for i in candidates], relevant, side_a)
