"""The parts of encoders' layers: self-attention, MLPs of two layers, and stacks of layers."""

import jax
from flax import linen as nn

from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blocks import ModelPart, activate, attend_heads, dense
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import multiplied, scan_layers


class SelfAttention(ModelPart):
    """Attention over heads of equal size.

    Attributes:
      inputs: the names of the layers of queries, keys and values.
      output: the name of the output layer; None without one.
      use_bias: whether the layers of queries, keys and values have a bias.
    """

    inputs: tuple[str, str, str] = ("query", "key", "value")
    output: str | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        width, heads = x.shape[-1], (*x.shape[:2], self.config.num_attention_heads, -1)
        q, k, v = (
            self.placement.constrain(
                dense(self, width, name=name, use_bias=self.use_bias)(x).reshape(heads), "heads"
            )
            for name in self.inputs
        )
        out = attend_heads(self, AttentionInputs(q, k, v, mask))
        return out if self.output is None else dense(self, width, name=self.output)(out)


class WrappedDense(ModelPart):
    """A layer that Hugging Face wraps in a module of its own; d_model wide by default."""

    features: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dense(self, self.features or self.config.hidden_size, name="dense")(x)


class TwoLayerMLP(ModelPart):
    """second(act(first(x))).

    Attributes:
      names: the names of the two layers.
    """

    names: tuple[str, str] = ("fc1", "fc2")

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, (first, second) = self.config, self.names
        inner = multiplied(dense(self, cfg.intermediate_size, name=first)(x), self.remat)
        inner = activate(cfg.hidden_act, inner)
        inner = self.placement.constrain(inner, "features")
        return dense(self, cfg.hidden_size, name=second)(inner)


class LayerStack(ModelPart):
    """Layers of one kind under the same mask, scanned.

    Attributes:
      layer: the scan's body, (x, mask) -> (x, None).
      stack: the name of the layers' parameters.
    """

    layer: type[nn.Module] = nn.Module
    stack: str = "layer"

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask) -> jax.Array:
        n_layers = self.config.num_hidden_layers
        layers = scan_layers(self.layer, self.remat, n_layers, nn.broadcast)
        x, _ = layers(*self.options, name=self.stack)(x, mask)
        return x
