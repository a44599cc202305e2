"""Connections between the processes of a run, over which each reports its end and the reason.

JAX reports a dead process only when it has missed heartbeats, in an error of its own, and signals
not at all: until then, the others wait in the next collective. Here every process holds a
connection to process 0, which passes messages on. A connection that breaks without a message means
that its process was killed, or that its host is gone; one that is silent for too long, that it is
frozen (`Heartbeats`).
"""

import contextlib
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from train.processes.hosts import gather

LOST = "ended without a message. It was killed, ran out of memory, or its host is gone"
_DONE = ""  # the reason of a process that ends because all is done
_CONNECT_SECONDS = 5.0  # to reach process 0, and to greet it
_MAX_MESSAGE_BYTES = 2**16  # bytes of a message
_MALFORMED = (ValueError, TypeError, KeyError, RecursionError)
# A host that is gone, whether or not something was sent to it: after 35 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 35_000}
_BEAT = b"\n"  # a line without a message
_HEARTBEATS_PER_TIMEOUT = 8
_MAX_HEARTBEAT_SECONDS = 1.0  # most seconds between two heartbeats


class Silence(NamedTuple):
    """The duration of a process's silence in seconds, and its start in seconds since 1970."""

    seconds: float
    since: float


class Heartbeats:
    """Measures the silence of each process.

    Time in which this process stood still itself (it was suspended with all others, say) does not
    count: what the others sent in the meantime is read only afterwards.

    Attributes:
      every: seconds between two heartbeats.
    """

    def __init__(self, processes: Iterable[int], timeout: float) -> None:
        """Starts with a silence of zero seconds for each process."""
        self.every = min(timeout / _HEARTBEATS_PER_TIMEOUT, _MAX_HEARTBEAT_SECONDS)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._silences = dict.fromkeys(processes, Silence(0.0, time.time()))

    def heard(self, process: int) -> None:
        """Resets the silence of a process."""
        with self._lock:
            if process in self._silences:
                self._silences[process] = Silence(0.0, time.time())

    def forget(self, process: int) -> None:
        """Stops measuring a process that has ended."""
        with self._lock:
            self._silences.pop(process, None)

    def count(self, seconds: float) -> dict[int, Silence]:
        """Adds the elapsed time; returns each silence that now exceeds the timeout, only once.

        Args:
          seconds: the time; of a longer one than two heartbeats, this process missed the rest.
        """
        counted_seconds = min(seconds, 2 * self.every)
        too_long = {}
        with self._lock:
            for process, silence in [*self._silences.items()]:
                silence = silence._replace(seconds=silence.seconds + counted_seconds)
                self._silences[process] = silence
                if silence.seconds >= self._timeout:
                    too_long[process] = silence
                    del self._silences[process]
        return too_long


class Ending(NamedTuple):
    """The premature end of a process.

    Attributes:
      process: its number.
      why: the reason.
      code: the exit code of all processes.
      unannounced: whether others noticed it: it did not, or could not, say so itself.
      deferred: whether it goes on until the step is over, and all end together.
    """

    process: int
    why: str
    code: int
    unannounced: bool = False
    deferred: bool = False


EndListener = Callable[[Ending], None]


