"""Reads what people pass as one input: texts and images in their order, audio, and the checks of their shape."""

import itertools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .media_vipolyqwen import LIMITS, Limits
from .waveforms_vipolyqwen import is_array_with_rate, is_samples

PART_KEYS = {
    "text": ["text"],
    "image": ["image", "url", "path", "base64", "bytes"],
    "audio": ["audio", "url", "path", "base64", "bytes"],
}
DEFINED_ORDER = {"image": 0, "text": 1, "audio": 2}
PAIR_ROLES = {"query", "document"}  # sentence-transformers' form of (a, b)


@dataclass
class EmbeddingInput:
    """One input: texts and images in their order, at most one audio clip, and the task prefix.

    Attributes:
        parts: a str is text, anything else a loaded image.
        audio: (samples,) float32 in [-1, 1], mono, at the feature extractor's sampling rate.
        prefix: the prefix token of the task; `None` gives the general embedding.
    """

    parts: list[str | Any] = field(default_factory=list)
    audio: np.ndarray | None = None
    prefix: str | None = None

    @property
    def texts(self) -> list[str]:
        """Returns the text parts."""
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def images(self) -> list[Any]:
        """Returns the image parts."""
        return [part for part in self.parts if not isinstance(part, str)]

    def check(self) -> "EmbeddingInput":
        """Returns the input; one without any part is a ValueError."""
        if not self.parts and self.audio is None:
            raise ValueError("It holds nothing to embed: pass a text, an image or audio.")
        return self


# --- text --------------------------------------------------------------------------------------------------------


def clean_text(text: Any, limits: Limits = LIMITS) -> str:
    """Normalises a text to NFC, so that equal characters give equal tokens.

    Raises:
        ValueError: it is not a string, has a lone surrogate or exceeds the limits.
    """
    if not isinstance(text, str):
        raise ValueError(f"A text is a {type(text).__name__}, {text!r:.80}; pass a string.")
    if len(text) > limits.text_characters:
        raise ValueError(
            f"The text {text[:40]!r}… has {len(text)} characters; the limit `text_characters` is "
            f"{limits.text_characters}. Split it or raise the limit."
        )
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text has a lone surrogate, {text[error.start]!r}, at position {error.start}; decode it as UTF-8."
        ) from error
    if len(text) > limits.combining_marks:
        _check_marks(text, limits)
    return unicodedata.normalize("NFC", text)


def _check_marks(text: str, limits: Limits) -> None:
    """Refuses long runs of combining marks, whose canonical order takes the square of their number."""
    limit = limits.combining_marks
    if limit and not any(map(unicodedata.combining, text[limit::limit])):  # a longer run covers one of these places
        return
    runs = (sum(1 for _ in run) for marks, run in itertools.groupby(map(unicodedata.combining, text), bool) if marks)
    longest = max(runs, default=0)
    if longest > limits.combining_marks:
        raise ValueError(
            f"The text {text[:20]!r}… has {longest} combining marks in a row; the limit `combining_marks` is "
            f"{limits.combining_marks}. Remove them or raise the limit."
        )


# --- messages ----------------------------------------------------------------------------------------------------


