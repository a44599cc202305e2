"""Embeds an encoder's tokens, and pools its hidden states to one embedding of a text."""

import jax
import jax.numpy as jnp

from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.layers.attention import wide_dtype
from lora_jax.models.layers.blocks import ModelPart, embed, layer_norm
from lora_jax.models.layers.noise import EmbeddingNoise, add_noise


class Embeddings(ModelPart):
    """LayerNorm(word + token type + position)."""

    config: EncoderConfig

    def setup(self) -> None:
        self.word_embeddings = embed(self, self.config.vocab_size)
        self.token_type_embeddings = embed(self, self.config.type_vocab_size)
        self.position_embeddings = embed(self, self.config.max_position_embeddings)
        self.LayerNorm = layer_norm(self)

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array,
        positions: jax.Array,
        embedding_noise: EmbeddingNoise | None,
    ) -> jax.Array:
        x = add_noise(self.word_embeddings(input_ids), embedding_noise)
        x = x + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(x + self.position_embeddings(positions))


def default_positions(input_ids: jax.Array, config: EncoderConfig) -> jax.Array:
    """Returns the rows of the table of positions, [batch, seq] int32; see ``Encoder.__call__``."""
    if not config.family.after_padding or config.pad_token_id is None:
        count = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        return jnp.broadcast_to(count, input_ids.shape)
    real = (input_ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + config.pad_token_id


def pool(hidden: jax.Array, attention_mask: jax.Array | None, config: EncoderConfig) -> jax.Array:
    """Pools hidden states as sentence-transformers does: [batch, d_model], at least fp32."""
    hidden = hidden.astype(wide_dtype(hidden.dtype))
    if config.pooling == "cls":
        out = hidden[:, 0]
    elif attention_mask is None:
        out = jnp.mean(hidden, axis=1)
    else:
        weights = attention_mask.astype(bool).astype(hidden.dtype)[..., None]
        out = jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
    if config.normalize:
        squares = jnp.sum(out * out, axis=-1, keepdims=True)
        out = out * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
    return out
