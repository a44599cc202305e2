"""Commands reach the engine in order and once, whatever clients and the machine do."""

import itertools
import random
import time
from pathlib import Path

import pytest

from tests.train.serve.client import Client, drawn, sampler
from tests.train.serve.fakes import FakeEngine, Tenant
from tests.train.serve.waiting import until
from train.serve.protocol.requests import AdapterSpec, Create, Gradient, Load, Save, Update
from train.serve.storage.folders import link
from train.serve.storage.ledger import Ledger
from train.serve.tenants.command_log import CommandLog, LogLimits


def kinds(engine):
    return [type(command).__name__ for _, command in engine.executed]


def send(client, model, seq, command):
    """Sends a command of a program: its kind and a number."""
    kind, value = command
    match kind:
        case "gradient":
            return client.gradient(model, seq, (value, 2.0))
        case "forward":
            return client.gradient(model, seq, (value, 2.0), only=1)
        case "step":
            return client.step(model, seq, value)
        case "bad":
            return client.step(model, seq, 666.0)
        case "save":
            return client.save(model, seq, f"n{seq}")
        case "sampler":
            return client.save(model, seq, f"n{seq}", "save_weights_for_sampler")
        case "snapshot":
            base = {"model_id": model, "seq_id": seq, "kind": "snapshot"}
            return client.post("save_weights_for_sampler", sampling_session_seq_id=seq, **base)
    raise AssertionError(kind)


def simulated(program):
    """The tenant after a program, by arithmetic alone."""
    number = momentum = gradient = 0.0
    steps = 0
    for kind, value in program:
        if kind == "gradient":
            gradient += (value * 5 + 2.0 * 6) / 100
        elif kind == "step":
            momentum = 0.9 * momentum + gradient
            number, gradient, steps = number - value * momentum, 0.0, steps + 1
    return number, momentum, gradient, steps


def state(tenant):
    return tenant.number, tenant.momentum, tenant.gradient, tenant.steps


def close_to(program):
    return pytest.approx(simulated(program), rel=1e-6)


PROGRAM = [
    *[("gradient", 1.0), ("gradient", -3.0), ("step", 0.5), ("save", 0), ("forward", 2.0)],
    *[("gradient", 0.25), ("save", 0), ("step", 0.1), ("bad", 0), ("snapshot", 0)],
    *[("gradient", 4.0), ("sampler", 0), ("bad", 0), ("gradient", 1.5), ("step", 2.0)],
    *[("gradient", 7.0), ("step", 0.3), ("gradient", -1.0)],
]


def test_a_program(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    sent = [send(client, model, seq, one) for seq, one in enumerate(PROGRAM, 1)]
    results = [client.result(one) for one in sent]
    assert state(client.engine.tenants[model]) == close_to(PROGRAM)
    assert simulated(PROGRAM)[2] != 0  # a gradient is pending
    wrong = [n for n, one in enumerate(results) if isinstance(one, dict) and "error" in one]
    assert wrong == [n for n, (kind, _) in enumerate(PROGRAM) if kind == "bad"]
    assert {results[n]["category"] for n in wrong} == {"server"}


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3, 4]))[::3])
def test_the_engine_sees_the_order_of_the_numbers(tmp_path, order):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    sent = {seq: send(client, model, seq, PROGRAM[seq - 1]) for seq in order}
    assert client.engine.step(99) == 5
    assert kinds(client.engine) == ["Create", "Gradient", "Gradient", "Update", "Save"]
    first, second = (client.engine.executed[n][1].data[0].inputs["weights"][0] for n in (1, 2))
    assert (first, second) == (1.0, -3.0)
    assert client.result(sent[4])["path"] == f"tinker://{model}/weights/n4"


