"""Embeds held-out pairs and retrieves them within each task and language."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vipolyqwen.data.collator import MixedBatchCollator
from vipolyqwen.data.schema import Task
from vipolyqwen.data.sources import PairDataset, load_pairs
from vipolyqwen.evaluation.metrics import best_ranks, pair_search
from vipolyqwen.microbatches_vipolyqwen import length_buckets, take_rows
from vipolyqwen.modeling_vipolyqwen import ViPolyQwenModel
from vipolyqwen.training.microbatches import row_lengths

ALL = "all"  # the cell of a task's rows of every group


@dataclass(frozen=True)
class Search:
    """Queries, candidates and relevance among some pairs: the same for every model."""

    queries: list[int]
    candidates: list[int]
    is_relevant: Tensor  # (queries, candidates) bool

    @property
    def chance(self) -> float:
        """Expected recall@1 of a random order."""
        return float(self.is_relevant.float().mean())

    def ranks(self, similarities: Tensor) -> Tensor:
        """(queries,) rank of each query's best relevant candidate, from (queries, candidates) similarities."""
        return best_ranks(similarities, self.is_relevant)


def load_grouped(
    sources: Sequence[Mapping[str, Any]], group_by: str | None, tasks: Mapping[str, Task], min_samples: int
) -> tuple[PairDataset, list[str | None]]:
    """The pairs of a recipe's sources, and each row's value of the column `group_by`."""
    if group_by is not None:  # the one further column that is read of every kind of file
        sources = [{**source, "columns": {**source.get("columns", {}), "group": group_by}} for source in sources]
    pairs = load_pairs(sources, tasks, min_samples)
    return pairs, pairs.groups() if group_by is not None else [None] * len(pairs)


def load_groups(
    sources: Sequence[Mapping[str, Any]], group_by: str | Sequence[str] | None, tasks: Mapping[str, Task], samples: int
) -> tuple[PairDataset, list[str | None]]:
    """As `load_grouped`, of one column or of several, whose values are joined by a space."""
    if group_by is None or isinstance(group_by, str):
        return load_grouped(sources, group_by, tasks, samples)
    loaded = [load_grouped(sources, column, tasks, samples) for column in group_by]
    return loaded[0][0], [" ".join(map(str, values)) for values in zip(*(groups for _, groups in loaded), strict=True)]


def collate(pairs: PairDataset, collator: MixedBatchCollator, batch_size: int) -> Iterator[dict[str, Any]]:
    """All pairs in their order as batches of both sides."""
    for start in range(0, len(pairs), batch_size):
        yield collator([pairs[row] for row in range(start, min(start + batch_size, len(pairs)))])


def by_length(model: ViPolyQwenModel, batch: Mapping[str, Any]) -> Tensor:
    """Vectors of a collated batch in its order; rows of like length go through the model together."""
    microbatches = [torch.tensor(rows) for rows in length_buckets(row_lengths(batch).tolist())]
    inputs = [
        {name: value.to(model.device) for name, value in take_rows(batch, rows).items()} for rows in microbatches
    ]
    vectors = torch.cat([model(**rows).embeddings for rows in inputs])
    return torch.empty_like(vectors).index_copy(0, torch.cat(microbatches).to(vectors.device), vectors)


@torch.inference_mode()
def embed(model: ViPolyQwenModel, batches: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Vectors `a` and `b` of all pairs, (pairs, D) each, and their `a_keys`, `b_keys` and `similarity_scores`."""
    columns = defaultdict(list)
    for batch in batches:
        count = len(batch["data_type"])
        vectors = by_length(model, batch).float().cpu()
        row = {"a": vectors[:count], "b": vectors[count:]}
        for name, value in (row | {key: batch[key] for key in ("a_keys", "b_keys", "similarity_scores")}).items():
            columns[name].append(value)
    return {name: torch.cat(values) for name, values in columns.items()}


def cells(tasks: Sequence[str], groups: Sequence[str | None]) -> dict[tuple[str, str], list[int]]:
    """Rows of each (task, group), and of each task with more groups than one as (task, "all")."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row, (task, group) in enumerate(zip(tasks, groups, strict=True)):
        found[task, ALL if group is None else group].append(row)
        if group is not None:
            found[task, ALL].append(row)
    members = defaultdict(set)
    for task, group in found:
        members[task].add(group)
    lonely = {task for task, names in members.items() if len(names) == 2 and ALL in names}
    kept = {cell: rows for cell, rows in found.items() if not (cell[0] in lonely and cell[1] == ALL)}
    order = list(dict.fromkeys(tasks))
    return dict(sorted(kept.items(), key=lambda item: (order.index(item[0][0]), item[0][1] == ALL, item[0][1])))


def search(columns: Mapping[str, Tensor], rows: Sequence[int], min_score: float | None) -> Search:
    """The search over some rows: every distinct a that has a relevant b, in all distinct b of these rows."""
    index = torch.tensor(rows)
    keys = (columns[name][index] for name in ("a_keys", "b_keys", "similarity_scores"))
    queries, candidates, relevant = pair_search(*keys, min_score=min_score)
    is_relevant = torch.zeros(len(queries), len(candidates), dtype=torch.bool)
    for query, positions in enumerate(relevant):
        is_relevant[query, list(positions)] = True
    return Search([rows[i] for i in queries], [rows[i] for i in candidates], is_relevant)
