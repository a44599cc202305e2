"""Names of types that have no class of their own."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

Tree: TypeAlias = Any  # a pytree: of parameters, plain or adapted, or of what belongs to them
Leaf: TypeAlias = Any  # of a tree of parameters: an array or its shape, a box, a base, a node
BaseLike: TypeAlias = Any  # W: an array, its shape, or a `lora_jax.core.base.Base`
Value: TypeAlias = Any  # in a jaxpr: an array, or a weight with its factors
Outputs = list[Value] | None  # what a rule makes of an equation; None to have its operands merged

Shaped = jax.Array | jax.ShapeDtypeStruct  # an array, or what it will be
Parts = dict[str, jax.Array]  # the arrays of one weight, by name
Adapter = dict[str, Parts]  # what trains, by path: the first half of `lora_jax.split`
Batch = Mapping[str, jax.Array]  # the arrays that a step or a loss sees, by name
Forward = Callable[..., Any]  # a function of a tree, such as a Flax module's `apply`
Fields = Mapping[str, Any]  # of a parsed JSON object: a config.json, a file's metadata
