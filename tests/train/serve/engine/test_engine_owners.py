"""Turns of owners and sessions, counted: what one asks for bounds what another waits."""

import itertools
import types
from collections import Counter

import numpy as np
import pytest

from tests.train.serve.engine.engines import (
    CHUNK,
    SECONDS,
    VOCAB,
    asked,
    begun,
    bits,
    held,
    sampled,
    tell,
    unused,
)
from train.serve.engine import engine as engine_module
from train.serve.protocol.requests import AdapterSpec, Client, Create, Datum, Gradient, Leave, Save

ROWS = 8  # of the engine


@pytest.fixture(scope="module")
def world(world):
    tell(world.engine, "maker", Create(AdapterSpec(rank=3)))
    for i in range(6):
        world.learn("maker", 10 + i)
        tell(world.engine, "maker", Save(unused(), name=f"more {i}"))
    tell(world.engine, "maker", Leave())
    return world


class Log:
    """Records the engine's turns in order: ("chunk", owner), ("draw", owners), ("train", owner)."""

    def __init__(self, engine, monkeypatch):
        self.engine, self.events, self.futures, self.ends = engine, [], [], []
        runner, places = engine._sampler._runner, engine._sampler._rows
        runner.store.clear()
        run, draw = runner.run, places.draw

        def ran(prompts, *rest):
            self.events.append(("chunk", prompts[0].job.request.client.owner))
            return run(prompts, *rest)

        def drawn(tree):
            rows = Counter(row.job.request.client for row in places.completions.values())
            self.events.append(("draw", {client.owner for client in rows}, rows))
            return draw(tree)

        monkeypatch.setattr(runner, "run", ran)
        monkeypatch.setattr(places, "draw", drawn)

    def ask(self, owner, session="", **fields):
        """Asks for a sample; `ends` gets the number of events until it was there."""
        self.ends.append(None)
        number = len(self.futures)
        self.futures.append(begun(self.engine, client=Client(owner, session), **fields))

        def note(_):
            self.ends[number] = len(self.events)

        self.futures[-1].add_done_callback(note)

    def end(self):
        return [future.result(SECONDS) for future in self.futures]

    def turns(self, owner, end):
        """The turns of an owner before an event."""
        return sum(owner in event[1] for event in self.events[:end])

    def check(self):
        """Between two tokens of an owner, each other one has one turn at most; counts these."""
        owners = {event[1] for event in self.events if event[0] == "chunk"}
        n_checked = 0
        for owner in owners:
            mine = [i for i, event in enumerate(self.events) if owner in event[1]]
            for one, next_ in itertools.pairwise(mine):
                if {self.events[one][0], self.events[next_][0]} != {"draw"}:
                    continue  # a prompt of its own ran
                between = self.events[one + 1 : next_]
                for other in owners - {owner}:
                    turns = [kind for kind, who, *_ in between if other in who]
                    assert max(turns.count("train"), len(turns) - turns.count("train")) <= 1, (
                        owner,
                        other,
                        between,
                    )
                    n_checked += len(turns)
        return n_checked


@pytest.mark.slow
def test_one_turn_of_each_other_owner_between_two_tokens(engine, monkeypatch):
    rng, log = np.random.default_rng(0), Log(engine, monkeypatch)
    with held(engine):
        log.ask("anna", prompt=[3], n=64, max_tokens=12, seed=1)
        for i in range(5):
            prompt = rng.integers(2, VOCAB, 40).tolist()
            log.ask("ben", adapter="one", prompt=prompt, n=3, max_tokens=9, seed=i)
        for i in range(3):
            prompt = rng.integers(2, VOCAB, 20 + i).tolist()
            log.ask("cleo", f"s{i}", adapter=f"more {i}", prompt=prompt, n=2, max_tokens=20)
    found = log.end()
    assert log.check() > 20
    assert [len(one.completions) for one in found] == [64] + [3] * 5 + [2] * 3


def alone(engine, **fields):
    """The first completion of a sample, in rows that are all in use."""
    return bits(sampled(engine, **fields | {"n": ROWS}))[0]


@pytest.mark.slow
def test_who_fills_all_rows_keeps_nobody_out(engine, monkeypatch):
    many = {"prompt": [3], "n": 64, "max_tokens": 12, "seed": 1, "temperature": 0.8}
    few = {"adapter": "one", "prompt": [7, 8], "max_tokens": 5, "seed": 2}
    before, mine = bits(sampled(engine, **many)), alone(engine, **few)
    log = Log(engine, monkeypatch)
    with held(engine):
        log.ask("anna", **many)
        log.ask("anna", **many | {"prompt": [4]})
        log.ask("ben", **few)
        log.ask("ben", "other session", **few | {"prompt": [9]})
    found = log.end()
    for end in log.ends[2:]:
        assert log.turns("anna", end) <= 8, "it waits for as many turns as it has itself"
    assert bits(found[0]) == before, "a completion that was paused has the same bits"
    assert bits(found[2]) == [mine]
    log.check()


