"""NEFTune: noise on the embeddings of a training batch (Jain et al., arXiv 2310.05914)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Forward, Tree
from lora_jax.models.layers.blocks import EmbeddingNoise

_KEY_NAME = "neftune"  # so that the noise is drawn with none of dropout's keys


def neftune(forward: Forward, alpha: float) -> Forward:
    """Returns an adapted forward function that adds noise if it gets a dropout key.

    Each element of a token's embedding gets a number between ± alpha / sqrt(L d): L counts the
    real tokens of its sequence, in a packed row those of its segment, and d is the model's width.
    Padding gets none: tokens whose ``attention_mask`` or else ``segment_ids`` is 0. (The paper's
    code counts L so, too; TRL's counts padding.) Evaluation has no dropout key, and so no noise.

    Args:
      forward: ``lora_jax.adapt(model.apply)`` of a model of ``lora_jax.models``.
      alpha: the noise's size; 5, 10 and 15 in the paper.

    Raises:
      ValueError: `alpha` is not a positive number.

    >>> from lora_jax import models
    >>> from lora_jax.training.neftune import neftune
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> params = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)])
    >>> forward = neftune(lj.adapt(model.apply), alpha=5.0)
    >>> calm = forward({"params": params}, ids)
    >>> noisy = forward({"params": params}, ids, dropout_key=jax.random.key(1))
    >>> bool((calm == noisy).any())
    False
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha={alpha!r} is no size of noise. Pass a positive number, such as 5.")

    def noisy(
        variables: Tree,
        ids: jax.Array,
        *args: Any,
        dropout_key: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Calls the function, with embedding noise if there is a dropout key."""
        # A call of another method has no tokens to embed.
        if dropout_key is not None and options.get("method") is None:
            mask = args[0] if args else options.get("attention_mask")
            lengths = _lengths_of_sequences(ids, mask, options.get("segment_ids"))
            bound = jnp.where(lengths > 0, alpha / jnp.sqrt(jnp.maximum(lengths, 1.0)), 0.0)
            noise = EmbeddingNoise(fold_in_path(dropout_key, _KEY_NAME), bound)
            options = {**options, "embedding_noise": noise}
        return forward(variables, ids, *args, dropout_key=dropout_key, **options)

    return noisy


def _lengths_of_sequences(
    ids: jax.Array, attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Returns the length of each token's sequence; 0 at padding.

    Args:
      ids: [batch, seq].
      attention_mask: [batch, seq], 0 at padding.
      segment_ids: [batch, seq], the sequence that a token is of, contiguous.

    Returns:
      [batch, seq] fp32.
    """
    is_token = jnp.ones(ids.shape, bool)
    for ids_or_mask in (segment_ids, attention_mask):
        if ids_or_mask is not None:
            is_token = is_token & (ids_or_mask != 0)
    ones = is_token.astype(jnp.float32)
    if segment_ids is None:
        return ones * jnp.sum(ones, axis=1, keepdims=True)
    is_new_segment = segment_ids[:, 1:] != segment_ids[:, :-1]
    is_start = jnp.concatenate([jnp.zeros_like(is_new_segment[:, :1]), is_new_segment], axis=1)
    segment_of_token = jnp.cumsum(is_start, axis=1, dtype=jnp.int32)
    sum_row = functools.partial(jax.ops.segment_sum, num_segments=ids.shape[1])
    lengths = jax.vmap(sum_row)(ones, segment_of_token)  # [batch, segments]
    return ones * jnp.take_along_axis(lengths, segment_of_token, axis=1)
