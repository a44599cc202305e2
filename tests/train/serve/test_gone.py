"""Samples of clients that are gone end, and those of others do not."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette

from tests.train.serve.client import Client, prompt, sampler
from tests.train.serve.command import Engine, ask, command
from tests.train.serve.fakes import FakeEngine
from tests.train.serve.waiting import until
from train.serve import __main__
from train.serve.routes.tinker.futures import Futures


@pytest.fixture
def client(tmp_path):
    found = Client(FakeEngine(held=True), tmp_path)
    yield found
    found.engine.release()
    found.engine.stop()


def asked(client, name, seq=0):
    """The id of a sample that the engine does not draw yet."""
    fields = {"prompt": prompt(5, 6), "sampling_params": {"max_tokens": 4}}
    return client.post("asample", sampling_session_id=name, seq_id=seq, **fields)["request_id"]


def test_samples_end_with_their_session(client):
    session = client.session()
    mine, other = sampler(client, session), sampler(client)
    requests = [asked(client, mine), asked(client, other)]
    client.post(f"sessions/{session}/finish", reason={"type": "success"})
    assert len(client.engine.ended) == 1
    assert client.poll(requests[0]).status_code == 410, "a client that lives asks anew"
    assert client.poll(requests[1]).status_code == 408
    client.engine.step(9)
    assert client.poll(requests[1]).status_code == 200
    assert client.server.futures._pending["alice"] == 0


def test_samples_end_after_missed_heartbeats(client):
    client.server.futures._patience_seconds = 0.0
    mine, other = client.session(), client.session()
    requests = [asked(client, sampler(client, session)) for session in (mine, other)]
    client.server.sweep_samples()
    assert client.engine.ended == [], "their clients live"
    client.later(45.0)
    client.post("session_heartbeat", session_id=other)
    client.server.sweep_samples()
    assert [client.poll(one).status_code for one in requests] == [410, 408]
    assert len(client.engine.ended) == 1


def test_samples_without_a_session_end_if_nobody_asks_for_them(client):
    fields = {"base_model": "tiny/base", "prompt": prompt(5), "sampling_params": {}}
    first, other = (client.post("asample", **fields)["request_id"] for _ in range(2))
    client.server.sweep_samples()
    assert client.engine.ended == []
    client.server.futures._patience_seconds = 0.0
    assert client.poll(first).status_code == 408
    client.server.sweep_samples()
    assert [client.poll(one).status_code for one in (first, other)] == [410, 408]


def test_a_sample_that_was_given_up_may_be_asked_for_again(client):
    client.server.futures._patience_seconds = 0.0
    name = sampler(client)
    request = asked(client, name)
    client.later(45.0)
    client.server.sweep_samples()
    assert client.poll(request).status_code == 410
    assert asked(client, name) == request  # as a retry would
    client.engine.step(1)
    assert client.poll(request).status_code == 408, "the result of the first is not taken for it"
    client.engine.step(1)
    assert client.poll(request).status_code == 200


@contextmanager
def listening(client):
    """The port of a server around the client's."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = Starlette(routes=client.server.routes())
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def open_poll(port, request):
    """A connection that waits for a result."""
    body = json.dumps({"request_id": request}).encode()
    head = "POST /api/v1/retrieve_future HTTP/1.1\r\nHost: localhost\r\nX-API-Key: tml-a\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def test_samples_end_on_a_closed_connection(client):
    futures = client.server.futures
    futures._hold_seconds, futures._closed_seconds = 30.0, 0.2
    requests = [asked(client, sampler(client), seq) for seq in range(2)]
    with listening(client) as port:
        connections = [open_poll(port, one) for one in (*requests, requests[1])]
        until(lambda: [futures._promises[one].polls for one in requests] == [1, 2], "both wait")
        for connection in connections[:2]:
            connection.close()
        until(lambda: futures._promises[requests[0]].polls == 0, "the server knows")
        until(lambda: futures._promises[requests[1]].polls == 1, "the server knows")
        client.server.sweep_samples()
        assert client.engine.ended == [], "it may come back"
        time.sleep(0.3)
        client.server.sweep_samples()
        assert len(client.engine.ended) == 1 and [*futures._promises] == requests[1:]
        client.engine.step(9)
        assert connections[2].recv(12) == b"HTTP/1.1 200"
        connections[2].close()


def test_a_sample_whose_adapter_is_being_read_ends(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    session = client.session()
    model = client.create(session)
    client.save(model, 1, "p", "save_weights_for_sampler")
    client.engine.step(9)
    path = f"tinker://{model}/sampler_weights/p"
    until(lambda: client.server.ledger.checkpoint(path), "the checkpoint is noted")
    asked(client, sampler(client, session, model_path=path))
    client.post(f"sessions/{session}/finish", reason={"type": "success"})
    client.engine.step(9)
    assert client.engine.drawn == [], "it was never begun"


def test_the_command_looks_for_clients_that_are_gone(monkeypatch, tmp_path):
    monkeypatch.setattr(__main__, "_LOOKED", 0.05)
    monkeypatch.setitem(Futures.__init__.__kwdefaults__, "gone", 0.1)
    engine = Engine(held=True)

    def work(port):
        def post(path, **fields):
            return ask(port, "POST", f"/api/v1/{path}", json.dumps(fields))[2]

        place = {"session_id": post("create_session")["session_id"], "sampling_session_seq_id": 0}
        name = post("create_sampling_session", base_model="tiny/base", **place)
        fields = {"prompt": prompt(5, 6), "sampling_params": {"max_tokens": 4}, "seq_id": 0}
        request = post("asample", **name, **fields)["request_id"]
        open_poll(port, request).close()
        until(lambda: engine.ended, "the sample ends")
        engine.release()
        return ask(port, "POST", "/api/v1/retrieve_future", json.dumps({"request_id": request}))[0]

    assert command(monkeypatch, tmp_path, "", work, engine) == 410
