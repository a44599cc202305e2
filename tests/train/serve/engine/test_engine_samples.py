"""The engine's samples: what is drawn, by whom, and in whose company."""

import functools
import types

import numpy as np
import pytest
from scipy import stats

from lora_jax import models
from tests.support import assert_close
from tests.train.serve.engine.engines import (
    LENGTH,
    NAMES,
    SECONDS,
    VOCAB,
    begun,
    bits,
    ids,
    made_engine,
    over_families,
    random_data,
    running,
    sampled,
    tell,
    text_of,
    unused,
)
from train.serve.protocol.requests import (
    AdapterSpec,
    Create,
    Datum,
    Gradient,
    Leave,
    RequestError,
    Save,
    Update,
)

of_families = over_families("qwen3-next")


def requests(seed, n):
    """Samples of all kinds."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        found.append(
            {
                "adapter": NAMES[i % 3],
                "prompt": ids(rng, int(rng.integers(1, 40))).tolist(),
                "n": int(rng.integers(1, 4)),
                "max_tokens": int(rng.integers(1, 24)),
                "temperature": (1.0, 0.6, 0.0, 1.7)[i % 4],
                "top_k": (-1, 3, 1000)[i // 2 % 3],
                "top_p": (1.0, 0.5)[i // 3 % 2],
                "seed": i,
                "top": (0, 4)[i % 2],
                "prompt_logprobs": i % 3 == 1,
                "top_prompt": (0, 3)[i % 2],
            }
        )
    return found


@of_families
def test_a_mixed_batch_against_the_model_itself(world, engine):
    asked = requests(1, 24)
    found = [begun(engine, **fields) for fields in asked]
    largest, size = 0.0, 1.0
    for fields, future in zip(asked, found, strict=True):
        drawn, prompt, t = future.result(SECONDS), fields["prompt"], fields["temperature"]
        assert len(drawn.completions) == fields["n"]
        for completion in drawn.completions:
            m = len(completion.tokens)
            assert m == min(fields["max_tokens"], LENGTH - len(prompt)) and not completion.stopped
            whole = [*prompt, *completion.tokens]
            logps = world.logps(fields["adapter"], whole, t)[len(prompt) - 1 : -1]
            off = logps[np.arange(m), completion.tokens] - completion.logprobs
            largest = max(largest, np.abs(off).max())
            size = max(size, np.abs(logps).max())
            for at, token in zip(logps, completion.tokens, strict=True):
                assert token in allowed(at, fields["top_k"], fields["top_p"] if t else 0.0)
            if fields["top"]:
                largest = max(largest, off_top(completion.top, logps, 4))
        plain = world.logps(fields["adapter"], prompt)[:-1]
        if fields["prompt_logprobs"]:
            assert np.isnan(drawn.prompt_logprobs[0])
            off = drawn.prompt_logprobs[1:] - plain[np.arange(len(plain)), prompt[1:]]
            largest = max(largest, np.abs(off).max(initial=0))
        if fields["top_prompt"]:
            first = drawn.top_prompt
            assert (first.ids[0] == 0).all() and (first.logprobs[0] == -99999).all()
            rest = types.SimpleNamespace(ids=first.ids[1:], logprobs=first.logprobs[1:])
            largest = max(largest, off_top(rest, plain, 3))
    print(f"largest deviation {largest:.1e} of {size:.1f}")
    assert largest < 3e-5 * size, "in single precision; layers of linear attention come to 1.1e-5"


@pytest.mark.parametrize("k", [1, 40])
def test_any_tokens_are_scored_at_each_place_of_a_prompt(world, engine, k):
    rng = np.random.default_rng(k)
    prompt = ids(rng, 12)
    targets = rng.integers(-1, VOCAB, (11, k)).astype(np.int32)
    targets[3], targets[4, 0] = -1, 5
    asked = {"adapter": "one", "prompt": prompt.tolist(), "max_tokens": 0}
    drawn = sampled(engine, **asked, targets=targets, top_prompt=2, prompt_logprobs=True)
    plain = world.logps("one", prompt)[:-1]
    expected = np.where(targets < 0, 0, np.take_along_axis(plain, targets, axis=1))
    assert_close(drawn.targets, expected, 1e-5)
    assert (drawn.targets[3] == 0).all()
    own = plain[np.arange(11), prompt[1:]]
    assert_close(drawn.prompt_logprobs[1:], own, 1e-5)
    assert drawn.top_prompt.ids[1:, 0].tolist() == plain.argmax(axis=1).tolist()
    with pytest.raises(RequestError, match=r"have the shape \(12, .*pass \[11, k\], with k from 1"):
        sampled(engine, **asked, targets=np.zeros((12, k), np.int32))
    with pytest.raises(RequestError, match="hold an id outside 0 to 36. Pass -1"):
        sampled(engine, **asked, targets=np.full((11, k), 37, np.int32))


def allowed(logps, top_k, top_p):
    """The tokens that may be drawn, by their definitions; of top_p 0, the likeliest."""
    order = np.argsort(-logps, kind="stable")
    order = order[:top_k] if top_k > 0 else order
    probs = np.exp(logps[order]) / np.exp(logps[order]).sum()
    before = np.concatenate([[0], np.cumsum(probs)[:-1]])
    return set(order[before < max(top_p, 1e-9)].tolist())


def off_top(top, logps, k):
    """How far the log-probabilities of the likeliest tokens are off, which are compared."""
    assert top.ids.shape == top.logprobs.shape == (len(logps), k)
    order = np.argsort(-logps, axis=-1)[:, :k]
    assert (top.ids == order).all()
    off = np.take_along_axis(logps, order, -1) - top.logprobs
    return np.abs(off).max(initial=0)


def test_sampler_and_trainer_agree(world, engine):
    tell(engine, "scorer", Create(AdapterSpec(rank=2, seed=3)))
    world.learn("scorer", 7)
    largest = 0.0
    for n in (1, 9, 40):
        prompt = ids(np.random.default_rng(n), n).tolist()
        tell(engine, "scorer", Save(unused(), name="scored"))
        drawn = sampled(engine, adapter="scored", prompt=prompt, n=2, max_tokens=20, seed=n)
        for completion in drawn.completions:
            whole = np.array([*prompt, *completion.tokens], np.int32)
            datum = Datum(whole[:-1], {"target_tokens": whole[1:]})
            request = Gradient([datum], "cross_entropy", forward_only=True)
            found = tell(engine, "scorer", request).logprobs[0][n - 1 :]
            largest = max(largest, np.abs(found - completion.logprobs).max())
    tell(engine, "scorer", Leave())
    print(f"largest deviation {largest:.1e}")
    assert largest < 1e-5


@pytest.mark.slow
@of_families
def test_greedy_tokens_are_those_of_generate(world, engine):
    prompts = np.stack([ids(np.random.default_rng(seed), 6) for seed in range(4)])
    expected = models.generate(
        world.base.model,
        world.trees["one"],
        prompts,
        max_new_tokens=30,
        eos_token_id=[],
        apply=world.forward,
    )
    found = [
        begun(engine, adapter="one", prompt=prompt.tolist(), max_tokens=30, temperature=0.0)
        for prompt in prompts
    ]
    tokens = np.stack([x.result(SECONDS).completions[0].tokens for x in found])
    assert (tokens == np.asarray(expected)).all()


def test_seeds(engine):
    fields = {"adapter": "two", "prompt": [5, 6], "n": 4, "max_tokens": 12, "temperature": 1.4}
    one, again, other = (sampled(engine, **fields, seed=seed) for seed in (1, 1, 2))
    assert bits(one) == bits(again)
    assert len({c.tokens.tobytes() for c in [*one.completions, *other.completions]}) == 8
    unseeded = [sampled(engine, **fields) for _ in range(2)]
    assert bits(unseeded[0]) != bits(unseeded[1])
    huge = [sampled(engine, **fields, seed=seed) for seed in (-1, 2**32 - 1, 2**40)]
    assert bits(huge[0]) == bits(huge[1]) != bits(huge[2])


@of_families
def test_neighbours_change_no_bit(engine):
    mine = {"adapter": "one", "prompt": [*range(20)], "n": 2, "max_tokens": 20, "top_p": 0.9}
    alone = bits(sampled(engine, **mine, seed=4))
    for crowd in range(3):
        others = [begun(engine, **fields) for fields in requests(crowd, 9)]
        assert bits(sampled(engine, **mine, seed=4)) == alone
        for other in others:
            other.result(SECONDS)


def test_snapshots_never_change(world, engine):
    tell(engine, "learner", Create(AdapterSpec(rank=4, seed=3)))
    found = []
    for step in range(4):
        world.learn("learner", step)
        tell(engine, "learner", Save(unused(), name=f"step {step}"))
        score = {
            "prompt": [1, 2, 3, 4],
            "prompt_logprobs": True,
            "n": 2,
            "max_tokens": 9,
            "seed": 1,
        }
        found.append([bits(sampled(engine, adapter=f"step {i}", **score)) for i in range(step + 1)])
    last = found[-1]
    assert all(row == last[: len(row)] for row in found)
    assert len({str(each) for each in last}) == 4
    tell(engine, "learner", Leave())
    assert bits(sampled(engine, adapter="step 1", **score)) == last[1]
    under_way = begun(engine, adapter="step 1", **score)
    engine.drop("step 1")
    assert bits(under_way.result(SECONDS)) == last[1]
    with pytest.raises(RequestError, match="'step 1'. Use one of these: one, two"):
        sampled(engine, adapter="step 1", **score)


@pytest.mark.slow
def test_draws_follow_the_distribution(world, engine):
    """Tokens become uniform numbers by the model's distribution functions: a χ² test of those."""
    fields = {"adapter": "one", "prompt": [3, 8], "max_tokens": 3, "temperature": 1.3}
    drawn = sampled(engine, **fields, n=400, seed=17)
    tokens = np.stack([c.tokens for c in drawn.completions])
    rng, known, uniform = np.random.default_rng(0), {}, []
    for row in tokens:
        for place in range(3):
            before = (3, 8, *row[:place].tolist())
            if before not in known:
                known[before] = np.exp(world.logps("one", before, 1.3)[-1])
            probs = known[before]
            uniform.append(probs[: row[place]].sum() + rng.uniform() * probs[row[place]])
    counts = np.histogram(uniform, bins=20, range=(0, 1))[0]
    assert len(np.unique(tokens[:, 0])) > 5
    assert stats.chisquare(counts).pvalue > 1e-3, counts
    by_place = np.reshape(uniform, tokens.shape)
    assert abs(np.corrcoef(by_place[:, 0], by_place[:, 1])[0, 1]) < 4 / 20


