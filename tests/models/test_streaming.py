"""Generation step by step: the tokens of `generate`, few compilations, and a cache in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import generate, init_cache, share, stream, streaming
from tests.models import tiny, tiny_encoders

SAMPLED = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "key": jax.random.key(5)}


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    return tiny.decoder("llama3")


def streamed(*args: Any, n: int = 8, **options: Any) -> np.ndarray:
    return np.stack(list(stream(*args, max_new_tokens=n, **options)), axis=1)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_it_is_generate_step_by_step(tiny_model: Any, options: dict[str, Any]) -> None:
    ids = tiny.tokens(2, 3, 6)
    mask = (np.arange(6) >= 6 - np.array([6, 2, 5])[:, None]).astype(np.int32)
    want = np.asarray(generate(*tiny_model, ids, mask, max_new_tokens=8, **options))
    assert len(np.unique(want)) > 4
    np.testing.assert_array_equal(streamed(*tiny_model, ids, mask, **options), want)
    parts = streamed(*tiny_model, ids, mask, tokens_per_call=3, **options)
    np.testing.assert_array_equal(parts, want)

    eos = [int(want[0, 2]), int(want[1, 4]), int(want[2, 3])]
    options = options | {"eos_token_id": eos, "pad_token_id": 60}
    ended = np.asarray(generate(*tiny_model, ids, mask, max_new_tokens=8, **options))
    parts = streamed(*tiny_model, ids, mask, tokens_per_call=3, **options)
    n = parts.shape[1]  # ends with the last row
    assert n < 8 and (ended[:, n:] == 60).all() and (ended[:, n - 1] != 60).any()
    np.testing.assert_array_equal(parts, ended[:, :n])


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
    run(1, n=6, **SAMPLED)
    assert len(traces) == 2
    np.testing.assert_array_equal(longer[:, :4], first)


def test_keys_and_values_that_are_shared_stay_the_callers() -> None:
    """The cache is given away from call to call; they are not."""
    model, params = tiny_encoders.model("gpt2")
    shared = share(model, params, tiny.tokens(5, 1, 9)[0])
    ids = tiny.tokens(6, 2, 4)
    want = generate(model, params, ids, max_new_tokens=5, shared=shared)
    for _ in range(2):
        np.testing.assert_array_equal(streamed(model, params, ids, n=5, shared=shared), want)


def test_the_cache_is_written_in_place(tiny_model: Any) -> None:
    model, params = tiny_model
    cache = init_cache(model.config, 2, 64, model.dtype)
    state = streaming.Loop(
        jnp.int32(1),
        jnp.zeros((2, 1), jnp.int32),
        *(jnp.zeros(2, kind) for kind in (jnp.int32, bool)),
        cache=None,
    )
    choice = streaming.arguments(
        model,
        jnp.zeros((2, 3), jnp.int32),
        None,
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=None,
        temperature=0.0,
        top_p=1.0,
        top_k=None,
        key=None,
    )[2]
    args = (params, cache, state, choice, jnp.int32(2), None)

    def aliased(function: Any) -> int:
        lowered = function.lower(*args, model=model, apply=None)
        return lowered.compile().memory_analysis().alias_size_in_bytes

    kept = jax.jit(streaming._more.__wrapped__, static_argnames=("model", "apply"))
    assert aliased(streaming._more) >= cache.key.nbytes + cache.value.nbytes
    assert aliased(kept) == 0, "the control"


def test_with_a_key_a_row_rows_do_not_depend_on_each_other(tiny_model: Any) -> None:
    ids, keys = tiny.tokens(2, 3, 6), jax.random.split(jax.random.key(1), 3)
    options = SAMPLED | {"key": keys}
    together = np.asarray(generate(*tiny_model, ids, max_new_tokens=6, **options))
    for row in range(3):
        options["key"] = keys[row]
        alone = generate(*tiny_model, ids[row : row + 1], max_new_tokens=6, **options)
        np.testing.assert_array_equal(alone[0], together[row])
    same = SAMPLED | {"key": jnp.stack([keys[0]] * 3)}
    repeated = np.asarray(generate(*tiny_model, ids[[0, 0, 0]], max_new_tokens=6, **same))
    assert (repeated == together[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_len": 9}, "cache_len is 9; prompt and answer need 10 slots"),
        ({"tokens_per_call": 0}, "at least 1, not 0"),
        ({"key": jax.random.split(jax.random.key(1), 2)}, r"\(2,\) keys for 1 rows"),
    ],
)
def test_refusals_come_before_the_first_step(
    tiny_model: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(*tiny_model, tiny.tokens(0, 1, 3), max_new_tokens=8, **options)
