"""Names of JAX for extensions (jaxprs, primitives), which may move between releases of JAX.

Only this file imports these names. From 0.12 on, `ClosedJaxpr` is another name of `Jaxpr`. The
differences inside equations are handled in `lora_jax.adapt.eqns`.
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
    "varying_mesh_axes",
]

Space: Any = jax.memory.Space


def move_to_memory(array: Any, space: Space) -> Any:
    """Returns an array in a memory space, or the array itself if it is there already."""
    is_in_space = jax.typeof(array).memory_space == space
    return array if is_in_space else jax.device_put(array, space)


def varying_mesh_axes(array: Any) -> frozenset[str]:
    """Returns the mesh axes along which an array varies, by its type in shard_map."""
    array_type = jax.typeof(array)
    manual_axes = getattr(array_type, "manual_axis_type", None)
    if manual_axes is None:  # in older releases of JAX
        return frozenset(getattr(array_type, "vma", ()))
    return frozenset(manual_axes.varying)
