"""Makes the slots of a bank, and writes adapters into them."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.bank.slots import WeightSlots, empty_slots, map_slots, slots_of
from lora_jax.bank.stored import BankError, compile_variant
from lora_jax.core.aliases import flatten_with_aliases
from lora_jax.core.base import is_base
from lora_jax.core.types import Leaf, Parts, Tree
from lora_jax.core.weight import Trained, TrainedRows, map_leaves
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.rules import Rule


def add_slots(
    params: Tree,
    rules: Sequence[Rule],
    n_slots: int,
    *,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Tree:
    """Returns the base with empty slots in place of each leaf that the rules select.

    Args:
      params, rules, trace, kinds: as in `lora_jax.lorafy`.
      n_slots: the number of slots, the base's included.
    """
    shapes, trace = _abstract(params, trace)
    nodes = nodes_of(lorafy(shapes, rules, trace=trace, kinds=kinds))

    def slots_of_leaf(path: str, leaf: Leaf) -> Tree:
        """Returns the slots of a leaf, or the leaf if no rule selects it."""
        node = nodes.get(path)
        if node is None:
            return leaf
        if isinstance(node, TrainedRows):
            raise BankError(f"bank: a rule trains some rows of {path!r}, which a slot cannot hold.")
        if isinstance(node, Trained):
            return empty_slots(Trained(leaf), n_slots)
        slots = empty_slots(node.replace(base=leaf), n_slots)
        if node.extras and not node.is_compact and isinstance(slots, WeightSlots):
            compile_variant(node, slots)
        return slots

    return map_leaves(slots_of_leaf, params)


def _abstract(params: Tree, trace: Sequence[object] | None) -> tuple[Tree, Sequence[object] | None]:
    """Returns a tree of shapes, and the trace with the same shape objects in its arguments."""
    struct_of_leaf: dict[int, Leaf] = {}  # by the leaf's id
    for _, leaf in flatten_with_aliases(params, is_base)[0]:
        if hasattr(leaf, "shape"):
            struct_of_leaf[id(leaf)] = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf
            )

    def abstract(tree: Tree) -> Tree:
        treedef: jax.tree_util.PyTreeDef
        path_leaves, treedef = flatten_with_aliases(tree, is_base)
        return treedef.unflatten([struct_of_leaf.get(id(leaf), leaf) for _, leaf in path_leaves])

    shapes = abstract(params)
    if not isinstance(trace, Sequence) or not trace:
        return shapes, trace  # none, or one that lorafy refuses with a message
    return shapes, (trace[0], *abstract(tuple(trace[1:])))


def write(tree: Tree, arrays: Mapping[str, Parts], slot: int, values: Mapping[str, Parts]) -> Tree:
    """Returns a bank's tree with new values in one slot.

    Args:
      tree: the tree.
      arrays: its arrays by path and name; their memory is taken.
      slot: the slot.
      values: values of the slot by path and name, of the arrays' shapes less the slot axis.
    """
    axes = tuple((path, slots.slot_axis) for path, slots in slots_of(tree).items())
    placed_values: dict[str, Parts] = {}
    for path, axis in axes:
        placed_values[path] = {
            name: _place_on_mesh(value, arrays[path][name], axis)
            for name, value in values[path].items()
        }
    updated_arrays = _update_slot(dict(arrays), placed_values, np.int32(slot), axes)
    return map_slots(lambda path, slots: slots.replace(arrays=updated_arrays[path]), tree)


def _place_on_mesh(value: Leaf, array: jax.Array, axis: int) -> Leaf:
    """Returns a slot's value with the sharding of the slots' array, if that lies on a mesh."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return value
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    del spec[axis]
    return jax.device_put(value, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _update_slot(
    arrays: dict[str, Parts],
    values: dict[str, Parts],
    slot: jax.typing.ArrayLike,
    axes: tuple[tuple[str, int], ...],
) -> dict[str, Parts]:
    """Returns arrays, by path and name, with new values in one slot; updates in place."""
    updated: dict[str, Parts] = {}
    for path, axis in axes:
        updated[path] = {
            name: lax.dynamic_update_index_in_dim(
                array, values[path][name].astype(array.dtype), slot, axis
            )
            for name, array in arrays[path].items()
        }
    return updated
