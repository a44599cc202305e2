"""Attention by cuDNN, on NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.layers.attention import AttentionCall, AttentionInputs, Implementation
from lora_jax.models.layers.blockwise import ON_GPU, Blockwise

# Tokens of a row up to which cuDNN is given its mask as an array: 32 MiB a row, for all heads.
_MAX_TOKENS = 4096
_HALF_PRECISION = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Cudnn(Implementation):
    """Computes attention by cuDNN, on Hopper or later; see ``attend`` for the arguments.

    The mask is an array of [batch, 1, queries, keys], in the dtype of the queries: the square of
    the length, but not for each head. cuDNN computes its gradient as well, which earlier GPUs may
    refuse. Rows longer than 4,096 tokens, and other calls that cuDNN does not support (see
    ``refusal``), go block by block in plain JAX.

    Attributes:
      backend: "cudnn", or "xla" to compute the same call on any device, for tests.
      fallback: computes what cuDNN refuses.
    """

    backend: str = "cudnn"
    fallback: Blockwise = ON_GPU

    def refusal(self, call: AttentionCall) -> str | None:
        """Returns the reason why cuDNN cannot run a call; None if it can."""
        if call.cached:
            return "keys lie in a cache"
        if call.split:
            return "the queries of a row lie on several devices"
        if call.dtype not in _HALF_PRECISION:
            return f"cuDNN has no {jnp.dtype(call.dtype)}"
        if call.head_dim > 128 or call.head_dim % 8:
            return f"cuDNN's heads are multiples of 8 up to 128, not {call.head_dim}"
        if call.capped:
            return "cuDNN does not cap scores"
        if call.sinks:
            return "cuDNN has no sinks"
        if call.queries % 2:
            return "cuDNN needs an even number of tokens"
        if call.queries > _MAX_TOKENS:
            return f"the mask of more than {_MAX_TOKENS:,} tokens takes too much memory"
        return None

    def compute(self, inputs: AttentionInputs) -> jax.Array:
        """Computes attention by cuDNN, or by the fallback if cuDNN cannot run the call."""
        if self.refusal(inputs.call):
            return self.fallback(*inputs)
        _, k, v, mask, *_ = inputs
        # Padding sees itself, so that no row of the mask is empty.
        visible = mask.visible() | (mask.queries.slots[:, None] == mask.keys.slots)
        implementation: Any = self.backend
        return jax.nn.dot_product_attention(
            inputs.scaled_queries,
            k,
            v,
            mask=visible[:, None],
            is_causal=mask.causal,
            scale=1.0,
            implementation=implementation,
        )
