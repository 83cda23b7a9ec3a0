"""Fetches a URL within bounds of bytes and time, and from public addresses only."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 2**16  # bytes
UNRESERVED = "/?%:@!$&'()*+,;=~-._"  # characters of a path and a query that are sent as they are
DEFAULT_PORTS = {"http": 80, "https": 443}


def is_url(source: Any) -> bool:
    """Returns whether `source` is an `http(s)://` URL."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def show_url(url: str) -> str:
    """Returns a URL without its user name and password."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def download(url: str, allow_urls: bool | str, max_bytes: int, seconds: float) -> bytes:
    """Returns the bytes at `url`.

    The connection goes to an address that was checked, not to a name that may resolve to another address a moment
    later. Proxies of the environment are not used.

    Args:
        url: an `http(s)://` URL.
        allow_urls: `True` allows public addresses, `"private"` those of this machine and its network as well.
        max_bytes: bytes of the answer at most.
        seconds: time of all of it, redirects included.

    Raises:
        ValueError: URLs are not allowed, the address is not public, or the URL cannot be fetched within the bounds.
    """
    if not allow_urls:
        raise ValueError(
            f"{show_url(url)!r} is a URL; download it and pass the path or the bytes, or load the processor with "
            "`allow_urls=True`. (Then the author of an input decides which addresses this machine opens.)"
        )
    deadline = time.monotonic() + seconds
    shown = show_url(url)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            target, data = _fetch(urlsplit(url), allow_urls == "private", max_bytes, deadline)
            url = url if target is None else urljoin(url, target)
        except (OSError, ValueError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline
            reason = f"it took more than {seconds:g} s, the limit `download_seconds`" if late else error
            raise ValueError(f"{shown!r} cannot be fetched: {reason}.") from None  # a cause may hold the password
        if target is None:
            return data
    raise ValueError(f"{shown!r} cannot be fetched: it redirects more than {MAX_REDIRECTS} times.")


def _fetch(url: SplitResult, allow_private: bool, max_bytes: int, deadline: float) -> tuple[str | None, bytes]:
    """Returns where an answer redirects to, or `None` and its content."""
    if url.scheme.lower() not in DEFAULT_PORTS:
        raise ValueError(f"its scheme is {url.scheme!r}; only http and https are fetched")
    raw = _connect(url, allow_private, deadline)
    with raw.dup() as twin:  # TLS detaches `raw`; both are one connection
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [twin])
        timer.daemon = True
        timer.start()
        try:
            answer = _exchange(raw, url, max_bytes)
        finally:
            timer.cancel()
            timer.join()
            raw.close()
    if time.monotonic() >= deadline:
        raise ValueError("it was cut off")
    return answer


def _connect(url: SplitResult, allow_private: bool, deadline: float) -> socket.socket:
    """Connects to the first address of the host that answers, if all of them are allowed."""
    if not url.hostname:
        raise ValueError("it names no host")
    port = url.port or DEFAULT_PORTS[url.scheme.lower()]
    found = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not (allow_private or is_public(str(address[0]))):
            raise ValueError(f"{url.hostname!r} is {address[0]}, not a public address")
    failure: OSError = OSError(f"{url.hostname!r} has no address")
    for family, kind, protocol, _, address in found:
        raw = socket.socket(family, kind, protocol)
        raw.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            raw.connect(address)
        except OSError as error:
            raw.close()
            failure = error
        else:
            return raw
    raise failure


def _shut(raw: socket.socket) -> None:
    """Ends all waiting for a socket."""
    try:
        raw.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


def _exchange(raw: socket.socket, url: SplitResult, max_bytes: int) -> tuple[str | None, bytes]:
    """Sends one request over a connected socket and reads its answer."""
    host = url.hostname or ""
    connection = http.client.HTTPConnection(host, url.port or DEFAULT_PORTS[url.scheme.lower()])
    secure = url.scheme.lower() == "https"
    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host) if secure else raw
    with contextlib.closing(connection):
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        headers = {"User-Agent": "vipolyqwen", "Accept-Encoding": "identity"}
        connection.request("GET", quote(path, safe=UNRESERVED), headers=headers)
        return _read_answer(connection.getresponse(), max_bytes)


def _read_answer(response: http.client.HTTPResponse, max_bytes: int) -> tuple[str | None, bytes]:
    if response.status in REDIRECTS:
        return response.getheader("Location") or "", b""
    if response.status != http.client.OK:
        reason = http.client.responses.get(response.status, "unknown")  # not the server's words, which may be any
        raise ValueError(f"HTTP Error {response.status}: {reason}")
    data = bytearray()
    while chunk := response.read1(CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes} bytes, the limit `download_bytes`; pass a smaller file")
    if response.length:
        raise ValueError(f"it ends {response.length} bytes too early")
    return None, bytes(data)


def is_public(address: str) -> bool:
    """Returns whether an IP address, and any IPv4 address inside it, is reachable from everywhere."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    addresses = [ip if ip.version == 4 or ip.ipv4_mapped is None else ip.ipv4_mapped, *filter(None, inner)]
    return all(entry.is_global and not entry.is_multicast and not entry.is_reserved for entry in addresses)


__all__ = ["download", "is_public", "is_url", "show_url"]
