"""The decoding loop for rows that start together: prompts, then one token per row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.hf.generation import end_token_ids
from lora_jax.models.layers.cache import Cache, init_cache
from lora_jax.models.sampling.adjust import mask_logits
from lora_jax.models.sampling.choice import (
    Sampling,
    choose_tokens,
    has_row_keys,
    log_probability,
    token_keys,
)
from lora_jax.models.sampling.prompts import Inputs, Prompts


class Decoding(NamedTuple):
    """The options of a decoding loop.

    Attributes:
      sampling: options of the sampler.
      eos: [n] int32, the tokens that end a row.
      pad: [] int32, the token after the end.
    """

    sampling: Sampling
    eos: jax.Array
    pad: jax.Array


class PromptKeywords(TypedDict, total=False):
    """The keyword arguments of ``run_prompts``."""

    model: Required[Model]
    apply: Required[Forward | None]
    cache_len: Required[int]
    n: Required[int]
    rows_each: int
    with_logps: bool
    with_routing: bool


class DecodingState(NamedTuple):
    """The state of a decoding loop.

    Attributes:
      step: [] int32, the number of tokens chosen.
      tokens: [batch, n] int32, the newest n; the one of step i is in column i % n.
      last: [batch] int32, each row's newest token.
      done: [batch] bool.
      cache: up to, and without, ``last``.
      logps: [batch, n] fp32, log p of each of ``tokens``, 0 after the end; None where nobody asks.
    """

    step: jax.Array
    tokens: jax.Array
    last: jax.Array
    done: jax.Array
    cache: Cache
    logps: jax.Array | None = None


def make_decoding(
    model: Model,
    rows: int,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
) -> Decoding:
    """Returns the options of ``generate`` as arrays, with defaults from the configuration.

    Args:
      model: see ``generate``, also for the options.
      rows: the number of answers, each of which may have a key.

    Raises:
      ValueError: see ``generate``.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}. Pass a number of at least 1.")
    if temperature > 0 and key is None:
        raise ValueError(
            "Sampling with a temperature above 0 needs a PRNG key. Pass key=jax.random.key(0), or "
            "temperature=0."
        )
    if key is not None and has_row_keys(key) and key.shape != (rows,):
        raise ValueError(
            f"key has the shape {key.shape}, but there are {rows} rows. Pass one key, or one for "
            "each row."
        )
    config = model.config
    if eos_token_id is None:
        eos_token_id = end_token_ids(config)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    sampling = Sampling(
        temperature=jnp.asarray(temperature, jnp.float32),
        top_p=jnp.asarray(top_p, jnp.float32),
        top_k=jnp.asarray(config.vocab_size if top_k is None else top_k, jnp.int32),
        key=jax.random.key(0) if key is None else key,
    )
    eos_ids, pad_id = jax.device_put((np.array(eos, np.int32), np.int32(pad_token_id)))
    return Decoding(sampling, eos_ids, pad_id)


def prefill(
    params: Tree, prompts: Prompts, decoding: Decoding, **static: Unpack[PromptKeywords]
) -> DecodingState:
    """Runs the prompts and chooses the first token of each answer.

    Args: see ``run_prompts``.
    """
    return choose_next_tokens(*run_prompts(params, prompts, decoding, **static), decoding)


def run_prompts(
    params: Tree,
    prompts: Prompts,
    decoding: Decoding,
    *,
    model: Model,
    apply: Forward | None,
    cache_len: int,
    n: int,
    rows_each: int = 1,
    with_logps: bool = False,
    with_routing: bool = False,
) -> tuple[DecodingState, jax.Array]:
    """Runs the prompts; returns the initial state, and the logits for the first tokens.

    Args:
      params, model, apply: see ``generate``.
      prompts, decoding: see ``make_prompts`` and ``make_decoding``.
      cache_len: the slots of the cache.
      n: the number of tokens that the state holds.
      rows_each: the answers to each prompt, side by side: batch * rows_each rows in the state.
      with_logps: whether the state has the tokens' log-probabilities.
      with_routing: whether its cache has the tokens' experts.
    """
    run: Any = model.apply if apply is None else apply
    batch, seq = prompts.ids.shape
    options: dict[str, Any] = {"with_routing": True} if with_routing else {}
    cache = init_cache(
        model.config, batch, cache_len, model.dtype, shared=prompts.shared, **options
    )
    last_token = seq - 1 - jnp.argmax(prompts.mask[:, ::-1], axis=1).astype(jnp.int32)
    logits, cache = next_logits(
        run,
        params,
        prompts.ids,
        cache,
        prompts.mask,
        logit_index=last_token,
        inputs=prompts.inputs,
    )
    rows = batch * rows_each
    if rows_each > 1:
        logits = jnp.repeat(logits, rows_each, axis=0)
        cache = cache.repeated(rows_each)
    state = DecodingState(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.broadcast_to(decoding.pad, (rows, n)),
        last=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        cache=cache,
        logps=jnp.zeros((rows, n), jnp.float32) if with_logps else None,
    )
    return state, logits


