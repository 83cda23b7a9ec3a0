"""The body of a request to `/v1/embeddings`: what is accepted, in which bounds, and how it is refused.

The format is OpenAI's for texts; items and chat messages add images and audio. A media string is base64, a data URL
or, if allowed, an http(s) URL. It is never a path: the server opens no file that a client names.
"""

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..download_vipolyqwen import is_url

KEYS = ("model", "input", "messages", "dimensions", "encoding_format", "prompt_name", "user")
ENCODING_FORMATS = ("float", "base64")
ITEM_KEYS = ("image", "text", "audio")  # the order of the parts of an item
ROLES = ("user", "assistant")
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
WHITESPACE = dict.fromkeys(map(ord, " \t\r\n"))  # base64 comes in lines from many tools
MAX_CONTAINERS = 1_000_000  # brackets and braces of a body; an empty list takes 60 bytes of memory


class RequestError(Exception):
    """Why a request is refused.

    Attributes:
        status: HTTP status.
        message: the value, the limit and the remedy.
        param: the key that is at fault.
        code: short name for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Returns the body of the answer, as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": kind, "param": param, "code": self.code}}


@dataclass(frozen=True)
class Bounds:
    """Limits of a request; each is an option of the server.

    Attributes:
        max_inputs: inputs of a request.
        max_parts: texts, images and clips of an input.
        max_characters: characters of a text.
        allow_urls: fetch media from http(s) URLs.
    """

    max_inputs: int = 256
    max_parts: int = 64
    max_characters: int = 200_000
    allow_urls: bool = False


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request that was read.

    Attributes:
        inputs: the parts of each input, as in a message: `{"type": "image", "image": bytes or URL}`.
        prompt_name: name of a prompt, such as a task's; `None`: the general embedding.
        dimensions: components to return; `None`: all.
        encoding_format: "float" or "base64" (of little-endian float32).
    """

    inputs: list[list[dict[str, Any]]]
    prompt_name: str | None
    dimensions: int | None
    encoding_format: str


def parse_body(body: bytes) -> dict[str, Any]:
    """Parses the JSON object of a request.

    Raises:
        RequestError: it is not one.
    """
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise RequestError(400, f"The body has more than {MAX_CONTAINERS} brackets; send several requests.")
    try:
        payload = json.loads(body, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}. Send an object.") from error
    if not isinstance(payload, dict):
        raise RequestError(400, f"The body is a {type(payload).__name__}; send an object with `input`.")
    return payload


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; of a key that comes twice, one value would be dropped silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(400, f"{_short(twice)} occurs twice in an object; pass it once.", twice[:100])
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def read_request(payload: Mapping[str, Any], model: str, bounds: Bounds) -> EmbeddingRequest:
    """Reads a request; every key is used or refused.

    Args:
        payload: the JSON object.
        model: name of the model that is served.
        bounds: limits.

    Raises:
        RequestError: what is wrong.
    """
    if unknown := sorted(set(payload) - set(KEYS)):
        raise RequestError(400, f"Unknown parameters {_short(unknown)}; known: {', '.join(KEYS)}.", unknown[0][:100])
    asked = payload.get("model", model)
    if asked != model:
        raise RequestError(
            404, f"The model is {_short(asked)}; this server has {model!r}.", "model", "model_not_found"
        )
    dimensions = payload.get("dimensions")
    if dimensions is not None and (not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1):
        raise RequestError(400, f"dimensions is {_short(dimensions)}; pass a positive whole number.", "dimensions")
    return EmbeddingRequest(
        inputs=_read_inputs(payload, bounds),
        prompt_name=_text_or_none(payload, "prompt_name"),
        dimensions=dimensions,
        encoding_format=_encoding_format(payload),
    )


def _encoding_format(payload: Mapping[str, Any]) -> str:
    _text_or_none(payload, "user")  # OpenAI's mark of the end user; has no effect on vectors
    chosen = payload.get("encoding_format", "float")
    if chosen not in ENCODING_FORMATS:
        known = ", ".join(ENCODING_FORMATS)
        raise RequestError(400, f"encoding_format is {_short(chosen)}; choose one of {known}.", "encoding_format")
    return chosen


def _text_or_none(payload: Mapping[str, Any], key: str) -> str | None:
    value = payload.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(400, f"{key} is {_short(value)}; pass a string.", key)
    return value


def _read_inputs(payload: Mapping[str, Any], bounds: Bounds) -> list[list[dict[str, Any]]]:
    if ("input" in payload) == ("messages" in payload):
        raise RequestError(400, "Pass either `input` or `messages`.", "input")
    if "messages" in payload:
        return [_bounded(_from_messages(payload["messages"], bounds), "messages", bounds)]
    given = payload["input"]
    items = given if isinstance(given, list) else [given]
    if not 1 <= len(items) <= bounds.max_inputs:
        limit = f"the limits are 1 and {bounds.max_inputs}; send several requests."
        raise RequestError(400, f"input has {len(items)} inputs; {limit}", "input")
    places = [f"input[{number}]" for number in range(len(items))] if isinstance(given, list) else ["input"]
    return [
        _bounded(_from_item(item, place, bounds), place, bounds) for item, place in zip(items, places, strict=True)
    ]


