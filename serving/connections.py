"""Connections that say nothing: the oldest of them makes room for a new one, so that they lock nobody out.

uvicorn counts open connections and refuses requests beyond `limit_concurrency`, but waits without end for the first
request of each.
"""

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class BoundedConnections(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # h11's or httptools', as installed
    """HTTP on one connection, which is closed when it is silent for too long or others need its place.

    A connection is silent from the moment it opens, or has its answer, until the headers of a request are complete;
    after that, `LimitLoad` bounds the time.
    """

    by_age: ClassVar[dict["BoundedConnections", None]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes the connection; closes the oldest silent one if there are as many as uvicorn serves."""
        super().connection_made(transport)
        self.by_age[self] = None
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            silent = next((other for other in self.by_age if other is not self and other.is_silent()), None)
            if silent is not None:
                silent.close()
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self.by_age.pop(self, None)
        super().connection_lost(exc)

    def is_silent(self) -> bool:
        """Returns whether no request is in progress, or its client does not read the rest of an answer."""
        return self.transport.is_closing() or self.cycle is None or self.cycle.response_complete

    def close(self) -> None:
        """Closes the connection and frees its place at once."""
        self.by_age.pop(self, None)
        self.connections.discard(self)
        self.transport.abort()

    def watch(self) -> None:
        """Closes the connection if it stays silent for uvicorn's keep-alive time; looks again if not."""
        self.loop.call_later(self.timeout_keep_alive, self._look, self.cycle)

    def _look(self, before: object) -> None:
        if self not in self.by_age:  # closed
            return
        if self.is_silent() and self.cycle is before:
            self.close()
        else:
            self.watch()