def test_a_gap_is_waited_for(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    client.later(900.0)  # a pause is no gap
    late = client.step(model, 2)
    assert client.engine.step(99) == 1
    client.later(590.0)
    client.server.sweep(1e9)
    assert client.poll(late["request_id"]).status_code == 408
    client.gradient(model, 1)
    assert client.engine.step(99) == 2
    assert client.result(late)["metrics"] == {"step:max": 1.0}


@pytest.mark.parametrize("parked", [False, True])
def test_a_gap_that_is_not_filled_ends_the_commands_behind_it(tmp_path, parked):
    client = Client(FakeEngine(), tmp_path, hold=0.01)
    model, other = client.create(), client.create()
    program = [("gradient", 3.0), ("step", 0.5), ("gradient", -1.0)]
    for seq, command in enumerate(program, 1):
        client.result(send(client, model, seq, command))  # the last gradient is of a step to come
    bad = (1.0, float("nan"))
    behind = [client.step(model, 5, 0.25), client.gradient(model, 9), client.step(model, 10, 0.1)]
    client.gradient(model, 7, bad, status=400)
    client.later(200.0)
    if parked:
        client.server.log.parking.park_silent(100.0)
        until(lambda: model not in client.engine.tenants, "it is parked")
    client.later(350.0)
    young = client.step(other, 2)
    client.later(51.0)
    client.server.sweep(1e9)
    for sent in behind:
        answer = client.result(sent)
        assert answer["category"] == "user" and "seq_id 4, 6, 8 of" in answer["error"]
        assert "go on with seq_id 11" in answer["error"]
    assert client.poll(young["request_id"]).status_code == 408, "it waited for a minute"
    more = [("gradient", 4.0), ("step", 2.0)]
    for seq, command in enumerate(more, 11):
        client.result(send(client, model, seq, command))
    whole = [*program[:2], *more]
    assert state(client.engine.tenants[model]) == close_to(whole)
    assert state(client.engine.tenants[model]) != close_to([*program, *more])
    wait(client)
    assert client.server.log._tenants[model].load == 0
    client.later(7200.0)  # answers are dropped
    client.server.log.sweep()
    again = Client(FakeEngine(), tmp_path, hold=0.01)
    for late in (client, again):
        for seq in (4, 6, 8):
            late.gradient(model, seq, status=400)
        late.gradient(model, 7, status=400)
    assert again.result(again.step(model, 13, 0.0))["metrics"] == {"step:max": 3.0}
    assert state(again.engine.tenants[model]) == close_to([*whole, ("step", 0.0)])


def test_a_gap_is_closed_at_once_or_not_at_all(tmp_path):
    client = Client(FakeEngine(), tmp_path, hold=0.01)
    model = client.create()
    client.result(client.gradient(model, 1))
    behind = client.step(model, 3)
    client.later(601.0)
    db = client.server.ledger._db._writer
    db.execute("pragma query_only = 1")
    client.server.sweep(1e9)
    assert client.poll(behind["request_id"]).status_code == 408
    db.execute("pragma query_only = 0")
    client.server.log._results.close()  # a kill comes before anybody is told
    client.server.sweep(1e9)
    restarted = Client(FakeEngine(), tmp_path, hold=0.01)
    assert "seq_id 2 of" in restarted.result(behind)["error"]
    restarted.result(restarted.gradient(model, 4, (0.5, 3.0)))
    restarted.result(restarted.step(model, 5, 0.5))
    assert state(restarted.engine.tenants[model])[3] == 1
    assert restarted.engine.tenants[model].number == -0.5 * (0.5 * 5 + 3.0 * 6) / 100


def test_duplicates_are_executed_once(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    session = client.session()
    model = client.create(session)
    assert client.create(session) == model
    early = client.gradient(model, 2)
    first = client.gradient(model, 1)
    assert client.gradient(model, 1) == first
    client.engine.step(99)
    assert client.gradient(model, 2) == early and client.gradient(model, 1) == first
    assert client.engine.step(99) == 0 and kinds(client.engine) == ["Create"] + 2 * ["Gradient"]
    assert client.result(first) == client.result(first)  # it can be fetched again
    said = client.step(model, 2, status=400)["detail"]
    assert "seq_id 2 already belongs to a forward_backward" in said


def test_a_refused_command_uses_its_number_up(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    model = client.create()
    client.step(model, 3)
    said = client.gradient(model, 1, (1.0, float("nan")), status=400)
    assert client.gradient(model, 1, (1.0, float("nan")), status=400) == said
    client.gradient(model, 2)
    client.engine.step(99)
    assert kinds(client.engine) == ["Create", "Gradient", "Update"]
    again = Client(FakeEngine(), tmp_path)
    assert again.result(again.step(model, 4))["metrics"] == {"step:max": 2.0}


def test_numbers_far_ahead_are_refused(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    assert "the next one is 1" in client.step(model, 20_000, status=400)["detail"]
    for wrong in (0, -1, 2**63, "1", 1.5, True):
        client.post("optim_step", 400, model_id=model, seq_id=wrong, adam_params={})


def crashed(folder, program, executed, lost, sent, every):
    """Runs a program on a server that dies; returns the ids of what was acknowledged.

    Args:
      executed: commands that the engine executes.
      lost: how many it executes besides, whose results are not noted.
      sent: the commands that are sent.
    """
    client = Client(FakeEngine(held=True), folder, every=every)
    model = client.create()
    ids = [send(client, model, seq, one)["request_id"] for seq, one in program[:sent]]
    client.engine.step(executed)
    client.server.log.close()  # what is executed from now on is not noted
    client.engine.step(lost)
    return model, ids


@pytest.mark.parametrize("every", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4)), 99])
def test_a_restart_at_every_point(tmp_path, every):
    rng = random.Random(every)
    numbered = list(enumerate(PROGRAM, 1))
    for executed in range(0, len(PROGRAM) + 6, 1 if every == 4 else 5):
        folder = tmp_path / str(executed)
        swapped = list(numbered)
        for place in rng.sample(range(len(swapped) - 1), 5):  # chunks arrive in any order
            swapped[place : place + 2] = swapped[place : place + 2][::-1]
        sent = min(len(PROGRAM), executed + rng.randrange(4))
        model, ids = crashed(folder, swapped, executed, rng.randrange(3), sent, every)
        again = Client(FakeEngine(), folder, every=every)
        for seq, one in swapped[max(0, sent - 2) :]:  # two are sent again
            ids.append(send(again, model, seq, one)["request_id"])
        assert set(ids) == {f"{model}:{seq}" for seq, _ in numbered}
        for request in ids:
            seq = int(request.rpartition(":")[2])
            answer = again.result(request)
            assert (b"error" in bytes(str(answer), "utf8")) == (PROGRAM[seq - 1][0] == "bad")
        assert state(again.engine.tenants[model]) == close_to(PROGRAM)
        listed = again.ask("GET", f"training_runs/{model}/checkpoints")["checkpoints"]
        assert {one["checkpoint_id"] for one in listed} == {
            *("weights/n4", "weights/n7"),
            "sampler_weights/n12",
        }
        saved = again.server.rows.weights(f"tinker://{model}/weights/n7", "alice")
        kept = Tenant.read(Path(saved["folder"]), True)
        assert (kept.number, kept.steps) == pytest.approx(
            (simulated(PROGRAM[:6])[0], simulated(PROGRAM[:6])[3])
        )
        again.server.close()
        again.engine.stop()


def test_a_second_restart_begins_at_the_last_state(tmp_path):
    client = Client(FakeEngine(), tmp_path, every=3)
    model = client.create()
    for seq, one in enumerate(PROGRAM, 1):
        answer = client.result(send(client, model, seq, one))
    assert logged(client, model) == [18]  # after the last update, number 17, a state was saved
    client.server.close()
    for _ in range(2):
        again = Client(FakeEngine(), tmp_path, every=3)
        assert again.result(f"{model}:18") == answer
        wait(again)
        assert kinds(again.engine) == ["Load", "Gradient"]
        assert state(again.engine.tenants[model]) == close_to(PROGRAM)
        states = list((tmp_path / "states" / model.replace(":", "-")).iterdir())
        assert [one.name for one in states] == ["17"]
        again.server.close()


def logged(client, model):
    """The numbers whose commands would be read again."""
    wait(client)
    rows = client.server.ledger.commands(model, -1)
    return [row["seq"] for row in rows if row["payload"]]


def wait(client):
    """Waits until the engine has done all, and all is noted."""
    client.engine.wait()
    client.server.log._results._thread.submit(lambda: None).result()


def test_no_state_is_kept_while_a_gradient_is_pending(tmp_path):
    client = Client(FakeEngine(), tmp_path, every=1)
    model = client.create()
    client.gradient(model, 1)
    client.result(client.save(model, 2, "half"))
    assert logged(client, model) == [0, 1, 2]
    client.result(client.step(model, 3, 666.0))  # fails: the gradient stays
    assert logged(client, model) == [0, 1, 2, 3]
    client.result(client.step(model, 4, 0.1))
    assert logged(client, model) == []


def test_an_explicit_save_is_a_state(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    client.gradient(model, 1)
    client.step(model, 2)
    client.result(client.save(model, 3, "whole"))
    assert logged(client, model) == []
    saved = client.server.rows.weights(f"tinker://{model}/weights/whole", "alice")
    client.ask("DELETE", f"training_runs/{model}/checkpoints/weights/whole")
    assert not Path(saved["folder"]).exists()
    again = Client(FakeEngine(), tmp_path)  # it starts from the state, which is not deleted
    wait(again)
    assert again.engine.tenants[model].number == client.engine.tenants[model].number != 0
    assert kinds(again.engine) == ["Load"]


def test_a_loaded_checkpoint_may_be_deleted_before_a_restart(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    model = client.create()
    client.gradient(model, 1)
    client.step(model, 2)
    path = client.result(client.save(model, 3, "one"))["path"]
    place = {"session_id": model.split(":")[0], "model_seq_id": 1}
    loaded = client.post("load_weights", path=path, optimizer=True, **place)
    found = {"path": path, "model_id": loaded["model_id"], "type": "load_weights"}
    assert client.result(loaded) == found
    client.ask("DELETE", f"training_runs/{model}/checkpoints/weights/one")
    again = Client(FakeEngine(), tmp_path)
    wait(again)
    one, other = (again.engine.tenants[name] for name in (model, loaded["model_id"]))
    assert state(one) == state(other) and one.number != 0
    info = again.post("get_info", model_id=loaded["model_id"])
    assert info["lora_rank"] == 3


def test_models_end_with_their_session(tmp_path):
    client = Client(FakeEngine(), tmp_path)
    session = client.session()
    model, kept = client.create(session), client.create(number=1)
    base = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
    sampler = client.result(client.post("save_weights_for_sampler", **base))
    client.result(client.save(model, 2, "stays", "save_weights_for_sampler"))
    waiting = client.step(model, 9)
    (name,) = client.engine.snapshots
    client.post(f"sessions/{session}/finish", reason={"type": "success"})
    wait(client)
    assert set(client.engine.tenants) == {kept} and not client.engine.snapshots
    assert not (tmp_path / name).exists() and not list((tmp_path / "states").glob(f"{session}*"))
    assert "unloaded" in client.result(waiting)["error"]
    assert "is unloaded" in client.step(model, 3, status=400)["detail"]
    sample = {"seq_id": 0, "prompt": {"chunks": []}, "sampling_params": {}}
    client.post("asample", 404, **sampler, **sample)
    client.post("session_heartbeat", 410, session_id=session)
    again = Client(FakeEngine(), tmp_path)
    wait(again)
    assert set(again.engine.tenants) == {kept}
    listed = again.ask("GET", "checkpoints")["checkpoints"]
    assert [one["checkpoint_id"] for one in listed] == ["sampler_weights/stays"]


def test_what_is_over_is_swept(tmp_path):
    now = [1000.0]
    client = Client(FakeEngine(), tmp_path, idle=4000.0)
    ledger = client.server.ledger
    ledger._clock = client.server.log._clock = lambda: now[0]
    model = client.create()
    other = client.create()
    client.result(client.save(model, 1, "short", ttl_seconds=4000))
    path = client.result(client.save(model, 2, "long"))["path"]
    now[0] += 3000
    client.post("session_heartbeat", session_id=model.split(":")[0])
    now[0] += 1500
    client.server.sweep(1e9)
    wait(client)
    assert set(client.engine.tenants) == {model}  # the other was silent for too long
    assert "is unloaded" in client.step(other, 1, status=400)["detail"]
    rows, count = ledger.checkpoints("alice")
    assert [row["path"] for row in rows] == [path] and count == 1
    assert len(list(tmp_path.glob("checkpoints/*/weights/*"))) == 1
    assert client.poll(f"{model}:1").status_code == 410  # its answer is old


@pytest.fixture
def set_wall_clock(monkeypatch):
    """Returns a function that sets the wall clock ahead, for all of a server that reads it."""
    read, ahead = time.time, [0.0]

    def wall_clock():
        return read() + ahead[0]

    def replaced(values):
        return tuple(wall_clock if value is read else value for value in values)

    monkeypatch.setattr(time, "time", wall_clock)
    for make in (Ledger.__init__, CommandLog.__init__):
        names = make.__kwdefaults__ or {}
        monkeypatch.setattr(make, "__defaults__", replaced(make.__defaults__ or ()))
        values = dict(zip(names, replaced(names.values()), strict=True))
        monkeypatch.setattr(make, "__kwdefaults__", values)

    def set_ahead(seconds):
        ahead[0] = seconds

    return set_ahead


@pytest.mark.parametrize("ahead", [7200.0, -7200.0])
def test_a_wall_clock_that_jumps_ends_nothing_that_lives(tmp_path, set_wall_clock, ahead):
    client = Client(FakeEngine(), tmp_path, idle=600.0, hold=0.01)
    beating, commanding, sampling = client.session(), client.create(), client.session()
    model, silent = client.create(beating), client.create()
    saved = client.result(client.save(model, 1, "short", ttl_seconds=3600))
    set_wall_clock(ahead)
    client.server.sweep(120.0)
    client.server.sweep_samples()
    wait(client)
    assert set(client.engine.tenants) == {model, commanding, silent}  # neither ended nor parked
    assert client.result(f"{model}:1") == saved, "its answer is kept"
    assert client.ask("GET", "checkpoints")["checkpoints"], "its hour is not over"
    client.later(500.0)
    client.post("session_heartbeat", session_id=beating)
    client.step(commanding, 1)
    drawn(client, sampler(client, sampling))
    client.later(500.0)
    client.server.sweep(1e9)
    wait(client)
    assert set(client.engine.tenants) == {model, commanding}
    assert not client.server.ledger.session(sampling)["ended"]
    client.later(500.0)  # now all were silent for longer than 600 seconds
    client.server.sweep(1e9)
    wait(client)
    assert not client.engine.tenants
    client.post("session_heartbeat", 410, session_id=sampling)


def test_a_full_queue_is_busy_but_gaps_are_filled(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path)
    client.server.log._limits = LogLimits(queue=3)
    model = client.create()
    client.gradient(model, 2)
    client.gradient(model, 3)
    assert "too many" in client.gradient(model, 4, status=429)["detail"]
    client.gradient(model, 1)
    client.gradient(model, 4, status=429)
    client.engine.step(99)
    client.server.log._results._thread.submit(lambda: None).result()
    client.gradient(model, 4)


def test_a_transaction_is_whole(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.open_session("s", "alice")
    with pytest.raises(ZeroDivisionError), ledger.transaction():
        ledger.add_model("m", "s", "alice", "base", None)
        with ledger.transaction():
            ledger.log("m", 0, "create_model", b"{}")
        1 / 0  # noqa: B018
    assert ledger.model("m") is None and ledger.command("m", 0) is None
    ledger.close()


def test_linked_folders_are_their_own(tmp_path):
    spec = AdapterSpec(rank=2)
    Tenant(spec, 1.5).write(tmp_path / "one", True)
    link(tmp_path / "one", tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.samefile(tmp_path / "two" / file.name)
        file.unlink()
    assert Tenant.read(tmp_path / "two", True).number == 1.5


def test_commands_are_the_engines_own(tmp_path):
    client = Client(FakeEngine(held=True), tmp_path, every=2)
    model = client.create(rank=5)
    client.gradient(model, 1, only=1)
    client.step(model, 2, 0.25, beta1=0.5, grad_clip_norm=3)
    client.engine.step(99)
    create, forward, update, save = (command for _, command in client.engine.executed)
    assert create == Create(AdapterSpec(rank=5))
    assert isinstance(forward, Gradient) and forward.forward_only
    assert update == Update(0.25, 0.5, 0.95, 1e-12, 0.0, 3.0)
    assert isinstance(save, Save) and save.optimizer and save.name is None
    assert isinstance(save.path, Path) and not isinstance(save, Load)
