"""Reads files over a network that breaks: what is repeated, from where, for how long, and what an error says."""

import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from fsspec.caching import BytesCache, Fetcher, register_cache
from transformers.utils import logging

from .files import COMPRESSIONS

logger = logging.get_logger(__name__)

Result = TypeVar("Result")
Classes = type[Exception] | tuple[type[Exception], ...]
TRIES = 5  # of a request, and of a shard
WAIT = 1.0  # seconds before the second try, twice as many before each other
PATIENCE = 600.0  # seconds after which a shard is not tried again
STALL = 30.0  # seconds without a byte after which a connection is given up
BUSY = {408, 425, 429}  # statuses of a server that may answer later; other 4xx stay
UNREADABLE = (OSError, ValueError, TypeError, EOFError, StopIteration, tarfile.TarError)
UNREADABLE += (pa.ArrowException, DatasetsError)
NETWORK = {"aiohttp", "botocore", "fsspec", "http", "httpx", "httpx2", "requests", "urllib3"}  # packages of its errors
WORDS = {"StopIteration": "its files have no rows"}  # of errors that say nothing


def storage_options() -> dict[str, Any]:
    """Returns how files are read over HTTP; nothing without aiohttp, which the file system asks for itself."""
    try:
        from aiohttp import ClientTimeout  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    timeout = ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)  # a large request may take long
    options = {
        "cache_type": WholeBytes.name,
        "client_kwargs": {"timeout": timeout},
        "headers": {"Accept-Encoding": "identity"},  # ranges and sizes are those of the file
    }
    return {"http": options, "https": options}


def open_remote(url: str) -> BinaryIO:
    """Opens a file at an address to read its bytes, of a compressed text file those of the text."""
    protocol, _, place = url.partition("://")
    compression = COMPRESSIONS.get(Path(place.partition("?")[0]).suffix.lower())
    return fsspec.open(url, "rb", compression=compression, **storage_options().get(protocol, {})).open()


class WholeBytes(BytesCache):
    """The read-ahead of a file over HTTP, which repeats a request that failed or brought too few bytes.

    Repeated here, the bytes come from the right place also where they are decompressed: `datasets` repeats reads of
    the decompressed file, which then miss the bytes that were lost. Too few bytes would be the end of the file.
    """

    name = "vipolyqwen"

    def __init__(self, blocksize: int, fetcher: Fetcher, size: int, **options: Any) -> None:
        def fetch(start: int, end: int) -> bytes:
            return patiently(lambda: whole(start, end), f"bytes {start:,} to {end:,}")

        def whole(start: int, end: int) -> bytes:
            found = fetcher(start, end)
            if len(found) < min(end, size) - start:
                raise ConnectionError(
                    f"{len(found):,} bytes came instead of those from {start:,} to {end:,}, of {size:,}"
                )
            return found

        super().__init__(blocksize, fetch, size, **options)


register_cache(WholeBytes, clobber=True)


def patiently(
    read: Callable[[], Result], what: str, again: Callable[[], None] = lambda: None, lasting: Classes = ()
) -> Result:
    """Returns what `read` returns; after a failure that may pass, calls `again` and `read` a few times more.

    Args:
        read: reads over the network.
        what: is read, for the log.
        again: prepares another try.
        lasting: classes of failures that do not pass, unless an HTTP status says that they may.

    Raises:
        Exception: the last failure, of any class.
    """
    began = time.monotonic()
    for number in range(1, TRIES + 1):
        try:
            return read()
        except Exception as error:
            if number == TRIES or not may_pass(error, lasting) or time.monotonic() - began > PATIENCE:
                raise
            wait = WAIT * 2 ** (number - 1)
            logger.warning(f"{what}: {explain(error)}. Trying again in {wait:g} s.")
            time.sleep(wait)
            again()
    raise AssertionError("unreachable")


@contextmanager
def without_their_retries() -> Iterator[None]:
    """Leaves repeated reads to `WholeBytes` and to the Hub's client, for files opened inside; see there why."""
    config = datasets.config
    before = config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL
    config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL = 1, 0
    try:
        yield
    finally:
        config.STREAMING_READ_MAX_RETRIES, config.STREAMING_READ_RETRY_INTERVAL = before


def is_unreadable(error: BaseException) -> bool:
    """Returns whether an error is one of files or of the network, whose classes depend on what is installed."""
    packages = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, UNREADABLE) or not packages.isdisjoint(NETWORK)


def may_pass(error: BaseException, lasting: Classes = ()) -> bool:
    """Returns whether a read that failed may succeed later; see `patiently`."""
    if isinstance(error, CastError) or not is_unreadable(error):
        return False
    statuses = [status for status in map(_status, _causes(error)) if status is not None]
    if not statuses:
        return not isinstance(error, lasting)
    return all(status >= 500 or status in BUSY for status in statuses)


def explain(error: BaseException) -> str:
    """Returns the error and its causes in words."""
    texts = (
        " ".join(f"{type(each).__name__}: {WORDS.get(type(each).__name__, each)}".split()) for each in _causes(error)
    )
    return ", by ".join(dict.fromkeys(texts))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status that an error of a client names: aiohttp as `status`, others in their `response`."""
    values = vars(error)
    status = values.get("status", getattr(values.get("response"), "status_code", None))
    return status if isinstance(status, int) else None
