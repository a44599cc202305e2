"""Whose turn it is: samples that wait, begin, share, and end early."""

import threading

import numpy as np
import pytest

from tests.train.serve.engine.engines import (
    CHUNK,
    LENGTH,
    SECONDS,
    VOCAB,
    begun,
    bits,
    held,
    ids,
    over_families,
    sampled,
    tell,
    unused,
)
from train.serve.protocol.requests import (
    AdapterSpec,
    Client,
    Create,
    Leave,
    RequestError,
    Save,
)

of_families = over_families("qwen3-next")


def forget(engine):
    """Has the engine keep no prompt of earlier tests."""
    engine._sampler._runner.store.clear()


@pytest.mark.slow
@of_families
def test_shared_prefixes_run_once(engine):
    prompt = ids(np.random.default_rng(0), 30).tolist()
    other = [*prompt[:21], *[(i + 1) % VOCAB for i in prompt[21:]], 5]
    fields = {"max_tokens": 8, "n": 2, "seed": 1}
    forget(engine)
    alone = sampled(engine, adapter="one", prompt=other, **fields)
    assert alone.cached == 0
    forget(engine)
    assert sampled(engine, adapter="one", prompt=prompt, **fields).cached == 0
    before = engine.status().prompt_tokens
    after = sampled(engine, adapter="one", prompt=other, **fields)
    assert after.cached == 16 and engine.status().prompt_tokens - before == len(other) - 16
    assert bits(after) == bits(alone)
    same = sampled(engine, adapter="one", prompt=prompt, **fields)
    assert same.cached == 24, "the last token runs in any case"
    assert sampled(engine, adapter="two", prompt=other, **fields).cached == 0
    forget(engine)
    before = engine.status().prompt_tokens
    with held(engine):
        crowd = [begun(engine, adapter="one", prompt=other, **fields) for _ in range(3)]
        crowd.append(begun(engine, adapter="one", prompt=prompt, **fields))
    found = [x.result(SECONDS) for x in crowd]
    assert [bits(x) for x in found[:3]] == [bits(alone)] * 3
    assert engine.status().prompt_tokens - before == 31 + 7 + 7 + 14


def test_long_prompts_hold_up_no_short_ones(engine):
    forget(engine)
    long, seen = ids(np.random.default_rng(1), 60).tolist(), {}

    def note(name):
        return lambda _: seen.setdefault(name, engine.status().prompt_tokens - before)

    before = engine.status().prompt_tokens
    with held(engine):
        crowd = [begun(engine, note(f"long {i}"), prompt=[i, *long], max_tokens=2) for i in (1, 2)]
        crowd += [
            begun(engine, note("short"), adapter="one", prompt=[4], max_tokens=2),
            begun(engine, note("same"), prompt=[7, 7], max_tokens=2),
            begun(engine, note("part"), prompt=[1, *long[:8]], max_tokens=2),
        ]
    for future in crowd:
        future.result(SECONDS)
    assert seen["short"] <= 3 * CHUNK and seen["same"] <= 4 * CHUNK
    assert seen["part"] <= 6 * CHUNK, "it waits for what is shared alone"
    assert seen["long 1"] > 8 * CHUNK


@pytest.mark.slow
def test_a_chunk_of_prompts_runs_between_two_tokens_of_a_neighbour(engine):
    """Whoever asks for them, and however many rows are free."""
    forget(engine)
    rng, seen = np.random.default_rng(2), []
    with held(engine):
        first = {"client": Client("anna"), "seed": 1, "max_tokens": 40}
        crowd = [
            begun(engine, lambda _: seen.append(engine.status().prompt_tokens), **first, prompt=[3])
        ]
        for i in range(9):
            who = Client(("anna", "ben", "cleo")[i % 3], ("", "other")[i % 2])
            crowd.append(begun(engine, prompt=ids(rng, 50).tolist(), max_tokens=2, client=who))
    for future in crowd:
        future.result(SECONDS)
    ran = np.diff(seen)
    assert len(ran) == 39 and ran.max() == CHUNK and ran.sum() > 30 * CHUNK


def test_earlier_work_is_not_held_against_an_adapter(engine):
    for name in ("one", "two"):  # the first has drawn more than the second, nobody waiting
        sampled(engine, adapter=name, prompt=[1], n=8, max_tokens=40 if name == "one" else 5)
    order, crowd = [], []
    with held(engine):
        for name in ["two"] * 12 + ["one"] * 12:
            crowd.append(begun(engine, adapter=name, prompt=[2], n=4, max_tokens=10))
            crowd[-1].add_done_callback(lambda _, name=name: order.append(name))
    for future in crowd:
        future.result(SECONDS)
    assert 4 <= order[:10].count("one") <= 6, order


