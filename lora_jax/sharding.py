"""Shardings of an adapted tree on a mesh: a table for the base, from which the adapter's derive.

A table has a line for each kind of leaf: a regular expression for its whole path, and a
PartitionSpec for its *last* axes, so that one line serves a layer and a stack of layers:

    table = [
        (r".*/(q|k|v|gate|up)_proj/kernel", P("fsdp", "tensor")),
        (r".*/(o|down)_proj/kernel", P("tensor", "fsdp")),
    ]
    params = lora_jax.sharding.place(params, table, mesh)

The first line that matches counts; a leaf without one is replicated. A is sharded like the in axes
of its kernel, B like the out axes, and the rank is replicated: each device then has the factors
for its part of W, and no product needs more of them.

Where activations are sharded along several axes (the batch and the sequence), trace the step under
``jax.set_mesh(mesh)``: products with the factors then do not flatten those axes into one, which
would move data between devices.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.core.aliases import flatten_with_aliases, restore_alias_form
from lora_jax.core.base import along
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained, is_node, map_leaves

Table = Sequence[tuple[str, PartitionSpec]]
_Entry = str | Sequence[str] | None  # the axes of the mesh that one axis of an array lies along
_Axes = tuple[_Entry, ...]  # an entry for each axis of an array: None, a name, or several


def shardings(params: Tree, table: Table, mesh: Mesh) -> Tree:
    """Returns the sharding of each array of a tree, in a tree of the same structure.

    An axis of the mesh whose size does not divide an axis of an array is left out there. If a spec
    has it at several axes, the first that it divides gets it.

    Args:
      params: a tree, adapted or plain; `jax.ShapeDtypeStruct` leaves will do.
      table: (regular expression for the whole path, spec of the last axes), the first match counts.
      mesh: its axes are those that the specs name.

    Raises:
      ValueError: a spec has an axis that the mesh lacks, or more axes than a leaf.

    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> table = [(".*/kernel", P(None, "tensor"))]
    >>> where = lj.sharding.shardings(tree, table, mesh)
    >>> tuple(where["dense"]["kernel"].b.spec)
    (None, 'tensor')
    """

    def leaf_sharding(path: str, leaf: Leaf) -> Leaf:
        """Returns the shardings of one leaf."""
        if is_node(leaf):
            return _node_shardings(path, leaf, table, mesh)
        if not hasattr(leaf, "shape"):
            return leaf
        return along(leaf, _sharding_function(_entries_of_leaf(path, leaf.shape, table), mesh))

    return map_leaves(leaf_sharding, params)


def place(params: Tree, table: Table, mesh: Mesh) -> Tree:
    """Returns the tree on the mesh, with the shardings that `shardings` returns.

    Args and errors are those of `shardings`.

    >>> from jax.sharding import PartitionSpec as P
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> table = [(".*/kernel", P(None, "tensor"))]
    >>> placed = lj.sharding.place(tree, table, mesh)
    >>> tuple(placed["dense"]["kernel"].a.sharding.spec)
    (None, None)
    """
    arrays, treedef = flatten_with_aliases(params)
    array_shardings, _ = flatten_with_aliases(shardings(params, table, mesh))
    placed_arrays: dict[tuple[int, NamedSharding], Leaf] = {}

    def put(array: Leaf, sharding: NamedSharding | None) -> Leaf:
        """Places one array, once for all weights that share it."""
        if not isinstance(sharding, NamedSharding):
            return array
        key = (id(array), sharding)  # an array that several weights share is placed once
        if key not in placed_arrays:
            placed_arrays[key] = jax.device_put(array, sharding)
        return placed_arrays[key]

    placed = [
        put(array, sharding)
        for (_, array), (_, sharding) in zip(arrays, array_shardings, strict=True)
    ]
    return restore_alias_form(params, treedef.unflatten(placed))


def sharding_of(path: str, shape: Sequence[int], table: Table, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of one leaf; see `shardings`.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> table = [(".*/kernel", P(None, "tensor"))]
    >>> tuple(lj.sharding.sharding_of("dense/kernel", (2, 4, 3), table, mesh).spec)
    (None, None, 'tensor')
    """
    return sharding_for(_entries_of_leaf(path, shape, table), shape, mesh)


