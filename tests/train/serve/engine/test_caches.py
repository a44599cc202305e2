"""Caches of rows grow and shrink with what is drawn, a step at a time."""

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.training.layout import layout_of_one_device
from tests.train.serve.engine.engines import SECONDS, begun, ids, running, sampled, text_of
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes

SIZES = Sizes(max_length=512, tokens=512, sequences=8, chunk=16)


@pytest.mark.parametrize("n", [1, 100, 129, 500])
def test_a_cache_is_at_most_twice_as_long_as_its_tokens(n):
    assert n <= SIZES.cache_length(n) <= max(128, 2 * n)
    assert Sizes(max_length=100, tokens=1, sequences=1, chunk=1).cache_lengths == (100,)


def test_steps_between_caches():
    # Without the shortest, a row of 60 tokens would take room for 128.
    assert SIZES.row_lengths == (64, 128, 256, 512)
    assert [*SIZES.caches_to(128, 512)] == [256, 512]
    assert [*SIZES.caches_to(512, 128)] == [256, 128]
    assert [*SIZES.caches_to(256, 256)] == []


@pytest.mark.slow
def test_rows_keep_their_tokens_while_caches_grow_and_shrink(base):
    engine = Engine(base, SIZES, layout_of_one_device(), eos=(), text_of=text_of, slots=1)
    engine.warm_up()
    before, places, lengths = engine.status().compiled, engine._sampler._rows, []
    resize = places._resize

    def seen(order, length):
        lengths.append(length)
        resize(order, length)

    places._resize = seen
    rng = np.random.default_rng(0)
    forward = jax.jit(lj.adapt(base.model.apply))
    tree = base.tree(base.zero_adapter.factors, base.zero_adapter.scales, base.shell)

    def deviation(prompt, completion):
        whole = np.zeros((1, SIZES.max_length), np.int32)
        tokens = [*prompt, *completion.tokens]
        whole[0, : len(tokens)] = tokens
        logps = jax.nn.log_softmax(forward({"params": tree}, whole)[0])
        drawn = np.arange(len(prompt) - 1, len(tokens) - 1)
        return np.abs(logps[drawn, completion.tokens] - completion.logprobs).max()

    with running(engine):
        short, long = ids(rng, 20).tolist(), ids(rng, 100).tolist()
        sampled(engine, prompt=ids(rng, 300).tolist(), max_tokens=1)  # from 128 to 512 at once
        crowd = [
            begun(engine, prompt=long, max_tokens=300, seed=1),
            *(begun(engine, prompt=short, max_tokens=80, seed=seed) for seed in range(3)),
        ]
        found = [one.result(SECONDS).completions[0] for one in crowd]
        after = sampled(engine, prompt=short, max_tokens=80, seed=0).completions[0]
    assert max(map(deviation, [long, short, short, short], found)) < 1e-5
    assert deviation(short, after) < 1e-5 and (after.tokens == found[1].tokens).all()
    assert lengths[:2] == [256, 512] and {128, 256} <= {*lengths[2:]}, lengths
    assert engine.status().compiled == before
