"""One server in processes of its own: what goes over HTTP, hostile requests among it."""

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TEXTS, random_image

from vipolyqwen.doctor import main as doctor
from vipolyqwen.serve_vipolyqwen import check_port
from vipolyqwen.serving.loading import LoadedModel

pytest.importorskip("litserve")
pytestmark = pytest.mark.slow
START_SECONDS = 180


@pytest.fixture(scope="module")
def port(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vipolyqwen.serve_vipolyqwen", str(repository), "--port", str(free)]
    command += ["--accelerator", "cpu", "--max_body_mib", "1", "--max_requests", "8", "--body_seconds", "2"]
    with log.open("w") as lines:
        server = subprocess.Popen(command, stdout=lines, stderr=lines, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while not _is_ready(free):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield free
        assert server.poll() is None, log.read_text()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def _is_ready(port: int) -> bool:
    try:
        return ask(port, "/ready", method="GET")[0] == 200
    except OSError:
        return False


def ask(port: int, path: str, payload: Any = None, method: str = "POST", body: bytes = b"") -> tuple[int, Any, dict]:
    """Status, body (parsed if it is JSON) and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body if payload is None else json.dumps(payload))
        answer = connection.getresponse()
        content, headers = answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(content) if content.startswith(b"{") else content, headers
    finally:
        connection.close()


def vectors_of(port: int, **payload: Any) -> np.ndarray:
    status, answer, _ = ask(port, "/v1/embeddings", payload)
    assert status == 200, answer
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    return np.array([entry["embedding"] for entry in answer["data"]], np.float32)


def test_vectors_are_those_of_encode(port: int, model: LoadedModel, rng: np.random.Generator) -> None:
    file = io.BytesIO()
    image = random_image(rng)
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    items = [TEXTS[0], {"image": data}, {"image": f"data:image/png;base64,{data}", "text": TEXTS[1]}]
    same = [TEXTS[0], {"image": image}, {"image": image, "text": TEXTS[1]}]
    assert np.abs(vectors_of(port, input=items) - model.encoder.encode(same)).max() <= 1e-6
    content = [{"type": "text", "text": TEXTS[1]}, {"type": "image_url", "image_url": {"url": data}}]
    messages = [{"role": "user", "content": content}]
    found = vectors_of(port, messages=messages, prompt_name="vqa_single", dimensions=64)
    content = [{"type": "text", "text": TEXTS[1]}, {"type": "image", "image": image}]
    expected = model.encoder.encode(
        [[{"role": "user", "content": content}]],
        prompt_name="vqa_single",
        truncate_dim=64,
        normalize_embeddings=True,
    )
    assert np.abs(found - expected).max() <= 1e-6


def test_every_answer_names_model_and_fingerprint(port: int, model: LoadedModel) -> None:
    for path, payload, method, status in (
        ("/v1/embeddings", {"input": "a"}, "POST", 200),
        ("/v1/embeddings", {"input": 1}, "POST", 400),
        ("/v1/models", None, "GET", 200),
        ("/health", None, "GET", 200),
    ):
        found, answer, headers = ask(port, path, payload, method)
        assert (found, answer.get("fingerprint", model.fingerprint)) == (status, model.fingerprint)
        assert (headers["x-model"], headers["x-model-fingerprint"]) == ("tiny", model.fingerprint)
        assert answer.get("status", "ok") == "ok"
    assert ask(port, "/nowhere", {})[2]["x-model-fingerprint"] == model.fingerprint


def test_the_doctor_certifies_the_server(
    port: int, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    url = f"http://127.0.0.1:{port}/v1"
    assert doctor([str(repository), "--against", url]) == 0
    report = capsys.readouterr().out
    assert all(f"OK    {kind} " in report for kind in ("text", "image", "audio", "mix", "prefix"))
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    published = json.loads((other / "fingerprint.json").read_text(encoding="utf-8"))
    published["vectors"]["image: drawing"].reverse()
    (other / "fingerprint.json").write_text(json.dumps(published), encoding="utf-8")
    assert doctor([str(other), "--against", url]) == 1
    assert "FAIL  image " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor([str(repository), "--against", "http://127.0.0.1:9/v1"])
    with pytest.raises(SystemExit):
        doctor([str(repository), "--against", f"127.0.0.1:{port}"])


def test_the_openai_client_reads_the_answers(port: int, model: LoadedModel) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # asks for base64
    found = np.array([entry.embedding for entry in answer.data], np.float32)
    assert np.abs(found - model.encoder.encode(TEXTS)).max() <= 1e-6
    with pytest.raises(openai.NotFoundError, match="other"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=4096)
    assert [entry.id for entry in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[" * 50_000, 400),
        (b'{"input": "' + b"a" * 2**20 + b'"}', 413),
        (b'{"input": "\\ud800"}', 400),
        (b'{"input": "a", "\\ud800": 1}', 400),
        (b'{"input": "a", "input": "b"}', 400),
        (b'{"input": {"image": "/etc/passwd"}}', 400),
        (b'{"input": {"image": "L2V0Yy9wYXNzd2Q="}}', 400),
        (b'{"input": {"audio": "UklGRgAAAABXQVZF"}}', 400),
        (b'{"input": {"image": "http://127.0.0.1/a.png"}}', 400),
        (b'{"input": "a", "prompt_name": "nothing"}', 400),
        (b'{"input": "a", "dimensions": 1e400}', 400),
        (b'{"input": "' + b"a b " * 40_000 + b'"}', 400),
        (b"\x00\xff\xfe", 400),
    ],
)
def test_hostile_bodies_are_refused_and_the_server_answers_on(port: int, body: bytes, status: int) -> None:
    found, answer, _ = ask(port, "/v1/embeddings", body=body)
    assert found == status and len(answer["error"]["message"]) < 600
    assert vectors_of(port, input="a").shape == (1, 1024)


def test_a_body_that_never_ends_is_given_up(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


def test_more_requests_than_allowed_are_refused_and_the_others_answered(port: int) -> None:
    waiting = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(8)]
    try:
        for client in waiting:
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 14\r\n\r\n{")
        time.sleep(0.3)
        status, answer, headers = ask(port, "/v1/embeddings", {"input": "a"})
        assert (status, headers["retry-after"]) == (429, "1") and "8 requests" in answer["error"]["message"]
        for client in waiting:
            client.sendall(b'"input": "a"}')
        assert all(b" 200 " in client.recv(65_536).split(b"\r\n")[0] for client in waiting)
    finally:
        for client in waiting:
            client.close()


def test_silent_connections_lock_nobody_out(port: int) -> None:
    opened = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(80)]  # uvicorn serves 32
    try:
        for client in opened[::2]:
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n")  # headers that never end
        assert all(ask(port, "/v1/embeddings", {"input": "a"})[0] == 200 for _ in range(3))
    finally:
        for client in opened:
            client.close()


def test_a_compressed_body_is_refused(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/embeddings", b'{"input": "a"}', {"Content-Encoding": "gzip"})
    answer = connection.getresponse()
    assert answer.status == 415 and "gzip" in json.loads(answer.read())["error"]["message"]
    connection.close()


def test_a_port_in_use_is_an_error_with_a_remedy(port: int) -> None:
    with pytest.raises(OSError, match=f"{port}.*--port"):
        check_port("127.0.0.1", port)