class Peers:
    """The connections of this process. Process 0 is connected to all others."""

    def __init__(
        self,
        connections: dict[int, socket.socket],
        places: list[str],
        on_ending: EndListener,
        timeout: float,
    ) -> None:
        """Starts the threads that listen and that send heartbeats.

        Args:
          connections: the connections, by the process at their other end.
          places: the number within its host, and the host, of each process of the run.
          on_ending: is called, in a thread, when another process ends before its time.
          timeout: seconds without a sign of life after which a process counts as frozen.
        """
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._connections = connections
        self._places = places
        self._on_ending = on_ending
        self._heartbeats = Heartbeats(connections, timeout)
        self._send_lock = threading.Lock()
        self._closed = False  # this process has sent its last message
        self._ended: set[int] = set()  # the processes that have
        self._frozen: set[int] = set()
        self._ending_lock = threading.Lock()  # `on_ending` is called of one process at a time
        self._threads = {
            process: threading.Thread(
                target=self._listen, args=(process, connection), name="peers", daemon=True
            )
            for process, connection in connections.items()
        }
        watch_thread = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        for thread in (*self._threads.values(), watch_thread):
            thread.start()

    def tell(self, reason: str, code: int, *, deferred: bool = False) -> None:
        """Tells the other processes that this process ends, and the reason."""
        self._announce(Ending(self.index, reason, code, deferred=deferred))

    def close(self) -> None:
        """Tells the other processes that this process has finished."""
        self._announce(Ending(self.index, _DONE, 0))
        with self._send_lock:
            self._closed = True
            for process, connection in list(self._connections.items()):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                if process in self._ended:
                    self._connections.pop(process).close()

    def wait_for_the_others(self, seconds: float) -> None:
        """Lets process 0 wait for the others, because JAX kills processes that lose it."""
        if self.index != 0:
            return
        deadline = time.monotonic() + seconds
        current = threading.current_thread()  # may be the one that was told of an end
        others = {process for process, thread in self._threads.items() if thread is not current}
        while others - self._ended - self._frozen and time.monotonic() < deadline:
            time.sleep(0.02)

    def _announce(self, ending: Ending, besides: int | None = None) -> None:
        """Sends an ending to all other processes except the process `besides`."""
        self._send(f"{json.dumps(ending._asdict())}\n".encode(), besides)

    def _send(self, line: bytes, besides: int | None = None) -> None:
        """Sends a line to all other processes except the process `besides`."""
        with self._send_lock:
            for process, connection in list(self._connections.items()):
                if process != besides:
                    with contextlib.suppress(OSError):  # it ended already
                        connection.sendall(line)

    def _listen(self, process: int, connection: socket.socket) -> None:
        """Handles the messages of another process until that process ends."""
        has_announced_end = False
        # Of a malformed message, the connection is at fault, not this process.
        with contextlib.suppress(OSError, *_MALFORMED), connection.makefile("rb") as lines:
            for line in iter(lambda: lines.readline(_MAX_MESSAGE_BYTES), b""):
                self._heartbeats.heard(process)
                if line == _BEAT:
                    continue
                ending = Ending(**json.loads(line))
                if ending.process == process and not ending.deferred:
                    has_announced_end = True
                self._handle(ending, process)
        self._heartbeats.forget(process)
        with self._send_lock:  # who has ended is still told that this process has, too
            self._ended.add(process)
            if self._closed:
                self._connections.pop(process).close()
        if not has_announced_end:
            self._handle(Ending(process, LOST, 1, unannounced=True), process)

    def _watch(self) -> None:
        """Sends heartbeats, and reports frozen processes, until all others have ended."""
        last_time = time.monotonic()
        while any(thread.is_alive() for thread in self._threads.values()):
            time.sleep(self._heartbeats.every)
            if not self._closed:
                self._send(_BEAT)
            now = time.monotonic()
            silences = self._heartbeats.count(now - last_time)
            last_time = now
            for process, silence in silences.items():
                self._frozen.add(process)
                clock = time.strftime("%H:%M:%S", time.localtime(silence.since))
                why = (
                    f"has not answered since {clock} ({silence.seconds:.0f} s). It is frozen, or "
                    f"its host or the network is gone. If {self._places[process]} still exists, "
                    "end it first"
                )
                self._handle(Ending(process, why, 1, unannounced=True), self.index)

    def _handle(self, ending: Ending, sender: int) -> None:
        """Forwards a premature ending to other processes, and calls the listener."""
        if ending.why == _DONE:
            return
        if self.index in (0, sender):
            self._announce(ending, besides=sender)
        with self._ending_lock:
            self._on_ending(ending)


