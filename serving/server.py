"""The server on LitServe: OpenAI's `/v1/embeddings` for texts, images and audio, `/v1/models` and `/health`.

One process answers HTTP and bounds what is in progress; one process a device holds the model. Requests that wait go
through the model together.
"""

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import litserve
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem

from ..fingerprint_vipolyqwen import Finding
from .batching import Batcher, Done, Job
from .limits import LimitLoad, Load
from .loading import LoadedModel, load_model
from .requests import Bounds, EmbeddingRequest, RequestError, encode_vector, parse_body, read_request

EMBEDDINGS, MODELS, HEALTH, READY = "/v1/embeddings", "/v1/models", "/health", "/ready"
GRACE_SECONDS = 10.0  # beyond the timeout, for an answer that is under way


@dataclass(frozen=True)
class ServerOptions:
    """What is served, and how.

    Attributes:
        model: folder or Hub id.
        name: name of the model for clients.
        fingerprint: its mark, see `fingerprint_of`.
        dtype: of the weights; `None`: as published.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code from the Hub may run.
        towers: which of text, image and audio to load; `None`: all.
        bounds: limits of a request.
        load: limits of what is in progress.
        timeout: seconds after which a waiting request is answered 504.
        max_batch_requests: requests that pass the model together.
        batch_seconds: how long a request waits for others.
        max_tokens: padded tokens of a pass through the model.
        max_decoded: bytes of the decoded images and audio of a request.
    """

    model: str
    name: str
    fingerprint: str
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    towers: list[str] | None = None
    bounds: Bounds = field(default_factory=Bounds)
    load: Load = field(default_factory=Load)
    timeout: float = 60.0
    max_batch_requests: int = 64
    batch_seconds: float = 0.005
    max_tokens: int = 16_384
    max_decoded: int = 512 * 2**20


@dataclass(frozen=True)
class HealthCheck:
    """Asks the process of the model to embed the golden inputs."""


class EmbeddingAPI(litserve.LitAPI):
    """The process that holds the model."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(
            max_batch_size=options.max_batch_requests,
            batch_timeout=options.batch_seconds,
            api_path=EMBEDDINGS,
            spec=EmbeddingSpec(options),
        )
        self.options = options

    def setup(self, device: str) -> None:
        """Loads the model onto a device and checks its vectors."""
        options = self.options
        self.model: LoadedModel = load_model(
            options.model,
            device,
            options.dtype,
            options.revision,
            options.trust_remote_code,
            options.towers,
            allow_urls=options.bounds.allow_urls,
        )
        if self.model.fingerprint != options.fingerprint:
            raise ValueError(f"{options.model!r} changed while the server started; start it again.")
        self.batcher = Batcher(self.model, options.max_tokens, max_decoded=options.max_decoded)

    def decode_request(self, request: Job | HealthCheck) -> Job | HealthCheck:
        """Returns the request; the process that answers HTTP has read it."""
        return request

    def batch(self, inputs: list[Job | HealthCheck]) -> list[Job | HealthCheck]:
        """Returns the requests as a list."""
        return list(inputs)

    def predict(self, requests: list[Job | HealthCheck]) -> list[Done | RequestError | list[Finding]]:
        """Returns the result of each request."""
        jobs = [request for request in requests if isinstance(request, Job)]
        done = iter(self.batcher.run(jobs) if jobs else [])
        return [next(done) if isinstance(request, Job) else self._health() for request in requests]

    def _health(self) -> list[Finding]:
        with self.batcher.lock:
            return self.model.check()

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Returns the results as a list."""
        return output

    def encode_response(self, output: Done | RequestError | list[Finding]) -> Any:
        """Returns the result; the process that answers HTTP writes it."""
        return output


