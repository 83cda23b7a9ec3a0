"""Turns local pairs into searches: queries, candidates and relevance judgements, embedded by a model."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from sentence_transformers import SentenceTransformer

from ..data.collator import message_parts
from ..data.names import rename_old_keys
from ..data.schema import Content, Row, declare_tasks, present_modalities
from ..data.sources import PairDataset, content_key, load_pairs
from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .metrics import pair_search

PLAIN_TEXT = {"chat_template": {"plain_text": True}}  # processing_kwargs of sentence-transformers
MIN_AUDIO_SAMPLES = 400  # receptive field of one frame of HuBERT-base
CHUNK = 128  # sides whose images and audio are decoded at a time


@dataclass(frozen=True)
class Side:
    """One side of a pair; images and audio are decoded only when embedded or displayed.

    Attributes:
        text: with one placeholder per image, or without any.
        images: paths or contents of files.
        audio: path or content of a file, or `{"array", "sampling_rate"}`.
        placeholder: marks the place of an image in the text.
    """

    text: str = ""
    images: tuple[str | bytes, ...] = ()
    audio: Any = None
    placeholder: str = "<image>"

    @property
    def modalities(self) -> tuple[str, ...]:
        """Returns the modalities that the side has, in the order `text`, `image`, `audio`."""
        return present_modalities(self.text, self.images, self.audio)

    @property
    def kind(self) -> str:
        """Returns the modalities as one name: `text`, `image`, `audio`, or such as `text + image`."""
        return " + ".join(self.modalities)

    def key(self) -> int:
        """Returns a hash, equal for equal content."""
        media = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in self.images]
        if isinstance(self.audio, dict):
            media.append(self.audio["array"].tobytes())
        elif self.audio is not None:
            media.append(self.audio if isinstance(self.audio, bytes) else Path(self.audio).read_bytes())
        return content_key(self.text, media)

    def read_audio(self) -> dict[str, Any]:
        """Returns the decoded audio as `{"array", "sampling_rate"}`."""
        samples, rate = load_audio(self.audio)
        return {"array": samples, "sampling_rate": rate}

    def as_input(self) -> str | list[dict[str, Any]]:
        """Returns an input of sentence-transformers: a text, or a message of decoded parts in order."""
        if not self.images and self.audio is None:
            return self.text
        audio = None if self.audio is None else self.read_audio()
        images = [load_image(image) for image in self.images]
        parts = message_parts(self.text, images, audio, self.placeholder)
        return [{"role": "user", "content": parts, "keep_order": True}]


class SidePrompt(NamedTuple):
    """The prompt of a task on one side of its pairs; none if that side had no prefix in training."""

    task: str
    side: str  # a or b


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
        recipe = rename_old_keys(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        if "eval_data" not in recipe:
            raise ValueError(f"{path} has no `eval_data`; it has {sorted(recipe)}. Name the held-out pairs there.")
    tasks = declare_tasks(recipe.get("tasks"))
    return load_pairs(recipe["eval_data"], tasks, MIN_AUDIO_SAMPLES), recipe.get("nce_min_score", 0.5)


def sides_of(row: Row, placeholder: str) -> tuple[Side, Side]:
    """Returns sides a and b of a pair."""
    return side_of(row.side("a"), placeholder), side_of(row.side("b"), placeholder)


def side_of(content: Content, placeholder: str) -> Side:
    """Returns the content of a row as a side."""
    return Side(content.text, tuple(content.images), content.audio, placeholder)


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


def prefix_sides(embedder: SentenceTransformer) -> dict[str, str]:
    """Returns {task: sides that carried its prefix in training}, of `PREFIX_SIDES`, as the processor records them.

    A viPolyQwen saved before they were recorded had prefixes on side a; other models have no tasks.
    """
    processor = vars(embedder[0]).get("processor")
    settings = {} if processor is None else vars(processor)
    return dict.fromkeys(settings.get("task_prefixes", {}), "a") | settings.get("prefix_sides", {})


def prompt_name(embedder: SentenceTransformer, task: str, side: str) -> str | None:
    """Returns the name of the prompt for a side of a task's pairs, `a` or `b`; `None` if it had none in training."""
    return task if prefix_sides(embedder).get(task) in (side, "both") else None


def takes_plain_text(embedder: SentenceTransformer) -> bool:
    """Returns whether a model can be told that texts are only texts (viPolyQwen): never paths, whatever they say."""
    processor = vars(embedder[0]).get("processor")
    render = getattr(processor, "apply_chat_template", None)  # tokenizers of other models may lack one
    return render is not None and "plain_text" in inspect.signature(render).parameters


def embed(embedder: SentenceTransformer, sides: Sequence[Side], prompt_name: str | None = None) -> torch.Tensor:
    """Returns (N, D) float32 vectors; encodes texts separately, so that none is interpreted as media."""
    plain = takes_plain_text(embedder)
    options: dict[str, Any] = {"processing_kwargs": PLAIN_TEXT} if plain else {}
    groups: dict[bool, list[int]] = {}
    for place, side in enumerate(sides):
        groups.setdefault(side.kind == "text", []).append(place)
    order, vectors = [], []
    for is_text, places in groups.items():
        step = len(places) if is_text else CHUNK
        for start in range(0, len(places), step):
            inputs = [sides[place].as_input() for place in places[start : start + step]]
            inputs = [{"text": given} if plain and isinstance(given, str) else given for given in inputs]
            options |= {"prompt_name": prompt_name, "convert_to_tensor": True, "show_progress_bar": False}
            vectors.append(embedder.encode(inputs, **options))
        order += places
    return torch.cat(vectors).float().cpu()[torch.tensor(order).argsort()]
