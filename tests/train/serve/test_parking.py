"""Tenants on disk: they take no room, come back at the next command, and lose nothing."""

import contextlib
import dataclasses
import itertools
import json
import queue
import random
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support import over
from tests.train.serve.client import Client, key_owner, prompt, sampler
from tests.train.serve.command import Engine, ask, command
from tests.train.serve.engine.engines import made_base, made_engine, running
from tests.train.serve.fakes import FACTS, FakeEngine, Tenant
from tests.train.serve.test_ledger import PROGRAM, close_to, send, state
from tests.train.serve.waiting import until
from train.serve import __main__
from train.serve.protocol.requests import Save
from train.serve.routes.tinker.api import Tinker, TinkerLimits
from train.serve.storage.ledger import Ledger
from train.serve.tenants import seats


def park(client, seconds=200.0):
    """Sweeps as if nobody had been heard for a while; waits until the engine has no tenant."""
    client.later(seconds)

    def are_gone():
        client.server.sweep(120.0)
        return not client.engine.tenants

    until(are_gone, "all are parked", 20)
    settle(client)


def settle(client):
    """Waits until what the engine did is noted."""
    for _ in range(3):
        client.engine.wait()
        client.server.log._results._thread.submit(lambda: None).result()


def run(client, model, program, first=1):
    sent = [send(client, model, seq, one) for seq, one in enumerate(program, first)]
    return [client.result(one) for one in sent]


@over(
    ("n", "killed"),
    itertools.product(range(1, len(PROGRAM), 2), [False, True]),
    often=[*(f"{n}, True" for n in range(1, len(PROGRAM), 2)), "1, False", "7, False"],
    called=lambda case: ", ".join(map(str, case)),
)
def test_a_parked_tenant_goes_on_where_it_was(tmp_path, n, killed):
    client = Client(FakeEngine(), tmp_path, every=4)
    model = client.create()
    run(client, model, PROGRAM[:n])
    park(client)
    assert client.engine.tenants == {}
    if killed:
        client = Client(FakeEngine(), tmp_path, every=4)
    run(client, model, PROGRAM[n:], n + 1)
    assert state(client.engine.tenants[model]) == close_to(PROGRAM)


