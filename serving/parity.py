"""Do the vectors of a server match the published ones? Golden inputs over HTTP, in OpenAI's format."""

import base64
import io
import json
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import soundfile

from ..fingerprint_vipolyqwen import Finding, Measured, compare_vector, golden_inputs, vector_finding

SECONDS = 60  # of an answer


def compare_server(url: str, published: Measured, processor: Any, limit: float) -> list[Finding]:
    """Embeds the golden inputs on a server and compares them with the fingerprint.

    Args:
        url: base of the API, such as `http://127.0.0.1:8000/v1`.
        published: the fingerprint.
        processor: processor of the repository.
        limit: of 1 - cosine.

    Returns:
        A note about the served model, one finding a kind of input about its worst vector, and a note for each input
        that the server refuses (4xx).

    Raises:
        OSError: the server does not answer, or fails.
    """
    model = served_model(url)
    findings = [Finding("server", "note", f"{url} serves {model!r}")]
    worst: dict[str, tuple[float, str]] = {}
    has_audio = any(name.startswith("audio: ") for name in published.vectors)
    for name, arguments in golden_inputs(processor, has_audio).items():
        if name not in published.vectors:
            continue
        kind = name.split(": ")[0]
        try:
            vector = ask(url, {"model": model, **golden_request(arguments)})
        except HTTPError as error:
            if error.code >= 500:
                raise
            findings.append(
                Finding(f"{kind}, refused", "note", f"{name!r} is answered {error.code}: {_reason(error)}")
            )
            continue
        found = compare_vector(name, vector, published)
        worst[kind] = min(worst.get(kind, found), found)
    return [*findings, *(vector_finding(kind, found, limit) for kind, found in worst.items())]


def golden_request(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns a golden input as a request; a text alone is plain text, which every server takes."""
    item: dict[str, Any] = {}
    if "images" in arguments:
        file = io.BytesIO()
        arguments["images"][0][0].save(file, "PNG")
        item["image"] = base64.b64encode(file.getvalue()).decode()
    if "text" in arguments:
        item["text"] = arguments["text"][0]
    if "audio" in arguments:
        clip, file = arguments["audio"][0], io.BytesIO()
        soundfile.write(file, clip["array"], clip["sampling_rate"], format="WAV", subtype="FLOAT")
        item["audio"] = base64.b64encode(file.getvalue()).decode()
    request = {"input": item["text"] if set(item) == {"text"} else item}
    return {**request, "prompt_name": arguments["task"]} if "task" in arguments else request


def ask(url: str, payload: dict[str, Any]) -> np.ndarray:
    """Returns the vector that a server gives for one input, (dimensions,) float32.

    Raises:
        HTTPError: the server refuses the input.
        OSError: it does not answer as an embeddings server does.
    """
    answer = _fetch(url, "embeddings", json.dumps(payload).encode())
    return np.array(_first(answer, "embedding", url), np.float32)


def served_model(url: str) -> str:
    """Returns the name of the first model that a server lists.

    Raises:
        OSError: it does not answer as an embeddings server does.
    """
    return _first(_fetch(url, "models", None), "id", url)


def _fetch(url: str, path: str, body: bytes | None) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The URL is {url!r}; write http://HOST:PORT/v1.")
    request = Request(f"{url.rstrip('/')}/{path}", body, {"content-type": "application/json"})
    with urlopen(request, timeout=SECONDS) as answer:
        return answer.read()


def _first(content: bytes, key: str, url: str) -> Any:
    """Returns a value of the first entry of an answer."""
    try:
        return json.loads(content)["data"][0][key]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise OSError(f"{url} answers {content[:80]!r}, which has no {key!r}; is it an OpenAI API?") from error


def _reason(error: HTTPError) -> str:
    return error.read(300).decode("utf-8", "replace")
