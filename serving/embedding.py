"""Inputs to vectors in two steps, tensors and model, so that one may run ahead; a bad input costs no other one."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from ..conversations_vipolyqwen import DEFINED_ORDER
from ..data.precision import check_dimensions, shorten

ON_ERROR = ("raise", "skip", "none")
INPUT_ERRORS = (ValueError, OSError)
PLAIN_TEXT = {"chat_template": {"plain_text": True}}  # a text is never taken for a path


@dataclass(frozen=True)
class Prepared:
    """Tensors of the good inputs of a batch.

    Attributes:
        features: input of the model; empty if no input is good.
        kept: positions of the good inputs in the batch.
        reasons: position of each bad input -> what is wrong with it.
    """

    features: Mapping[str, Any]
    kept: list[int]
    reasons: dict[int, str]

    def tokens(self) -> list[int]:
        """Returns the number of tokens of each good input; 0 for audio alone."""
        mask = self.features.get("attention_mask")
        return [0] * len(self.kept) if mask is None else mask.sum(dim=1).tolist()


@dataclass(frozen=True)
class Embedder:
    """Embeds with one prompt and one number of dimensions.

    Attributes:
        encoder: the model.
        prompt: text of the prompt, such as a task's prefix; `None` for the general embedding.
        dimensions: see `shorten`.
        processing_kwargs: as in sentence-transformers' `encode`.
        max_tokens: an input with more is an error, if the processor does not cut it; `None` for no limit.
    """

    encoder: SentenceTransformer
    prompt: str | None = None
    dimensions: int | None = None
    processing_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_dimensions(self.dimensions, self.encoder.get_embedding_dimension())

    @property
    def width(self) -> int:
        """Returns the number of components of a vector."""
        return self.dimensions or self.encoder.get_embedding_dimension()

    def prepare(self, inputs: Sequence[Callable[[], Any]]) -> Prepared:
        """Turns inputs into tensors on the CPU.

        Args:
            inputs: functions that load an input as `encode` takes it.

        Returns:
            The tensors of the inputs without error; a ValueError or OSError is the reason why one is missing.
        """
        loaded, reasons = {}, {}
        for position, load in enumerate(inputs):
            try:
                loaded[position] = load()
            except INPUT_ERRORS as error:
                reasons[position] = str(error)
        try:
            return Prepared(self._tensors(list(loaded.values())), list(loaded), reasons)
        except INPUT_ERRORS:
            for position, item in list(loaded.items()):
                try:
                    self._tensors([item])
                except INPUT_ERRORS as error:
                    reasons[position] = str(error)
                    del loaded[position]
        return Prepared(self._tensors(list(loaded.values())), list(loaded), reasons)

    def _tensors(self, inputs: list[Any]) -> Mapping[str, Any]:
        features = self.encoder.preprocess(inputs, prompt=self.prompt, processing_kwargs=dict(self.processing_kwargs))
        config = self.encoder.transformers_model.config
        if hasattr(config, "check_inputs"):  # code of models published earlier always loads all towers
            config.check_inputs(features)
        tokens = int(features["attention_mask"].sum(dim=1).max()) if "attention_mask" in features else 0
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"the input has {tokens} tokens; the limit is {self.max_tokens}: split it.")
        return features

    @torch.inference_mode()
    def vectors(self, features: Mapping[str, Any]) -> np.ndarray:
        """Returns (rows, width) float32 unit vectors of prepared inputs."""
        if not features:
            return np.zeros((0, self.width), np.float32)
        output = self.encoder(batch_to_device(dict(features), self.encoder.device))
        return shorten(output["sentence_embedding"].float().cpu().numpy(), self.dimensions)


def without_direction(vectors: np.ndarray) -> dict[int, str]:
    """Returns row -> what is wrong with each of (rows, width) vectors that cannot be compared with others."""
    norms = np.linalg.norm(vectors, axis=1)
    return {
        int(row): f"the model's vector {'is 0' if norms[row] == 0 else 'has NaN or infinite components'}, which no "
        "search can compare; try another dtype, or leave the input out."
        for row in np.flatnonzero(~(norms > 0) | ~np.isfinite(norms))
    }


@dataclass(frozen=True)
class Embeddings:
    """Vectors of N inputs.

    Attributes:
        vectors: float32 unit vectors: (N, width), a bad input's NaN; with `on_error="skip"` one for each good input.
        ok: (N,) bool, whether the input could be embedded.
        reasons: N entries, what is wrong with the input, or `None`.
    """

    vectors: np.ndarray
    ok: np.ndarray
    reasons: list[str | None]


def embed(
    encoder: SentenceTransformer,
    inputs: Sequence[Any],
    on_error: str = "raise",
    *,
    prompt_name: str | None = None,
    dimensions: int | None = None,
    batch_size: int = 32,
    processing_kwargs: Mapping[str, Any] | None = None,
) -> Embeddings:
    """Embeds inputs, some of which may be bad: N inputs give N results.

    Args:
        encoder: the model.
        inputs: anything that `encode` takes: texts, dicts of modalities, conversations.
        on_error: "raise" a ValueError that names the first bad input, "skip" bad inputs, or give them "none", NaN.
        prompt_name: prompt, such as a task's name.
        dimensions: see `shorten`.
        batch_size: inputs that pass the model together.
        processing_kwargs: as in `encode`.

    Raises:
        ValueError: an input is bad and `on_error="raise"`, or an argument is wrong.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; choose one of {', '.join(ON_ERROR)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    embedder = Embedder(encoder, prompt_of(encoder, prompt_name), dimensions, processing_kwargs or {})
    vectors = np.full((len(inputs), embedder.width), np.nan, np.float32)
    reasons: list[str | None] = [None] * len(inputs)
    items = [as_conversation(item) for item in inputs]
    for positions in _batches(items, batch_size):
        prepared = embedder.prepare([lambda item=items[position]: item for position in positions])
        found = embedder.vectors(prepared.features)
        faults = {prepared.kept[row]: reason for row, reason in without_direction(found).items()}
        for place, reason in {**prepared.reasons, **faults}.items():
            if on_error == "raise":
                raise ValueError(f"Input {positions[place]} of {len(inputs)}: {reason}")
            reasons[positions[place]] = reason
        good = [row for row, place in enumerate(prepared.kept) if place not in faults]
        vectors[[positions[prepared.kept[row]] for row in good]] = found[good]
    ok = np.array([reason is None for reason in reasons], bool)
    return Embeddings(vectors[ok] if on_error == "skip" else vectors, ok, reasons)


def as_conversation(item: Any) -> Any:
    """Returns a dict, or a decoder of audio, as a conversation, and any other input as it is.

    Of a dict sentence-transformers takes one sampling rate a batch and no bytes of audio; a part keeps both.
    """
    if hasattr(item, "get_all_samples") or (isinstance(item, Mapping) and "array" in item):
        item = {"audio": item}
    if isinstance(item, Mapping) and {"role", "content"} <= set(item):
        return [item]
    if not isinstance(item, Mapping) or not item or set(item) - set(DEFINED_ORDER):
        return item
    parts = []
    for kind in DEFINED_ORDER:
        given = item.get(kind, [])
        several = isinstance(given, (list, tuple)) and (kind != "audio" or not given)
        parts += [{"type": kind, kind: value} for value in (given if several else [given])]
    return [{"role": "user", "content": parts}]


def _batches(items: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Yields the positions of each batch: conversations apart from the rest, inputs of similar length together."""

    def is_conversation(position: int) -> bool:
        return isinstance(items[position], list)

    order = sorted(range(len(items)), key=lambda position: (is_conversation(position), -_length(items[position])))
    for _, alike in itertools.groupby(order, key=is_conversation):
        positions = list(alike)
        for first in range(0, len(positions), size):
            yield positions[first : first + size]


def _length(item: Any) -> int:
    """Returns the characters of a text, or of the parts of a conversation of one message; else 0."""
    message = item[0] if isinstance(item, list) and len(item) == 1 else None
    content = message.get("content") if isinstance(message, Mapping) else item
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return sum(len(text) for text in texts if isinstance(text, str))


def prompt_of(encoder: SentenceTransformer, name: str | None) -> str | None:
    """Returns the text of a prompt; an unknown name is a ValueError."""
    if name is None:
        return None
    if name not in encoder.prompts:
        raise ValueError(f"prompt_name is {name!r}; this model has {', '.join(encoder.prompts) or 'no prompts'}.")
    return encoder.prompts[name]
