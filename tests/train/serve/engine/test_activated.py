"""Activated LoRA in the engine: its answers, and the base's prefix that is not run again."""

import functools

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models, peft
from lora_jax.models.sampling.prompts import pad_left
from tests.support import with_random_factors
from tests.train.serve.engine.engines import CHUNK, SECONDS, asked, bits, ids, sampled, tell
from train.serve.protocol.requests import Load, RequestError

INVOCATION = (3, 5, 3)
BEFORE = 4 * CHUNK + 3  # tokens before the invocation, which stands in the midst of a chunk


@pytest.fixture(scope="module")
def activated(world, tmp_path_factory):
    """Adapters that the engine has by name, and their trees: an activated LoRA, a plain LoRA with
    the same factors, and an activated LoRA with the same invocation and other factors."""
    model, params = world.base.model, world.base.params
    trees, folder = {}, tmp_path_factory.mktemp("activated")
    for name, invocation, seed in (
        ("alora", INVOCATION, 7),
        ("lora", None, 7),
        ("other alora", INVOCATION, 8),
    ):
        rule = lj.LoraRule(targets="all-linear", rank=4, alpha=6, invocation=invocation)
        trees[name] = with_random_factors(lj.lorafy(params, [rule]), seed)
        peft.save(folder / name, model, trees[name], task_type="CAUSAL_LM")
        adopt = functools.partial(world.engine.adopt, name, folder / name)
        asked(adopt).result(SECONDS)
    yield trees, folder
    for name in trees:
        world.engine.drop(name)


def prompt(n=BEFORE, more=(7, 8), seed=4):
    text = ids(np.random.default_rng(seed), n)
    return [*np.where(text == INVOCATION[0], 1, text).tolist(), *INVOCATION, *more]


def ran(engine, **fields):
    """A sample's result, and the tokens of its prompt that ran."""
    before = engine.status().prompt_tokens
    result = sampled(engine, temperature=0.0, max_tokens=12, **fields)
    return result, engine.status().prompt_tokens - before


def forget(engine):
    """Has an engine compute all anew, in as few rows as will do, on which last bits depend."""
    engine._sampler._runner.store.clear()
    engine._sampler._rows.narrow()


@pytest.mark.slow
def test_answers_as_generated(world, engine, activated):
    """As `models.generate`, with the invocation in the midst of a chunk, at its ends, or first."""
    (trees, _), model = activated, world.base.model
    texts = [prompt(n) for n in (BEFORE, 3 * CHUNK, 2 * CHUNK - 1, CHUNK - len(INVOCATION), 0)]
    given = {"max_new_tokens": 12, "apply": lj.adapt(model.apply), "eos_token_id": ()}
    ids, mask = pad_left(texts, max(map(len, texts)), 0)
    wanted = models.generate(model, trees["alora"], ids, mask, **given)
    forget(engine)
    differ = 0
    for text, want in zip(texts, wanted.tolist(), strict=True):
        result, _ = ran(engine, adapter="alora", prompt=text)
        drawn = result.completions[0].tokens.tolist()
        assert drawn == want[: len(drawn)]
        base, _ = ran(engine, prompt=text)
        differ += base.completions[0].tokens.tolist() != drawn
    assert differ >= 4, "the adapter must be seen"


@pytest.mark.slow
def test_the_prefix_of_the_base_is_not_run_again(engine, activated):
    """Up to whole chunks before the invocation; a plain LoRA of the same factors runs all."""
    forget(engine)
    text = prompt()
    alone, n = ran(engine, adapter="alora", prompt=text)
    assert n == len(text) and alone.cached == 0
    forget(engine)
    chat = text[:BEFORE]
    _, n = ran(engine, prompt=chat)
    assert n == BEFORE
    result, n = ran(engine, adapter="alora", prompt=text)
    assert n == len(text) - 4 * CHUNK and result.cached == 4 * CHUNK
    assert bits(result) == bits(alone)
    control, n = ran(engine, adapter="lora", prompt=text)
    assert n == len(text) and control.cached == 0
    # The other way round, too; and what the adapter ran itself is not the base's.
    forget(engine)
    long = [*text, *ids(np.random.default_rng(6), 2 * CHUNK).tolist()]
    ran(engine, adapter="alora", prompt=long)
    base, n = ran(engine, prompt=long)
    assert n == len(long) - 4 * CHUNK
    forget(engine)
    assert bits(ran(engine, prompt=long)[0]) == bits(base)


def test_turns_after_the_invocation_are_not_run_again(engine, activated):
    """By the same adapter, after the same text; no other finds them, and they find no other's.

    Users of a second activated LoRA with the same invocation would get the first's keys.
    """
    forget(engine)
    text = prompt(more=ids(np.random.default_rng(6), 10).tolist())
    longer = [*text, 7, 9, 8]
    alone, n = ran(engine, adapter="alora", prompt=longer)
    assert n == len(longer) and alone.cached == 0
    forget(engine)
    ran(engine, adapter="alora", prompt=text)
    result, n = ran(engine, adapter="alora", prompt=longer)
    whole = len(text) - len(text) % CHUNK
    assert whole > BEFORE + CHUNK and n == len(longer) - whole and result.cached == whole
    assert bits(result) == bits(alone)
    # The same chunks from the invocation on, after another text.
    other = [*prompt(seed=5)[:BEFORE], *longer[BEFORE:]]
    assert other[: 4 * CHUNK] != longer[: 4 * CHUNK]
    _, n = ran(engine, adapter="alora", prompt=other)
    assert n == len(other)
    for name, cached in (("lora", 0), (None, 4 * CHUNK), ("other alora", 4 * CHUNK)):
        result, n = ran(engine, adapter=name, prompt=longer)
        assert result.cached == cached
    forget(engine)
    assert bits(ran(engine, adapter="other alora", prompt=longer)[0]) == bits(result)


def test_a_prompt_without_the_invocation_is_the_bases(engine, activated):
    forget(engine)
    text = prompt()[:BEFORE]
    base, _ = ran(engine, prompt=text)
    result, n = ran(engine, adapter="alora", prompt=text)
    assert bits(result) == bits(base) and n == BEFORE - 4 * CHUNK


@pytest.mark.slow
def test_log_probabilities_of_a_prompt(world, engine, activated):
    (trees, _), text = activated, prompt()
    result, _ = ran(engine, adapter="alora", prompt=text, prompt_logprobs=True)
    logits = lj.adapt(world.base.model.apply)({"params": trees["alora"]}, np.array([text]))[0]
    logps = np.asarray(jax.nn.log_softmax(logits))
    want = logps[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(result.prompt_logprobs[1:], want, atol=1e-4)


def test_it_does_not_train_there(engine, activated):
    with pytest.raises(RequestError, match="Use train.sft --alora"):
        tell(engine, "other", Load(activated[1] / "alora", optimizer=False))