def _bounded(parts: list[dict[str, Any]], place: str, bounds: Bounds) -> list[dict[str, Any]]:
    if not 1 <= len(parts) <= bounds.max_parts:
        raise RequestError(400, f"{place} has {len(parts)} parts; the limits are 1 and {bounds.max_parts}.", place)
    if sum(part["type"] == "audio" for part in parts) > 1:
        raise RequestError(400, f"{place} has several audio clips; the limit is 1: join them.", place)
    return parts


def _from_item(item: Any, place: str, bounds: Bounds) -> list[dict[str, Any]]:
    """Reads a text, or an object of `text`, `image` (one or a list) and `audio`."""
    if isinstance(item, str):
        return [_part("text", item, place, bounds)]
    if not isinstance(item, dict):
        remedy = "pass a string or an object of text, image, audio; token ids are not accepted."
        raise RequestError(400, f"{place} is {_short(item)}; {remedy}", place)
    if unknown := sorted(set(item) - set(ITEM_KEYS)):
        raise RequestError(400, f"{place} has the keys {_short(unknown)}; known: {', '.join(ITEM_KEYS)}.", place)
    parts = []
    for kind in ITEM_KEYS:
        value = item.get(kind)
        values = value if kind == "image" and isinstance(value, list) else [] if value is None else [value]
        parts += [_part(kind, value, f"{place}.{kind}", bounds) for value in values]
    return parts


def _from_messages(messages: Any, bounds: Bounds) -> list[dict[str, Any]]:
    """Reads a conversation as one input: the contents of its messages in their order."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, f"messages is {_short(messages)}; pass a list of messages.", "messages")
    parts = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RequestError(400, f"{place} is {_short(message)}; pass an object of role and content.", place)
        if message["role"] not in ROLES:
            remedy = f"pass one of {', '.join(ROLES)}, and choose a task with `prompt_name`."
            raise RequestError(400, f"{place}.role is {_short(message['role'])}; {remedy}", place)
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestError(400, f"{place}.content is {_short(content)}; pass a string or a list of parts.", place)
        for index, part in enumerate(content):
            parts.append(_from_part(part, f"{place}.content[{index}]", bounds))
    return parts


# type of a part -> key of its content, keys within that content of which the first is the source, kind of input
PART_TYPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "text": ("text", (), "text"),
    "image": ("image", (), "image"),
    "audio": ("audio", (), "audio"),
    "image_url": ("image_url", ("url", "detail"), "image"),
    "audio_url": ("audio_url", ("url",), "audio"),
    "input_audio": ("input_audio", ("data", "format"), "audio"),
}


def _from_part(part: Any, place: str, bounds: Bounds) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PART_TYPES:
        raise RequestError(400, f"{place} is {_short(part)}; `type` is one of {', '.join(PART_TYPES)}.", place)
    key, inner, modality = PART_TYPES[kind]
    if set(part) != {"type", key}:
        raise RequestError(400, f"{place} has the keys {_short(sorted(part))}; pass `type` and `{key}`.", place)
    source = part[key]
    if inner and isinstance(source, dict):
        if inner[0] not in source or set(source) - set(inner):
            known = f"{inner[0]} (and {', '.join(inner[1:])})" if inner[1:] else inner[0]
            raise RequestError(400, f"{place}.{key} has the keys {_short(sorted(source))}; pass {known}.", place)
        if source.get("detail", "auto") != "auto":
            raise RequestError(400, f"{place}.detail is {_short(source['detail'])}; only 'auto' is known.", place)
        source = source[inner[0]]
    return _part(modality, source, place, bounds)


def _part(kind: str, value: Any, place: str, bounds: Bounds) -> dict[str, Any]:
    if not isinstance(value, str):
        raise RequestError(400, f"{place} is {_short(value)}; pass a string.", place)
    if kind != "text":
        return {"type": kind, kind: _media(value, place, bounds)}
    if not value.strip():
        raise RequestError(400, f"{place} is {_short(value)}; pass a text.", place)
    if len(value) > bounds.max_characters:
        limit = f"the limit is {bounds.max_characters}: split it."
        raise RequestError(400, f"{place} has {len(value)} characters; {limit}", place)
    return {"type": "text", "text": value}


def _media(value: str, place: str, bounds: Bounds) -> bytes | str:
    """Returns the bytes of base64 or of a data URL, or an http(s) URL."""
    if is_url(value):
        if not bounds.allow_urls:
            raise RequestError(400, f"{place} is a URL; this server takes base64 or data URLs only.", place)
        return value
    header = DATA_URL.match(value[:200])
    try:
        content = base64.b64decode((value[header.end() :] if header else value).translate(WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        remedy = "pass base64 (with + and /) of the file, or data:TYPE/SUBTYPE;base64,…"
        raise RequestError(
            400, f"{place} is {_short(value)}, which is not base64 ({error}); {remedy}", place
        ) from error
    if not content:
        raise RequestError(400, f"{place} is empty; pass the bytes of a file in base64.", place)
    return content


def _encodable(text: str) -> str:
    """Returns a text with lone surrogates, which JSON can name and UTF-8 cannot hold, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def encode_vector(vector: np.ndarray, encoding_format: str) -> list[float] | str:
    """Returns a (dimensions,) float32 vector as an answer holds it."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