class EmbeddingSpec(LitSpec):
    """The process that answers HTTP: routes, reading requests, writing answers."""

    def __init__(self, options: ServerOptions) -> None:
        super().__init__()
        self.options = options
        self.api_path = EMBEDDINGS

    def pre_setup(self, lit_api: litserve.LitAPI) -> None:
        """Registers the routes."""
        self.add_endpoint(EMBEDDINGS, self.embeddings, ["POST"])
        self.add_endpoint(MODELS, self.models, ["GET"])
        self.add_endpoint(HEALTH, self.health, ["GET"])

    def decode_request(self, request: Any, context_kwargs: dict | None = None) -> Any:
        """Returns the request unchanged."""
        return request

    def encode_response(self, output: Any, context_kwargs: dict | None = None) -> Any:
        """Returns the result unchanged."""
        return output

    async def embeddings(self, request: Request) -> JSONResponse:
        """Answers `POST /v1/embeddings`."""
        try:
            if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
                raise RequestError(415, f"The content-encoding is {encoding!r:.80}; send the body as it is.")
            body = await request.body()
            asked = await asyncio.to_thread(self._read, body)
            result = await self._ask(Job(asked.inputs, asked.prompt_name, asked.dimensions))
            return JSONResponse(await asyncio.to_thread(self._answer, asked, result))
        except RequestError as error:
            return JSONResponse(error.body() | self._identity(), error.status)

    async def models(self, request: Request) -> JSONResponse:
        """Answers `GET /v1/models`."""
        model = {"id": self.options.name, "object": "model", "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model | self._identity()]})

    async def health(self, request: Request) -> JSONResponse:
        """Answers `GET /health`: 200 if the golden inputs have the published vectors, else 503."""
        try:
            findings = await self._ask(HealthCheck())
        except RequestError as error:
            return JSONResponse({"status": "error", **error.body(), **self._identity()}, 503)
        failed = any(finding.level == "fail" for finding in findings)
        checks = {finding.check: {"level": finding.level, "text": finding.text} for finding in findings}
        content = {"status": "wrong vectors" if failed else "ok", "checks": checks, **self._identity()}
        return JSONResponse(content, 503 if failed else 200)

    def _identity(self) -> dict[str, str]:
        return {"model": self.options.name, "fingerprint": self.options.fingerprint}

    def _read(self, body: bytes) -> EmbeddingRequest:
        return read_request(parse_body(body), self.options.name, self.options.bounds)

    def _answer(self, asked: EmbeddingRequest, done: Done) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": index, "embedding": encode_vector(vector, asked.encoding_format)}
            for index, vector in enumerate(done.vectors)
        ]
        usage = {"prompt_tokens": done.tokens, "total_tokens": done.tokens}
        return {"object": "list", "data": data, "usage": usage, **self._identity()}

    async def _ask(self, payload: Job | HealthCheck) -> Any:
        """Sends a payload to the process of the model and waits for its result.

        Raises:
            RequestError: the result is an error, or does not come in time.
        """
        uid, event = str(uuid.uuid4()), asyncio.Event()
        self.response_buffer[uid] = ResponseBufferItem(event=event)
        try:
            message = (self.response_queue_id, uid, time.monotonic(), payload)
            await asyncio.to_thread(self.request_queue.put, message)
            async with asyncio.timeout(self.options.timeout + GRACE_SECONDS):
                await event.wait()
            response, status = self.response_buffer[uid].response
        except TimeoutError as error:
            raise _late(self.options.timeout) from error
        finally:
            self.response_buffer.pop(uid, None)
        if status == LitAPIStatus.ERROR:
            if isinstance(response, HTTPException) and response.status_code == 504:
                raise _late(self.options.timeout)
            raise RequestError(500, "The model's process failed; try again.", None, "internal")
        if isinstance(response, RequestError):
            raise response
        return response


def _late(seconds: float) -> RequestError:
    return RequestError(504, f"The request waited for {seconds:g} s; try again later.", None, "timeout")


def build_server(options: ServerOptions, accelerator: str = "auto", devices: int | str = "auto") -> litserve.LitServer:
    """Returns the server; `run(host=…, port=…, num_api_servers=1)` starts it.

    Args:
        options: what is served.
        accelerator: "cpu", "cuda", "mps" or "auto".
        devices: number of devices, each with a process that holds the model, or "auto" for all.
    """
    identity = {"x-model": options.name, "x-model-fingerprint": options.fingerprint}
    return litserve.LitServer(
        EmbeddingAPI(options),
        accelerator=accelerator,
        devices=devices,
        timeout=options.timeout,
        healthcheck_path=READY,
        model_metadata={"model": options.name, "fingerprint": options.fingerprint},
        middlewares=[(LimitLoad, {"load": options.load, "headers": identity})],
        disable_openapi_url=True,
        restart_workers=True,
    )