def test_the_status_shows_who_is_parked(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create(rank=5)
    run(client, model, [("gradient", 1.0), ("step", 0.5)] * 2)
    before = client.server.log.parking.status()[model]
    assert (before.parked, before.steps, len(before.losses)) == (False, 2, 2)
    park(client)
    there = client.server.log.parking.status()[model]
    assert (there.parked, there.steps, there.size) == (True, 2, 0)
    assert there.losses == before.losses and there.client == before.client
    run(client, model, [("gradient", 1.0), ("step", 0.5)], 5)
    after = client.server.log.parking.status()[model]
    assert (after.parked, after.steps) == (False, 3) and len(after.losses) == 3
    park(client)
    twice = client.server.log.parking.status()[model]
    assert (twice.losses, twice.seconds) == (after.losses, before.seconds + 0.5)
    again = Tinker(FakeEngine(), tmp_path, key_owner)
    again.start(-1000.0)
    found = again.log.parking.status()[model]
    assert (found.parked, found.steps, found.spec.rank) == (True, None, 5), "not known is no 0"


def test_those_that_work_or_beat_are_not_parked(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    quiet, beats, works = (client.create() for _ in range(3))
    for model in (quiet, beats, works):
        client.result(f"{model}:0")
    server = client.server
    client.later(200.0)
    client.post("session_heartbeat", session_id=beats.split(":")[0])
    client.result(client.step(works, 1))
    server.sweep(120.0)
    until(lambda: client.engine.tenants.keys() == {beats, works}, "one is parked")
    assert not server.ledger.session(quiet.split(":")[0])["ended"]


@pytest.mark.parametrize("gap", [False, True])
def test_more_clients_than_room(tmp_path, gap):
    """All start, one after the other, though nobody ends; and all go on."""
    client = Client(FakeEngine(), tmp_path, room=2)
    models = []
    for i in range(10):
        models.append(client.create(client.session()))
        run(client, models[-1], [("gradient", float(i)), ("step", 0.5)])
        if gap:
            client.gradient(models[-1], 9)  # it was killed between two requests
        assert len(client.engine.tenants) <= 2
    for i, model in enumerate(models):
        run(client, model, [("gradient", 1.0), ("step", 0.25)], 3)
        program = [("gradient", float(i)), ("step", 0.5), ("gradient", 1.0), ("step", 0.25)]
        assert state(client.engine.tenants[model]) == close_to(program)
        assert len(client.engine.tenants) <= 2


def test_all_at_once_have_their_turn(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path, room=2)
    models = [client.create() for _ in range(6)]
    sent = [client.gradient(model, 1) for model in models]
    sent += [client.step(model, 2) for model in models]
    client.engine.release()
    assert [client.result(one).get("metrics") for one in sent[6:]] == [{"step:max": 1.0}] * 6
    settle(client)
    assert len(client.engine.tenants) == 2


def execute(client, count=99):
    """Has a held engine execute some commands, and notes their results."""
    assert client.engine.step(count)
    flush(client)


def flush(client):
    for _ in range(2):
        client.server.log._results._thread.submit(lambda: None).result()


@pytest.mark.parametrize("is_quiet", [True, False])
def test_a_client_that_goes_on_gives_way(tmp_path, monkeypatch, is_quiet):
    """One sends its next command while its state is saved, one has work in the engine always."""
    monkeypatch.setattr(seats, "_TURN_SECONDS", 0.0)
    client = Client(FakeEngine(held=True), tmp_path, room=1)
    first = client.create()
    execute(client)
    sent = []

    def go_on():
        n = len(sent) + 1
        sent.append(client.step(first, n) if n % 2 == 0 else client.gradient(first, n))

    go_on()
    go_on()
    if is_quiet:
        execute(client)
    other = client.create(client.session())
    for _ in range(6):
        if is_made := client.poll(f"{other}:0").status_code == 200:
            break
        go_on()
        execute(client, 1)
    saves = [isinstance(one, Save) for name, one in client.engine.executed if name == first]
    assert is_made and sum(saves) == 1, "the state is saved once, to leave"
    client.engine.release()
    for request in sent:
        assert "error" not in str(client.result(request))
    program = ([("gradient", 1.0), ("step", 0.5)] * len(sent))[: len(sent)]
    assert state(client.engine.tenants[first]) == close_to(program)


def test_a_tenant_that_could_not_be_saved_goes_on(tmp_path, monkeypatch):
    client = Client(FakeEngine(held=True), tmp_path, room=1)
    first = client.create()
    execute(client)
    monkeypatch.setattr(Tenant, "write", lambda *_: 1 / 0)
    other = client.create(client.session())
    sent = client.step(first, 1)
    execute(client)
    assert "room for no more" in client.result(f"{other}:0")["error"]
    execute(client)
    assert client.result(sent)["metrics"] == {"step:max": 1.0}


def test_a_client_that_waits_has_one_tenant_parked(tmp_path):
    """Though another owner's waits, too: for that one, room of this owner's is of no use."""
    alice = Client(FakeEngine(held=True), tmp_path, own_room=2)
    bob = alice.other("tml-b")
    mine, his = ([client.create() for _ in range(2)] for client in (alice, bob))
    execute(alice)
    for model in his:
        bob.gradient(model, 1)
    bob.create()
    mine.append(alice.create())
    holds = alice.server.log._seats.holds
    assert [*map(holds, mine + his)] == [False, True, False, True, True]
    while alice.engine.step():
        flush(alice)
    assert [name in alice.engine.tenants for name in mine] == [False, True, True]


@pytest.mark.parametrize("phase", ["saved", "left", "loaded"])
def test_an_unloaded_tenant_keeps_its_room_until_it_has_left(tmp_path, phase):
    client = Client(FakeEngine(held=True), tmp_path, room=1)
    session = client.session()
    first = client.create(session)
    execute(client)
    client.gradient(first, 1)
    client.step(first, 2)
    execute(client)
    other = client.create(client.session())  # the state of the first is being saved
    if phase != "saved":
        execute(client, 1)
    if phase == "loaded":
        execute(client)
        client.gradient(first, 3)
        execute(client, 2)  # the other is saved, and has left
    client.post(f"sessions/{session}/finish", reason={"type": "success"})
    flush(client)
    holds, n = client.server.log._seats.holds, 1
    while n:
        assert not (holds(other) and first in client.engine.tenants)
        n = client.engine.step()
        flush(client)
    assert client.result(f"{other}:0")["model_id"] == other
    kept = [other.replace(":", "-")] if phase == "loaded" else []
    assert [folder.name for folder in (tmp_path / "states").iterdir()] == kept
    third = client.create(client.session())
    client.engine.release()
    assert client.result(f"{third}:0")["model_id"] == third


@pytest.mark.parametrize("restarted", [False, True])
def test_a_state_that_is_lost_is_said_and_takes_no_room(tmp_path, restarted, caplog):
    client = Client(FakeEngine(), tmp_path, room=1)
    model = client.create()
    run(client, model, PROGRAM[:3])
    park(client)
    (file,) = tmp_path.glob("states/*/*/adapter_model.safetensors")
    file.rename(tmp_path / "away")
    if restarted:
        client = Client(FakeEngine(), tmp_path, room=1)
        settle(client)
        assert f"the state of {model} could not be loaded" in caplog.text
    for seq in (5, 4):  # also those that came too early
        early = client.step(model, seq)
    answers = [client.result(early), client.result(f"{model}:5")]
    for answer in answers:
        assert f"the state of {model} could not be loaded: " in answer["error"]
    other = client.create(client.session())
    assert client.result(f"{other}:0")["model_id"] == other
    (tmp_path / "away").rename(file)
    run(client, model, PROGRAM[5:], 6)
    program = PROGRAM[:3] + PROGRAM[5:]
    assert state(client.engine.tenants[model]) == close_to(program)


def test_a_rank_that_a_later_server_does_not_take_is_said(tmp_path, caplog):
    client = Client(FakeEngine(), tmp_path)
    large, small = client.create(rank=16), client.create(rank=4)
    run(client, large, PROGRAM[:3])
    run(client, small, PROGRAM[:3])
    settle(client)
    engine = FakeEngine(dataclasses.replace(FACTS, max_rank=8))
    client = Client(engine, tmp_path)
    assert f"the state of {large} could not be loaded: rank" in caplog.text
    for seq in (4, 5):
        assert "could not be loaded: rank" in client.result(client.step(large, seq))["error"]
    run(client, small, PROGRAM[3:], 4)
    assert state(engine.tenants[small]) == close_to(PROGRAM)
    assert [*engine.tenants] == [small]


def test_a_model_that_cannot_be_made_takes_no_room(tmp_path):
    client = Client(FakeEngine(), tmp_path, room=1)
    first = client.create()
    path = client.result(client.save(first, 1, "a"))["path"]
    settle(client)  # the checkpoint is the state of `first`, too, a moment after its answer
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    place = {"session_id": client.session(), "model_seq_id": 0}
    client.post("load_weights", 500, path=path, **place)
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    for file in tmp_path.glob("checkpoints/*/weights/a@1/adapter_model.safetensors"):
        file.unlink()
    sent = client.post("load_weights", path=path, **place)
    assert "holds no adapter" in client.result(sent)["error"]
    broken = sent["model_id"]
    assert "no tenant" in client.result(client.step(broken, 1))["error"]
    assert client.result(client.step(first, 2))["metrics"] == {"step:max": 1.0}


def test_a_full_disk_keeps_tenants_in_memory_and_says_so(tmp_path, monkeypatch, caplog):
    client = Client(FakeEngine(), tmp_path, room=1)
    model = client.create()
    run(client, model, PROGRAM[:3])
    write = Tenant.write

    def full(self, path, *rest):
        write(self, path, *rest)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Tenant, "write", full)
        other = client.create(client.session())
        said = client.result(f"{other}:0")["error"]
        assert "room for no more" in said and "No space left on device" in said
        assert f"{model} cannot be moved to the disk and stays in memory" in caplog.text
        run(client, model, PROGRAM[4:5], 4)
        assert client.engine.tenants[model].steps == 1
    monkeypatch.setattr(seats, "_RETRY_SECONDS", -1.0)
    client.server.log._seats._stuck.clear()
    third = client.create(client.session())
    assert client.result(f"{third}:0")["model_id"] == third
    assert [*client.engine.tenants] == [third]
    run(client, model, PROGRAM[3:], 5)
    assert state(client.engine.tenants[model]) == close_to(PROGRAM)


def test_silence_ends_a_session_only_where_it_was_asked_for(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    run(client, model, PROGRAM[:3])
    park(client, 10 * 86400.0)
    run(client, model, PROGRAM[3:], 4)
    assert state(client.engine.tenants[model]) == close_to(PROGRAM)
    client.server._max_idle_seconds = 3600.0
    client.later(4000.0)
    client.server.sweep(120.0)
    client.post("session_heartbeat", 410, session_id=model.split(":")[0])
    settle(client)
    assert client.engine.tenants == {} and not list((tmp_path / "states").iterdir())


@pytest.mark.parametrize("kind", ["commands", "samples", "a long command", "a long sample"])
def test_sessions_that_work_without_heartbeats_are_not_idle(tmp_path, kind):
    is_long = kind.startswith("a long")
    client = Client(FakeEngine(held=is_long), tmp_path, idle=60.0)
    session, idle = client.session(), client.session()
    model, name = client.create(session), sampler(client, session, 7)
    sampled = {"sampling_session_id": name, "prompt": prompt(5, 6), "sampling_params": {}}
    for seq in range(1, 2 if is_long else 8):
        if "command" in kind:
            sent = client.step(model, seq)
        else:
            client.engine.step(9)
            sent = client.post("asample", seq_id=seq, **sampled)["request_id"]
        if not is_long:
            client.result(sent)
        client.later(100.0 if is_long else 20.0)
        client.server.sweep(1e9)
    assert client.server.ledger.session(idle)["ended"]
    client.post("session_heartbeat", session_id=session)
    client.engine.release()
    client.result(sent)
    client.later(100.0)
    settle(client)
    client.server.sweep(1e9)
    client.post("session_heartbeat", 410, session_id=session)


def test_a_sweep_goes_on_after_a_failure(tmp_path, monkeypatch, caplog):
    client = Client(FakeEngine(), tmp_path, idle=60.0)
    sessions = [client.session() for _ in range(3)]
    end = client.server.ledger.end_session

    def fail(session):
        if session != sessions[1]:
            raise OSError("out of order")
        return end(session)

    monkeypatch.setattr(client.server.ledger, "end_session", fail)
    swept = []
    monkeypatch.setattr(client.server.log, "sweep", lambda: swept.append(True))
    client.later(100.0)
    client.server.sweep(1e9)
    assert client.server.ledger.session(sessions[1])["ended"] and swept
    assert f"the end of the idle session {sessions[0]} failed" in caplog.text


def test_what_is_done_now_and_then_is_named_when_it_fails(caplog):
    end = __main__._every(0.01, lambda: 1 / 0, "the sweep")
    until(lambda: "the sweep failed" in caplog.text, "it is in the log")
    end()


def fall(client):
    """Ends a server in the midst of its work: what is queued is never done, nor noted."""
    jobs = client.engine._jobs
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()
    client.engine._idle()
    client.engine.stop()
    client.server.log._results._thread.shutdown(cancel_futures=True)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_clients_restarts_and_silence(tmp_path, seed):
    """Models of programs that are cut, sent in any order, and met by a server with room for two."""
    rng = random.Random(seed)
    options = {"every": rng.choice([2, 5, 32]), "room": 2}
    client = Client(FakeEngine(), tmp_path, **options)
    models = {client.create(): 0 for _ in range(5)}
    for _ in range(60):
        model = rng.choice([*models])
        n = min(rng.randint(1, 4), len(PROGRAM) - models[model])
        seqs = [models[model] + 1 + i for i in range(n)]
        models[model] += n
        sent = [send(client, model, seq, PROGRAM[seq - 1]) for seq in rng.sample(seqs, n)]
        if rng.random() < 0.7:
            for one in sent:
                client.result(one)
        if rng.random() < 0.1:
            client.later(200.0)
            client.server.sweep(120.0)
        if rng.random() < 0.1:
            fall(client)
            client = Client(FakeEngine(), tmp_path, **options)
    for model, n in models.items():
        client.result(client.save(model, n + 1, "end"))
        assert state(client.engine.tenants[model]) == close_to(PROGRAM[:n])


@pytest.mark.slow
@pytest.mark.parametrize("pending", [False, True])
def test_weights_and_moments_come_back_bitwise(tmp_path, pending):
    with running(made_engine(made_base())) as engine:
        server = Tinker(engine, tmp_path, key_owner, ["tiny/base"], TinkerLimits(hold=0.5))
        server.start()
        client, saved = Client(engine, None, server=server), []
        for is_parked in (False, True):
            model, seqs = client.create(), itertools.count(1)
            for step in range(4):
                ran_once = [client.gradient(model, next(seqs), (1.0, step - 2.5))]
                if is_parked and step == 2 and pending:
                    client.result(ran_once[0])
                    park_all(client)
                ran_once.append(client.step(model, next(seqs), 0.01))
                gradient, step_ = map(client.result, ran_once)
                assert isinstance(gradient, bytes) and "metrics" in step_
                if is_parked and step == 2 and not pending:
                    park_all(client)
            path = client.result(client.save(model, next(seqs), "end"))["path"]
            folder = Path(server.rows.weights(path, "alice")["folder"])
            saved.append({file.name: load_file(file) for file in folder.glob("*.safetensors")})
        one, other = saved
        assert len(one) == 2 and one.keys() == other.keys()
        for file, arrays in one.items():
            assert all((other[file][name] == array).all() for name, array in arrays.items())
            assert any(array.any() for array in arrays.values())
        server.close()


def park_all(client):
    """Parks all tenants of a real engine; waits until it has none."""
    client.later(200.0)

    def are_gone():
        client.server.sweep(120.0)
        return not client.engine.status().tenants

    until(are_gone, "all are parked")


def test_the_command_parks_whom_others_need_the_room_of(monkeypatch, tmp_path):
    monkeypatch.setattr(__main__, "_SWEPT", 0.05)

    def work(port):
        def post(path, **fields):
            return ask(port, "POST", f"/api/v1/{path}", json.dumps(fields))[2]

        def made():
            session = post("create_session")["session_id"]
            lora = {"base_model": "tiny/base", "lora_config": {"rank": 2}}
            sent = post("create_model", session_id=session, model_seq_id=0, **lora)
            del sent["model_id"]
            return until(lambda: "model_id" in (one := post("retrieve_future", **sent)) and one, "")

        models = [made()["model_id"] for _ in range(3)]
        tenants = ask(port, path="/status.json")[2]["tenants"]
        before = [tenants[model]["parked"] for model in models]
        sent = post("optim_step", model_id=models[2], seq_id=2, adam_params={})
        now = Ledger.now
        monkeypatch.setattr(Ledger, "now", lambda ledger: now(ledger) + 61.0)
        answer = until(lambda: post("retrieve_future", **sent).get("error"), "it fails")
        assert "seq_id 1 of" in answer and "within 60 seconds" in answer
        monkeypatch.setattr(__main__, "_SILENT", -10.0)
        until(lambda: not engine.tenants, "silence parks them all")
        return before

    engine = Engine()
    line = "--tenants 1 --missing-timeout 60"
    assert command(monkeypatch, tmp_path, line, work, engine) == [True, True, False]