def test_stops(engine, monkeypatch):
    fields = {"adapter": "one", "prompt": [9, 2, 4], "max_tokens": 12, "seed": 3}
    free = sampled(engine, **fields).completions[0]
    at = next(i for i in range(3, 12) if free.tokens[i] not in free.tokens[:i])
    stops = (
        {"stop_ids": frozenset({int(free.tokens[at])})},
        {"stop": ("never", text_of(free.tokens[at - 1 : at + 1]))},
    )
    for stop in stops:
        found = sampled(engine, **fields, **stop, top=2).completions[0]
        assert found.stopped and len(found.top.ids) == at + 1
        assert (found.tokens == free.tokens[: at + 1]).all()
        assert (found.logprobs == free.logprobs[: at + 1]).all()
    exact = sampled(engine, **fields | {"max_tokens": at + 1}, **stops[0]).completions[0]
    assert exact.stopped, "the last token may be a stop"
    assert not sampled(engine, **fields | {"max_tokens": at}, **stops[0]).completions[0].stopped
    monkeypatch.setattr(engine._sampler, "_text_of", lambda tokens: "あ" * (len(tokens) // 3))
    slow = sampled(engine, **fields | {"max_tokens": 30}, stop=("あ" * 6,)).completions[0]
    assert slow.stopped and len(slow.tokens) == 18, "a letter of several tokens"
    monkeypatch.setattr(engine._sampler, "_text_of", lambda ids: "".join(f"({i})" for i in ids))
    within = sampled(engine, **fields, stop=(f"({free.tokens[at]}",)).completions[0]
    assert within.stopped and len(within.tokens) == at + 1, "a stop text inside a token's text"


@pytest.mark.parametrize(
    ("n", "most", "drawn"),
    [
        (1, None, 63),
        (1, 5, 5),
        (LENGTH - 1, None, 1),
        (LENGTH - 1, 9, 1),
        (LENGTH, 0, 0),
        (8, 0, 0),
    ],
)
def test_shortest_and_longest(world, engine, n, most, drawn):
    prompt = ids(np.random.default_rng(n), n)
    found = sampled(
        engine, adapter="two", prompt=prompt.tolist(), max_tokens=most, prompt_logprobs=True
    )
    assert [len(c.tokens) for c in found.completions] == [drawn]
    expected = world.logps("two", prompt)[np.arange(n - 1), prompt[1:]]
    assert np.abs(found.prompt_logprobs[1:] - expected).max(initial=0) < 1e-5


@pytest.mark.parametrize("temperature", [1e-40, 1e-8])
def test_cold_samples_are_greedy(engine, temperature):
    fields = {"adapter": "one", "prompt": [1, 2, 3], "max_tokens": 9}
    cold = sampled(engine, **fields, temperature=temperature, top_k=2**40).completions[0]
    greedy = sampled(engine, **fields, temperature=0.0).completions[0]
    assert (cold.tokens == greedy.tokens).all() and (np.abs(cold.logprobs) < 0.1).all()


@pytest.mark.slow
def test_adapters_that_nobody_asks_for_are_read_again(base, tmp_path):
    """However many are named, a few are in memory, and all say what they said before."""
    with running(made_engine(base, slots=1)) as engine:
        draw = functools.partial(
            sampled, engine, prompt=[1, 2, 3], max_tokens=9, seed=4, prompt_logprobs=True
        )
        said = []
        tell(engine, "maker", Create(AdapterSpec(rank=3, seed=5)))
        for i in range(5):
            tell(engine, "maker", Gradient(random_data(i), "cross_entropy"))
            tell(engine, "maker", Update(3e-2, eps=1e-8))
            tell(engine, "maker", Save(tmp_path / str(i), name=str(i)))
            said.append(draw(adapter=str(i)))
            assert len(engine._adapters) == min(i + 1, 2)
        assert len({tuple(one.prompt_logprobs[1:]) for one in said}) == 5
        assert engine.status().adapters == ("0", "1", "2", "3", "4") and engine.knows("0")
        for i in (0, 1, 4, 0):
            assert bits(draw(adapter=str(i))) == bits(said[i])
        engine.drop("0")
        with pytest.raises(RequestError, match="there is no adapter '0'"):
            sampled(engine, adapter="0", prompt=[1])
