"""The common part of the nodes of an adapted tree."""

import math
from collections.abc import Mapping
from typing import Self

import jax.numpy as jnp

from lora_jax.core.base import NoArray
from lora_jax.core.types import BaseLike, Leaf, Parts


class TreeNode(NoArray):
    """A node of an adapted tree: its trained arrays by name, and W's shape and dtype."""

    how_to_use = (
        "is a node of an adapted tree, not an array. Call the function that uses it through "
        "lora_jax.adapt: forward = adapt(fn); forward(params, …). To get plain arrays, use "
        "lora_jax.merge(params)"
    )
    base: BaseLike
    n_frozen = 0  # the adapter's parameters that do not train; W is not among them
    is_factored = False  # whether functions run on it as W with factors, rather than on one array

    def part_names(self) -> tuple[str, ...]:
        """Returns the names of the arrays that train, also of those that this half lacks."""
        return ("value",)

    def parts(self) -> Parts:
        """Returns the arrays that train, by name; none in the base half of a tree."""
        arrays = {name: getattr(self, name) for name in self.part_names()}
        return {name: array for name, array in arrays.items() if array is not None}

    def part_shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of an array that trains; None where this half does not tell."""
        return getattr(getattr(self, name), "shape", None)

    def with_parts(self, parts: Mapping[str, Leaf]) -> Self:
        """Returns the inverse of `parts`; with an empty mapping, the node of the base half."""
        return self.replace(**{name: parts.get(name) for name in self.part_names()})

    @property
    def is_on(self) -> bool:
        """True where what trains is here; False in the base half, which stands for W alone."""
        return all(getattr(self, name) is not None for name in self.part_names())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        return len(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of W."""
        dtype: jnp.dtype = self.base.dtype
        return dtype

    @property
    def n_trainable(self) -> int:
        """The number of trained parameters, padding not counted."""
        return sum(math.prod(part.shape) for part in self.parts().values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={getattr(self.base, 'shape', None)})"