def _entries_of_leaf(path: str, shape: Sequence[int], table: Table) -> _Axes:
    """Returns the table's entry for each axis; None for the stack axes in front."""
    for pattern, spec in table:
        if re.fullmatch(pattern, path) is None:
            continue
        if len(spec) > len(shape):
            raise ValueError(
                f"{path} of shape {list(shape)} has fewer axes than the spec {spec} of the "
                f"pattern {pattern!r}. Shorten the spec, or change the pattern."
            )
        return (None,) * (len(shape) - len(spec)) + tuple(spec)
    return (None,) * len(shape)


def sharding_for(axes: _Axes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns an array's sharding, without mesh axes that do not divide the array's axes.

    Args:
      axes: one entry an axis of the array: None, or a name or names of the mesh's axes. A name that
        stands for several axes of the array shards the first whose size it divides.
      shape: shape of the array.
      mesh: its axes are those that `axes` names.

    Raises:
      ValueError: the mesh lacks an axis.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> tuple(lj.sharding.sharding_for((None, "tensor"), (4, 3), mesh).spec)
    (None, 'tensor')
    """

    spec: list[_Entry] = []
    used_names: list[str] = []
    for size, entry in zip(shape, axes, strict=True):
        names = _dividing_names(size, entry, mesh, used_names)
        used_names.extend(names)
        # An entry of a spec is None, one name, or a tuple of several names.
        if len(names) > 1:
            spec.append(tuple(names))
        else:
            spec.append(names[0] if names else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _dividing_names(size: int, entry: _Entry, mesh: Mesh, used_names: Sequence[str]) -> list[str]:
    """Returns the mesh axes that evenly shard one axis of an array.

    Args:
      size: size of the array's axis.
      entry: the axes of the mesh that the table names for it.
      mesh: the mesh.
      used_names: axes of the mesh that earlier axes of the array are sharded over.

    Raises:
      ValueError: the mesh lacks an axis.
    """
    if entry is None:
        return []
    names = [entry] if isinstance(entry, str) else entry
    dividing_names: list[str] = []
    for name in names:
        if name not in mesh.shape:
            raise ValueError(
                f"The mesh has no axis {name!r}. Its axes are {', '.join(mesh.shape)}. Use these "
                "names in the table."
            )
        n_shards = math.prod(mesh.shape[axis] for axis in (*dividing_names, name))
        if name not in used_names and size % n_shards == 0:
            dividing_names.append(name)
    return dividing_names


def _node_shardings(path: str, node: Node, table: Table, mesh: Mesh) -> Node:
    """Returns a node with shardings in place of its arrays."""
    axes = _entries_of_leaf(path, node.shape, table)
    if isinstance(node, Trained):
        return Trained(sharding_for(axes, node.shape, mesh))
    array_sharding = _sharding_function(axes, mesh)
    base = along(node.base, array_sharding)
    if isinstance(node, LoraWeight):
        arrays = {
            name: array_sharding(array, node.layout(name)) for name, array in node.arrays.items()
        }
        return node.replace(base=base, arrays=arrays)
    value_sharding = sharding_for((None, *axes[1:]), node.shape, mesh)  # no split of trained rows
    return node.replace(base=base, value=None if node.value is None else value_sharding)


def _sharding_function(axes: _Axes, mesh: Mesh) -> Callable[[Leaf, Sequence[int]], NamedSharding]:
    """Returns a function (array, layout) -> sharding for the arrays of one weight.

    An axis of an array has the entry in `axes` of the weight's axis that it holds. Axes that the
    weight lacks, such as the rank, are replicated.
    """

    def array_sharding(array: Leaf, layout: Sequence[int]) -> NamedSharding:
        entries = tuple(None if axis < 0 else axes[axis] for axis in layout)
        return sharding_for(entries, array.shape, mesh)

    return array_sharding