def read_conversations(conversation: Any) -> list[Sequence[Mapping[str, Any]]]:
    """Returns a batch of conversations, given one or a list of them.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"A conversation is a {type(conversation).__name__}, {conversation!r:.80}; pass messages.")
    if not conversation:
        raise ValueError("The batch is empty; pass at least one message or conversation.")
    batched = [isinstance(entry, (list, tuple)) for entry in conversation]
    if any(batched) and not all(batched):
        raise ValueError(f"Entry {batched.index(False)} is a message beside conversations; pass lists of messages.")
    return list(conversation) if batched[0] else [conversation]


def read_parts(messages: Sequence[Mapping[str, Any]], limits: Limits = LIMITS) -> list[tuple[str, str, Any]]:
    """Returns role, type and source of each part of a conversation, in their order (see `in_defined_order`).

    Raises:
        ValueError: a message or part has the wrong shape, or the conversation holds (a, b) or too many parts.
    """
    messages = in_defined_order(messages)
    if {message["role"] for message in messages} >= PAIR_ROLES:
        raise ValueError(
            "A pair was passed as one input, but this model embeds each input separately. Pass its two sides as "
            "two inputs; for a mix of modalities use a dict, such as {'image': [first, second], 'text': …}."
        )
    parts = [(message["role"], *part) for message in messages for part in _message_parts(message)]
    if len(parts) > limits.input_parts:
        raise ValueError(f"{len(parts)} parts in one input; the limit `input_parts` is {limits.input_parts}.")
    return parts


def in_defined_order(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Returns a conversation with its parts in the order images, text, audio unless it gives an order.

    sentence-transformers turns a dict of modalities into a message whose parts follow the keys, and equal dicts may
    differ in the order of their keys. A message of that form, one of the user with each modality in one block, is put
    into the defined order. A message that mixes them, several messages, and a message with `"keep_order": True` keep
    their order.

    Raises:
        ValueError: a message or part has the wrong shape.
    """
    messages = [inner for message in messages for inner in _unwrap_messages(message)]
    for number, message in enumerate(messages):
        _check_message(message, number)
    spoken = [message for message in messages if message["role"] != "system"]
    if len(spoken) != 1 or spoken[0]["role"] != "user" or spoken[0].get("keep_order"):
        return messages
    content = spoken[0]["content"]
    if isinstance(content, str) or len(content) == 1:
        return messages
    blocks = [kind for kind, _ in itertools.groupby(content, key=lambda part: _part_content(part)[0])]
    if len(blocks) != len(set(blocks)):
        return messages
    ordered = sorted(content, key=lambda part: DEFINED_ORDER[part["type"]])
    return [{**message, "content": ordered} if message is spoken[0] else message for message in messages]


def _unwrap_messages(message: Any) -> Sequence[Any]:
    """Returns the messages of a conversation that sentence-transformers, beside other inputs, made a part of one."""
    content = message.get("content") if _is_mapping(message) else None
    if isinstance(content, list) and len(content) == 1 and _is_mapping(content[0]):
        inner = content[0].get("message") if content[0].get("type") == "message" else None
        if isinstance(inner, (list, tuple)):
            return inner
    return [message]


def _is_mapping(value: Any) -> bool:
    """Returns whether a value is a mapping; the test of the type alone, true of most, costs a tenth of the other."""
    return type(value) is dict or isinstance(value, Mapping)


MESSAGE_KEYS = (("role", str, "a string"), ("content", (str, list, tuple), "a string or a list of parts"))


def _check_message(message: Any, number: int) -> None:
    if not _is_mapping(message):
        raise ValueError(f"Message {number} is a {type(message).__name__}, {message!r:.80}; pass a dict.")
    for key, kinds, shown in MESSAGE_KEYS:
        if not isinstance(message.get(key), kinds):
            raise ValueError(
                f"Message {number} has the {key} {message.get(key)!r:.80}; pass {shown}, such as "
                "{'role': 'user', 'content': [{'type': 'text', 'text': …}]}."
            )


