"""Connections between the processes of a run, over which each says that it ends, and why.

JAX reports a dead process only when its heartbeat is missed, after 100 seconds, and signals not at
all: until then, the others wait in the next collective. Here every process holds a connection to
process 0, which passes messages on. A connection that breaks without a message means that its
process was killed, or that its host is gone.
"""

import contextlib
import ipaddress
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from train.processes.hosts import gathered

LOST = "ended without a word: it was killed, ran out of memory, or its host is gone"
_SECONDS = 5.0  # to reach process 0
_LONGEST = 2**16  # bytes of a message
_MALFORMED = (ValueError, TypeError, KeyError, RecursionError)
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a host that is gone

# Called with a process, the reason why it ends, and its exit code.
Told = Callable[[int, str, int], None]


class Peers:
    """The connections of this process: process 0 has one to each other, the others one to it."""

    def __init__(self, connections: dict[int, socket.socket], told: Told) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self._connections = connections
        self._told = told
        self._sending = threading.Lock()
        self._closed = False  # this process has said its last
        self._ended: set[int] = set()  # the processes that have
        self._done = threading.Event()  # all connections are closed
        self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
        self._thread.start()

    def tell(self, reason: str, code: int) -> None:
        """Tells the others that this process ends, and why."""
        self._send({"process": self.index, "reason": reason, "code": code})

    def close(self) -> None:
        """Tells the others that this process ends because all is done."""
        self._send({"process": self.index, "reason": None, "code": 0})
        with self._sending:
            self._closed = True
            for process, connection in list(self._connections.items()):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                if process in self._ended:
                    self._connections.pop(process).close()

    def wait_for_the_others(self, seconds: float) -> None:
        """Has process 0 wait until the others have ended: JAX kills processes that lose it."""
        if self.index == 0:
            self._done.wait(seconds)

    def _send(self, message: dict[str, Any], besides: int | None = None) -> None:
        line = f"{json.dumps(message)}\n".encode()
        with self._sending:
            for process, connection in list(self._connections.items()):
                if process != besides:
                    with contextlib.suppress(OSError):  # it ended already
                        connection.sendall(line)

    def _listen(self) -> None:
        """Passes on the messages of the others, until all have ended."""
        waiting = selectors.DefaultSelector()
        for process, connection in self._connections.items():
            waiting.register(connection, selectors.EVENT_READ, (process, bytearray()))
        ending: set[int] = set()  # whose connection may break
        while waiting.get_map():
            for key, _ in waiting.select():
                process, received = key.data
                try:
                    data = key.fileobj.recv(4096)  # type: ignore[union-attr]
                except OSError:
                    data = b""
                received += data
                try:
                    for message in _messages(received):
                        ending.add(message["process"])
                        self._hear(message, process)
                except _MALFORMED:  # the connection is at fault, not this process
                    data = b""
                if not data:
                    waiting.unregister(key.fileobj)
                    with self._sending:  # who has ended is still told that this process has, too
                        self._ended.add(process)
                        if self._closed:
                            self._connections.pop(process).close()
                    if process not in ending:
                        self._hear({"process": process, "reason": LOST, "code": 1}, process)
        waiting.close()
        self._done.set()

    def _hear(self, message: dict[str, Any], sender: int) -> None:
        if message["reason"] is None:
            return
        if self.index == 0:
            self._send(message, besides=sender)
        self._told(message["process"], message["reason"], message["code"])


def connect(coordinator: str | None, told: Told) -> Peers | str:
    """Connects the processes of this run; all of them have to call this.

    Args:
      coordinator: the address of process 0, host:port, as the user gave it.
      told: is called, in a thread, when another process says that it ends before its time.

    Returns:
      The connections; or, in every process, the reason why there are none.
    """
    if jax.process_index():
        offer, *_ = gathered(None)
        connection = _reached(offer)
        connections = {} if connection is None else {0: connection}
        reached = gathered(connection is not None)
    else:
        token, connections = secrets.token_hex(16), {}
        server, host = _server(coordinator)
        with server:
            offer = {"host": host, "port": server.getsockname()[1]}
            accepting = threading.Thread(
                target=_accept, args=(server, token, connections), name="accept", daemon=True
            )
            accepting.start()
            gathered({**offer, "token": token})
            reached = gathered(True)
            if all(reached):
                accepting.join()
    if all(reached):
        return Peers(connections, told)
    for connection in connections.values():
        connection.close()
    return (
        f"process {reached.index(False)} does not reach process 0 at "
        f"{offer['host']}:{offer['port']}"
    )


def _messages(received: bytearray) -> Iterator[dict[str, Any]]:
    """Yields the messages that have arrived whole, and takes them away.

    Raises:
      ValueError, TypeError, KeyError, RecursionError: a line is no message.
    """
    while b"\n" in received:
        line, _, rest = bytes(received).partition(b"\n")
        received[:] = rest
        yield dict(json.loads(line))
    if len(received) > _LONGEST:
        raise ValueError("a message without an end")


def _server(coordinator: str | None) -> tuple[socket.socket, str]:
    """Returns a socket that listens on one interface of this host, and its address there.

    The interface is the coordinator's; where none is named, that of the default route.
    """
    hosts = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing, but chooses an interface
        hosts.append(probe.getsockname()[0])
    for host in (*hosts, socket.gethostname()):
        with contextlib.suppress(OSError, ValueError):
            family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            is_loopback = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
            # Some systems give their own name a loopback address, which no other host reaches.
            if is_loopback and host not in ("localhost", address[0]):
                continue
            return socket.create_server(address[:2], family=family), host
    return socket.create_server(("127.0.0.1", 0)), "127.0.0.1"


def _reached(offer: dict[str, Any]) -> socket.socket | None:
    hello = {"token": offer["token"], "process": jax.process_index()}
    with contextlib.suppress(OSError):
        connection = socket.create_connection((offer["host"], offer["port"]), _SECONDS)
        connection.sendall(f"{json.dumps(hello)}\n".encode())
        if connection.recv(1):  # process 0 knows the token, and others at this address do not
            return _kept_alive(connection)
    return None


def _accept(server: socket.socket, token: str, connections: dict[int, socket.socket]) -> None:
    """Adds the connection of each other process; closes those that do not know the token.

    Ends when all are there or the server is closed. No connection has to wait for another.
    """
    server.setblocking(False)
    with selectors.DefaultSelector() as waiting:
        waiting.register(server, selectors.EVENT_READ)
        while len(connections) < jax.process_count() - 1 and server.fileno() >= 0:
            for key, _ in waiting.select(timeout=0.2):
                if key.fileobj is server:
                    with contextlib.suppress(OSError):
                        connection, _ = server.accept()
                        connection.setblocking(False)
                        waiting.register(connection, selectors.EVENT_READ, bytearray())
                    continue
                connection, received = key.fileobj, key.data  # type: ignore[assignment]
                try:
                    received += (data := connection.recv(1024))
                    hello = next(_messages(received), None)
                    if hello is None and data:
                        continue
                    known = hello is not None and hello["token"] == token
                    process = int(hello["process"]) if hello is not None else -1
                except (OSError, *_MALFORMED):
                    known = False
                waiting.unregister(connection)
                if not known:
                    connection.close()
                    continue
                with contextlib.suppress(OSError):  # it is gone already
                    connection.setblocking(True)
                    connection.sendall(b"\n")
                    connections[process] = _kept_alive(connection)
        for key in [key for key in waiting.get_map().values() if key.fileobj is not server]:
            key.fileobj.close()  # type: ignore[union-attr]


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
