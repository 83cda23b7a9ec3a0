"""How fast does the server answer 1, 8 and 32 clients, and what do hostile requests do to it?

    python benchmarks/server_load.py [--model MODEL] [--seconds 10] [--requests 10000] [--seed 0]

Starts serve_vipolyqwen.py on 127.0.0.1 and asks it for one text at a time, by plain HTTP and with the official
`openai` client if it is installed: requests a second, p50 and p99 in milliseconds, beside `encode` in this process,
one text at a time. Then sends --requests of which a tenth are hostile, by 32 clients, while as many connections as the
server takes stay silent, and compares every vector with that of `encode`. Load goes to this machine only. Without
--model, a tiny untrained one. Writes benchmarks/results/server_load.json.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import TEXTS, save_tiny_model
from result_files import claim, write_result

from vipolyqwen.fingerprint_vipolyqwen import write_fingerprint
from vipolyqwen.serving.loading import load_model


def _bomb(side: int) -> str:
    """Returns a PNG file of side × side white pixels, some kilobytes, in base64."""
    file = io.BytesIO()
    Image.new("1", (side, side), 1).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


try:
    import openai  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    openai = None

CLIENTS = (1, 8, 32)
HOST = "127.0.0.1"
COMMAND = Path(__file__).parent.parent / "serve_vipolyqwen.py"
START_SECONDS = 300
SILENT = 512  # connections, as many as the server takes
HOSTILE: list[bytes] = [
    b"",
    b"{",
    b"[" * 20_000,
    b'{"input": "\\ud800"}',
    b'{"input": [1, 2, 3]}',
    b'{"input": "a", "surprise": 1}',
    b'{"input": "a", "model": "another"}',
    b'{"input": "a", "dimensions": 1000000}',
    b'{"input": {"image": "/etc/passwd"}}',
    b'{"input": {"image": "http://127.0.0.1/a.png"}}',
    b'{"input": {"image": "iVBORw0KGgoAAAANSUhEUgAB"}}',
    b'{"input": {"audio": "UklGRiT///9XQVZFZm10IBAAAAABAAEA"}}',
    b'{"messages": [{"role": "system", "content": "<ocr>"}]}',
    b'{"input": "' + b"a b " * 30_000 + b'"}',
    b"\xff\xfe\x00",
    b'{"input": "a", "input": "b"}',
    b'{"input": "a", "\\ud800": 1}',
    b'{"input": "a", "dimensions": NaN}',
    b'{"input": "a", "dimensions": "64"}',
    b'{"input": "a", "encoding_format": ["float"]}',
    b'{"input": ' + b"[" * 800 + b"]" * 800 + b"}",
    json.dumps({"input": ["a"] * 100_000}).encode(),
    json.dumps({"input": [{"image": [_bomb(7000)] * 64}] * 16}).encode(),
    json.dumps({"input": {"image": f"data:image/png;base64,{_bomb(20_000)}"}}).encode(),
]


class Client:
    """A connection that is opened again when the server has closed it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = http.client.HTTPConnection(HOST, port, timeout=120)

    def ask(self, body: bytes, path: str = "/v1/embeddings", method: str = "POST") -> tuple[int, bytes]:
        """Returns status and body of the answer."""
        for attempt in range(2):
            try:
                self.connection.request(method, path, body)
                answer = self.connection.getresponse()
                return answer.status, answer.read()
            except (ConnectionError, http.client.HTTPException):
                self.connection.close()
                if attempt:
                    raise
        raise AssertionError


def start(model: str) -> tuple[subprocess.Popen, int]:
    """Starts the server on a free port and waits until it is ready."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, COMMAND, model, "--port", str(port), "--accelerator", "cpu", "--host", HOST]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            if Client(port).ask(b"", "/ready", "GET")[0] == 200:
                return server, port
        except OSError:
            pass
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"The server did not start within {START_SECONDS} s.")
        time.sleep(0.2)


def in_threads(count: int, work: Callable[[int], None]) -> float:
    """Runs `work(number)` in threads; returns the seconds until all have ended, and raises the first error."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    return time.perf_counter() - begin


def plain_client(port: int, model: str) -> Callable[[str], object]:
    """Returns a function that asks for the vector of a text over a connection that stays open."""
    client = Client(port)

    def ask(text: str) -> None:
        status, _ = client.ask(json.dumps({"input": text, "model": model, "encoding_format": "base64"}).encode())
        if status != 200:
            raise RuntimeError(f"The server answered {status}.")

    return ask