def connect(coordinator: str | None, on_ending: EndListener, timeout: float) -> Peers | str:
    """Connects the processes of this run. All processes must call it.

    Args:
      coordinator: the address of process 0, host:port, as the user gave it.
      on_ending: is called, in a thread, when another process ends before its time.
      timeout: seconds without a sign of life after which a process counts as frozen.

    Returns:
      The connections; or, in every process, the reason why there are none.
    """
    place = f"process {os.getpid()} of {socket.gethostname()}"
    connections: dict[int, socket.socket] = {}
    if jax.process_index() == 0:
        token = secrets.token_hex(16)
        server, host = _open_server(coordinator)
        with server:
            offer = {"host": host, "port": server.getsockname()[1], "token": token}
            accept_thread = threading.Thread(
                target=_accept_connections,
                args=(server, token, connections),
                name="accept",
                daemon=True,
            )
            accept_thread.start()
            gather(offer)
            answers = gather([True, place])
            if all(is_reached for is_reached, _ in answers):
                accept_thread.join()
    else:
        offer, *_ = gather(None)
        connection = _connect_to_first_process(offer)
        if connection is not None:
            connections[0] = connection
        answers = gather([connection is not None, place])
    unreached = [process for process, (is_reached, _) in enumerate(answers) if not is_reached]
    if not unreached:
        return Peers(connections, [place for _, place in answers], on_ending, timeout)
    for connection in [*connections.values()]:
        connection.close()
    return f"process {unreached[0]} does not reach process 0 at {offer['host']}:{offer['port']}"


def _open_server(coordinator: str | None) -> tuple[socket.socket, str]:
    """Opens a socket that listens on one interface; returns it and its host name or address.

    The interface is the coordinator's; where none is named, that of the default route.
    """
    candidates = []
    if coordinator:
        candidates.append(coordinator.rpartition(":")[0].strip("[]"))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing, but chooses an interface
        candidates.append(probe.getsockname()[0])
    candidates.append(socket.gethostname())
    for host in candidates:
        with contextlib.suppress(OSError, ValueError):
            family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            is_loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
            # Some systems give their own name a loopback address, which no other host reaches.
            if is_loopback and host not in ("localhost", address[0]):
                continue
            return socket.create_server(address[:2], family=family), host
    return socket.create_server(("127.0.0.1", 0)), "127.0.0.1"


def _connect_to_first_process(offer: dict[str, Any]) -> socket.socket | None:
    """Connects to the address that process 0 has published; returns None on failure."""
    greeting = {"token": offer["token"], "process": jax.process_index()}
    with contextlib.suppress(OSError):
        address = (offer["host"], offer["port"])
        connection = socket.create_connection(address, _CONNECT_SECONDS)
        connection.sendall(f"{json.dumps(greeting)}\n".encode())
        if connection.recv(1):  # process 0 knows the token, and others at this address do not
            return _with_keepalive(connection)
    return None


def _accept_connections(
    server: socket.socket, token: str, connections: dict[int, socket.socket]
) -> None:
    """Accepts connections until every process has one or the server is closed."""
    with contextlib.suppress(OSError):  # the server is closed
        server.settimeout(0.05)
        while len(connections) < jax.process_count() - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            args = (connection, token, connections)  # no connection has to wait for another
            threading.Thread(target=_check_greeting, args=args, name="greet", daemon=True).start()


def _check_greeting(
    connection: socket.socket, token: str, connections: dict[int, socket.socket]
) -> None:
    """Keeps a connection that greets with the token, and closes any other connection."""
    with contextlib.suppress(OSError, *_MALFORMED):
        connection.settimeout(_CONNECT_SECONDS)
        with connection.makefile("rb") as lines:
            greeting = json.loads(lines.readline(_MAX_MESSAGE_BYTES))
        if greeting["token"] == token:
            process = int(greeting["process"])
            connection.sendall(b"\n")
            connections[process] = _with_keepalive(connection)
            return
    connection.close()


def _with_keepalive(connection: socket.socket) -> socket.socket:
    """Removes the timeout of a connection, and turns TCP keepalive on."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
