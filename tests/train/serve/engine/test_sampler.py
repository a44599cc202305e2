"""The sampler's choices alone, without arrays: whatever is asked for, each step does something."""

import functools
import itertools
import random
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from lora_jax.models.sampling.slots import DrawnTokens
from train.serve.engine import engine as engine_module
from train.serve.engine.commands import EngineTenant
from train.serve.engine.engine import Engine
from train.serve.engine.jobs import SampleJob
from train.serve.engine.pool import AdapterPool
from train.serve.engine.sampler import Sampler
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import Client, SampleRequest

CHUNK = 8


class EmptyPool(AdapterPool):
    """Slots that hold no arrays."""

    def __init__(self, slots):
        self._tree, self._users = None, Counter()
        self._adapters = dict.fromkeys(range(1, slots + 1))

    def _write(self, slot, adapter):
        pass


class EmptyPlaces:
    """Rows that hold no arrays."""

    are_lost = False

    def __init__(self, shared):
        self.completions, self.shared = {}, shared

    def narrow(self):
        pass

    def begin(self, row, logits, cache):
        self.resume(row)
        return self.draw(None)

    def pause(self, row):
        self.free(row)

    def free(self, row):
        del self.completions[
            next(place for place, other in self.completions.items() if other is row)
        ]

    def resume(self, row):
        assert row.job.slot is not None
        self.completions[next(i for i in itertools.count() if i not in self.completions)] = row

    def draw(self, tree):
        n = max(self.completions) + 1
        return DrawnTokens(np.zeros(n, int), np.zeros(n), None)


def made_sampler(slots, sequences, shared, trainer=None, **sizes):
    cache = SimpleNamespace(positions=np.zeros((1, 64)))
    drawing = SimpleNamespace(
        chunk=CHUNK,
        depends_on_cache_length=False,
        has_memory=False,
        empty_rows=lambda width, length: None,
        prompt_cache=lambda length: cache,
        copy_chunk=lambda cache, first: SimpleNamespace(size=1),
        put_block=lambda cache, first, block: cache,
        extend=lambda tree, slot, ids, n, cache: (None, cache),
        extend_all=lambda tree, slot, ids, n, caches: ([None] * len(caches), caches),
        round_up=lambda length: length,
    )
    base = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=9)), zero_adapter=None
    )
    sizes = Sizes(max_length=64, tokens=64, sequences=sequences, chunk=CHUNK, **sizes)
    sampler = Sampler(base, trainer, drawing, EmptyPool(slots), sizes, str)
    sampler._rows = EmptyPlaces(shared)
    return sampler


def step(sampler):
    """Takes a step, which draws tokens or runs a part of a prompt."""
    before = sampler.drawn_tokens, sampler.prompt_tokens
    sampler.step()
    assert (sampler.drawn_tokens, sampler.prompt_tokens) != before


class Weights:
    """Stands for an adapter's arrays."""


class Requests:
    """Asks a sampler, and counts the answers."""

    def __init__(self, sampler):
        self.sampler, self.jobs, self.answers, self._adapters = sampler, [], [], {}

    def ask(self, owner, session, name, n, most, prompt, **fields):
        adapter = None if name is None else self._adapters.setdefault(name, Weights())
        request = SampleRequest(
            **{"adapter": name, "prompt": prompt, "n": n, "max_tokens": most},
            client=Client(owner, session),
            **fields,
        )
        self.jobs.append(SampleJob(request, adapter, 0, self.answers.append, None))
        self.sampler.add(self.jobs[-1])

    def end(self):
        """Takes steps until all is answered."""
        while self.sampler.busy:
            step(self.sampler)
        assert len(self.answers) == len(self.jobs)
        assert not any(isinstance(answer, Exception) for answer in self.answers)
        assert not self.sampler._turns._users
        assert not any(n for slot, n in self.sampler._pool._users.items() if slot)


