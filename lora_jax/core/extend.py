"""JAX's names for those who extend it, which move from release to release: imported here alone.

Public JAX has no names for what walks over a jaxpr or adds a primitive. From 0.12 on, `ClosedJaxpr`
is another name of `Jaxpr`; what differs inside equations is read in `lora_jax.adapt.eqns`.
"""

from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Space",
    "Var",
    "ad",
    "batching",
    "jaxpr_as_fun",
    "mlir",
    "move_to_memory",
    "source_info_util",
    "varies_over",
]

Space: Any = jax.memory.Space


def move_to_memory(array: Any, space: Space) -> Any:
    """Returns an array in a memory space; the array itself if it is there already."""
    is_in_space = jax.typeof(array).memory_space == space
    return array if is_in_space else jax.device_put(array, space)


def varies_over(array: Any) -> frozenset[str]:
    """Returns the axes of the mesh over which an array's type in shard_map says that it differs."""
    array_type = jax.typeof(array)
    manual_axes = getattr(array_type, "manual_axis_type", None)
    if manual_axes is None:  # in older releases of JAX
        return frozenset(getattr(array_type, "vma", ()))
    return frozenset(manual_axes.varying)
