"""Runs the HTTP server in a thread, with limits on connections and a graceful end."""

import asyncio
import contextlib
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from train.console.errors import UserError
from train.console.output import say
from train.serve.routes.access import Access

_DRAIN_SECONDS = 30.0  # that requests under way have when the server ends
_POLL_SECONDS = 0.05
HEAD = 30.0  # seconds that the head of a request may take
_MAX_CONNECTIONS = 10_000
_OTHER_FILES = 128  # that the process has open besides
_TIMEOUT_ANSWER = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_OVERLOAD_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\n\r\n"
)


def most_connections() -> int:
    """Returns the maximum number of connections within the limit on open files."""
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(1, min(_MAX_CONNECTIONS, max_files - _OTHER_FILES))


class Connections:
    """Creates the protocol of each connection, for `uvicorn.Config(http=...)`.

    Attributes:
      open: the connections.
      waiting: timers of connections that owe the head of a request, the oldest first.
    """

    def __init__(self, head: float = HEAD, most: int | None = None) -> None:
        """Creates a registry without connections.

        Args:
          head: seconds that the head of a request may take.
          most: number of connections at once; by default as many as there may be open files. If
            there are more, the one that owes a head for the longest time is closed.
        """
        self.head = head
        self.most = most or most_connections()
        self.open: set[_Connection] = set()
        self.waiting: dict[_Connection, asyncio.TimerHandle] = {}

    def __call__(self, **arguments: Any) -> asyncio.Protocol:
        """Returns the protocol of a new connection."""
        return _Connection(self, AutoHTTPProtocol(**arguments))


class _Connection(asyncio.Protocol):
    """Forwards to uvicorn's protocol, and closes a connection whose request head is late.

    The time begins with the connection, or with the first byte of a later request on it; no further
    byte prolongs it.
    """

    def __init__(self, connections: Connections, inner: Any) -> None:
        self._connections = connections
        self._inner = inner
        self._has_sent = False  # whether the client sent anything

    def connection_made(self, transport: Any) -> None:
        """Adds a connection, and closes the longest-waiting one if there are too many."""
        self._transport = transport
        self._inner.connection_made(transport)
        self._connections.open.add(self)
        self._wait()
        if len(self._connections.open) > self._connections.most:
            oldest = next(iter(self._connections.waiting))
            oldest.refuse(_OVERLOAD_ANSWER)

    def data_received(self, data: bytes) -> None:
        """Forwards bytes. A request's first byte starts its timer, and a complete head stops it."""
        self._has_sent = True
        previous_cycle = self._inner.cycle  # uvicorn's state of a request and its answer
        is_idle = previous_cycle is None or previous_cycle.response_complete
        if is_idle and self not in self._connections.waiting:
            self._wait()
        self._inner.data_received(data)
        has_head = self._inner.cycle is not previous_cycle
        if has_head:
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._connections.open.discard(self)
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def refuse(self, answer: bytes) -> None:
        """Closes the connection, with an answer unless the client timed out without a request."""
        self._end_wait()
        self._connections.open.discard(self)
        if not self._transport.is_closing():
            if self._has_sent or answer is _OVERLOAD_ANSWER:
                self._transport.write(answer)
            self._transport.close()

    def _wait(self) -> None:
        """Starts the timer for the head of a request."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._connections.head, self.refuse, _TIMEOUT_ANSWER)
        self._connections.waiting[self] = timer

    def _end_wait(self) -> None:
        timer = self._connections.waiting.pop(self, None)
        if timer is not None:
            timer.cancel()


class _Server(uvicorn.Server):
    """A uvicorn server without signal handlers, because the main thread handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An HTTP server in a thread, which listens for the duration of a `with` block.

    Attributes:
      app: the application; it may be replaced by another.
      address: the address.
    """

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        """Opens the listening socket.

        Args:
          app: the application.
          host: the address.
          port: the port; 0 for a free one.

        Raises:
          UserError: the address cannot be had.
        """
        self.app = app
        self._listener = _listen(host, port)
        self.address = _address(self._listener)
        config = uvicorn.Config(
            self._answer,
            http=cast(Any, Connections()),
            interface="asgi3",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._work, name="server", daemon=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def _work(self) -> None:
        with self._listener:
            asyncio.run(self._server.serve([self._listener]))

    def __enter__(self) -> "HttpServer":
        """Starts the server's thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the server's thread."""
        self._server.should_exit = True
        self._thread.join()

    def serve(self, access: Access, stop: Callable[[], None]) -> None:
        """Serves until SIGTERM or SIGINT. The main thread must call it.

        Then new work is refused with 503, and requests under way have half a minute to end; a
        second signal ends them at once. Long polls should end once `access.draining` is set.

        Args:
          access: that of the application.
          stop: ends the engine; it is called once no request is under way, or time is up.
        """
        with _signals() as signals:
            say(f"serving at {self.address} (Ctrl-C ends it)")
            while not signals and self._thread.is_alive():
                time.sleep(_POLL_SECONDS)
            access.draining = True
            say("ends after the running requests; press Ctrl-C again to end at once")
            n_signals = len(signals)
            seconds_left = _DRAIN_SECONDS
            while access.running.total() and len(signals) == n_signals and seconds_left > 0:
                time.sleep(_POLL_SECONDS)
                seconds_left -= _POLL_SECONDS
            stop()
            self._server.should_exit = True
            self._thread.join()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that would otherwise end the process."""
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        signals.append(number)

    previous_handlers = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield signals
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket."""
    name = host.strip("[]")
    try:
        family, *_ = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((name, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"The server cannot listen at --host {host} --port {port} ({error.strerror}). Another "
            "server may use this port. Stop it, or pass another --port."
        ) from error


def _address(listener: socket.socket) -> str:
    """Returns the address of a listening socket."""
    host, port = listener.getsockname()[:2]
    is_ipv6 = ":" in host
    return f"http://[{host}]:{port}" if is_ipv6 else f"http://{host}:{port}"
