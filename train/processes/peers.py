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
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from train.processes.hosts import gather

LOST = "ended without a word: it was killed, ran out of memory, or its host is gone"
_SECONDS = 5.0  # to reach process 0, and to greet it
_LONGEST = 2**16  # bytes of a message
_MALFORMED = (ValueError, TypeError, KeyError, RecursionError)
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a host that is gone

# Called with a process, the reason why it ends, and its exit code.
EndListener = Callable[[int, str, int], None]


class Peers:
    """The connections of this process: process 0 has one to each other, the others one to it."""

    def __init__(self, connections: dict[int, socket.socket], told: EndListener) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self._connections = connections
        self._told = told
        self._sending = threading.Lock()
        self._closed = False  # this process has said its last
        self._ended: set[int] = set()  # the processes that have
        self._hearing = threading.Lock()  # `told` is called of one process at a time
        self._threads = [
            threading.Thread(target=self._listen, args=each, name="peers", daemon=True)
            for each in connections.items()
        ]
        for thread in self._threads:
            thread.start()

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
        until = time.monotonic() + seconds
        for thread in self._threads if self.index == 0 else ():
            if thread is not threading.current_thread():  # which was told of an end
                thread.join(max(0.0, until - time.monotonic()))

    def _send(self, message: dict[str, Any], besides: int | None = None) -> None:
        line = f"{json.dumps(message)}\n".encode()
        with self._sending:
            for process, connection in list(self._connections.items()):
                if process != besides:
                    with contextlib.suppress(OSError):  # it ended already
                        connection.sendall(line)

    def _listen(self, process: int, connection: socket.socket) -> None:
        """Passes on the messages of another process, until it has ended."""
        ending = False  # whether the connection may break
        # Of a malformed message, the connection is at fault, not this process.
        with contextlib.suppress(OSError, *_MALFORMED), connection.makefile("rb") as lines:
            while line := lines.readline(_LONGEST):
                message = dict(json.loads(line))
                ending = ending or message["process"] == process
                self._hear(message, process)
        with self._sending:  # who has ended is still told that this process has, too
            self._ended.add(process)
            if self._closed:
                self._connections.pop(process).close()
        if not ending:
            self._hear({"process": process, "reason": LOST, "code": 1}, process)

    def _hear(self, message: dict[str, Any], sender: int) -> None:
        if message["reason"] is None:
            return
        if self.index == 0:
            self._send(message, besides=sender)
        with self._hearing:
            self._told(message["process"], message["reason"], message["code"])


def connect(coordinator: str | None, told: EndListener) -> Peers | str:
    """Connects the processes of this run; all of them have to call this.

    Args:
      coordinator: the address of process 0, host:port, as the user gave it.
      told: is called, in a thread, when another process says that it ends before its time.

    Returns:
      The connections; or, in every process, the reason why there are none.
    """
    if jax.process_index():
        offer, *_ = gather(None)
        connection = _reached(offer)
        connections = {} if connection is None else {0: connection}
        reached = gather(connection is not None)
    else:
        token, connections = secrets.token_hex(16), {}
        server, host = _server(coordinator)
        with server:
            offer = {"host": host, "port": server.getsockname()[1]}
            accepting = threading.Thread(
                target=_accept, args=(server, token, connections), name="accept", daemon=True
            )
            accepting.start()
            gather({**offer, "token": token})
            reached = gather(True)
            if all(reached):
                accepting.join()
    if all(reached):
        return Peers(connections, told)
    for connection in [*connections.values()]:
        connection.close()
    return (
        f"process {reached.index(False)} does not reach process 0 at "
        f"{offer['host']}:{offer['port']}"
    )


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
    """Adds the connection of each other process, until all are there or the server is closed."""
    with contextlib.suppress(OSError):  # the server is closed
        server.settimeout(0.05)
        while len(connections) < jax.process_count() - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            args = (connection, token, connections)  # no connection has to wait for another
            threading.Thread(target=_greet, args=args, name="greet", daemon=True).start()


def _greet(connection: socket.socket, token: str, connections: dict[int, socket.socket]) -> None:
    """Adds a connection that knows the token; closes another one."""
    with contextlib.suppress(OSError, *_MALFORMED):
        connection.settimeout(_SECONDS)
        with connection.makefile("rb") as lines:
            hello = json.loads(lines.readline(_LONGEST))
        if hello["token"] == token:
            process = int(hello["process"])
            connection.sendall(b"\n")
            connections[process] = _kept_alive(connection)
            return
    connection.close()


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
