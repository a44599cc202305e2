"""Linear layers' token mixer: the gated delta net of Qwen3-Next and Qwen3.5 (Yang et al. 2025)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lora_jax.models.decoder.blocks import RMSNorm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.blocks import ACTIVATION, ModelPart, dense
from lora_jax.models.layers.cache import Recurrent
from lora_jax.models.layers.delta import (
    RecurrentTokens,
    gated_delta_rule,
    normalise,
    short_convolution,
)


class GatedDeltaNet(ModelPart):
    """Mixes each token with earlier tokens through a state of fixed size."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: RecurrentTokens, memory: Recurrent | None
    ) -> tuple[jax.Array, Recurrent | None]:
        """Mixes each token with the earlier tokens of its segment.

        Args:
          x: [batch, seq, d_model].
          tokens: padding and segments.
          memory: the layer's memory of earlier tokens; None without a cache.

        Returns:
          [batch, seq, d_model], and the memory after these tokens; None without a cache.
        """
        cfg = self.config
        dtype = wide_dtype(self.dtype)
        key_heads, value_heads = cfg.linear_num_key_heads, cfg.linear_num_value_heads
        key_dim = cfg.linear_key_head_dim
        (_, channels), state_shape = cfg.recurrent_shapes

        def split_heads(x: jax.Array, n_heads: int) -> jax.Array:
            return self.placement.constrain(x.reshape(*x.shape[:2], n_heads, -1), "heads")

        init = nn.initializers.normal(cfg.initializer_range)
        taps_shape = (channels, 1, cfg.linear_conv_kernel_dim)
        taps = self.param("conv1d", init, taps_shape, self.param_dtype)
        log_rate = self.param("A_log", nn.initializers.zeros, (value_heads,), self.param_dtype)
        shift = self.param("dt_bias", nn.initializers.ones, (value_heads,), self.param_dtype)

        # A short convolution over the channels of q, k and v together.
        projections: dict[str, jax.Array] = {}
        for letters in cfg.linear_projections:
            projections |= zip(letters, self._project(x, letters), strict=True)
        qkv = jnp.concatenate([projections[letter] for letter in "qkv"], axis=-1)
        tail = None if memory is None else memory.tail.astype(dtype)
        qkv, new_tail = short_convolution(qkv.astype(dtype), taps.astype(dtype), tokens, tail)
        qkv = ACTIVATION[cfg.hidden_act](qkv)
        q, k, v = jnp.split(qkv, [key_heads * key_dim, 2 * key_heads * key_dim], axis=-1)
        q = normalise(split_heads(q, key_heads))
        k = normalise(split_heads(k, key_heads))
        # A head of keys serves neighbouring heads of values.
        q = jnp.repeat(q, value_heads // key_heads, axis=2)
        k = jnp.repeat(k, value_heads // key_heads, axis=2)

        # Each token's rate of writing and decay, [batch, seq, value_heads]; padding has neither.
        beta = nn.sigmoid(projections["b"].astype(dtype))
        time_step = nn.softplus(projections["a"].astype(dtype) + shift.astype(dtype))
        log_decay = -jnp.exp(log_rate.astype(dtype)) * time_step
        is_present = tokens.present[..., None]
        beta = jnp.where(is_present, beta, 0)
        log_decay = jnp.where(is_present, log_decay, 0)
        if memory is None:
            state = jnp.zeros((x.shape[0], *state_shape), dtype)
        else:
            state = memory.state.astype(dtype)
        out, state = gated_delta_rule(
            q=q * key_dim**-0.5,
            k=k,
            v=split_heads(v, value_heads),
            log_decay=log_decay,
            beta=beta,
            state=state,
            segments=tokens.segments,
        )
        # The output is normalised, gated by z, and projected back to d_model.
        out = RMSNorm(cfg.rms_norm_eps, self.dtype, self.param_dtype, name="norm")(out)
        out = out.astype(dtype) * nn.silu(split_heads(projections["z"], value_heads).astype(dtype))
        out = self.placement.constrain(out.reshape(*x.shape[:2], -1).astype(self.dtype), "features")
        out = dense(self, cfg.hidden_size, use_bias=False, name="out_proj")(out)
        if memory is None or new_tail is None:
            return out, None
        return out, Recurrent(new_tail.astype(memory.tail.dtype), state.astype(memory.state.dtype))

    def _project(self, x: jax.Array, letters: str) -> list[jax.Array]:
        """Returns the parts of a projection such as "qkv": [batch, seq, features] each."""
        cfg = self.config
        n_groups = cfg.linear_num_key_heads if cfg.linear_projections_joined else 1
        sizes = [cfg.linear_sizes[letter] for letter in letters]
        out = dense(self, sum(sizes), use_bias=False, name=f"in_proj_{letters}")(x)
        grouped = out.reshape(*x.shape[:2], n_groups, -1)
        results = jnp.split(grouped, np.cumsum(sizes[:-1]) // n_groups, axis=-1)
        return [result.reshape(*x.shape[:2], -1) for result in results]
