"""Shardings of an adapted tree on a mesh: the base by a table, the adapter like its base.

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

from lora_jax.core.aliases import flatten, restore_form
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
        if is_node(leaf):
            return _node_shardings(path, leaf, table, mesh)
        if not hasattr(leaf, "shape"):
            return leaf
        return along(leaf, _fitting(_axes_of(path, leaf.shape, table), mesh))

    return map_leaves(leaf_sharding, params)


def place(params: Tree, table: Table, mesh: Mesh) -> Tree:
    """Returns the tree on the mesh, each array with the sharding that `shardings` returns.

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
    where, placed = shardings(params, table, mesh), dict[tuple[int, NamedSharding], Leaf]()

    def put(array: Leaf, sharding: NamedSharding | None) -> Leaf:
        if not isinstance(sharding, NamedSharding):
            return array
        key = (id(array), sharding)  # an array that several weights share is placed once
        if key not in placed:
            placed[key] = jax.device_put(array, sharding)
        return placed[key]

    keyed, treedef = flatten(params)
    arrays = [put(array, at) for (_, array), (_, at) in zip(keyed, flatten(where)[0], strict=True)]
    return restore_form(params, treedef.unflatten(arrays))


def sharding_of(path: str, shape: Sequence[int], table: Table, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of one leaf; see `shardings`.

    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> table = [(".*/kernel", P(None, "tensor"))]
    >>> tuple(lj.sharding.sharding_of("dense/kernel", (2, 4, 3), table, mesh).spec)
    (None, None, 'tensor')
    """
    return sharding_for(_axes_of(path, shape, table), shape, mesh)


def _axes_of(path: str, shape: Sequence[int], table: Table) -> _Axes:
    """Returns the table's entry for each axis; None for the leading axes of a stack."""
    pattern, spec = next((line for line in table if re.fullmatch(line[0], path)), ("", ()))
    if len(spec) > len(shape):
        raise ValueError(f"{path} {list(shape)} has fewer axes than {spec} ({pattern!r})")
    return (None,) * (len(shape) - len(spec)) + tuple(spec)


def sharding_for(axes: _Axes, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array, less the axes of the mesh that do not divide its own.

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

    taken: list[str] = []

    def fitting(size: int, entry: _Entry) -> _Entry:
        kept: list[str] = []
        for name in (entry,) if isinstance(entry, str) else entry or ():
            if name not in mesh.shape:
                raise ValueError(f"the mesh has no axis {name!r}, only {', '.join(mesh.shape)}")
            if name in taken:
                continue
            if size % math.prod(mesh.shape[k] for k in (*kept, name)) == 0:
                kept.append(name)
        taken.extend(kept)
        return tuple(kept) if len(kept) > 1 else kept[0] if kept else None

    spec = [fitting(size, entry) for size, entry in zip(shape, axes, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def _node_shardings(path: str, node: Node, table: Table, mesh: Mesh) -> Node:
    """Returns a node with shardings in place of its arrays."""
    axes = _axes_of(path, node.shape, table)
    if isinstance(node, Trained):
        return Trained(sharding_for(axes, node.shape, mesh))
    fitting = _fitting(axes, mesh)
    base = along(node.base, fitting)
    if isinstance(node, LoraWeight):
        arrays = {name: fitting(array, node.layout(name)) for name, array in node.arrays.items()}
        return node.replace(base=base, arrays=arrays)
    whole = sharding_for((None, *axes[1:]), node.shape, mesh)  # the trained rows are not split
    return node.replace(base=base, value=None if node.value is None else whole)


def _fitting(axes: _Axes, mesh: Mesh) -> Callable[[Leaf, Sequence[int]], NamedSharding]:
    """Returns a function of an array and, for each of its axes, the weight's axis, if it holds one.

    It returns the array's sharding: the entry in `axes` of each of the weight's axes, none for
    others.
    """

    def fitting(array: Leaf, places: Sequence[int]) -> NamedSharding:
        picked = tuple(None if place < 0 else axes[place] for place in places)
        return sharding_for(picked, array.shape, mesh)

    return fitting