@pytest.mark.slow
def test_rows_are_shared_evenly(engine, monkeypatch):
    log = Log(engine, monkeypatch)
    with held(engine):
        log.ask("anna", prompt=[3], n=20, max_tokens=10)
        log.ask("ben", "1", prompt=[3], n=20, max_tokens=10)
        log.ask("ben", "2", prompt=[4], n=20, max_tokens=10)
    log.end()
    shares = [event[2] for event in log.events if event[0] == "draw"]
    full = {Client("anna"): 4, Client("ben", "1"): 2, Client("ben", "2"): 2}
    assert shares.count(full) >= 10, shares
    assert {sum(share.values()) for share in shares[2:40]} == {ROWS}, "no row stays free"


@pytest.mark.parametrize("owners", [11, 19])
def test_more_owners_than_rows(engine, monkeypatch, owners):
    fields = {"max_tokens": 6, "seed": 3, "top": 2}
    before = [alone(engine, prompt=[i + 2], **fields) for i in range(owners)]
    log = Log(engine, monkeypatch)
    with held(engine):
        for i in range(owners):
            log.ask(f"owner {i}", prompt=[i + 2], **fields)
    assert [bits(one) for one in log.end()] == [[one] for one in before]
    assert log.check() > 3 * owners


def test_who_fills_all_slots_keeps_nobody_out(engine, monkeypatch):
    fields = {"prompt": [5] * 2 * CHUNK, "max_tokens": 10, "seed": 4}
    names = [f"more {i}" for i in range(6)]
    before = {name: alone(engine, adapter=name, **fields) for name in names}
    log = Log(engine, monkeypatch)
    with held(engine):
        for name in names[:4]:  # there are three slots
            log.ask("anna", adapter=name, **fields | {"n": 40})
        for owner, name in zip(("ben", "cleo", "dora"), names[3:], strict=True):
            log.ask(owner, adapter=name, **fields)
    found = log.end()
    for end in log.ends[4:]:
        assert log.turns("anna", end) <= 16
    assert [bits(one)[0] for one in found] == [before[name] for name in names[:4] + names[3:]]
    log.check()


@pytest.mark.slow
def test_a_session_whose_samples_lost_their_slots_goes_on(engine, monkeypatch):
    """Its other samples hold all slots then, and none of them has a row."""
    sampler = engine._sampler
    monkeypatch.delitem(sampler._pool._adapters, 3)  # two are left
    plan = {0: ("a", "one", 8, 20), 2: ("a", "two", 12, 5), 11: ("b", "more 0", 1, 20)}
    plan[24] = "a", "more 0", 8, 5
    futures, count, step = [], itertools.count(), sampler.step

    def counted():
        if row := plan.get(next(count)):
            owner, name, n, most = row
            fields = {"prompt": [2, 3, 4], "n": n, "max_tokens": most, "seed": 1}
            futures.append(begun(engine, adapter=name, client=Client(owner), **fields))
        before = sampler.prompt_tokens, sampler.drawn_tokens
        step()
        if (sampler.prompt_tokens, sampler.drawn_tokens) == before:
            raise RuntimeError("the step did nothing")

    with held(engine):
        first = begun(engine, prompt=[2], max_tokens=40, client=Client("c"))
        monkeypatch.setattr(sampler, "step", counted)
    first.result(SECONDS)
    found = [future.result(SECONDS) for future in futures]
    assert [len(one.completions) for one in found] == [8, 12, 1, 8]


def test_a_paused_sample_ends_early(engine):
    def seen(piece):
        if not piece.index:
            many.call()

    with held(engine):
        many = begun(engine, prompt=[3], n=20, client=Client("anna"))
        fields = {"prompt": [4], "n": 20, "max_tokens": 5, "client": Client("ben")}
        other = begun(engine, seen, **fields)
    assert len(other.result(SECONDS).completions) == 20
    assert 0 < len(many.result(SECONDS).completions) <= ROWS


def test_others_train_one_batch_between_two_tokens(engine, monkeypatch):
    """Though a token takes as long as a hundred batches."""
    log, now = Log(engine, monkeypatch), [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)
    monkeypatch.setattr(engine_module, "time", clock)
    gradient, draw = engine._trainer.gradient, engine._sampler._rows.draw

    def trained(*rest):
        now[0] += 1.0
        log.events.append(("train", "ben"))
        return gradient(*rest)

    def drawn(tree):
        now[0] += 100.0
        return draw(tree)

    monkeypatch.setattr(engine._trainer, "gradient", trained)
    monkeypatch.setattr(engine._sampler._rows, "draw", drawn)
    ben = Client("ben")
    tell(engine, "tenant", Create(AdapterSpec(rank=1)))
    data = [Datum(np.arange(60) % VOCAB, {"target_tokens": np.ones(60, int)})] * 40
    with held(engine):
        log.ask("anna", prompt=[2], max_tokens=12)
        training = asked(
            lambda done: engine.submit("tenant", Gradient(data, "cross_entropy"), done, ben)
        )
    log.end()
    training.result(SECONDS)
    kinds = [event[0] for event in log.events[: log.ends[0]]]
    assert all(len([*same]) == 1 for kind, same in itertools.groupby(kinds) if kind == "train")
    assert kinds.count("draw") == 11 and kinds.count("train") >= 9, "it has its share"
    tell(engine, "tenant", Leave())
