"""A trained bias c on B, PEFT's ``lora_bias``: xW + s·((xA)B + c).

The shift of the products is s·c, and the part that trains is c.

A product with all in axes of W adds s·c once. `lora_jax.adapt` raises a MergeError where a function
multiplies by pieces of the in axes and sums the products: each product would add s·c. A kernel
whose pieces are gathered inside a `jax.shard_map` has all in axes again.
"""

import jax
import jax.numpy as jnp

from lora_jax.core.factored import Factored
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.variant import InPeft, Variant


def _zero_bias(node: LoraWeight) -> jax.Array:
    """Returns the initial value of c, zeros [batch…, out…]."""
    return jnp.zeros(node.shape_of("bias"), node.b.dtype)


def _with_shift(weight: Factored, node: LoraWeight, bias: jax.Array) -> Factored:
    """Returns the weight with the shift s·c."""
    scale = jnp.expand_dims(weight.scale, range(node.n_batch, bias.ndim)).astype(bias.dtype)
    return weight.replace(shift=scale * bias)


BIAS_ON_B = Variant(
    option="bias_on_b",
    name="a bias on B",
    help="Add a trained bias to B.",
    parts=(Part("bias", ("batch", "out"), _zero_bias, _with_shift, vector="shift"),),
    in_peft=InPeft("lora_bias", "lora_B.bias", fill=0.0),
    is_compared=False,
)
