"""Fast prompts (last bits may differ): prompts run in batches, completions' caches are reused."""

import numpy as np
import pytest

from lora_jax.training.layout import layout_of_one_device
from tests.train.serve.engine.engines import (
    CHUNK,
    LENGTH,
    SECONDS,
    begun,
    held,
    ids,
    running,
    sampled,
    text_of,
)
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes
from train.serve.protocol.requests import Client

pytestmark = pytest.mark.slow
NAMES = (None, "one", "two")
SIZES = Sizes(max_length=LENGTH, tokens=LENGTH, sequences=8, chunk=CHUNK, fast_prompts=True)


@pytest.fixture(scope="module")
def fast(world, base):
    """An engine that is warm, with the adapters of the world, and an account of its calls."""
    engine = Engine(base, SIZES, layout_of_one_device(), eos=[], text_of=text_of, slots=3)
    engine.warm_up()
    for name in NAMES[1:]:
        engine._commands.adapters.add(name, None, world.engine._commands.adapters.find(name))
    engine.calls, runner = [], engine._sampler._runner
    run = runner.run

    def ran(prompts, tree):
        engine.calls.append(run(prompts, tree))
        return engine.calls[-1]

    runner.run = ran
    with running(engine):
        yield engine


@pytest.fixture(autouse=True)
def forget(fast):
    fast.calls.clear()
    fast._sampler._runner.store.clear()


def deviation(world, name, prompt, completion):
    tokens = [*prompt, *completion.tokens]
    logps = world.logps(name, tokens)
    drawn = np.arange(len(prompt) - 1, len(tokens) - 1)
    return np.abs(logps[drawn, completion.tokens] - completion.logprobs).max()


def test_prompts_run_together_as_each_alone(world, fast):
    """Mixes adapters, owners and lengths; no call has more tokens than a chunk."""
    rng, compiled = np.random.default_rng(0), fast.status().compiled
    prompts = [ids(rng, n).tolist() for n in (1, 2, 3, 17, 2, 19, 40, 5, 8, 9, 1, 23)]
    fields = [
        {"adapter": NAMES[i % 3], "client": Client("ab"[i % 2]), "prompt": prompt, "seed": i}
        for i, prompt in enumerate(prompts)
    ]
    with held(fast):
        crowd = [begun(fast, max_tokens=5, **each) for each in fields]
    for each, future in zip(fields, crowd, strict=True):
        (completion,) = future.result(SECONDS).completions
        assert deviation(world, each["adapter"], each["prompt"], completion) < 1e-4
    assert fast.status().compiled == compiled, "nothing compiles once it is warm"
    assert all(sum(call.values()) <= CHUNK for call in fast.calls)
    assert sum(len(call) > 1 for call in fast.calls) > 3, "several ran together"
    chunks = sum(-(-len(prompt) // CHUNK) for prompt in prompts)
    assert len(fast.calls) < chunks, "which is fewer calls than alone"


def test_what_was_drawn_is_found_again(world, fast):
    prompt, n, before = ids(np.random.default_rng(1), 21).tolist(), 10, 0
    compiled = fast.status().compiled
    for turn in range(3):
        drawn = sampled(fast, adapter="one", prompt=prompt, max_tokens=n, seed=turn)
        assert drawn.cached == before - before % CHUNK
        (completion,) = drawn.completions
        assert deviation(world, "one", prompt, completion) < 1e-4
        before = len(prompt) + n - 1  # the newest token was not run
        prompt = [*prompt, *completion.tokens.tolist(), 3, 4]
    assert fast.status().compiled == compiled
