"""Connections between the processes of a run, over which each says that it ends, and why.

JAX reports a dead process only when its heartbeat is missed, after 100 seconds, and signals not at
all: until then, the others wait in the next collective. Here every process holds a connection to
process 0, which passes messages on. A connection that breaks without a message means that its
process was killed, or that its host is gone.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

from train.processes.hosts import gathered

LOST = "ended without a word: it was killed, ran out of memory, or its host is gone"
_SECONDS = 3.0  # for each address of process 0 that is tried
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
                while b"\n" in received:
                    line, _, rest = bytes(received).partition(b"\n")
                    received[:] = rest
                    message = json.loads(line)
                    ending.add(message["process"])
                    self._hear(message, process)
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
        with _server() as server:
            offer = {"hosts": _own_hosts(coordinator), "port": server.getsockname()[1]}
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
    tried = ", ".join(f"{host}:{offer['port']}" for host in offer["hosts"])
    return f"process {reached.index(False)} does not reach process 0 at {tried}"


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_hosts(coordinator: str | None) -> list[str]:
    """Returns the addresses under which this host may be reached, the likeliest first."""
    found = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing, but chooses an interface
        found.append(probe.getsockname()[0])
    return list(dict.fromkeys([*found, socket.gethostname(), "127.0.0.1"]))


def _reached(offer: dict[str, Any]) -> socket.socket | None:
    hello = {"token": offer["token"], "process": jax.process_index()}
    for host in offer["hosts"]:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, offer["port"]), _SECONDS)
            connection.sendall(f"{json.dumps(hello)}\n".encode())
            if connection.recv(1):  # process 0 knows the token, and others at this address do not
                return _kept_alive(connection)
    return None


def _accept(server: socket.socket, token: str, connections: dict[int, socket.socket]) -> None:
    """Adds the connection of each other process; closes those that do not know the token."""
    while len(connections) < jax.process_count() - 1:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection, _ = server.accept()
            connection.settimeout(_SECONDS)
            with connection.makefile("rb") as received:
                hello = json.loads(received.readline(1000))
            if hello["token"] != token:
                connection.close()
                continue
            connection.sendall(b"\n")
            connections[hello["process"]] = _kept_alive(connection)
        if server.fileno() < 0:
            return


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