def decode(
    params: Tree,
    state: DecodingState,
    decoding: Decoding,
    until: jax.typing.ArrayLike,
    *,
    model: Model,
    apply: Forward | None,
) -> DecodingState:
    """Decodes up to `until` tokens of each answer, or until all have ended."""
    run: Any = model.apply if apply is None else apply

    def is_unfinished(state: DecodingState) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: DecodingState) -> DecodingState:
        # A row that has ended feeds padding.
        return choose_next_tokens(*run_tokens(run, params, state), decoding)

    return lax.while_loop(is_unfinished, step, state)


def run_tokens(run: Forward, params: Tree, state: DecodingState) -> tuple[DecodingState, jax.Array]:
    """Runs the newest token of each row; returns the state with updated cache, and the logits."""
    mask = ~state.done[:, None]
    logits, cache = next_logits(run, params, state.last[:, None], state.cache, mask)
    return state._replace(cache=cache), logits


def next_logits(
    run: Forward,
    params: Tree,
    ids: jax.Array | np.ndarray,
    cache: Cache,
    mask: jax.Array | None = None,
    *,
    logit_index: jax.Array | None = None,
    inputs: Inputs | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs the next tokens of each row, and returns the logits after them.

    Args:
      run: the model's ``apply``, or the function in its place.
      params: the parameters that ``run`` takes.
      ids: [rows, seq] int32.
      cache: the cache of the tokens before these.
      mask: [rows, seq] bool, False at padding; None without padding.
      logit_index: [rows] int32, the index of the token whose logits are returned; 0 by default.
      inputs: see ``generate``.

    Returns:
      The logits, [rows, vocab] fp32, and the cache with these tokens.
    """
    if logit_index is None:
        logit_index = jnp.zeros(len(ids), jnp.int32)
    logits, cache = run(
        {"params": params},
        ids,
        attention_mask=mask,
        cache=cache,
        logits_at=logit_index[:, None],
        **(inputs or {}),
    )
    return logits[:, 0], cache


def choose_next_tokens(
    state: DecodingState,
    logits: jax.Array,
    decoding: Decoding,
    allowed: jax.Array | np.ndarray | None = None,
) -> DecodingState:
    """Chooses the next tokens, and adds them to the state.

    Args:
      state: the answers so far.
      logits: [rows, vocab].
      decoding: the options.
      allowed: [rows, words] uint32, the tokens to choose from; by default all. See ``mask_logits``.
    """
    sampling = decoding.sampling
    masked_logits = logits if allowed is None else mask_logits(logits, allowed)
    tokens = choose_tokens(masked_logits, sampling, token_keys(sampling.key, state.step))
    tokens = jnp.where(state.done, decoding.pad, tokens)
    column = state.step % state.tokens.shape[1]
    logps = state.logps
    if logps is not None:
        token_logps = log_probability(logits, tokens, sampling.temperature)
        token_logps = jnp.where(state.done, 0.0, token_logps)
        logps = lax.dynamic_update_slice_in_dim(logps, token_logps[:, None], column, axis=1)
    return DecodingState(
        step=state.step + 1,
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, tokens[:, None], column, axis=1),
        last=tokens,
        done=state.done | jnp.isin(tokens, decoding.eos),
        cache=state.cache,
        logps=logps,
    )
