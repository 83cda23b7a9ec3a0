import base64
import json
from typing import Any

import numpy as np
import pytest

from vipolyqwen.serving.requests import Bounds, RequestError, encode_vector, parse_body, read_request

PNG = base64.b64encode(b"\x89PNG").decode()


def read(payload: dict[str, Any], **bounds: Any) -> list[list[dict[str, Any]]]:
    return read_request(payload, "tiny", Bounds(**bounds)).inputs


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("a", [[("text", "a")]]),
        (["a", "b"], [[("text", "a")], [("text", "b")]]),
        ({"text": "a"}, [[("text", "a")]]),
        ([{"image": PNG}, "a"], [[("image", b"\x89PNG")], [("text", "a")]]),
        (
            {"audio": PNG, "text": "a", "image": [PNG, PNG]},
            [[("image", b"\x89PNG")] * 2 + [("text", "a"), ("audio", b"\x89PNG")]],
        ),
        ({"image": f"data:image/png;base64,{PNG}"}, [[("image", b"\x89PNG")]]),
        ({"image": f"DATA:Image/PNG;charset=x;BASE64,{PNG}"}, [[("image", b"\x89PNG")]]),
        ({"image": f"data:;base64,{PNG}"}, [[("image", b"\x89PNG")]]),
        ({"image": f" {PNG[:4]}\r\n{PNG[4:]}\n"}, [[("image", b"\x89PNG")]]),
    ],
)
def test_inputs(given: Any, parts: list) -> None:
    assert [[(part["type"], part[part["type"]]) for part in item] for item in read({"input": given})] == parts


def test_messages_are_one_input_in_their_order() -> None:
    content = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "auto"}},
        {"type": "image", "image": PNG},
        {"type": "input_audio", "input_audio": {"data": PNG, "format": "wav"}},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    (parts,) = read({"messages": messages})
    assert [part["type"] for part in parts] == ["text", "image", "image", "audio", "text"]


def test_urls_are_refused_unless_they_are_allowed() -> None:
    for url in ("https://example.org/a.png", "HTTP://example.org/a.png"):
        payload = {"input": {"image": url}}
        with pytest.raises(RequestError, match="URL"):
            read(payload)
        assert read(payload, allow_urls=True) == [[{"type": "image", "image": url}]]


TEXT = {"role": "user", "content": "a"}


def said(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("payload", "status", "words"),
    [
        ({}, 400, ["input", "messages"]),
        ({"input": "a", "messages": [TEXT]}, 400, ["input", "messages"]),
        ({"input": "a", "model": "other"}, 404, ["other", "tiny"]),
        ({"input": "a", "model": ["x"]}, 404, ["x", "tiny"]),
        ({"input": "a", "dimension": 5}, 400, ["dimension", "dimensions"]),
        ({"input": "a", "dimensions": 0}, 400, ["dimensions", "0"]),
        ({"input": "a", "dimensions": True}, 400, ["dimensions", "True"]),
        ({"input": "a", "encoding_format": "hex"}, 400, ["hex", "base64"]),
        ({"input": "a", "encoding_format": ["float"]}, 400, ["float", "base64"]),
        ({"input": "a", "prompt_name": 3}, 400, ["prompt_name", "3"]),
        ({"input": "a", "user": 3}, 400, ["user", "3"]),
        ({"input": []}, 400, ["0 inputs", "256"]),
        ({"input": ["a"] * 257}, 400, ["257", "256"]),
        ({"input": [1, 2, 3]}, 400, ["input[0]", "token ids"]),
        ({"input": None}, 400, ["input", "None"]),
        ({"input": " "}, 400, ["input", "' '"]),
        ({"input": "a" * 200_001}, 400, ["200001", "200000"]),
        ({"input": {}}, 400, ["0 parts"]),
        ({"input": {"video": PNG}}, 400, ["video", "audio"]),
        ({"input": {"image": "/etc/passwd"}}, 400, ["/etc/passwd", "base64"]),
        ({"input": {"image": "file:///etc/passwd"}}, 400, ["file:///etc/passwd", "base64"]),
        ({"input": {"image": {"path": "/etc/passwd"}}}, 400, ["/etc/passwd", "string"]),
        ({"input": {"image": ""}}, 400, ["image", "empty"]),
        ({"input": {"image": [PNG] * 65}}, 400, ["65", "64"]),
        ({"input": {"audio": [PNG, PNG]}}, 400, ["audio", "string"]),
        ({"messages": []}, 400, ["messages"]),
        ({"messages": "a"}, 400, ["messages", "'a'"]),
        ({"messages": [{"role": "user"}]}, 400, ["messages[0]", "content"]),
        ({"messages": [{"role": "system", "content": "<ocr>"}]}, 400, ["system", "prompt_name"]),
        ({"messages": [{"role": ["user"], "content": "a"}]}, 400, ["role", "prompt_name"]),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, 400, ["content"]),
        (said({"type": "video"}), 400, ["video", "image_url"]),
        (said({"type": ["text"]}), 400, ["type", "text"]),
        (said({"type": "text", "text": "a", "b": 1}), 400, ["'b'"]),
        (said({"type": "image_url", "image_url": {"uri": PNG}}), 400, ["uri"]),
        (said({"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}), 400, ["detail", "low"]),
        (said({"type": "audio", "audio": PNG}, {"type": "audio", "audio": PNG}), 400, ["several", "1"]),
    ],
)
def test_refusals_name_value_and_remedy(payload: dict, status: int, words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        read(payload)
    assert error.value.status == status
    assert all(word in error.value.message for word in words), error.value.message
    assert len(error.value.message) < 500


BODIES = {
    b"": "JSON",
    b"{": "JSON",
    b"[]": "list",
    b"\xff": "JSON",
    b"[" * 100_000: "JSON",
    b"[" + b"[]," * 1_000_001: "1000000 brackets",
    b'{"input": ' + b"9" * 5000 + b"}": "JSON",
    b'{"input": "a", "dimensions": NaN}': "NaN",
    b'{"input": "a", "user": -Infinity}': "-Infinity",
    b'{"input": "a", "input": "b"}': "'input' occurs twice",
    b'{"input": {"text": "a", "text": "b"}}': "'text' occurs twice",
    b'{"\\ud800": 1, "input": "a"}': "ud800",
    b'{"input": {"\\ud800": 1}}': "ud800",
}


@pytest.mark.parametrize("body", BODIES, ids=BODIES.get)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as error:
        read_request(parse_body(body), "tiny", Bounds())
    assert error.value.status == 400 and BODIES[body] in error.value.message
    assert len(json.dumps(error.value.body(), ensure_ascii=False).encode()) < 600


def test_vectors_are_written_exactly() -> None:
    vector = np.array([0.1, -2.5e-8, 1.0], np.float32)
    assert np.array_equal(np.float32(json.loads(json.dumps(encode_vector(vector, "float")))), vector)
    assert np.array_equal(np.frombuffer(base64.b64decode(encode_vector(vector, "base64")), "<f4"), vector)
