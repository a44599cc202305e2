"""Names of types that have no class of their own."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Tree: TypeAlias = Any  # a pytree: of parameters, plain or adapted, or of what belongs to them
Leaf: TypeAlias = Any  # a leaf of such a tree: an array or its shape, a box, a base, a node
BaseLike: TypeAlias = Any  # W: an array, its shape, or a `lora_jax.core.base.Base`
Value: TypeAlias = Any  # in a jaxpr: an array, or a weight with its factors
Tokenizer: TypeAlias = Any  # one of transformers', which is not imported with this package
Outcome = list[Value] | None  # a rule's results of an equation; None: merge the operands first

Shaped = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # an array, or the shape of one
Parts = dict[str, jax.Array]  # the arrays of one weight, by name
Adapter = dict[str, Parts]  # the arrays that train, by path: the first half of `lora_jax.split`
Batch = Mapping[str, jax.Array]  # the arrays that a step or a loss takes, by name
ArrayBatch = Mapping[str, jax.Array | np.ndarray]  # a batch on the host or on devices
EqnParams = dict[str, Any]  # the parameters of an equation of JAX
Forward = Callable[..., Any]  # a function of a tree, such as a Flax module's `apply`
Fields = Mapping[str, Any]  # a parsed JSON object: a config.json, a file's metadata
JsonObject = dict[str, Any]  # a JSON object while it is put together


class Model(Protocol):
    """A Flax module of a family, as `lora_jax.models.from_pretrained` returns it."""

    config: Any
    dtype: Any

    def apply(self, variables: Tree, /, *args: Any, **kwargs: Any) -> Any: ...

    def clone(self, **changes: Any) -> Any: ...
