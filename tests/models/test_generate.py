"""Generation against a plain loop, and how often it compiles."""

import dataclasses
import functools
import importlib
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.hf.generation import Generation
from lora_jax.models import Decoder, generate, sample, share, stream
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.sampling import choice
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.loop import Decoding
from lora_jax.models.sampling.prompts import Prompts
from tests.models import tiny, tiny_encoders
from tests.support import over

# The module's name is the function's, too.
MODULE = importlib.import_module("lora_jax.models.sampling.generate")


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return tiny.decoder("llama3")


EOS = (-1, -2)  # no token is; as many as a test ends rows by, so that one program serves all tests


def generated(tiny_model: Any, seed: int = 2, **options: Any) -> np.ndarray:
    """Eight tokens after each of three prompts of six."""
    options = {"max_new_tokens": 8, "eos_token_id": EOS} | options
    return np.asarray(generate(*tiny_model, tiny.tokens(seed, 3, 6), **options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_an_argmax_loop(tiny_model: Any, side: str) -> None:
    model, params = tiny_model
    ids = tiny.tokens(2, 3, 6)
    lengths = [6, 2, 5]
    want = []
    mask = np.zeros_like(ids)
    for row, n in enumerate(lengths):
        part = slice(0, n) if side == "right" else slice(6 - n, 6)
        mask[row, part] = 1
        want.append(tiny.greedy_loop(model, params, ids[row, part], 8 - n + 6)[:8])
    np.testing.assert_array_equal(generated(tiny_model, attention_mask=mask), want)
    assert len(np.unique(want)) > 3


TRACED: list[int] = []
RAN: list[int] = []


@pytest.fixture(scope="module")
def counted(tiny_model: Any) -> Any:
    """The model's apply, which counts how often it is traced, and how often it runs."""

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        TRACED.append(1)
        jax.debug.callback(lambda: RAN.append(1))
        return tiny_model[0].apply(variables, *args, **kwargs)

    return apply


def test_it_compiles_once(tiny_model: Any, counted: Any) -> None:
    model, params = tiny_model

    def run(seed: int, params: Any, **options: Any) -> np.ndarray:
        return generated((model, params), seed, apply=counted, **options)

    first = run(0, params)
    once = len(TRACED)
    others = [
        run(1, params, key=jax.random.key(1), temperature=0.7, top_p=0.9, top_k=5),
        run(0, jax.tree.map(lambda x: np.asarray(x) * np.float32(1.5), params)),
        run(0, params, eos_token_id=[-3, -4], pad_token_id=3),
        run(2, params, key=jax.random.key(2), temperature=2.0),
    ]
    assert once == len(TRACED) == 2  # prefill and one step
    assert all(not np.array_equal(first, other) for other in others if other is not others[2])
    np.testing.assert_array_equal(first, others[2])


def test_equal_models_share_what_is_compiled(tiny_model: Any) -> None:
    model, params = tiny_model
    generated(tiny_model)
    compiled = MODULE._generate._cache_size()
    generated((Decoder(model.config), params))
    assert MODULE._generate._cache_size() == compiled


def test_weights_are_arguments_not_constants(tiny_model: Any) -> None:
    model, params = tiny_model
    traced = MODULE._generate.trace(
        params,
        Prompts(jnp.zeros((3, 6), jnp.int32), jnp.ones((3, 6), bool)),
        Decoding(
            Sampling(jnp.zeros(()), jnp.ones(()), jnp.zeros((), jnp.int32), jax.random.key(0)),
            eos=jnp.zeros((2,), jnp.int32),
            pad=jnp.zeros((), jnp.int32),
        ),
        model=model,
        apply=None,
        max_new_tokens=8,
    )
    smallest = min(leaf.size for leaf in jax.tree.leaves(params))
    assert all(np.size(const) < smallest for const in traced.jaxpr.consts)


@pytest.mark.parametrize("limit", [{"top_p": 1e-6}, {"top_k": 1}])
def test_the_narrowest_sampling_is_greedy(tiny_model: Any, limit: dict[str, Any]) -> None:
    want = generated(tiny_model, 0)
    hot = {"temperature": 3.0, "key": jax.random.key(3)}
    np.testing.assert_array_equal(generated(tiny_model, 0, **hot, **limit), want)
    assert not np.array_equal(generated(tiny_model, 0, **hot), want)


choose = jax.jit(choice.choose_tokens)
LOGITS = np.log(np.array([0.05, 0.4, 0.25, 0.2, 0.1], np.float32))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "expected"),
    [
        (1.0, 1.0, 5, [0.05, 0.4, 0.25, 0.2, 0.1]),
        (1.0, 0.6, 5, [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0]),
        (1.0, 1.0, 3, [0, 0.4 / 0.85, 0.25 / 0.85, 0.2 / 0.85, 0]),
        # Top-p counts what top-k leaves: 0.4 / 0.65 is over 0.6 alone.
        (1.0, 0.6, 2, [0, 1, 0, 0, 0]),
        (0.5, 1.0, 2, [0, 0.16 / 0.2225, 0.0625 / 0.2225, 0, 0]),
        (0.0, 1.0, 5, [0, 1, 0, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(
    temperature: float, top_p: float, top_k: int, expected: list[float]
) -> None:
    n = 20_000
    logits = np.tile(LOGITS, (n, 1))
    limits = jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k)
    drawn = choose(logits, Sampling(*limits, None), jax.random.key(0))
    shares = np.bincount(drawn, minlength=5) / n
    np.testing.assert_allclose(shares, expected, atol=0.015)
    assert all(share == 0 for share, p in zip(shares, expected, strict=True) if p == 0)


def test_a_row_ends_at_eos(tiny_model: Any) -> None:
    free = generated(tiny_model)
    eos = [int(free[0, 2]), int(free[1, 4])]
    got = generated(tiny_model, eos_token_id=eos, pad_token_id=60)
    for row, want in zip(got, free, strict=True):
        ends = np.flatnonzero(np.isin(want, eos))
        stop = ends[0] + 1 if len(ends) else 8
        np.testing.assert_array_equal(row[:stop], want[:stop])
        assert (row[stop:] == 60).all()


@pytest.mark.slow
def test_a_row_ends_where_generation_config_says(tiny_model: Any) -> None:
    """No other default of the file counts."""
    model, params = tiny_model
    ids = tiny.tokens(2, 1, 6)
    want = tiny.greedy_loop(model, params, ids[0], 8)
    end = int(want[2])
    assert end not in want[:2]
    fields = {"eos_token_id": [end], "do_sample": True, "temperature": 1.7, "pad_token_id": 60}
    config = dataclasses.replace(model.config, generation=Generation(json.dumps(fields)))
    options: dict[str, Any] = {"max_new_tokens": 8}
    got = generate(model.clone(config=config), params, ids, **options)
    assert got[0].tolist() == [*want[:3], *[end] * 5]
    own = generate(model.clone(config=config), params, ids, eos_token_id=(), **options)
    np.testing.assert_array_equal(own, [want])


def test_it_stops_when_all_rows_have_ended(tiny_model: Any, counted: Any) -> None:
    """Counts the forward passes that run, not those that are traced."""
    free = generated(tiny_model)

    def passes(eos: list[int]) -> int:
        jax.effects_barrier()
        RAN.clear()
        generated(tiny_model, eos_token_id=eos, apply=counted)
        jax.effects_barrier()
        return len(RAN)

    # Two tokens by which all rows end, as early as any two do.
    ends = {
        pair: [np.flatnonzero(np.isin(row, pair)) for row in free]
        for pair in itertools.combinations(np.unique(free).tolist(), 2)
    }
    last, eos = min(
        (max(int(at[0]) for at in rows), pair)
        for pair, rows in ends.items()
        if all(at.size for at in rows)
    )
    assert last < 7
    assert passes(list(eos)) == last + 1
    assert passes(list(EOS)) == 8, "the control"


@pytest.mark.slow
@over("case", ["llama3", "gpt2", "qwen3.5", "gpt-oss"], often=["llama3"])
def test_it_runs_where_64_bits_are_enabled(case: str) -> None:
    """The tokens are those of the loop, which runs without a cache and with 32 bits."""
    model, params = tiny_encoders.model("gpt2") if case == "gpt2" else tiny.decoder(case)
    ids = tiny.tokens(2, 1, 6)
    want = tiny.greedy_loop(model, params, ids[0], 8)
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": EOS}
    with jax.enable_x64(True):
        streamed = np.stack(list(stream(model, params, ids, **options)), axis=1)
        drawn = sample(model, params, ids, n=2, temperature=0, key=jax.random.key(0), **options)
        traced = jax.eval_shape(lambda tree: generate(model, tree, ids, **options), params)
    assert (traced.shape, traced.dtype) == ((1, 8), np.int32)
    for got in (streamed, *np.split(np.asarray(drawn.tokens), 2)):
        np.testing.assert_array_equal(got, [want])


def test_refusals(tiny_model: Any) -> None:
    model, params = tiny_model
    ids = tiny.tokens(0, 1, 3)
    with pytest.raises(ValueError, match="needs a PRNG key"):
        generate(model, params, ids, max_new_tokens=2, temperature=1.0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, params, ids, max_new_tokens=0)


@over(
    ("case", "attention"),
    [
        ("gemma3 with every option", Blockwise(block=3, spans=2)),
        ("phi3 with a long context", "dense"),
        ("qwen3.5", "dense"),
        ("qwen3-next", "dense"),
        ("gpt2", "dense"),
    ],
    often=[],
    called=lambda case: f"{case[0]}, {case[1] if case[1] == 'dense' else 'by blocks'}",
)
def test_prompts_that_share_their_beginning(case: str, attention: Any) -> None:
    """As if each had it: held once, beside prompts of several lengths."""
    model, params = tiny_encoders.model("gpt2") if case == "gpt2" else tiny.decoder(case)
    model = model.clone(attention=attention)
    shared, rest, lengths = tiny.tokens(5, 1, 9)[0], tiny.tokens(6, 3, 4), np.array([4, 1, 3])
    mask = (np.arange(4) >= 4 - lengths[:, None]).astype(np.int32)

    def after(shared: np.ndarray) -> np.ndarray:
        before = share(model, params, shared, more_tokens=4 + 5 - 1)
        return np.asarray(generate(model, params, rest, mask, max_new_tokens=5, shared=before))

    got = after(shared)
    for row, n, new in zip(rest, lengths, got, strict=True):
        whole = np.concatenate([shared, row[4 - n :]])
        want = tiny.greedy_loop(model, params, whole, 9 - n)[:5]  # over 18 slots for each
        np.testing.assert_array_equal(new, want)
    assert not np.array_equal(after(shared[::-1]), got)


@pytest.mark.slow
def test_what_is_shared_is_held_once(tiny_model: Any) -> None:
    """A shared token takes a row less than its keys and values; one of the row's own, those."""
    model, params = tiny_model
    config = model.config
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4

    def of_one(shared: int, own: int) -> float:
        before = jax.eval_shape(lambda: share(model, params, np.zeros(shared, np.int32)))
        ids = jax.ShapeDtypeStruct((24, own), jnp.int32)
        run = functools.partial(generate, model, max_new_tokens=3)
        lowered = jax.jit(lambda p, ids, s: run(p, ids, shared=s)).lower(params, ids, before)
        bytes = lowered.compile().memory_analysis().temp_size_in_bytes
        return bytes / 24 / max(shared, own)

    shared, own = of_one(512, 1), of_one(1, 512)
    print(shared, own, of_a_token)
    assert shared < 0.5 * of_a_token
    assert own > of_a_token, "the control"


@pytest.mark.parametrize("ids", [[], [[1, 2]]])
def test_nothing_to_share(tiny_model: Any, ids: list[Any]) -> None:
    with pytest.raises(ValueError, match="Pass one list of at least one token id"):
        share(*tiny_model, np.asarray(ids, np.int32))
