"""Text generation: prefill and a decoding loop with a key/value cache, in one compiled function."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.causal import CausalLM
from lora_jax.models.choosing import Sampling, choose, has_row_keys, log_probability
from lora_jax.models.layers.cache import Cache, Shared, init_cache

Inputs = Mapping[str, jax.typing.ArrayLike]


def generate(
    model: CausalLM,
    params: Tree,
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    apply: Forward | None = None,
    shared: Shared | None = None,
    inputs: Inputs | None = None,
) -> jax.Array:
    """Continues each prompt, greedily or by sampling.

    One function is compiled per prompt shape, ``max_new_tokens`` and number of EOS tokens. It runs
    other prompts, weights, temperatures, top_p, top_k and keys as well: they are its arguments,
    never constants in it. The loop ends once every row has ended.

    Args:
      model: gives the configuration, the cache's dtype, and ``model.apply`` by default.
      params: passed to ``apply({"params": params}, ...)``; any pytree.
      input_ids: [batch, seq], int. Pad on the left or on the right.
      attention_mask: [batch, seq], 0 at padding; None for no padding.
      max_new_tokens: the number of tokens to add at most.
      eos_token_id: the token or tokens that end a row; by default the configuration's.
      pad_token_id: the token after the end; by default the configuration's, else the first EOS,
        else 0.
      temperature: divides the logits before sampling; 0 takes the most likely token.
      top_p: sample from the fewest tokens whose probabilities add up to it (Holtzman et al. 2020).
      top_k: sample from that many tokens, before top_p.
      key: the PRNG key to sample with; needed where temperature is above 0. Or [batch] keys: then
        what a row draws does not depend on the rows beside it.
      apply: a function with ``model.apply``'s signature to run in its place, such as
        ``lora_jax.adapt(model.apply)``. Keep one and pass it again: each new function compiles.
      shared: tokens that come before each prompt, from ``share``: a system prompt, solved examples.
        Their keys and values are stored, and read, once for all rows.
      inputs: further inputs of the model beside the prompts: ``pixel_values`` of ``SmolVLM``.

    Returns:
      [batch, max_new_tokens], int32: the new tokens, EOS included, then padding.

    Raises:
      ValueError: for max_new_tokens < 1, or a temperature above 0 without a key.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> new = models.generate(model, params, ids, jnp.ones_like(ids), max_new_tokens=4)
    >>> new.shape
    (1, 4)
    """
    ids, mask, choice = arguments(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=key,
    )
    static: dict[str, Any] = {"model": model, "apply": apply, "max_new_tokens": max_new_tokens}
    tokens: jax.Array = _generate(params, ids, mask, choice, shared, inputs, **static)
    return tokens


def arguments(
    model: CausalLM,
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    key: jax.Array | None = None,
    rows_each: int = 1,
) -> tuple[jax.Array, jax.Array, Sampling]:
    """Returns ids, mask and choice as arrays, with the configuration's defaults; see ``generate``.

    ``rows_each`` is the number of answers to each prompt, each of which may have a key.

    Raises:
      ValueError: see ``generate``.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a key, such as jax.random.key(0)")
    config = model.config
    if eos_token_id is None:
        eos_token_id = config.eos_token_ids
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if pad_token_id is None:
        pad_token_id = config.pad_token_id
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    ids = jnp.asarray(input_ids, jnp.int32)
    mask = jnp.ones_like(ids, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
    rows = ids.shape[0] * rows_each
    if key is not None and has_row_keys(key) and key.shape != (rows,):
        raise ValueError(f"{key.shape} keys for {rows} rows: one key, or one a row")
    choice = Sampling(
        eos=jnp.asarray(eos, jnp.int32),
        pad=jnp.asarray(pad_token_id, jnp.int32),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_p=jnp.asarray(top_p, jnp.float32),
        top_k=jnp.asarray(config.vocab_size if top_k is None else top_k, jnp.int32),
        key=jax.random.key(0) if key is None else key,
    )
    return ids, mask, choice


def share(
    model: CausalLM,
    params: Tree,
    ids: jax.typing.ArrayLike,
    *,
    more_tokens: int = 0,
    apply: Forward | None = None,
) -> Shared:
    """Runs the tokens that many prompts begin with through the model, once.

    Args:
      model, params, apply: see ``generate``.
      ids: [n], int: the tokens, one at least.
      more_tokens: the number of tokens, of prompt and answer, that will follow in a row. It matters
        to RoPE of the kind "longrope" alone, which chooses its frequencies by the number of all.

    Returns:
      Keys and values, for ``generate(…, shared=…)``.

    Raises:
      ValueError: ids is empty, or does not have one axis; or the model has linear layers.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> params = model.init(jax.random.key(0), jnp.array([[1]]))["params"]
    >>> system = models.share(model, params, [5, 6, 7])
    >>> prompts = jnp.array([[1, 2], [3, 4]])
    >>> models.generate(model, params, prompts, max_new_tokens=4, shared=system).shape
    (2, 4)
    """
    tokens = jnp.asarray(ids, jnp.int32)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"ids has the shape {tokens.shape}: one axis of tokens is needed")
    if getattr(model.config, "linear_layers", ()):
        raise ValueError(
            f"a {model.config.model_type} model has linear layers, which have no keys and values "
            "to share: give generate whole prompts, without shared="
        )
    shared: Shared = _share(params, tokens, model=model, more_tokens=more_tokens, apply=apply)
    return shared