def _message_parts(message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    content = message["content"]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind, source = _part_content(part)
        if kind == "image" and isinstance(source, (list, tuple)):
            yield from (("image", image) for image in source)
        else:
            yield kind, source


def _part_content(part: Any) -> tuple[str, Any]:
    """Returns the type of a message part and its content."""
    if type(part) is dict and len(part) == 2 and part.get("type") == "text" and "text" in part:
        return "text", part["text"]  # nothing else to check
    if not _is_mapping(part):
        raise ValueError(f"A message part is a {type(part).__name__}, {part!r:.80}; pass a dict with its type.")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in PART_KEYS:
        raise ValueError(f"A message part of type {kind!r:.40}; this model takes text, image and audio parts.")
    others = [key for key in PART_KEYS if key != kind and part.get(key) is not None]
    if others:
        raise ValueError(
            f"A part of type {kind} also has {', '.join(others)}, which would be ignored; make it a part."
        )
    keys = [key for key in PART_KEYS[kind] if key in part]
    if not keys:
        given = ", ".join(map(str, part))
        raise ValueError(f"A {kind} part with {given:.80} only; it needs one of {', '.join(PART_KEYS[kind])}.")
    return kind, part[keys[0]] if kind == "text" else _only_source(part, kind, keys)


def _only_source(part: Mapping[str, Any], kind: str, keys: list[str]) -> Any:
    """Returns the source of an image or audio part; of bytes and path, as the Hub stores them, the bytes."""
    given = [key for key in keys if part[key] is not None]
    if not given:
        raise ValueError(f"An {kind} part whose {keys[0]} is None; leave it out.")
    if len(given) > 1 and set(given) != {"path", "bytes"}:
        raise ValueError(f"An {kind} part has {' and '.join(given)}; pass one of them, or a part for each.")
    return part[given[-1]]


def join_clips(clips: list[Any]) -> Any:
    """Returns the clip of an input, `None` without one.

    Raises:
        ValueError: the input has several.
    """
    if is_array_with_rate(clips):  # sentence-transformers takes (array, rate) apart
        return tuple(clips)
    if len(clips) > 1:
        raise ValueError(f"{len(clips)} audio clips in one input; the limit is 1. Join them or embed each alone.")
    return clips[0] if clips else None


# --- arguments of a call -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Arguments of a call, one entry an input; `None` where an argument was not passed.

    Attributes:
        size: number of inputs.
        texts: texts.
        images: images of each input.
        clips: clip of each input.
    """

    size: int
    texts: Sequence[Any] | None
    images: list[list[Any]] | None
    clips: list[Any] | None

    def row(self, number: int) -> tuple[Sequence[Any], list[Any], Any]:
        """Returns the texts (one or none), images and clip of an input."""
        texts = [] if self.texts is None else self.texts[number : number + 1]
        return texts, self.images[number] if self.images else [], self.clips[number] if self.clips else None


def read_columns(text: Any, images: Any, audio: Any) -> Columns:
    """Arranges the arguments of a call as one entry an input.

    Raises:
        ValueError: they hold nothing or differ in length.
    """
    if text is None and images is None and audio is None:
        raise ValueError("The inputs hold nothing to embed: pass `text`, `images` or `audio`.")
    texts = text if text is None or isinstance(text, (list, tuple)) else [text]
    image_lists = nest_images(images, None if texts is None else len(texts))
    given = {"text": texts, "images": image_lists, "audio": as_batch(audio)}
    sizes = {name: len(column) for name, column in given.items() if column is not None}
    size = next(iter(sizes.values()))
    for name, entries in sizes.items():
        if entries != size:
            raise ValueError(f"`{name}` has {entries} entries for a batch of {size}; give one entry an input.")
    if size == 0:
        raise ValueError("The batch is empty; pass at least one input.")
    return Columns(size, *given.values())


def as_batch(audio: Any) -> list[Any] | None:
    """Returns `audio` as one clip an input."""
    if audio is None or (isinstance(audio, (list, tuple)) and not is_samples(audio) and not is_array_with_rate(audio)):
        return audio if audio is None else list(audio)
    return [audio]


def nest_images(images: Any, texts: int | None) -> list[list[Any]] | None:
    """Arranges `images` as one list an input."""
    if images is None:
        return None
    if not isinstance(images, (list, tuple)):
        images = [images]
    nested = any(isinstance(entry, (list, tuple)) for entry in images)
    if texts == 1 and not nested:
        return [[image for image in images if image is not None]]
    if not nested and texts is not None and texts != len(images):
        raise ValueError(
            f"{len(images)} images for {texts} texts: pass a list of lists to say which images belong to which text."
        )
    return [as_list(entry) for entry in images]


def as_list(entry: Any) -> list[Any]:
    """Returns `entry` as a list; [] for `None`."""
    if entry is None:
        return []
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


__all__ = [
    "Columns",
    "EmbeddingInput",
    "as_batch",
    "as_list",
    "clean_text",
    "in_defined_order",
    "join_clips",
    "nest_images",
    "read_columns",
    "read_conversations",
    "read_parts",
]