def test_cancelled(engine):
    stop = {}

    def seen(piece):
        if len(piece_of := stop.setdefault(piece.index, [])) == 4:
            stop["call"]()
        piece_of.append(piece.token)

    with held(engine):
        drawing = begun(engine, seen, adapter="one", prompt=[1] * 20, n=3, seed=1)
        stop["call"] = drawing.call
        waiting = begun(engine, prompt=[1] * 20, n=3)
        waiting.call()
    found = drawing.result(SECONDS).completions
    assert [c.tokens.tolist() for c in found] == [stop[i] for i in range(3)]
    assert {len(c.tokens) for c in found} <= {4, 5, 6} and not any(c.stopped for c in found)
    assert waiting.result(SECONDS).completions == []
    for future in (drawing, waiting):
        future.call()
    with held(engine):  # more than there are rows: some did not begin
        many = begun(engine, lambda _: many.call(), prompt=[1], n=20)
    assert 1 <= len(many.result(SECONDS).completions) < 20


def test_few_prompts_that_wait_take_memory(engine):
    most = []

    def seen(_):
        sampler = engine._sampler
        most.append(sum(p.cache is not None for p in sampler._prompts + sampler._ready))

    with held(engine):
        crowd = [begun(engine, seen, prompt=[i], n=4, max_tokens=6) for i in range(20)]
    for future in crowd:
        assert len(future.result(SECONDS).completions) == 4
    assert max(most) <= 2


@of_families
def test_more_adapters_and_completions_than_places(world, engine):
    """All are served, those that ask for much no more than others."""
    order = []
    tell(engine, "maker", Create(AdapterSpec(rank=1, seed=9)))
    for i in range(5):
        world.learn("maker", i)
        tell(engine, "maker", Save(unused(), name=f"many {i}"))
    tell(engine, "maker", Leave())
    with held(engine):
        crowd = []
        for i in range(4):
            for _ in range(10):
                name = f"many {i}"
                crowd.append(begun(engine, adapter=name, prompt=[i], n=4, max_tokens=6))
        crowd.append(begun(engine, adapter="many 4", prompt=[1], max_tokens=6))
        crowd.append(begun(engine, prompt=[1], max_tokens=6))
        names = [f"many {i}" for i in range(4) for _ in range(10)] + ["many 4", "base"]
        for name, future in zip(names, crowd, strict=True):
            future.add_done_callback(lambda _, name=name: order.append(name))
    for future in crowd:
        assert future.result(SECONDS).completions
    assert order.index("many 4") < 20 and order.index("base") < 10
    halves = [order[:20].count(f"many {i}") for i in range(4)]
    assert min(halves) >= 3, order


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [0] * LENGTH}, "may have at most 64"),
        ({"prompt": [0] * (LENGTH + 1), "max_tokens": 0}, "65 tokens"),
        ({"prompt": [VOCAB]}, "outside 0 to 36"),
        ({"prompt": [-1]}, "outside"),
        ({"n": 0}, "0 completions"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top": 21}, "at most 20"),
        ({"stop": ("",)}, "a stop is an empty text"),
        ({"adapter": "three"}, "there is no adapter 'three'"),
    ],
    ids=str,
)
def test_bad_samples_are_refused(engine, fields, said):
    with pytest.raises(RequestError, match=said):
        sampled(engine, **{"prompt": [1]} | fields)


@pytest.mark.slow
def test_status_while_all_changes(world, engine):
    stop, failures = threading.Event(), []

    def look():
        while not stop.is_set():
            try:
                engine.status()
                engine.knows("one")
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(8):
        tell(engine, f"tenant {i}", Create(AdapterSpec(rank=1, seed=i)))
        engine.drop(f"tenant {i - 1}")
        tell(engine, f"tenant {i}", Save(unused(), name=f"tenant {i}"))
        tell(engine, f"tenant {i}", Leave())
    stop.set()
    thread.join(SECONDS)
    assert not failures


def test_ended_samples_hold_no_arrays(engine, monkeypatch):
    jobs, add = [], engine._sampler.add
    monkeypatch.setattr(engine._sampler, "add", lambda job: (jobs.append(job), add(job)))
    drawn = sampled(engine, adapter="one", prompt=[1, 2], max_tokens=3, prompt_logprobs=True)
    (job,) = jobs
    assert len(drawn.completions) == 1 and len(drawn.prompt_logprobs) == 2
    assert (job.adapter, job.completions, {*job.scores}) == (None, {}, {None})
