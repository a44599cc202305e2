"""Makes the slots of a bank, and writes adapters into them."""

import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.bank.slots import WeightSlots, empty_slots, map_slots, slots_of
from lora_jax.bank.stored import BankError, compile_variant
from lora_jax.core.aliases import flatten
from lora_jax.core.base import is_base
from lora_jax.core.types import Leaf, Parts, Tree
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, map_leaves
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

    def slots(path: str, leaf: Leaf) -> Tree:
        node = nodes.get(path)
        if isinstance(node, TrainedRows):
            raise BankError(f"bank: a rule trains some rows of {path!r}, which no slot can hold")
        if isinstance(node, LoraWeight):
            empty = empty_slots(node.replace(base=leaf), n_slots)
            if node.extras and not node.is_compact and isinstance(empty, WeightSlots):
                compile_variant(node, empty)
            return empty
        return leaf if node is None else empty_slots(Trained(leaf), n_slots)

    return map_leaves(slots, params)


def _abstract(params: Tree, trace: Sequence[object] | None) -> tuple[Tree, Sequence[object] | None]:
    """Returns a tree's shapes, and a trace whose arguments hold the very same shapes."""
    twins: dict[int, Leaf] = {}
    for _, leaf in flatten(params, is_base)[0]:
        if hasattr(leaf, "shape"):
            twins[id(leaf)] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)

    def abstract(tree: Tree) -> Tree:
        treedef: jax.tree_util.PyTreeDef
        keyed, treedef = flatten(tree, is_base)
        return treedef.unflatten(twins.get(id(leaf), leaf) for _, leaf in keyed)

    known = isinstance(trace, Sequence) and bool(trace)  # of others, lorafy says what is wrong
    return abstract(params), (trace[0], *abstract(tuple(trace[1:]))) if known and trace else trace


def write(tree: Tree, arrays: Mapping[str, Parts], slot: int, values: Mapping[str, Parts]) -> Tree:
    """Returns a bank's tree with other values in a slot.

    Args:
      tree: the tree.
      arrays: its arrays by path and name; their memory is taken.
      slot: the slot.
      values: what goes into it: the arrays' shapes, less the slot axis.
    """
    axes = tuple((path, slots.slot_axis) for path, slots in slots_of(tree).items())
    placed = {
        path: {name: _beside(arrays[path][name], axis, x) for name, x in values[path].items()}
        for path, axis in axes
    }
    new = _written(dict(arrays), placed, np.int32(slot), axes)
    return map_slots(lambda path, slots: slots.replace(arrays=new[path]), tree)


def _beside(array: jax.Array, axis: int, value: Leaf) -> Leaf:
    """Returns a slot's value on the mesh as the slots are, if they are on one."""
    where = array.sharding
    if not isinstance(where, NamedSharding):
        return value
    spec = [*where.spec, *[None] * (array.ndim - len(where.spec))]
    del spec[axis]
    return jax.device_put(value, NamedSharding(where.mesh, PartitionSpec(*spec)))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _written(
    arrays: dict[str, Parts],
    values: dict[str, Parts],
    slot: jax.typing.ArrayLike,
    axes: tuple[tuple[str, int], ...],
) -> dict[str, Parts]:
    """Returns arrays, by path and name, with other values in a slot; in the arrays' own memory."""
    put = lax.dynamic_update_index_in_dim
    return {
        path: {
            name: put(array, values[path][name].astype(array.dtype), slot, axis)
            for name, array in arrays[path].items()
        }
        for path, axis in axes
    }
