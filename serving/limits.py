"""Bounds on what clients can make the server hold, requests, bytes and seconds: an ASGI middleware."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .requests import RequestError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Load:
    """Limits of what is in progress at once; each is an option of the server.

    Attributes:
        max_requests: requests in progress; more are answered 429.
        max_body: bytes of a body; more are answered 413.
        max_pending: bytes of all bodies in progress; more are answered 429.
        body_seconds: time to send a body, beyond which the answer is 408, and to read an answer.
    """

    max_requests: int = 128
    max_body: int = 32 * 2**20
    max_pending: int = 512 * 2**20
    body_seconds: float = 30.0


@dataclass
class _Reading:
    """The body of one request: bytes that count towards those in progress, and whether it is complete."""

    held: int = 0
    complete: bool = False


class LimitLoad:
    """Answers what exceeds the limits, reads bodies completely, and adds headers to every answer."""

    def __init__(self, app: Application, load: Load, headers: dict[str, str]) -> None:
        self.app, self.load = app, load
        self.headers = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self.requests = self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a connection; only HTTP requests are counted."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self.headers]}
            async with asyncio.timeout(self.load.body_seconds):
                await send(message)

        if scope["method"] in ("GET", "HEAD") and scope["path"] != "/health":  # answered from memory
            await self.app(scope, receive, send_with_headers)
            return
        reading = _Reading()
        self.requests += 1
        try:
            body = await self._read(scope, receive, reading)
            await self.app(scope, _replay(body, receive), send_with_headers)
        except RequestError as error:
            if error.status != 408:
                await self._discard(receive, reading)
            await _answer(error, send_with_headers)
        except (ConnectionError, TimeoutError):
            pass  # the client left while it sent the body, or does not read its answer: nobody to answer
        finally:
            self.requests -= 1
            self.bytes -= reading.held

    async def _read(self, scope: Scope, receive: Receive, reading: _Reading) -> bytes:
        """Returns the body; raises a `RequestError` if it exceeds a limit."""
        load = self.load
        if self.requests > load.max_requests:
            raise RequestError(429, f"{load.max_requests} requests are in progress; try again later.", None, "busy")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > load.max_body:
            raise _too_large(load)
        try:
            async with asyncio.timeout(load.body_seconds):
                return await self._collect(receive, reading)
        except TimeoutError as error:
            message = f"The body did not arrive within {load.body_seconds:g} s; send it faster or in parts."
            raise RequestError(408, message, None, "timeout") from error

    async def _discard(self, receive: Receive, reading: _Reading) -> None:
        """Reads up to `max_body` more bytes and keeps none: most clients read an answer only after they have sent."""
        read = 0
        try:
            async with asyncio.timeout(self.load.body_seconds):
                while read < self.load.max_body and not reading.complete:
                    message = await receive()
                    read += len(message.get("body", b""))
                    reading.complete = not message.get("more_body", False)
        except TimeoutError:
            return

    async def _collect(self, receive: Receive, reading: _Reading) -> bytes:
        chunks = []
        while not reading.complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            chunk = message.get("body", b"")
            reading.complete = not message.get("more_body", False)
            reading.held += len(chunk)
            self.bytes += len(chunk)
            if reading.held > self.load.max_body:
                raise _too_large(self.load)
            if self.bytes > self.load.max_pending:
                message = f"Bodies of {self.load.max_pending} bytes are in progress; try again later."
                raise RequestError(429, message, None, "busy")
            chunks.append(chunk)
        return b"".join(chunks)


def _too_large(load: Load) -> RequestError:
    return RequestError(
        413, f"The body exceeds {load.max_body} bytes; send fewer or smaller inputs.", None, "too_large"
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a channel that gives the body first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _answer(error: RequestError, send: Send) -> None:
    content = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.status == 429:
        headers.append((b"retry-after", b"1"))
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
