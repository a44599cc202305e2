"""DoRA: rescales each column of W + s·AB to a trained magnitude.

DoRA (Liu et al., arXiv 2402.09353) is (W + s·AB)·diag(m / ‖W + s·AB‖), the norms held constant. The
gain of the products is the whole quotient, and the part that trains is m. `lora_jax.core.magnitude`
has the algebra.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import as_array, is_base, member
from lora_jax.core.extend import Space, move_to_memory
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import column_norms
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.variant import InPeft, Variant

_move_to_device = functools.partial(move_to_memory, space=Space.Device)


def _norms_of_columns(node: LoraWeight, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns ‖W + s·AB‖ of each column, [batch…, out…].

    If the base is a stack of codes, W is formed for one layer at a time.
    """
    node, a, b = jax.tree.map(_move_to_device, (node, a, b))  # from the host's memory
    is_stack_of_codes = is_base(node.base) and node.n_batch > 0
    if not is_stack_of_codes:
        return column_norms(as_array(node.base), a, b, node.scale, node.labels)
    stack_axis = node.labels.index("batch")
    layer_labels = (*node.labels[:stack_axis], *node.labels[stack_axis + 1 :])

    def layer_norms(layer: tuple[jax.Array, ...]) -> jax.Array:
        index, layer_a, layer_b, layer_scale = layer
        w = as_array(member(node.base, stack_axis, index))
        return column_norms(w, layer_a, layer_b, layer_scale, layer_labels)

    indices = jnp.arange(node.shape[stack_axis])
    norms: jax.Array = lax.map(layer_norms, (indices, a, b, node.scale))
    return norms


def _initial_magnitude(node: LoraWeight) -> jax.Array:
    """Returns the initial norms: ‖W‖ if A and B derive from W, else ‖W + s·AB‖."""
    a = node.a if node.start is None else jnp.zeros_like(node.a)
    return _norms_of_columns(node, a, node.b)


def _with_gain(weight: Factored, node: LoraWeight, magnitude: jax.Array) -> Factored:
    """Returns the weight with the gain m / ‖W + s·AB‖, and 1 in layers without an adapter."""
    norms = jax.lax.stop_gradient(_norms_of_columns(node, weight.a, weight.b))
    magnitude = _move_to_device(magnitude).astype(norms.dtype)
    return weight.replace(gain=node.where_adapted(magnitude / norms, 1))


DORA = Variant(
    option="dora",
    name="DoRA",
    help="Rescale each output column to a trained magnitude (DoRA).",
    parts=(Part("magnitude", ("batch", "out"), _initial_magnitude, _with_gain, vector="gain"),),
    not_with={"bias_on_b": "DoRA has no bias on B."},
    in_peft=InPeft("use_dora", "lora_magnitude_vector"),
)
