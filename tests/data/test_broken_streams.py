"""Streams over a network that breaks: no row is lost or read twice, nothing hangs, and errors say what happened."""

import gzip
import io
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import serving_in_thread

from vipolyqwen.data import remote
from vipolyqwen.data.remote import WholeBytes, explain, is_unreadable, may_pass, patiently
from vipolyqwen.data.source_config import SourceConfig
from vipolyqwen.data.streams import RecordStream, StreamedSource

ROWS, SHARDS = 120, 2
BLOCK = 2**11  # bytes of a request, of which a file has several
TEXTS = sorted(f"{shard} {row}" for shard in range(SHARDS) for row in range(ROWS))


def shards(kind: str) -> dict[str, bytes]:
    """Returns the content of two files by their names."""
    files = {}
    for shard in range(SHARDS):
        # text that no compression shortens, so that every kind takes several requests
        draw = random.Random(shard)
        rows = [{"a": f"{shard} {row}", "b": draw.randbytes(60).hex()} for row in range(ROWS)]
        text = "\n".join(map(json.dumps, rows)).encode()
        if kind == "parquet":
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, buffer := io.BytesIO(), row_group_size=30, compression="none", use_dictionary=False)
            text = buffer.getvalue()
        files[f"{shard}.{kind}"] = gzip.compress(text, 1) if kind.endswith("gz") else text
    return files


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0)


def epoch_of(source: StreamedSource) -> list[str]:
    """Returns the texts of an epoch in alphabetical order."""
    records, found = RecordStream(source, lambda record: [record], 0, 3, 0, 1), []
    while (record := next(records)).epoch == 0:
        found.append(record.values["a"])
    return sorted(found)


def opened(url: str) -> StreamedSource:
    return StreamedSource.open(SourceConfig(path=url, streaming=True, shuffle_buffer=20))


# Over HTTP


class Server:
    """Serves files over HTTP, each request to an address with the next of its faults.

    Attributes:
        files: name -> content.
        faults: name -> what happens to each request of content in turn: a status, or `drop`, `stall`, `short` or
            `empty`; `None`: nothing. The last one stays.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: dict[str, list[int | str | None]] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_of": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that has left
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def fault(self, name: str) -> int | str | None:
        faults = self.faults.get(name, [None])
        return faults.pop(0) if len(faults) > 1 else faults[0]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server_of: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the output of the tests clean."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        name = self.path.strip("/")
        if not name:
            links = " ".join(f'<a href="/{each}">file</a>' for each in self.server_of.files)
            return self.send(200, links.encode(), {"Content-Type": "text/html"})
        content = self.server_of.files[name]
        fault = (
            self.server_of.fault(name) if self.command == "GET" or 404 in self.server_of.faults.get(name, []) else None
        )
        if isinstance(fault, int):
            return self.send(fault, b"", {})
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(content) - 1)) if wanted else (0, len(content) - 1)
        about = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.send(206 if wanted else 200, content[first : last + 1], about, fault)

    def send(self, status: int, content: bytes, headers: dict[str, str], fault: str | None = None) -> None:
        content = content[: {"short": len(content) // 2, "empty": 0}.get(fault, len(content))]
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if fault not in ("drop", "stall") else content[: len(content) // 2])
        if fault in ("drop", "stall"):
            time.sleep(0.35 if fault == "stall" else 0)
            self.close_connection = True
            self.connection.shutdown(2)


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    server = Server(shards(kind))
    with serving_in_thread(server.http):
        yield server


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of few bytes, and a short patience with a connection that stalls."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "STALL", 0.2)
    options = remote.storage_options()
    options = {protocol: {**each, "block_size": BLOCK} for protocol, each in options.items()}
    monkeypatch.setattr("vipolyqwen.data.streams.storage_options", lambda: options)


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("fault", ["drop", "stall", "short", "empty", 503, 429])
def test_a_break_in_a_file_loses_and_repeats_no_row(kind: str, fault: int | str) -> None:
    with serving(kind) as server:
        source = opened(f"{server.url}/*.{kind}")
        server.faults = {name: [fault, None, fault, None] for name in server.files}
        assert epoch_of(source) == TEXTS
        assert all(len(left) < 4 for left in server.faults.values())  # a fault has come


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_a_shard_that_is_missing_ends_the_run_by_name(kind: str) -> None:
    with serving(kind) as server:
        source = opened(f"{server.url}/*.{kind}")
        server.faults = {f"1.{kind}": [404]}
        address = re.escape(f"shard 1 ({server.url}/1.{kind}), after record 0: the stream cannot be read: ")
        with pytest.raises(ValueError, match=rf"{address}.*not found|{address}.*404|{address}FileNotFound") as error:
            epoch_of(source)
        assert "resume the run when it can be reached; no row is lost" in str(error.value)


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("fault", ["drop", "empty", 503])
def test_a_break_that_lasts_ends_the_run_by_name(fault: int | str) -> None:
    with serving("jsonl") as server:
        source = opened(f"{server.url}/*.jsonl")
        server.faults = {"1.jsonl": [None, fault]}
        with pytest.raises(ValueError, match=rf"{server.url}/1.jsonl\), after record \d+.*resume the run"):
            epoch_of(source)


@pytest.mark.usefixtures("small_requests")
def test_an_address_that_is_wrong_is_refused_at_once() -> None:
    with (
        serving("jsonl") as server,
        pytest.raises(ValueError, match=r"9.jsonl: the source cannot be streamed: .*9.jsonl"),
    ):
        server.files["9.jsonl"] = b""
        server.faults = {"9.jsonl": [404]}
        opened(f"{server.url}/9.jsonl")


# Without HTTP


class Flaky(MemoryFileSystem):
    """A file system in memory whose reads fail when they are told to."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    failures: list[Exception | None] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> io.BytesIO:
        file = super()._open(path, mode, **kwargs)
        return FlakyFile(file.getvalue()) if mode == "rb" else file


