"""Self-attention of encoders, under Hugging Face's names, and a dense layer in its own module."""

import jax
from flax import linen as nn

from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blocks import ModelPart, attend_heads, dense
from lora_jax.models.layers.masks import Mask


class SelfAttention(ModelPart):
    """Attention over heads of equal size, without its output layer.

    Attributes:
      use_bias: whether the layers of queries, keys and values have a bias.
    """

    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (
            self.placement.constrain(
                dense(self, self.config.hidden_size, name=name, use_bias=self.use_bias)(x).reshape(
                    heads
                ),
                "heads",
            )
            for name in ("query", "key", "value")
        )
        return attend_heads(self, AttentionInputs(q, k, v, mask))


class Dense(ModelPart):
    """A layer that Hugging Face wraps in a module of its own; d_model wide by default."""

    features: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(self, self.features or self.config.hidden_size, name="dense")(x)
