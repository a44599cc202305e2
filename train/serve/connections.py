"""Connections to a server: the heads of requests come in time, and no more are open than may be."""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD = 30.0  # seconds that the head of a request may take
_MOST = 10_000
_OTHERS = 128  # files that the process has open besides
_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\n\r\n"
)


def most_connections() -> int:
    """Returns the number of connections that the limit on open files has room for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else max(1, min(_MOST, files - _OTHERS))


class Connections:
    """Makes the protocol of each connection of a server, for `uvicorn.Config(http=...)`.

    Attributes:
      open: the connections.
      waiting: timers of connections that owe the head of a request, the oldest first.
    """

    def __init__(self, head: float = HEAD, most: int | None = None) -> None:
        """Starts with none.

        Args:
          head: seconds that the head of a request may take.
          most: number of connections at once; by default as many as there may be open files. If
            there are more, the one that owes a head for the longest time is closed.
        """
        self.head, self.most = head, most or most_connections()
        self.open: set[_Connection] = set()
        self.waiting: dict[_Connection, asyncio.TimerHandle] = {}

    def __call__(self, **arguments: Any) -> asyncio.Protocol:
        """Returns the protocol of a new connection."""
        return _Connection(self, AutoHTTPProtocol(**arguments))


class _Connection(asyncio.Protocol):
    """Passes all on to uvicorn's protocol, and closes a connection whose head is late.

    The time begins with the connection, or with the first byte of a later request on it; no further
    byte prolongs it.
    """

    def __init__(self, all_: Connections, inner: Any) -> None:
        self._all, self._inner, self._said = all_, inner, False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._inner.connection_made(transport)
        self._all.open.add(self)
        self._wait()
        if len(self._all.open) > self._all.most:
            next(iter(self._all.waiting)).refuse(_MANY)

    def data_received(self, data: bytes) -> None:
        self._said, before = True, self._inner.cycle
        if self not in self._all.waiting and (before is None or before.response_complete):
            self._wait()
        self._inner.data_received(data)
        if self._inner.cycle is not before:  # a request: its head is whole
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._all.open.discard(self)
        self._inner.connection_lost(exc)

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def refuse(self, answer: bytes) -> None:
        """Closes the connection; a client that has begun to ask is told why."""
        self._end_wait()
        self._all.open.discard(self)
        if not self._transport.is_closing():
            if self._said or answer is _MANY:
                self._transport.write(answer)
            self._transport.close()

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._all.waiting[self] = loop.call_later(self._all.head, self.refuse, _LATE)

    def _end_wait(self) -> None:
        timer = self._all.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()
