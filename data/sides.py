"""Sides of pairs as inputs of a sentence-transformers model, and their vectors."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ..images_vipolyqwen import load_image
from ..waveforms_vipolyqwen import load_audio
from .collator import message_parts
from .schema import Content, Row, present_modalities
from .sources import content_key

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


def sides_of(row: Row, placeholder: str) -> tuple[Side, Side]:
    """Returns sides a and b of a pair."""
    return side_of(row.side("a"), placeholder), side_of(row.side("b"), placeholder)


def side_of(content: Content, placeholder: str) -> Side:
    """Returns the content of a row as a side."""
    return Side(content.text, tuple(content.images), content.audio, placeholder)


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


def embed(
    embedder: SentenceTransformer, sides: Sequence[Side], prompt_name: str | None = None, batch_size: int = 32
) -> torch.Tensor:
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
            options["batch_size"] = batch_size
            vectors.append(embedder.encode(inputs, **options))
        order += places
    return torch.cat(vectors).float().cpu()[torch.tensor(order).argsort()]


def encoder_of(model: str, batch_size: int = 32) -> tuple[Callable[[Sequence[Side], str, str], np.ndarray], str]:
    """Loads a sentence-transformers model.

    Args:
        model: a folder or the id of one.
        batch_size: inputs that pass the model together.

    Returns:
        A function of sides, their task and "a" or "b" -> (N, D) float32 vectors, with the prompts of training; and
        the name of the model with the state of its files, which tells whether vectors on disk are of it.
    """
    embedder = SentenceTransformer(model, trust_remote_code=True)

    def encode(sides: Sequence[Side], task: str, side: str) -> np.ndarray:
        return embed(embedder, sides, prompt_name(embedder, task, side), batch_size).numpy()

    weights = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return encode, repr((model, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]))