@pytest.mark.parametrize("seed", range(24))
def test_each_step_does_something(seed):
    rng = random.Random(seed)
    slots = rng.choice([2, 2, 3, 8])
    sequences = rng.choice([4, 8])
    sampler = made_sampler(slots, sequences, shared=rng.choice([1, sequences]))
    requests, is_ended_early = Requests(sampler), rng.choice([0.0, 0.01])
    for _ in range(300):
        if rng.random() < 0.08:
            names = [None, *(f"x{i}" for i in range(slots + 3))]
            prompt = rng.choices(range(2), k=rng.choice([3, 20]))
            who = rng.choice("abc"), rng.choice(["", "s"])
            requests.ask(
                *who, rng.choice(names), rng.choice([1, 2, 12]), rng.choice([1, 5, 30]), prompt
            )
        if requests.jobs and rng.random() < is_ended_early:
            sampler.end(rng.choice(requests.jobs))
        if sampler.busy:
            step(sampler)
    requests.end()


def test_a_sample_that_lost_its_slot_holds_up_no_others_of_its_session():
    """These hold all slots, and none of them has a row."""
    requests = Requests(made_sampler(2, 8, 8))
    plan = {0: ("a", "x0", 8, 20), 2: ("a", "x1", 12, 5), 11: ("b", "x2", 1, 20)}
    plan[24] = "a", "x2", 8, 5
    for i in range(25):
        if i in plan:
            owner, *rest = plan[i]
            requests.ask(owner, "", *rest, [2, 3, 4])
        step(requests.sampler)
    requests.end()


def test_a_prompt_that_fails_beside_others_ends_alone():
    """Of those that run together, at its last chunk."""
    trainer = SimpleNamespace(score_prompt=Mock(side_effect=MemoryError))
    requests = Requests(made_sampler(2, 8, 8, trainer, fast_prompts=True))
    for owner in "abc":
        requests.ask(owner, "", None, 1, 3, [2, 3], prompt_logprobs=owner == "b")
    step(requests.sampler)
    assert requests.sampler.prompt_tokens == 6, "all ran together"
    assert [type(answer) for answer in requests.answers] == [MemoryError]
    while requests.sampler.busy:
        step(requests.sampler)
    assert [len(answer.completions[0].tokens) for answer in requests.answers[1:]] == [3, 3]


def test_a_command_behind_one_that_failed_is_answered():
    """Neither has an adapter; a client would wait for the second one for ever."""

    def fail(tenant, command):
        raise LookupError(command)
        yield

    tenant, answers = EngineTenant("one", Client("anna")), []
    tenant.queue.extend((command, answers.append) for command in ("first", "second"))
    engine = SimpleNamespace(
        _tenants={"one": tenant},
        _commands=SimpleNamespace(execute=fail),
        _trained_parties=set(),
        _train_seconds=Counter(),
    )
    engine._finish_command = functools.partial(Engine._finish_command, engine)
    while engine._tenants:
        Engine._train_tenant(engine, tenant)
    assert [str(answer) for answer in answers] == ["first", "second"]


def test_training_and_sampling_have_as_much_time(monkeypatch):
    """A turn that takes three times as long comes a third as often; a job that began goes on."""
    clock, turns = [1000.0], []

    def turn(kind, seconds):
        turns.append(kind)
        clock[0] += seconds

    tenant = EngineTenant("one", Client("anna"))
    tenant.job = iter(())
    engine = SimpleNamespace(
        _tenants={"one": tenant},
        _sampler=SimpleNamespace(busy=True, step=lambda: turn("sampling", 1.0)),
        _seconds_of_kind={"training": 0.0, "sampling": 0.0},
        _may_train=lambda tenant: True,
        _turn_key=lambda tenant: 0,
        _train_tenant=lambda tenant: turn("training", 3.0),
    )
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for _ in range(8):
        Engine._take_turn(engine)
    assert Counter(turns) == {"training": 2, "sampling": 6}