def openai_client(port: int, model: str) -> Callable[[str], object]:
    """Returns the same function with OpenAI's client, which raises an error unless the status is 200."""
    client = openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", max_retries=0)
    return lambda text: client.embeddings.create(model=model, input=text)


def measure(connect: Callable[[], Callable[[str], object]], clients: int, seconds: float, texts: list[str]) -> dict:
    """Asks for one text at a time; returns requests a second and percentiles in milliseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        ask, rng = connect(), random.Random(number)
        while time.perf_counter() < end:
            begin = time.perf_counter()
            ask(rng.choice(texts))
            times.append(time.perf_counter() - begin)

    return figures(times, in_threads(clients, work))


def figures(times: list[float], seconds: float) -> dict[str, float]:
    """Returns requests a second, p50 and p99 in milliseconds."""
    p50, p99 = np.percentile(times, (50, 99)) * 1000
    return {"requests_a_second": round(len(times) / seconds, 1), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1)}


def attack(port: int, requests: int, texts: list[str], vectors: np.ndarray) -> dict[str, Any]:
    """Sends requests of which a tenth are hostile; returns counts of answers, wrong vectors and broken connections."""
    statuses: Counter = Counter()
    worst = [0.0] * max(CLIENTS)
    broken = [0] * max(CLIENTS)

    def work(number: int) -> None:
        client, rng = Client(port), random.Random(number)
        for turn in range(number, requests, max(CLIENTS)):
            hostile = turn % 10 == 0
            row = rng.randrange(len(texts))
            body = rng.choice(HOSTILE) if hostile else json.dumps({"input": texts[row]}).encode()
            try:
                status, answer = client.ask(body)
            except (OSError, http.client.HTTPException):
                broken[number] += 1
                continue
            statuses["hostile" if hostile else "good", status] += 1
            if status == 200:
                found = np.array(json.loads(answer)["data"][0]["embedding"], np.float32)
                worst[number] = max(worst[number], float(np.abs(found - vectors[row]).max()))

    seconds = in_threads(max(CLIENTS), work)
    counts = {f"{kind} {status}": count for (kind, status), count in sorted(statuses.items())}
    return {"answers": counts, "broken": sum(broken), "largest_difference": max(worst), "seconds": round(seconds, 1)}


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id; default: a tiny untrained one")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--requests", type=int, default=10_000, help="of which a tenth are hostile")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    words = " ".join(TEXTS).split()
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 40))) for _ in range(256)]
    with tempfile.TemporaryDirectory() as name:
        source = options.model or str(Path(name) / "tiny")
        if options.model is None:
            save_tiny_model(Path(source))
            write_fingerprint(source)
        encoder = load_model(source, device="cpu").encoder
        vectors = encoder.encode(texts)
        times = []
        for text in texts:
            begin = time.perf_counter()
            encoder.encode(text)
            times.append(time.perf_counter() - begin)
        speed = {"encode, one at a time": figures(times, sum(times))}
        server, port = start(source)
        connect = {"HTTP": plain_client, **({} if openai is None else {"openai": openai_client})}
        try:
            for kind, client in connect.items():
                for clients in CLIENTS:
                    ask = partial(client, port, Path(source).name)
                    speed[f"server, {clients} clients, {kind}"] = measure(ask, clients, options.seconds, texts)
            silent = [socket.create_connection((HOST, port)) for _ in range(SILENT)]
            attacked = attack(port, options.requests, texts, vectors)
            healthy = Client(port).ask(b"", "/health", "GET")[0] == 200 and server.poll() is None
            for connection in silent:
                connection.close()
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    answers = attacked["answers"]
    failures = sum(count for key, count in answers.items() if key.startswith("good") and key != "good 200")
    failures += sum(count for key, count in answers.items() if key in ("hostile 200", "hostile 500"))
    claims = {
        "largest_difference_from_encode": claim(
            attacked["largest_difference"], 1e-6, attacked["largest_difference"] <= 1e-6
        ),
        "wrong_answers": claim(failures + attacked["broken"], 0, failures + attacked["broken"] == 0),
        "healthy_after_the_attack": claim(int(healthy), 1, healthy),
    }
    write_result(
        "server_load", claims, speed=speed, attack=attacked, requests=options.requests, seconds=options.seconds
    )


if __name__ == "__main__":
    main()