@functools.partial(jax.jit, static_argnames=("model", "more_tokens", "apply"))
def _share(
    params: Tree, ids: jax.Array, *, model: Model, more_tokens: int, apply: Forward | None
) -> Shared:
    run: Any = model.apply if apply is None else apply
    n = ids.shape[0]
    cache = init_cache(model.config, 1, n + more_tokens, model.dtype)
    no_logits = jnp.zeros((1, 1), jnp.int32)
    _, cache = run({"params": params}, ids[None], cache=cache, logits_at=no_logits)
    return Shared(cache.key[:, 0, :, :n], cache.value[:, 0, :, :n])


class DecodingState(NamedTuple):
    """The decoding loop's state.

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


# Static arguments are compared: equal models share what was compiled.
@functools.partial(jax.jit, static_argnames=("model", "apply", "max_new_tokens"))
def _generate(
    params: Tree,
    ids: jax.Array,
    mask: jax.Array,
    choice: Sampling,
    shared: Shared | None,
    inputs: Inputs | None = None,
    *,
    model: CausalLM,
    apply: Forward | None,
    max_new_tokens: int,
) -> jax.Array:
    static: dict[str, Any] = {"model": model, "apply": apply}
    cache_len = ids.shape[1] + max_new_tokens - 1  # the last token is never fed
    start = (params, ids, mask, choice, shared, inputs)
    state = prefill(*start, cache_len=cache_len, n=max_new_tokens, **static)
    return decode(params, state, choice, max_new_tokens, **static).tokens


def prefill(
    params: Tree,
    ids: jax.Array,
    mask: jax.Array,
    choice: Sampling,
    shared: Shared | None,
    inputs: Inputs | None = None,
    *,
    model: CausalLM,
    apply: Forward | None,
    cache_len: int,
    n: int,
    rows_each: int = 1,
    with_logps: bool = False,
) -> DecodingState:
    """Runs the prompts and chooses the first token of each answer.

    Args:
      params, shared, inputs, model, apply: see ``generate``.
      ids: [batch, seq] int32.
      mask: [batch, seq] bool.
      choice: how tokens are chosen.
      cache_len: the slots of the cache.
      n: the number of tokens that the state holds.
      rows_each: the answers to each prompt, side by side: batch * rows_each rows in the state.
      with_logps: whether the state has the tokens' log-probabilities.
    """
    run: Any = model.apply if apply is None else apply
    batch, seq = ids.shape
    cache = init_cache(model.config, batch, cache_len, model.dtype, shared=shared)
    last_real = seq - 1 - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    logits, cache = _forward(run, params, ids, mask, cache, last_real, inputs or {})
    rows = batch * rows_each
    if rows_each > 1:
        logits, cache = jnp.repeat(logits, rows_each, axis=0), cache.repeated(rows_each)
    start = DecodingState(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.broadcast_to(choice.pad, (rows, n)),
        last=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        cache=cache,
        logps=jnp.zeros((rows, n), jnp.float32) if with_logps else None,
    )
    return _written(start, choice, logits, cache)


def decode(
    params: Tree,
    state: DecodingState,
    choice: Sampling,
    until: jax.typing.ArrayLike,
    *,
    model: CausalLM,
    apply: Forward | None,
) -> DecodingState:
    """Decodes up to `until` tokens of each answer, or until all have ended."""
    run: Any = model.apply if apply is None else apply

    def unfinished(state: DecodingState) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def one(state: DecodingState) -> DecodingState:
        fed = ~state.done  # a row that has ended feeds padding
        here = jnp.zeros(state.last.shape, jnp.int32)
        found = _forward(run, params, state.last[:, None], fed[:, None], state.cache, here, {})
        return _written(state, choice, *found)

    return lax.while_loop(unfinished, one, state)


def _forward(
    run: Forward,
    params: Tree,
    ids: jax.Array,
    mask: jax.Array,
    old: Cache,
    at: jax.Array,
    inputs: Inputs,
) -> tuple[jax.Array, Cache]:
    """Returns the logits, [batch, vocab], of one token of each row, and the longer cache."""
    logits, new = run(
        {"params": params}, ids, attention_mask=mask, cache=old, logits_at=at[:, None], **inputs
    )
    return logits[:, 0], new


def _written(
    state: DecodingState, choice: Sampling, logits: jax.Array, cache: Cache
) -> DecodingState:
    """Chooses the next tokens, and writes them down."""
    fold = jax.random.fold_in
    if has_row_keys(choice.key):
        fold = jax.vmap(fold, (0, None))
    new = choose(logits, choice, fold(choice.key, state.step))
    new = jnp.where(state.done, choice.pad, new)
    column = state.step % state.tokens.shape[1]
    tokens = lax.dynamic_update_slice(state.tokens, new[:, None], (0, column))
    logps = state.logps
    if logps is not None:
        found = jnp.where(state.done, 0.0, log_probability(logits, new, choice.temperature))
        logps = lax.dynamic_update_slice(logps, found[:, None], (0, column))
    done = state.done | jnp.isin(new, choice.eos)
    return DecodingState(state.step + 1, tokens, new, done, cache, logps)
