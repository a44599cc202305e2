"""Text generation: prefill and a decoding loop with a key/value cache, in one compiled function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.cache import Shared, init_cache
from lora_jax.models.sampling.loop import Decoding, decode, make_decoding, prefill
from lora_jax.models.sampling.prompts import Inputs, Prompts, make_prompts, params_by_prompt


def generate(
    model: Model,
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
      eos_token_id: the token or tokens that end a row; by default those of config.json and of
        generation_config.json. No other default of generation_config.json counts.
        An empty sequence ends no row.
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
      inputs: further inputs of the model beside the prompts: ``pixel_values`` of ``SmolVLM``,
        with ``image_grids`` of ``QwenVL``.

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
    prompts = make_prompts(input_ids, attention_mask, shared, inputs)
    decoding = make_decoding(
        model,
        len(prompts.ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=key,
    )
    static: dict[str, Any] = {"model": model, "apply": apply, "max_new_tokens": max_new_tokens}
    tokens: jax.Array = _generate(params, prompts, decoding, **static)
    return tokens


def share(
    model: Model,
    params: Tree,
    ids: jax.typing.ArrayLike,
    *,
    more_tokens: int = 0,
    apply: Forward | None = None,
) -> Shared:
    """Runs a common prefix of many prompts through the model once.

    Args:
      model, params, apply: see ``generate``.
      ids: [n], int: the tokens, one at least.
      more_tokens: the number of tokens, of prompt and answer, that will follow in a row. It matters
        to RoPE of the kind "longrope" alone, which chooses its frequencies by the number of all.

    Returns:
      Keys and values, and the memory of linear layers, for ``generate(…, shared=…)``.

    Raises:
      ValueError: ids is empty, or does not have one axis.

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
        raise ValueError(
            f"ids has the shape {tokens.shape}. Pass one list of at least one token id."
        )
    shared: Shared = _share(params, tokens, model=model, more_tokens=more_tokens, apply=apply)
    return shared


@functools.partial(jax.jit, static_argnames=("model", "more_tokens", "apply"))
def _share(
    params: Tree, ids: jax.Array, *, model: Model, more_tokens: int, apply: Forward | None
) -> Shared:
    """Runs ``share``, compiled."""
    run: Any = model.apply if apply is None else apply
    n_tokens = ids.shape[0]
    cache = init_cache(model.config, 1, n_tokens + more_tokens, model.dtype)
    first_token = jnp.zeros((1, 1), jnp.int32)  # the fewest logits that a call can return
    _, cache = run({"params": params}, ids[None], cache=cache, logits_at=first_token)
    return Shared(
        key=cache.key[:, 0, :, :n_tokens],
        value=cache.value[:, 0, :, :n_tokens],
        recurrent=cache.recurrent,
    )


# Static arguments are compared: equal models share what was compiled.
@functools.partial(jax.jit, static_argnames=("model", "apply", "max_new_tokens"))
def _generate(
    params: Tree,
    prompts: Prompts,
    decoding: Decoding,
    *,
    model: Model,
    apply: Forward | None,
    max_new_tokens: int,
) -> jax.Array:
    """Runs ``generate``, compiled."""
    static: dict[str, Any] = {"model": model, "apply": apply}
    length = prompts.ids.shape[1] + max_new_tokens - 1  # the last token is never fed
    prompt_params, answer_params = params_by_prompt(apply, params, prompts)
    state = prefill(prompt_params, prompts, decoding, cache_len=length, n=max_new_tokens, **static)
    return decode(answer_params, state, decoding, max_new_tokens, **static).tokens
