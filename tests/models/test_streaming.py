"""Generation step by step: the tokens of `generate`, few compilations, and a cache in place."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import generate, init_cache, share, stream
from lora_jax.models.sampling import choice, streaming
from tests.models import tiny, tiny_encoders

# The module's name is the function's, too.


@cache
def sampled() -> dict[str, Any]:
    return {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "key": jax.random.key(5)}


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return tiny.decoder("llama3")


NONE = (-1, -2, -3)  # no tokens: as many as rows end by below, so that all run the same programs


def streamed(*args: Any, n: int = 8, **options: Any) -> np.ndarray:
    return np.stack(list(stream(*args, max_new_tokens=n, **options)), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "drawing",
    [pytest.param(dict, id="greedy"), pytest.param(sampled, id="sampled")],
)
def test_it_is_generate_step_by_step(
    tiny_model: Any, drawing: Callable[[], dict[str, Any]]
) -> None:
    ids = tiny.tokens(2, 3, 6)
    mask = (np.arange(6) >= 6 - np.array([6, 2, 5])[:, None]).astype(np.int32)
    options = drawing() | {"eos_token_id": NONE, "pad_token_id": 60}
    want = np.asarray(generate(*tiny_model, ids, mask, max_new_tokens=8, **options))
    assert len(np.unique(want)) > 4
    parts = streamed(*tiny_model, ids, mask, tokens_per_call=3, **options)
    np.testing.assert_array_equal(parts, want)

    eos = [int(want[0, 2]), int(want[1, 4]), int(want[2, 3])]
    options["eos_token_id"] = eos
    ended = np.asarray(generate(*tiny_model, ids, mask, max_new_tokens=8, **options))
    parts = streamed(*tiny_model, ids, mask, tokens_per_call=3, **options)
    n = parts.shape[1]  # ends with the last row
    assert n < 8 and (ended[:, n:] == 60).all() and (ended[:, n - 1] != 60).any()
    np.testing.assert_array_equal(parts, ended[:, :n])


@pytest.mark.slow
def test_another_length_or_weights_compile_nothing(tiny_model: Any) -> None:
    model, params = tiny_model
    traces = []

    def apply(variables: Any, *args: Any, **kwargs: Any) -> Any:
        traces.append(1)
        return model.apply(variables, *args, **kwargs)

    def run(seed: int, **options: Any) -> np.ndarray:
        ids = tiny.tokens(seed, 2, 5)
        return streamed(model, params, ids, cache_len=16, apply=apply, **options)

    first = run(0, n=4)
    assert len(traces) == 2  # the prompt, and one step
    longer = run(0, n=9, tokens_per_call=1)
    run(1, n=6, **sampled())
    assert len(traces) == 2
    np.testing.assert_array_equal(longer[:, :4], first)


@pytest.mark.slow
def test_keys_and_values_that_are_shared_stay_the_callers() -> None:
    """The cache is given away from call to call; they are not."""
    model, params = tiny_encoders.model("gpt2")
    shared = share(model, params, tiny.tokens(5, 1, 9)[0])
    ids = tiny.tokens(6, 2, 4)
    first, again = (streamed(model, params, ids, n=5, shared=shared) for _ in range(2))
    whole = np.concatenate([tiny.tokens(5, 1, 9)[0], ids[0]])
    np.testing.assert_array_equal(first[0], tiny.greedy_loop(model, params, whole, 5))
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_the_cache_is_written_in_place(tiny_model: Any) -> None:
    model, params = tiny_model
    cache = init_cache(model.config, 2, 64, model.dtype)
    state = streaming.DecodingState(
        jnp.int32(1),
        jnp.zeros((2, 1), jnp.int32),
        *(jnp.zeros(2, kind) for kind in (jnp.int32, bool)),
        cache=None,
    )
    decoding = streaming.make_decoding(model, 2, max_new_tokens=4)
    args = (params, cache, state, decoding, jnp.int32(2), None)

    def aliased(function: Any) -> int:
        lowered = function.lower(*args, model=model, apply=None)
        return lowered.compile().memory_analysis().alias_size_in_bytes

    kept = jax.jit(streaming._decode_more.__wrapped__, static_argnames=("model", "apply"))
    assert aliased(streaming._decode_more) >= cache.key.nbytes + cache.value.nbytes
    assert aliased(kept) == 0, "the control"


@pytest.mark.slow
def test_with_a_key_a_row_rows_do_not_depend_on_each_other(tiny_model: Any) -> None:
    ids, keys = tiny.tokens(2, 3, 6), jax.random.split(jax.random.key(1), 3)

    def of(rows: list[int]) -> np.ndarray:
        options = sampled() | {"key": keys[np.array(rows)]}
        return np.asarray(generate(*tiny_model, ids[rows], max_new_tokens=6, **options))

    together = of([0, 1, 2])
    assert len(np.unique(together, axis=0)) == 3
    for rows in ([2, 0, 1], [0, 0, 0], [1, 2, 2]):
        np.testing.assert_array_equal(of(rows), together[rows])


def test_a_row_alone_draws_what_it_does_among_others() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 61)).astype(np.float32)
    limits = np.float32(1.3), np.float32(0.9), np.int32(40)
    sampling = choice.Sampling(*limits, None)
    keys, choose = jax.random.split(jax.random.key(1), 3), jax.jit(choice.choose_tokens)
    together = choose(logits, sampling, keys)
    alone = [choose(logits[i : i + 1], sampling, keys[i])[0] for i in range(3)]
    np.testing.assert_array_equal(alone, together)
    assert len(np.unique(alone)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_len": 9}, "cache_len is 9, but prompt and answer need 10 slots"),
        ({"tokens_per_call": 0}, "tokens_per_call is 0"),
        (
            {"key": lambda: jax.random.split(jax.random.key(1), 2)},
            r"shape \(2,\), but .* 1 rows",
        ),
    ],
)
def test_refusals_come_before_the_first_step(
    tiny_model: Any, options: dict[str, Any], message: str
) -> None:
    options = {name: made() if callable(made) else made for name, made in options.items()}
    with pytest.raises(ValueError, match=message):
        stream(*tiny_model, tiny.tokens(0, 1, 3), max_new_tokens=8, **options)
