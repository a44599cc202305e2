"""A ledger that another process holds, and a disk that is full."""

import json
import resource
import shutil
import sqlite3
import threading

import pytest

from tests.train.serve.client import Client
from tests.train.serve.command import Engine, ask, command
from tests.train.serve.fakes import FakeEngine
from tests.train.serve.process import Server
from tests.train.serve.test_kills import SERVER
from tests.train.serve.waiting import until
from train.serve.storage import database


def post(port, path, **fields):
    return ask(port, "POST", f"/api/v1/{path}", json.dumps(fields))


def result(port, request):
    """The result of a request, once it is there."""

    def found():
        status, _, answer = post(port, "retrieve_future", request_id=request)
        return status == 200 and answer

    return until(found, "there is a result")


def background(function):
    """Calls a function in a thread; returns the thread, and the list of what it returned."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    return thread, found


@pytest.fixture
def held(tmp_path):
    """Holds the ledger in `served` as a backup does: returns a connection of another program's."""

    def hold():
        other = sqlite3.connect(tmp_path / "served" / "ledger.sqlite", isolation_level=None)
        other.execute("begin exclusive")
        return other

    return hold


def test_a_ledger_that_others_hold_keeps_nobody_else_waiting(monkeypatch, tmp_path, held):
    monkeypatch.setattr(database.Database.__init__, "__defaults__", (60.0,))  # writes wait for long

    def work(port):
        session = post(port, "create_session")[2]["session_id"]
        other = held()
        waiting = [background(lambda: post(port, "create_session")) for _ in range(5)]
        until(lambda: all(thread.is_alive() for thread, _ in waiting), "all wait")
        pages = ["/healthz", "/", "/status.json", "/metrics", "/v1/models", "/api/v1/healthz"]
        pages += ["/api/v1/sessions", f"/api/v1/sessions/{session}"]
        answers = [ask(port, path=page)[0] for page in pages]
        poll = post(port, "retrieve_future", request_id="x:0")[0]
        assert not any(found for _, found in waiting), "nothing was asked while they waited"
        other.close()
        for thread, _ in waiting:
            thread.join()
        return answers, poll, [found[0][0] for _, found in waiting]

    answers, poll, written = command(monkeypatch, tmp_path, "", work)
    assert set(answers) == {200} and poll == 410 and written == [200] * 5


def test_who_writes_to_a_ledger_that_others_hold_is_told_to_come_again(monkeypatch, tmp_path, held):
    monkeypatch.setattr(database.Database.__init__, "__defaults__", (0.1,))
    engine = Engine(held=True)

    def work(port):
        session = post(port, "create_session")[2]["session_id"]
        made = {"session_id": session, "model_seq_id": 0, "base_model": "tiny/base"}
        made = post(port, "create_model", **made, lora_config={"rank": 2})[2]
        other = held()
        engine.step(1)  # its result cannot be noted yet
        step = {"model_id": made["model_id"], "seq_id": 1, "adam_params": {}}
        refused = [post(port, "optim_step", **step), post(port, "create_session")]
        pending = post(port, "retrieve_future", request_id=made["request_id"])
        other.close()
        engine.release()
        taken = post(port, "optim_step", **step)[2]
        return refused, pending, [result(port, one["request_id"]) for one in (made, taken)]

    refused, pending, results = command(monkeypatch, tmp_path, "", work, engine)
    assert [(one[0], one[1]["retry-after"]) for one in refused] == [(503, "1")] * 2
    assert all("backup" in one[2]["detail"] for one in refused)
    assert pending[0] == 408
    assert results[1]["metrics"] == {"step:max": 1.0}


def test_who_waits_for_other_requests_of_the_server_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(database.Database.__init__, "__defaults__", (0.05,))
    client = Client(FakeEngine(), tmp_path)
    with client.server.ledger.transaction():
        refused = client.post("create_session", 503)["detail"]
    assert refused == "many requests write to the server's ledger. Send the request again."


def test_nobody_waits_while_files_are_copied(monkeypatch, tmp_path):
    monkeypatch.setattr(database.Database.__init__, "__defaults__", (0.5,))
    client = Client(FakeEngine(), tmp_path)
    model, copy = client.create(), shutil.copytree
    path = client.result(client.save(model, 1, "a"))["path"]
    begun, go_on = threading.Event(), threading.Event()

    def wait(*given, **options):
        begun.set()
        go_on.wait(20)
        return copy(*given, **options)

    place = {"session_id": client.session(), "model_seq_id": 0}
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", wait)
        thread, sent = background(lambda: client.post("load_weights", path=path, **place))
        assert begun.wait(20)
        client.session()
        client.step(model, 2)
        go_on.set()
        thread.join()
    loaded = sent[0]["model_id"]
    assert client.result(sent[0])["model_id"] == loaded
    assert client.post("load_weights", path=path, **place) == sent[0], "it came before"
    assert client.result(client.step(loaded, 1))["metrics"] == {"step:max": 1.0}
    for model_, again in ((loaded, 2), (model, 3)):
        client.post("load_weights", 400, path=f"{path}-", model_id=model_, seq_id=again)
    folder = client.server.log.model_folder("states", loaded)
    assert [one.name for one in folder.iterdir()] == ["load-0"]


def filled(ledger):
    """Has the ledger no room for another page; returns what makes room."""
    db = ledger._db._writer

    def pages(n):
        db.execute(f"pragma max_page_count = {n}")

    db.execute("pragma wal_checkpoint(truncate)")
    pages(db.execute("pragma page_count").fetchone()[0])
    return lambda: pages(2**30)


