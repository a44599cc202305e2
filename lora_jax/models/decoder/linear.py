"""A linear layer's mixer: the gated delta net of Qwen3-Next and Qwen3.5 (Yang et al. 2025)."""

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
    """Mixes each token with those before it through a state of fixed size."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, tokens: RecurrentTokens, before: Recurrent | None
    ) -> tuple[jax.Array, Recurrent | None]:
        """Mixes tokens.

        Args:
          x: [batch, seq, d_model].
          tokens: padding and segments.
          before: what the layer remembers of earlier tokens; None without a cache.

        Returns:
          [batch, seq, d_model], and what the layer remembers now; None without a cache.
        """
        cfg, dtype = self.config, wide_dtype(self.dtype)
        keys, values = cfg.linear_num_key_heads, cfg.linear_num_value_heads
        tail, state = cfg.recurrent_shapes
        act, init = ACTIVATION[cfg.hidden_act], nn.initializers.normal(cfg.initializer_range)
        width, group = cfg.linear_key_head_dim, values // keys

        def heads(x: jax.Array, n: int) -> jax.Array:
            return self.placement.constrain(x.reshape(*x.shape[:2], n, -1), "heads")

        shape = (tail[1], 1, cfg.linear_conv_kernel_dim)
        taps = self.param("conv1d", init, shape, self.param_dtype)
        rate = self.param("A_log", nn.initializers.zeros, (values,), self.param_dtype)
        shift = self.param("dt_bias", nn.initializers.ones, (values,), self.param_dtype)

        q, k, v, z, b, a = [
            part for name in cfg.linear_projections for part in self._project(x, name)
        ]
        mixed, new_tail = short_convolution(
            *(jnp.concatenate([q, k, v], axis=-1).astype(dtype), taps.astype(dtype), tokens),
            before and before.tail.astype(dtype),
        )
        q, k, v = jnp.split(act(mixed), [keys * width, 2 * keys * width], axis=-1)
        q, k = (normalise(heads(part, keys)) for part in (q, k))
        # A head of keys serves neighbouring heads of values.
        q, k = (jnp.repeat(part, group, axis=2) for part in (q, k))
        beta = nn.sigmoid(b.astype(dtype))
        softened = nn.softplus(a.astype(dtype) + shift.astype(dtype))
        log_decay = -jnp.exp(rate.astype(dtype)) * softened
        beta, log_decay = (jnp.where(tokens.present[..., None], x, 0) for x in (beta, log_decay))
        if before is None:
            start = jnp.zeros((x.shape[0], *state), dtype)
        else:
            start = before.state.astype(dtype)
        out, end = gated_delta_rule(
            *(q * width**-0.5, k, heads(v, values), log_decay, beta, start),
            tokens.segments,
        )
        out = RMSNorm(cfg.rms_norm_eps, self.dtype, self.param_dtype, name="norm")(out)
        out = out.astype(dtype) * nn.silu(heads(z, values).astype(dtype))
        out = self.placement.constrain(out.reshape(*x.shape[:2], -1).astype(self.dtype), "features")
        out = dense(self, cfg.hidden_size, use_bias=False, name="out_proj")(out)
        if before is None or new_tail is None:
            return out, None
        return out, Recurrent(new_tail.astype(before.tail.dtype), end.astype(before.state.dtype))

    def _project(self, x: jax.Array, name: str) -> list[jax.Array]:
        """Returns the parts of a projection, such as "qkv": [batch, seq, features] each."""
        cfg = self.config
        n = cfg.linear_num_key_heads if cfg.linear_projections_joined else 1
        sizes = [cfg.linear_sizes[part] for part in name]
        out = dense(self, sum(sizes), use_bias=False, name=f"in_proj_{name}")(x)
        parts = jnp.split(out.reshape(*x.shape[:2], n, -1), np.cumsum(sizes[:-1]) // n, axis=-1)
        return [part.reshape(*x.shape[:2], -1) for part in parts]
