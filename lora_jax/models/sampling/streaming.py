"""Text generation as a stream: yields the tokens of `generate` as they are chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Unpack, cast

import jax
import numpy as np

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.cache import Cache, Shared
from lora_jax.models.sampling.choice import SamplingKeywords
from lora_jax.models.sampling.loop import (
    Decoding,
    DecodingState,
    choose_next_tokens,
    decode,
    make_decoding,
    prefill,
    run_prompts,
    run_tokens,
)
from lora_jax.models.sampling.prompts import Inputs, make_prompts, params_by_prompt

Allow = Callable[[np.ndarray | None], np.ndarray]


def stream(
    model: Model,
    params: Tree,
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None = None,
    *,
    max_new_tokens: int,
    tokens_per_call: int = 1,
    cache_len: int | None = None,
    apply: Forward | None = None,
    shared: Shared | None = None,
    inputs: Inputs | None = None,
    allow: Allow | None = None,
    **choosing: Unpack[SamplingKeywords],
) -> Iterator[np.ndarray]:
    """Continues each prompt, and yields the tokens as they are chosen.

    They are those of ``generate`` with the same arguments. Two functions are compiled: one for the
    prompts, per shape and ``cache_len``, and one for `tokens_per_call` tokens of the answers, per
    number of rows and ``cache_len``. The latter writes to the cache in place.

    Args:
      model, params, input_ids, attention_mask, apply, shared, inputs: see ``generate``.
      max_new_tokens: the number of tokens to add at most. It is not compiled in where ``cache_len``
        is given.
      tokens_per_call: the tokens that are decoded between two looks at them. More of them cost
        fewer calls.
      cache_len: the slots of the cache; by default those that are needed, seq + max_new_tokens - 1.
      allow: says which tokens may come next: is called before each token with the newest ones,
        [batch] int32 (None before the first), while the device computes the next logits; returns
        masks, [batch, words] uint32, by ``pack_mask``. One token a call is decoded then.
      **choosing: eos_token_id, pad_token_id, temperature, top_p, top_k and key; see ``generate``.

    Yields:
      [batch], int32: the next token of each row, EOS included, then padding; until all rows have
      ended.

    Raises:
      ValueError: see ``generate``; or cache_len is too small, or tokens_per_call below 1.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> tokens = [int(new[0]) for new in models.stream(model, params, ids, max_new_tokens=4)]
    >>> tokens == models.generate(model, params, ids, max_new_tokens=4)[0].tolist()
    True
    """
    prompts = make_prompts(input_ids, attention_mask, shared, inputs)
    decoding = make_decoding(model, len(prompts.ids), max_new_tokens=max_new_tokens, **choosing)
    n_slots = prompts.ids.shape[1] + max_new_tokens - 1  # the last token is never fed
    if cache_len is None:
        cache_len = n_slots
    if cache_len < n_slots:
        raise ValueError(
            f"cache_len is {cache_len}, but prompt and answer need {n_slots} slots. Pass a "
            f"cache_len of at least {n_slots}."
        )
    if tokens_per_call < 1:
        raise ValueError(f"tokens_per_call is {tokens_per_call}. Pass a number of at least 1.")
    static: dict[str, Any] = {"model": model, "apply": apply}
    prompt_params, answer_params = params_by_prompt(apply, params, prompts)
    if allow is not None:
        state, logits = _begin_logits(
            prompt_params, prompts, decoding, cache_len=cache_len, n=1, **static
        )
        options = _StreamOptions(decoding, prompts.shared, max_new_tokens)
        return _allowed_steps(answer_params, state, logits, options, allow, **static)

    def steps() -> Iterator[np.ndarray]:
        """Yields the tokens of each step, decoding several per call."""
        n_yielded = 0
        n = min(tokens_per_call, max_new_tokens)
        state = _begin(prompt_params, prompts, decoding, cache_len=cache_len, n=n, **static)
        while True:
            step, tokens, done = jax.device_get((state.step, state.tokens, state.done))
            for i in range(n_yielded, step):
                yield tokens[:, i % n]
            n_yielded = int(step)
            if n_yielded == max_new_tokens or done.all():
                return
            until = np.int32(min(n_yielded + n, max_new_tokens))
            state = _decode_more(
                answer_params,
                state.cache,
                state._replace(cache=None),
                decoding,
                until,
                shared,
                **static,
            )

    return steps()


class _StreamOptions(NamedTuple):
    """The arguments of ``stream`` that do not change between tokens."""

    decoding: Decoding
    shared: Shared | None
    max_new_tokens: int


def _allowed_steps(
    params: Tree,
    state: DecodingState,
    logits: jax.Array,
    options: _StreamOptions,
    allow: Allow,
    **static: Any,
) -> Iterator[np.ndarray]:
    """Yields the tokens of ``stream``, restricted to those that `allow` allows."""
    tokens = None
    no_cache = cast(Cache, None)
    for i in range(options.max_new_tokens):
        cache = state.cache
        masks = allow(tokens)  # while the device computes
        state = _append_allowed(state._replace(cache=no_cache), logits, options.decoding, masks)
        tokens, done = jax.device_get((state.last, state.done))
        yield tokens
        if done.all() or i + 1 == options.max_new_tokens:
            return
        cache, logits = _run_tokens(params, cache, state, options.shared, **static)
        state = state._replace(cache=cache)


_append_allowed = jax.jit(choose_next_tokens)


@functools.partial(jax.jit, static_argnames=("model", "apply", "cache_len", "n"))
def _begin_logits(*args: Any, **static: Any) -> tuple[DecodingState, jax.Array]:
    state, logits = run_prompts(*args, **static)
    return state._replace(cache=state.cache._replace(shared=None)), logits


@functools.partial(jax.jit, static_argnames=("model", "apply"), donate_argnames="cache")
def _run_tokens(
    params: Tree,
    cache: Cache,
    state: DecodingState,
    shared: Shared | None,
    *,
    model: Model,
    apply: Forward | None,
) -> tuple[Cache, jax.Array]:
    """Runs the newest token of each row; ``state`` is passed without its cache."""
    run: Any = model.apply if apply is None else apply
    state = state._replace(cache=cache._replace(shared=shared))
    state, logits = run_tokens(run, params, state)
    return state.cache._replace(shared=None), logits


# `shared` stays out of the state, which is donated: its arrays are the caller's.
@functools.partial(jax.jit, static_argnames=("model", "apply", "cache_len", "n"))
def _begin(*args: Any, **static: Any) -> DecodingState:
    state = prefill(*args, **static)
    return state._replace(cache=state.cache._replace(shared=None))


@functools.partial(jax.jit, static_argnames=("model", "apply"), donate_argnames="cache")
def _decode_more(
    params: Tree,
    cache: Cache,
    state: DecodingState,
    decoding: Decoding,
    until: jax.Array,
    shared: Shared | None,
    **static: Any,
) -> DecodingState:
    """Decodes up to ``until`` tokens; ``state`` is passed without its cache."""
    state = state._replace(cache=cache._replace(shared=shared))
    state = decode(params, state, decoding, until, **static)
    return state._replace(cache=state.cache._replace(shared=None))