def pending(client, sent):
    """Waits until a poll says that a result waits for the ledger."""

    def is_said():
        answer = client.poll(sent["request_id"])
        assert answer.status_code == 408, answer.text
        state = answer.json()
        said = "cannot record it" in state.get("queue_state_reason", "")
        return said and state["queue_state"] == "paused_capacity"

    until(is_said, "it is said why the result is not there")


def test_a_full_disk_is_said_and_what_was_done_is_noted_once_there_is_room(tmp_path):
    engine = FakeEngine(held=True)
    client = Client(engine, tmp_path)
    model = client.create()
    engine.step(1)
    client.result(f"{model}:0")
    sent = [client.gradient(model, 1), client.step(model, 2)]
    sent += [client.save(model, 3, "n" * 100)]
    again = filled(client.server.ledger)
    # An answer larger than a page needs a new one.
    client.server.log._results._write = lambda row, result: b"{" + b" " * 9000 + b"}"
    engine.step(3)
    for one in sent:
        pending(client, one)
    client.server.log.sweep()
    for one in sent:
        pending(client, one)
    assert client.step(model, 2) == sent[1], "who asks again gets no second step"
    refused = client.step(model, 4, status=507, padding="x" * 9000)
    assert "disk of the server is full" in refused["detail"]
    again()
    client.server.log.sweep()
    for one in sent:
        until(lambda one=one: client.poll(one["request_id"]).content.startswith(b"{ "), "noted")
    assert engine.tenants[model].steps == 1
    assert client.step(model, 4, padding="x" * 9000)["request_id"] == f"{model}:4"
    assert client.ask("GET", f"training_runs/{model}/checkpoints")["checkpoints"]


def test_a_ledger_that_cannot_be_written_is_said_and_what_was_done_is_noted_later(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    client.engine.step(1)
    client.result(f"{model}:0")
    sent = client.step(model, 1)
    db = client.server.ledger._db._writer
    db.execute("pragma query_only = 1")
    client.engine.step(1)
    pending(client, sent)
    until(lambda: client.server.log._tenants[model].n_running == 0, "it is counted")
    db.execute("pragma query_only = 0")
    client.server.log.sweep()
    until(lambda: b"metrics" in client.poll(sent["request_id"]).content, "it is noted")
    client.engine.release()
    assert client.result(client.step(model, 2))["metrics"] == {"step:max": 2.0}


def test_a_result_that_is_kept_during_a_sweep_is_not_lost(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    client.result(f"{model}:0")
    reached, free = threading.Event(), threading.Event()

    class Slow(list):
        def append(self, item):
            reached.set()
            assert free.wait(60)
            super().append(item)

    client.server.log._results._backlog = Slow()
    again = filled(client.server.ledger)
    client.server.log._results._write = lambda row, result: b"{" + b" " * 9000 + b"}"
    sent = client.step(model, 1)
    assert reached.wait(60)

    def is_noted():
        answer = client.poll(sent["request_id"])
        is_there = answer.content.startswith(b"{ ")
        assert is_there or answer.status_code == 408, answer.text
        return is_there

    assert not is_noted()
    again()
    client.server.log.sweep()
    free.set()
    client.server.log.sweep()
    until(is_noted, "it is noted")


@pytest.mark.parametrize("parked", [False, True])
def test_what_could_not_be_noted_before_a_kill_is_done_again_and_noted(tmp_path, parked):
    client = Client(FakeEngine(held=True), tmp_path, every=2)
    model = client.create()
    client.engine.step(1)
    client.result(f"{model}:0")
    sent = [client.gradient(model, 1, (0.5, 3.0)), client.step(model, 2, 0.25)]
    again, results = filled(client.server.ledger), client.server.log._results
    write = results._write
    results._write = lambda row, result: write(row, result) + b" " * 9000
    client.engine.step(2)
    for one in sent:
        pending(client, one)
    again()  # the state after the update is saved, but it lacks the answers
    client.engine.step(1)
    results._thread.submit(lambda: None).result()
    moved = client.engine.tenants[model]
    if parked:
        client.engine.release()
        client.later(200.0)
        client.server.log.parking.park_silent(100.0)
        until(lambda: not client.engine.tenants, "it is parked")
        client.step(model, 3, 0.0)
        found, steps = client, 2
    else:
        client.server.log.close()  # no result is noted from now on
        found, steps = Client(FakeEngine(), tmp_path, every=2), 1
    results = [found.result(one) for one in sent]
    assert results[1]["metrics"] == {"step:max": 1.0} and isinstance(results[0], bytes)
    until(lambda: found.engine.tenants[model].steps == steps, "the commands are executed")
    assert found.engine.tenants[model].number == moved.number != 0
    until(lambda: found.server.log._tenants[model].load == 0, "nothing waits for an answer")


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_said_too(tmp_path):
    server = Server(tmp_path, lambda port: ["-c", SERVER, str(port)])
    try:
        server.ready()
        model = server.create(rank=2)
        server.result({"request_id": f"{model}:0"})
        unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        step = {"model_id": model, "seq_id": 1, "adam_params": {}}
        refused = ask(
            server.port, "POST", "/api/v1/optim_step", json.dumps(step), X_API_Key="tml-a"
        )
        assert refused[0] == 507 and "disk of the server is full" in refused[2]["detail"]
        assert ask(server.port, path="/api/v1/healthz")[0] == 200
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert server.result(server.step(model, 1))["metrics"] == {"step:max": 1}
    finally:
        server.kill()
