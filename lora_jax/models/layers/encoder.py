"""Parts of encoder layers: self-attention, two-layer MLPs, and stacks of layers."""

import jax
from flax import linen as nn

from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.blocks import ModelPart, activate, attend_heads, dense
from lora_jax.models.layers.masks import Mask
from lora_jax.models.layers.trunk import name_mlp_product, scan_layers


class SelfAttention(ModelPart):
    """Self-attention with heads of equal size.

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
        d_model = x.shape[-1]
        heads_shape = (*x.shape[:2], self.config.num_attention_heads, -1)
        qkv = []
        for name in self.inputs:
            features = dense(self, d_model, name=name, use_bias=self.use_bias)(x)
            qkv.append(self.placement.constrain(features.reshape(heads_shape), "heads"))
        q, k, v = qkv
        out = attend_heads(self, AttentionInputs(q=q, k=k, v=v, mask=mask))
        if self.output is None:
            return out
        return dense(self, d_model, name=self.output)(out)


class WrappedDense(ModelPart):
    """A dense layer that Hugging Face wraps in its own module; d_model wide by default."""

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
        cfg = self.config
        up_name, down_name = self.names
        features = name_mlp_product(dense(self, cfg.intermediate_size, name=up_name)(x), self.remat)
        features = activate(cfg.hidden_act, features)
        features = self.placement.constrain(features, "features")
        return dense(self, cfg.hidden_size, name=down_name)(features)


class LayerStack(ModelPart):
    """Scanned layers of one kind that share a mask.

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
