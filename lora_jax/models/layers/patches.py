"""The patches of images, and vectors in the places of a text's tokens."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.layers.blocks import ModelPart


class PatchProjection(ModelPart):
    """A convolution whose stride is its size: a product with each patch's pixels.

    Its kernel is [width, height, channels, d_model].

    Attributes:
      size: (height, width) of a patch in pixels.
    """

    size: tuple[int, int] = (16, 16)

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        cfg, (high, wide) = self.config, self.size
        shape = (wide, high, cfg.num_channels, cfg.hidden_size)
        normal = nn.initializers.normal(cfg.initializer_range)
        kernel = self.param("kernel", normal, shape, self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype)
        rows, columns = pixels.shape[2] // high, pixels.shape[3] // wide
        x = pixels[:, :, : rows * high, : columns * wide].astype(self.dtype)
        x = x.reshape(*x.shape[:2], rows, high, columns, wide)
        x = x.transpose(0, 2, 4, 5, 3, 1).reshape(x.shape[0], rows * columns, -1)
        return x @ kernel.reshape(-1, shape[-1]) + bias.astype(self.dtype)


def insert_vectors(x: jax.Array, at: jax.Array | None, vectors: jax.Array | None) -> jax.Array:
    """Returns embedded tokens with vectors in the place of some of them.

    Args:
      x: the embedded tokens, [batch, seq, d_model].
      at: where a row's next vector stands, [batch, seq] bool.
      vectors: the vectors of each row in their order, [batch, n, d_model]; None for none.
    """
    if at is None or vectors is None:
        return x
    order = jnp.maximum(jnp.cumsum(at, axis=1) - 1, 0)[..., None]
    found = jnp.take_along_axis(vectors.astype(x.dtype), order, axis=1, mode="fill")
    return jnp.where(at[..., None], found, x)