class FlakyFile(io.BytesIO):
    """A file whose reads fail."""

    def read(self, size: int = -1) -> bytes:
        failure = Flaky.failures.pop(0) if Flaky.failures else None
        if failure is not None:
            raise failure
        return super().read(size)


@pytest.fixture
def flaky() -> Callable[[str], str]:
    """Puts shards into the file system; returns their address."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)

    def fill(kind: str) -> str:
        Flaky.failures = []
        for name, content in shards(kind).items():
            fsspec.filesystem("flaky").pipe(f"/{kind}/{name}", content)
        return f"flaky://{kind}/*.{kind}"

    return fill


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_file_whose_reads_fail_is_opened_again(flaky: Callable[[str], str], kind: str, before: int) -> None:
    source = opened(flaky(kind))
    Flaky.failures = [None] * before + [ConnectionResetError("reset"), None, TimeoutError("slow")]
    assert epoch_of(source) == TEXTS
    assert ConnectionResetError not in map(type, Flaky.failures)  # it has come


class Breaking(RecordStream):
    """Loses every third batch on its way."""

    count = 0

    def _open_shard(self, library: dict[str, Any] | None) -> None:
        super()._open_shard(library)
        self._batches = self.losing(self._batches)

    def losing(self, batches: Iterator[dict[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
        for batch in batches:
            self.count += 1
            if self.count % 3 == 0:
                raise ConnectionResetError("reset")
            yield batch


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_shard_is_read_again_to_where_the_stream_stood(tmp_path: Path, kind: str) -> None:
    for name, content in shards(kind).items():
        (tmp_path / name).write_bytes(content)
    source = opened(str(tmp_path / f"*.{kind}"))
    source = replace(source, files=[f"http://host/{file}" for file in source.files])
    straight, broken = (cls(source, lambda record: [record], 0, 3, 0, 1) for cls in (RecordStream, Breaking))
    assert [next(broken) for _ in range(3 * SHARDS * ROWS)] == [next(straight) for _ in range(3 * SHARDS * ROWS)]
    assert broken.count > 30
    state = json.loads(json.dumps(broken.state()))
    resumed = RecordStream(source, lambda record: [record], 0, 3, 0, 1, state)
    assert [next(resumed) for _ in range(50)] == [next(straight) for _ in range(50)]


def test_a_failure_that_stays_names_file_and_place(flaky: Callable[[str], str]) -> None:
    source = opened(flaky("jsonl"))
    Flaky.failures = [ConnectionResetError("the peer left")] * 99
    with pytest.raises(ValueError, match=r"flaky://.*jsonl\), after record 0: .*ConnectionResetError: the peer left"):
        epoch_of(source)
    Flaky.failures = []


def test_a_local_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("a local file is not waited for"))
    for name, content in shards("parquet").items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] if name[0] == "1" else content)
    with pytest.raises(ValueError, match=r"shard 1, after record 0: the stream cannot be read: .*prepare"):
        epoch_of(opened(str(tmp_path / "*.parquet")))


def test_a_source_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"0.jsonl: the source cannot be streamed: .*no JSON object"):
        opened(str(tmp_path / "0.jsonl"))


def test_too_few_bytes_are_asked_for_again_and_never_the_end_of_a_file() -> None:
    content, answers = bytes(range(200)) * 40, [0.5, 0.0, 1.0]

    def fetch(start: int, end: int) -> bytes:
        share = answers.pop(0) if answers else 1.0
        return content[start : start + int(share * (min(end, len(content)) - start))]

    assert WholeBytes(100, fetch, len(content))._fetch(1000, 5000) == content[1000:5000] and not answers
    answers = [0.5] * 99
    with pytest.raises(ConnectionError, match=r"2,050 bytes came instead of those from 1,000 to 5,100, of 8,000"):
        WholeBytes(100, fetch, len(content))._fetch(1000, 5000)


def with_status(status: int) -> OSError:
    error = OSError("refused")
    error.status = status
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TimeoutError(), True),
        (with_status(503), True),
        (with_status(429), True),
        (with_status(404), False),
        (with_status(403), False),
        (FileNotFoundError("x"), False),
        (KeyError("of the code"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, passes: bool) -> None:
    tries = []

    def read() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise error
        return 7

    if passes:
        assert patiently(read, "x", lasting=FileNotFoundError) == 7
    else:
        with pytest.raises(type(error)):
            patiently(read, "x", lasting=FileNotFoundError)
    assert len(tries) == (3 if passes else 1)


def test_errors_of_network_packages_are_known_by_their_module() -> None:
    foreign = type("ClientError", (Exception,), {"__module__": "aiohttp.client_exceptions"})
    of_it = type("ServerLeft", (foreign,), {"__module__": "elsewhere"})
    assert is_unreadable(of_it()) and may_pass(of_it()) and not is_unreadable(RuntimeError())
    assert explain(of_it("gone\nnow")) == "ServerLeft: gone now"
