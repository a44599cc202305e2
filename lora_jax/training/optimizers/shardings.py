"""The sharding of an optimiser's state: each array is sharded like its parameter."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.core.types import Adapter, Shaped, Tree


def state_shardings(opt_state: optax.OptState, adapter: Adapter, whole: NamedSharding) -> Tree:
    """Returns the sharding of each array of an optimiser's state.

    An optimiser keeps its arrays in trees like the adapter's, so the last two keys of an array's
    path name the parameter. An array of the parameter's shape is sharded like it; one that lacks an
    axis of it (a row or a column of Adafactor's), like the axes that are left. All others, and rows
    where it is unclear which of two equal axes is gone, are replicated.

    Args:
      opt_state: the state's shapes.
      adapter: the parameters, or their shapes with shardings.
      whole: the sharding of a replicated array.
    """

    def of(keys: Any, array: Shaped) -> Sharding:
        path, name = (getattr(key, "key", "") for key in ("", "", *keys)[-2:])
        parameter = adapter.get(path, {}).get(name) if isinstance(path, str) else None
        return whole if parameter is None else _like(parameter, array.shape, whole)

    return jax.tree_util.tree_map_with_path(of, opt_state)


def _like(parameter: jax.Array, shape: tuple[int, ...], whole: NamedSharding) -> Sharding:
    where: Sharding = parameter.sharding
    if shape == parameter.shape:
        return where
    if not isinstance(where, NamedSharding):
        return whole
    axes = [*where.spec, *[None] * (parameter.ndim - len(where.spec))]
    found = {
        PartitionSpec(*axes[:axis], *axes[axis + 1 :])
        for axis in range(parameter.ndim)
        if parameter.shape[:axis] + parameter.shape[axis + 1 :] == shape
    }
    return NamedSharding(where.mesh, found.pop()) if len(found) == 1 else whole
