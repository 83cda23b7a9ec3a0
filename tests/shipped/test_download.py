"""URLs: public addresses only, within bounds of bytes and time, and never a password in a message."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helpers import random_image

from vipolyqwen.download_vipolyqwen import download, is_public
from vipolyqwen.processing_vipolyqwen import ViPolyQwenProcessor

MEGABYTE = 2**20


class Site(BaseHTTPRequestHandler):
    """Answers as its path says."""

    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/short":
            self.send_header("Content-Length", "100")
        self.end_headers()
        if self.path == "/endless":
            while True:
                self.wfile.write(b"x" * 1024)
        for _ in range(600 if self.path == "/slow" else 1):
            self.wfile.write(b"x")
            self.wfile.flush()
            if self.path == "/slow":
                time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    """Address of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that hangs up is the point
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_is_bounded_in_bytes_and_time(site: str) -> None:
    assert download(f"http://{site}/x?a=b c", "private", MEGABYTE, 5) == b"x"
    with pytest.raises(ValueError, match=f"more than {MEGABYTE} bytes, the limit `download_bytes`"):
        download(f"http://{site}/endless", "private", MEGABYTE, 30)
    with pytest.raises(ValueError, match="ends 99 bytes too early"):
        download(f"http://{site}/short", "private", MEGABYTE, 5)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"took more than 0\.5 s, the limit `download_seconds`"):
        download(f"http://{site}/slow", "private", MEGABYTE, 0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("target", ["http://[::1", "http://127.0.0.1:99999/", "http://a..b/", "file:///etc/hosts"])
def test_a_wrong_redirect_names_the_url_that_was_asked_for(target: str, site: str) -> None:
    with pytest.raises(ValueError, match=rf"^'http://{site}/to/.*' cannot be fetched: "):
        download(f"http://{site}/to/{target}", "private", MEGABYTE, 5)


def test_a_server_that_says_nothing_ends_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for scheme in ("http", "https"):
            started = time.monotonic()
            with pytest.raises(ValueError, match="took more than 0.3 s"):
                download(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/", "private", MEGABYTE, 0.3)
            assert time.monotonic() - started < 2


def test_each_redirect_is_checked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert download(f"http://{site}/to//x", "private", MEGABYTE, 5) == b"x"
    for target in ("file:///etc/passwd", "ftp://example.org/x"):
        with pytest.raises(ValueError, match="only http and https are fetched"):
            download(f"http://{site}/to/{target}", "private", MEGABYTE, 5)
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        download(f"http://{site}/to/", "private", MEGABYTE, 5)
    public = iter([True, False])  # the first address passes for a public one
    monkeypatch.setattr("vipolyqwen.download_vipolyqwen.is_public", lambda address: next(public))
    with pytest.raises(ValueError, match="not a public address"):
        download(f"http://{site}/to/http://{site}/x", True, MEGABYTE, 5)


@pytest.mark.parametrize("place", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "[::1]", "0.0.0.0"])
def test_no_spelling_of_this_machine_is_fetched(place: str, site: str) -> None:
    with pytest.raises(ValueError, match="not a public address|cannot be fetched"):
        download(f"http://{place}:{site.split(':')[1]}/x", True, MEGABYTE, 5)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses_are_told_from_others(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in ("1.1.1.1", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ValueError, match="'two.example' is 10.0.0.7, not a public address"):
        download("http://two.example/x", True, MEGABYTE, 5)


def test_a_password_is_never_printed(processor: ViPolyQwenProcessor, site: str) -> None:
    for allowed in (False, True, "private"):
        with pytest.raises(ValueError) as caught:
            download(f"http://anna:geheim@{site}/to/file:///x", allowed, MEGABYTE, 5)
        error: BaseException | None = caught.value
        while error is not None:
            assert "geheim" not in str(error)
            error = error.__cause__
    for inputs in (
        {"images": "https://anna:geheim@example.org/a.png"},
        {"audio": "https://anna:geheim@example.org/a.wav"},
    ):
        with pytest.raises(ValueError, match="is a URL; download it") as caught:
            processor(**inputs)
        assert "geheim" not in str(caught.value)


def test_the_permission_is_neither_saved_nor_read(processor: ViPolyQwenProcessor, tmp_path: Any, rng: Any) -> None:
    processor.save_pretrained(tmp_path)
    config = tmp_path / "processor_config.json"
    assert "allow_urls" not in config.read_text()
    config.write_text(config.read_text().replace("{", '{"allow_urls": true,', 1))
    assert ViPolyQwenProcessor.from_pretrained(tmp_path).allow_urls is False
    assert ViPolyQwenProcessor.from_pretrained(tmp_path, allow_urls=True).allow_urls is True
    with pytest.raises(ValueError, match="`allow_urls` is 'yes'; it must be"):
        ViPolyQwenProcessor.from_pretrained(tmp_path, allow_urls="yes")
    assert processor(images=[[random_image(rng)]])["image_grid_thw"].shape == (1, 3)
