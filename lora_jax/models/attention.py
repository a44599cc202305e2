"""Tells which implementation of attention a model's rows will run on."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models.layers.attend import Attend, AttentionChoice, choose_implementation
from lora_jax.models.layers.call import AttentionCall
from lora_jax.models.layers.masks import Split


def choose_attention(
    config: Any,
    seq: int,
    *,
    dtype: DTypeLike,
    attention: str | Attend = "auto",
    platform: str = "cpu",
    split: Split | None = None,
) -> AttentionChoice:
    """Returns the implementation that rows of a length will run on, without a cache, and why.

    >>> from lora_jax import models
    >>> from lora_jax.models.attention import choose_attention
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_positions": 4096}
    >>> config = models.read_config(fields)
    >>> print(choose_attention(config, 2048, dtype="float16", platform="tpu"))
    blockwise (splash: the kernel has no float16)

    Args:
      config: the configuration of a model of ``lora_jax.models``.
      seq: tokens per row.
      dtype: dtype of the computation.
      attention: the name that was asked for; see ``Decoder``.
      platform: the kind of device; see ``lora_jax.models.layers.placement.platform_of``.
      split: how the queries of a row are split over devices; None where they are not.

    Raises:
      ValueError: for an unknown name, or one that does not run on the platform.
    """
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    call = AttentionCall(
        queries=seq // (split.parts if split else 1),
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
        capped=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=getattr(config, "sinks", False),
        split=split,
    )
    return choose_implementation(attention, call, seq, platform)
