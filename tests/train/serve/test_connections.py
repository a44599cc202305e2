"""Connections of which no request comes: they end, and others go on."""

import contextlib
import socket
import time
from functools import partial

import pytest

from tests.train.serve.command import ask, command
from train.serve import server

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = REQUEST[:-9]


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Runs some work against the command, which waits for heads for a short time."""

    def run(work, **limits):
        limited = partial(server.Connections, **{"head": 0.4, **limits})
        monkeypatch.setattr(server, "Connections", limited)
        return command(monkeypatch, tmp_path, "", work)

    return run


@pytest.fixture
def connected():
    """Connects to a port; all ends with the test."""
    with contextlib.ExitStack() as all_:

        def connect(port):
            found = all_.enter_context(socket.create_connection(("127.0.0.1", port)))
            found.settimeout(60)
            return found

        yield connect


def rest(connection):
    """All that comes until the server closes the connection."""
    found = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            found.append(part)
    return b"".join(found)


def answer(connection):
    """One answer of a few bytes, on a connection that is kept."""
    connection.sendall(REQUEST)
    found = b""
    while not found.endswith(b'"}'):
        found += connection.recv(4096)
    return found


def test_a_head_that_does_not_come_ends_its_connection(served, connected):
    def work(port):
        idle, half, slow, kept = [connected(port) for _ in range(4)]
        half.sendall(HALF)
        first = answer(kept)
        kept.sendall(HALF)
        with contextlib.suppress(OSError):
            for byte in HALF:  # each byte in time, and the whole head too late
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        return first, *map(rest, (idle, half, slow, kept))

    first, idle, half, slow, kept = served(work)
    assert first.startswith(b"HTTP/1.1 200") and idle == b""
    assert half.startswith(b"HTTP/1.1 408") and kept.startswith(b"HTTP/1.1 408")
    assert slow.startswith(b"HTTP/1.1 408") or slow == b""  # it was sending still


@pytest.mark.slow
def test_bodies_and_pauses_between_requests_may_take_longer(served, connected):
    def work(port):
        slow, kept = connected(port), connected(port)
        head = (
            b"POST /api/v1/create_session HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
        )
        slow.sendall(head)
        both = [answer(kept)]
        time.sleep(0.8)
        slow.sendall(b"{}")
        both.append(answer(kept))
        return [*both, slow.recv(4096)]

    assert all(one.startswith(b"HTTP/1.1 200") for one in served(work))


def test_many_connections_without_a_request_let_others_in(served, connected):
    def work(port):
        kept = connected(port)
        answer(kept)
        held = [connected(port) for _ in range(30)]
        for one in held:
            with contextlib.suppress(OSError):  # it may be closed already
                one.sendall(HALF)
        status = ask(port)[0]
        return status, [rest(one) for one in held[:20]], answer(kept)

    status, refused, kept = served(work, head=300.0, most=8)
    assert status == 200 and kept.startswith(b"HTTP/1.1 200")
    assert all(not one or one.startswith(b"HTTP/1.1 503") for one in refused)
