"""Parts of a decoder layer: norms, and gated MLPs with optimization barriers around the activation.

XLA for TPUs fuses the operations before and after a product with it. With more operands at a time,
a product is cut into smaller parts, which take longer. By the estimate of a TPU v5e's compiler for
a step of Llama-3.1-8B (fsdp=16, 8,192 tokens a chip), the down projection [14336, 4096] takes 9.8
ms forward with the activation before it and the sums after it, 7.9 with the sums, and 4.8 alone;
the sum with the stream then takes 0.7. With 2,048 and 4,096 tokens a chip, that saves nothing, and
one barrier in front of the activation, in both passes, is best.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.blocks import ModelPart, activate, dense
from lora_jax.models.layers.trunk import apply_chunked, name_mlp_product

MIN_TOKENS_TO_ISOLATE_PRODUCT = 8192  # tokens on a device


@jax.custom_jvp
def put_barrier(x: jax.Array) -> jax.Array:
    """Returns x behind an optimization barrier; its gradient has no barrier."""
    settled: jax.Array = lax.optimization_barrier(x)
    return settled


@put_barrier.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return put_barrier(*primals), tangents[0]


@jax.custom_jvp
def put_barrier_on_gradient(x: jax.Array) -> jax.Array:
    """Returns x, and puts an optimization barrier behind its gradient."""
    return x


@put_barrier_on_gradient.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], lax.optimization_barrier(tangents[0])


class RMSNorm(nn.Module):
    """x / rms(x) * scale, normalised in fp32 (Zhang and Sennrich 2019).

    With ``multiplies_wide`` it also multiplies in fp32, before it rounds; with ``adds_one`` it does
    that by 1 + scale.
    """

    eps: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    adds_one: bool = False
    multiplies_wide: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.adds_one else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide_x = x.astype(wide_dtype(x.dtype))
        mean_square = jnp.mean(wide_x * wide_x, axis=-1, keepdims=True)
        normalised = wide_x * lax.rsqrt(mean_square + self.eps)
        if not (self.adds_one or self.multiplies_wide):
            return normalised.astype(self.dtype) * scale.astype(self.dtype)
        wide_scale = float(self.adds_one) + scale.astype(normalised.dtype)
        return (normalised * wide_scale).astype(self.dtype)


class MLP(ModelPart):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    config: DecoderConfig
    inner: int | None = None  # None for the configuration's intermediate_size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return apply_chunked(self, _apply_gated_mlp, x)


def _apply_gated_mlp(module: MLP, x: jax.Array) -> jax.Array:
    """Computes an ``MLP``, with barriers on TPUs; see this module."""
    cfg = module.config
    size = cfg.intermediate_size if module.inner is None else module.inner

    def project(x: jax.Array, name: str, features: int) -> jax.Array:
        return dense(module, features, use_bias=cfg.mlp_bias, name=name)(x)

    if cfg.fused_projections:
        fused = name_mlp_product(project(x, "gate_up_proj", 2 * size), module.remat)
        gate, up = jnp.split(fused, 2, axis=-1)
    else:
        gate = name_mlp_product(project(x, "gate_proj", size), module.remat)
        up = name_mlp_product(project(x, "up_proj", size), module.remat)
    # On a TPU, barriers keep XLA from fusing the activation with the products around it.
    is_on_tpu = module.placement.platform == "tpu"
    has_many_tokens = math.prod(x.shape[:-1]) >= (
        MIN_TOKENS_TO_ISOLATE_PRODUCT * module.placement.token_parts
    )
    isolates_product = is_on_tpu and has_many_tokens
    if isolates_product:
        gate = put_barrier_on_gradient(gate)
        up = put_barrier_on_gradient(up)
    elif is_on_tpu:
        gate, up = lax.optimization_barrier((gate, up))
    hidden = module.placement.constrain(activate(cfg.hidden_act, gate, up), "features")
    if isolates_product:
        hidden = put_barrier(hidden)
    out = project(hidden, "down_proj", cfg.hidden_size)
    return put_barrier(out) if isolates_product else out


def multiply(x: jax.Array, factor: float) -> jax.Array:
    """Returns x * factor in x's dtype, without rounding the factor to that dtype."""
    return x if factor == 1 else (x.astype(wide_dtype(x.dtype)) * factor).astype(x.dtype)


def rms_norm(module: ModelPart, name: str | None = None) -> RMSNorm:
    """Creates a norm with the dtypes and options of its parent module."""
    cfg: DecoderConfig = module.config
    return RMSNorm(
        eps=cfg.rms_norm_eps,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        adds_one=cfg.norm_adds_one,
        multiplies_wide=cfg.norm_multiplies_wide,
        name=name,
    )
