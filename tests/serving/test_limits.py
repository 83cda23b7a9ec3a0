import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from vipolyqwen.serve_vipolyqwen import read_options
from vipolyqwen.serving.limits import LimitLoad, Load


async def echo(scope: dict, receive: Callable[[], Awaitable[dict]], send: Callable[[dict], Awaitable[None]]) -> None:
    message = await receive()
    await asyncio.sleep(0.02)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


async def call(
    app: LimitLoad, chunks: list[bytes], length: int | None = None, seconds: float = 0.0, path: str = "/v1/embeddings"
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Status, body and headers of the answer to a POST whose body comes in chunks, each after so many seconds."""
    messages: Iterator[dict] = iter(
        [{"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)]
        or [{"type": "http.disconnect"}]
    )
    sent: list[dict[str, Any]] = []

    async def receive() -> dict:
        await asyncio.sleep(seconds)
        return next(messages)

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    await app({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
    if not sent:
        return 0, b"", {}
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def limited(**load: Any) -> LimitLoad:
    return LimitLoad(echo, Load(**{"max_body": 10, **load}), {"x-model": "tiny", "x-model-fingerprint": "00"})


def test_a_body_within_the_limits_reaches_the_application() -> None:
    status, body, headers = asyncio.run(call(limited(), [b"01234", b"56789"]))
    assert (status, body, headers[b"x-model-fingerprint"]) == (200, b"0123456789", b"00")


def test_a_large_body_is_refused_by_its_header_or_while_it_is_read() -> None:
    for answer in (call(limited(), [b""], length=11), call(limited(), [b"01234", b"56789", b"!"], length=3)):
        status, body, headers = asyncio.run(answer)
        assert status == 413 and "10 bytes" in json.loads(body)["error"]["message"] and headers[b"x-model"] == b"tiny"


def test_a_slow_body_is_refused() -> None:
    status, body, _ = asyncio.run(call(limited(body_seconds=0.05), [b"0"] * 9, seconds=0.02))
    assert status == 408 and "0.05" in json.loads(body)["error"]["message"]


def test_more_requests_or_bytes_than_allowed_at_once_are_refused() -> None:
    async def together(app: LimitLoad, count: int) -> list[int]:
        return sorted([status for status, _, _ in await asyncio.gather(*(call(app, [b"0123"]) for _ in range(count)))])

    app = limited(max_requests=2)
    assert asyncio.run(together(app, 5)) == [200, 200, 429, 429, 429]
    assert asyncio.run(together(app, 2)) == [200, 200]
    app = limited(max_pending=9)
    assert asyncio.run(together(app, 3)) == [200, 200, 429]
    assert asyncio.run(together(app, 2)) == [200, 200]
    assert (app.requests, app.bytes) == (0, 0)


def test_a_client_that_leaves_frees_its_place() -> None:
    app = limited()
    assert asyncio.run(call(app, []))[0] == 0
    assert (app.requests, app.bytes) == (0, 0)


def test_a_complete_body_that_is_too_large_is_not_waited_for() -> None:
    status, _, _ = asyncio.run(call(limited(body_seconds=60), [b"0123456789!"]))
    assert status == 413


def test_a_client_that_does_not_read_its_answer_frees_its_place() -> None:
    async def stall(message: dict) -> None:
        await asyncio.sleep(60)

    async def ask(app: LimitLoad) -> None:
        body = {"type": "http.request", "body": b"0", "more_body": False}
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}
        await app(scope, lambda: asyncio.sleep(0, body), stall)

    app = limited(body_seconds=0.05)
    asyncio.run(asyncio.wait_for(ask(app), 5))
    assert (app.requests, app.bytes) == (0, 0)


@pytest.mark.parametrize(
    "flags", [["--port", "80"], ["--port", "0"], ["--max_requests", "0"], ["--timeout", "-1"], ["--towers", "image"]]
)
def test_options_that_cannot_serve_are_refused_at_once(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        read_options(["MODEL", *flags])
    assert f"{flags[0]} is {flags[1]}" in capsys.readouterr().err
