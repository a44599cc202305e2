"""Samples several answers to each prompt, with the log-probabilities of their tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.sampling.choice import has_row_keys, row_keys
from lora_jax.models.sampling.loop import Decoding, decode, make_decoding, prefill
from lora_jax.models.sampling.prompts import Prompts, make_prompts, params_by_prompt


class Samples(NamedTuple):
    """Sampled completions; those of one prompt are adjacent rows.

    Attributes:
      tokens: [prompts * n, max_new_tokens] int32: the new tokens, EOS included, then padding.
      logps: fp32, as tokens: log p of each under softmax(logits / temperature) over the whole
        vocabulary, whatever top_p and top_k are; at temperature 1 where it is 0. 0 after the end.
      lengths: [prompts * n] int32: the number of tokens up to and with the first EOS.
      ended: [prompts * n] bool: whether there is an EOS.
      routing: [prompts * n, seq + max_new_tokens - 1, layers, k] int16: the experts of each token
        of the prompt, as it was padded, and of the answer, but its last; -1 at padding. None where
        nobody asks.
    """

    tokens: jax.Array
    logps: jax.Array
    lengths: jax.Array
    ended: jax.Array
    routing: jax.Array | None = None


def sample(
    model: Model,
    params: Tree,
    input_ids: jax.typing.ArrayLike,
    attention_mask: jax.typing.ArrayLike | None = None,
    *,
    n: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    key: jax.Array,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    apply: Forward | None = None,
    with_routing: bool = False,
) -> Samples:
    """Samples n answers to each prompt, which runs through the model only once.

    What is compiled, and what it runs, is as in ``generate``. On a mesh, call it under
    ``jax.set_mesh`` with parameters and prompts that lie there.

    Args:
      model, params, input_ids, attention_mask, max_new_tokens, apply: see ``generate``.
      n: the answers to each prompt: prompt i has the rows from i * n on.
      temperature, top_p, top_k, eos_token_id, pad_token_id: see ``generate``.
      key: one PRNG key, of which row i has ``jax.random.fold_in(key, i)``; or a key for each of
        the prompts * n rows. What a row draws depends on its own key alone.
      with_routing: return the experts of each token, of a mixture.

    Returns:
      The answers.

    Raises:
      ValueError: see ``generate``; or n < 1.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    >>> ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> drawn = models.sample(model, params, ids, n=3, max_new_tokens=4, key=jax.random.key(1))
    >>> drawn.tokens.shape
    (6, 4)
    """
    if n < 1:
        raise ValueError(f"n, the number of answers to each prompt, is {n}. Pass at least 1.")
    prompts = make_prompts(input_ids, attention_mask)
    decoding = make_decoding(
        model,
        len(prompts.ids) * n,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=key,
    )
    samples: Samples = _sample(
        params,
        prompts,
        decoding,
        model=model,
        apply=apply,
        n=n,
        max_new_tokens=max_new_tokens,
        with_routing=with_routing,
    )
    return samples


@functools.partial(
    jax.jit, static_argnames=("model", "apply", "n", "max_new_tokens", "with_routing")
)
def _sample(
    params: Tree,
    prompts: Prompts,
    decoding: Decoding,
    *,
    model: Model,
    apply: Forward | None,
    n: int,
    max_new_tokens: int,
    with_routing: bool,
) -> Samples:
    """Runs ``sample``, compiled."""
    static: dict[str, Any] = {"model": model, "apply": apply}
    batch, seq = prompts.ids.shape
    key = decoding.sampling.key
    if not has_row_keys(key):
        sampling = decoding.sampling._replace(key=row_keys(key, jnp.arange(batch * n)))
        decoding = decoding._replace(sampling=sampling)
    prompt_params, answer_params = params_by_prompt(apply, params, prompts, n)
    state = prefill(
        prompt_params,
        prompts,
        decoding,
        cache_len=seq + max_new_tokens - 1,  # the last token is never fed
        n=max_new_tokens,
        rows_each=n,
        with_logps=True,
        with_routing=with_routing,
        **static,
    )
    state = decode(answer_params, state, decoding, max_new_tokens, **static)
    eos_index = jnp.argmax(jnp.isin(state.tokens, decoding.eos), axis=1).astype(jnp.int32)
    lengths = jnp.where(state.done, eos_index + 1, max_new_tokens)
    assert state.logps is not None, "prefill was called with_logps"
    routing = state.cache.routing
    if routing is not None:
        slots = jnp.arange(routing.shape[2], dtype=jnp.int32)
        # A row that has ended feeds padding, whose experts do not count.
        has_token = (state.cache.positions >= 0) & (slots < (seq + lengths - 1)[:, None])
        routing = jnp.where(has_token[..., None, None], jnp.moveaxis(routing, 0, 2), -1)
    return Samples(
        tokens=state.tokens,
        logps=state.logps,
        lengths=lengths,
        ended=state.done,
        routing=routing,
    )
