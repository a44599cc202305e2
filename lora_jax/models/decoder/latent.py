"""Attention from vectors that all heads share: MLA of DeepSeek-V2 (2024, section 2.1) and later.

Keys and values are expanded for every head, as in training: a cache holds them like any other
model's, [heads, tokens, head_dim], and values filled up with zeros to the size of keys.
"""

import jax
import jax.numpy as jnp

from lora_jax.models.decoder.blocks import RMSNorm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.rope import RopeAngles, rotate
from lora_jax.models.layers.blocks import ModelPart, dense
from lora_jax.models.layers.trunk import projected

_EPS = 1e-6  # of the vectors' norms, whatever the configuration says of the others


def project_latent(
    module: ModelPart, x: jax.Array, rope: RopeAngles
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, keys and values, [batch, seq, heads, head_dim] each, rotated.

    Args:
      module: the attention that has the projections, in its compact method.
      x: [batch, seq, d_model].
      rope: the rotation of its tokens.
    """
    cfg: DecoderConfig = module.config
    plain, heads = cfg.qk_nope_head_dim, cfg.num_attention_heads

    def product(x: jax.Array, name: str, size: int, *, use_bias: bool = False) -> jax.Array:
        return projected(dense(module, size, use_bias=use_bias, name=name)(x), module.remat)

    def split_heads(x: jax.Array) -> jax.Array:
        return module.placement.constrain(x.reshape(*x.shape[:2], heads, -1), "heads")

    def norm(x: jax.Array, name: str) -> jax.Array:
        return RMSNorm(_EPS, module.dtype, module.param_dtype, name=name)(x)

    def turn(x: jax.Array) -> jax.Array:
        return rotate(x, rope, neighbours=cfg.rope_interleave)

    if cfg.q_lora_rank is None:
        q = product(x, "q_proj", heads * cfg.head_dim)
    else:
        q = product(x, "q_a_proj", cfg.q_lora_rank, use_bias=cfg.qkv_bias)
        q = product(norm(q, "q_a_layernorm"), "q_b_proj", heads * cfg.head_dim)
    q_plain, q_turned = jnp.split(split_heads(q), [plain], axis=-1)
    size = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    joined = product(x, "kv_a_proj_with_mqa", size, use_bias=cfg.qkv_bias)
    shared, k_turned = jnp.split(joined, [cfg.kv_lora_rank], axis=-1)
    size = heads * (plain + cfg.v_head_dim)
    expanded = split_heads(product(norm(shared, "kv_a_layernorm"), "kv_b_proj", size))
    k_plain, v = jnp.split(expanded, [plain], axis=-1)
    k_turned = jnp.broadcast_to(
        turn(k_turned[:, :, None]), (*k_plain.shape[:-1], cfg.qk_rope_head_dim)
    )
    q = jnp.concatenate([q_plain, turn(q_turned)], axis=-1)
    k = jnp.concatenate([k_plain, k_turned], axis=-1)
    return q, k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, cfg.head_dim - cfg.v_head_dim)))


def take_values(module: ModelPart, out: jax.Array) -> jax.Array:
    """Returns attention's output without what fills values up: [batch, seq, heads * v_head_dim]."""
    cfg: DecoderConfig = module.config
    heads = out.reshape(*out.shape[:2], cfg.num_attention_heads, -1)[..., : cfg.v_head_dim]
    return module.placement.constrain(heads.reshape(*out.shape[:2], -1), "features")
