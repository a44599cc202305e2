"""The arrays of several adapters of one weight, one slot for each adapter.

The slot axis stands before the rank: [batch…, slots, r, in…]. All slots' factors are then one pair
of factors of rank slots·r without a copy: the slots are side by side. A mixed batch is one product
with this pair, of which each example keeps its own columns. A scan over layers takes a layer of all
slots, and `jax.vmap` over the slot axis runs each adapter by itself.

Slot 0 is the base alone. It needs no room in the arrays: without `has_base`, the first slot of the
arrays is slot 1.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import field

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core.axes import AxisRoles
from lora_jax.core.base import NoArray
from lora_jax.core.parts import NEUTRAL, RANK, STATIC
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import BaseLike, Leaf, Parts, Shaped, Tree
from lora_jax.core.weight import LoraWeight, Trained, is_leaf

# A product with all slots' factors at once reads each of them and multiplies by slots·r columns;
# above this number, each example gets a copy of its own adapter's factors instead.
WIDEST = 256


class _Slots(NoArray):
    """Superclass of both kinds of slots: raises an error if they are used as an array."""

    how_to_use = (
        "is a node of a bank, not an array: call the function that uses it through "
        "lora_jax.bank.mixed, on bank.choose(names)"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class WeightSlots(_Slots):
    """A kernel W with the factors of several adapters, one slot for each.

    Attributes:
      base: W itself; see `lora_jax.core.base`.
      arrays: by name, each with an axis for the slots after the weight's batch axes:
        a: [batch…, slots, r, in…]; b: [batch…, slots, r, out…]; scale: [batch…, slots], fp32;
        gain and shift, where the bank has room for DoRA or a bias on B: [batch…, slots, out…].
      roles: the axis roles of W.
      uses: the uses of W that see an adapter; see `lora_jax.LoraWeight`.
      per_example: whether the slots are not adapters, but the examples of a batch, in order.
      has_base: whether slot 0 is here, empty; else the first slot here is slot 1.
    """

    base: BaseLike
    arrays: Parts
    roles: AxisRoles = field(metadata=STATIC)
    uses: str = field(default="all", metadata=STATIC)
    per_example: bool = field(default=False, metadata=STATIC)
    has_base: bool = field(default=True, metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return tuple(self.base.shape)

    @property
    def slot_axis(self) -> int:
        """The axis of each array that indexes the slots."""
        return len(self.roles.sizes(self.base.shape, "batch"))

    @property
    def rank(self) -> int:
        """The largest rank that a slot holds."""
        return self.arrays["a"].shape[self.slot_axis + 1]

    @property
    def n_here(self) -> int:
        """The number of slots that the arrays hold."""
        return self.arrays["a"].shape[self.slot_axis]

    @property
    def n_slots(self) -> int:
        """The number of slots, the base's included."""
        return self.n_here + (not self.has_base)

    @property
    def is_side_by_side(self) -> bool:
        """True if all slots are plain factors, without copies, DoRA or a bias on B."""
        return (
            not self.per_example
            and self.uses != "each"
            and self.arrays.keys() == {"a", "b", "scale"}
        )

    def batch_weight(self, ids: jax.Array) -> LoraWeight:
        """Returns the adapted weight of all examples; see `lora_jax.adapt.per_example`.

        Args:
          ids: [examples] int, the slot of each.
        """
        is_slot_of = self._slots == ids[:, None]  # [examples, slots]
        slot_weights = is_slot_of.astype(jnp.float32) + _nan_unless_slot(ids, self.n_slots)[:, None]
        parts = self._side_by_side(self.arrays["scale"])
        parts["rows"] = jnp.repeat(slot_weights, self.rank, axis=1)
        return self._joint_weight(parts)

    @property
    def _slots(self) -> jax.Array:
        """The indices of the slots that the arrays hold, [slots] int."""
        return jnp.arange(self.n_here) + int(not self.has_base)

    @property
    def _joint_rank(self) -> int:
        """The sum of the ranks of all slots."""
        return self.n_here * self.rank

    def _joint_weight(self, parts: Parts) -> LoraWeight:
        """Returns the weight with the factors of all slots concatenated along the rank."""
        return LoraWeight(
            base=self.base,
            arrays=parts,
            roles=self.roles,
            ranks=(self._joint_rank,),
            uses=self.uses,
        )

    def _side_by_side(self, scales: jax.Array) -> Parts:
        """Returns the concatenated factors of all slots, and the scale of each column.

        Args:
          scales: [batch…, slots].
        """
        axis = self.slot_axis

        def merge_slots_and_rank(array: jax.Array) -> jax.Array:
            return array.reshape(*array.shape[:axis], self._joint_rank, *array.shape[axis + 2 :])

        return {
            "a": merge_slots_and_rank(self.arrays["a"]),
            "b": merge_slots_and_rank(self.arrays["b"]),
            "scale": jnp.ones(scales.shape[:axis], jnp.float32),
            "lambda_d": jnp.repeat(scales, self.rank, axis=axis),
        }

    def chosen(self, ids: jax.Array) -> "WeightSlots":
        """Returns the weight for a batch, with copies of each example's factors if cheaper.

        Args:
          ids: [examples] int, the slot of each.
        """
        if self.uses != "each" and self._joint_rank <= WIDEST:
            return self
        arrays = _take_slots(self.arrays, ids if self.has_base else ids - 1, self.slot_axis)
        scale = arrays["scale"]
        if not self.has_base:
            scale = jnp.where(ids > 0, scale, 0)
        arrays["scale"] = scale + _nan_unless_slot(ids, self.n_slots)
        return self.replace(arrays=arrays, per_example=True)

    def only(self, slot: jax.Array) -> "WeightSlots":
        """Returns the weight with the base and a copy of one slot, [] int, as slot 1."""
        index = slot - (not self.has_base)
        arrays = {
            name: lax.dynamic_index_in_dim(array, index, self.slot_axis)
            for name, array in self.arrays.items()
        }
        return self.replace(arrays=arrays, has_base=False)

    def take_example(self, arrays: Parts, index: jax.Array) -> LoraWeight:
        """Returns the adapted weight for one example.

        Args:
          arrays: the weight's arrays; without the slot axis where the slots are examples.
          index: [] int, the example's slot.
        """
        if self.per_example:
            rank = arrays["a"].shape[self.slot_axis]
            return LoraWeight(
                base=self.base, arrays=arrays, roles=self.roles, ranks=(rank,), uses=self.uses
            )
        scales = jnp.where(self._slots == index, arrays["scale"], 0)
        parts = self._side_by_side(scales + _nan_unless_slot(index, self.n_slots))
        for name in ("gain", "shift"):
            if name in arrays:
                parts[name] = jnp.take(arrays[name], index, axis=self.slot_axis, mode="clip")
        return self._joint_weight(parts)

    def __repr__(self) -> str:
        return f"WeightSlots(shape={self.base.shape}, slots={self.n_slots}, rank={self.rank})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class ValueSlots(_Slots):
    """A leaf that each adapter trains in full, such as a head, with a value in each slot.

    Attributes:
      arrays: {"value": [slots, …]}, the base's in slot 0; or from slot 1 on, where `base` is given.
      base: the base's value.
      per_example: whether the slots are the examples of a batch, in order.
    """

    arrays: Parts
    base: BaseLike = None
    per_example: bool = field(default=False, metadata=STATIC)
    slot_axis = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(self.arrays["value"].shape[1:])

    @property
    def n_slots(self) -> int:
        """The number of slots, the base's included."""
        return self.arrays["value"].shape[0] + (self.base is not None)

    def chosen(self, ids: jax.Array) -> "ValueSlots":
        """Returns the leaf with the value of each example of a batch."""
        value = _take_slots(self.arrays, ids - int(self.base is not None), 0)["value"]
        value_axes = range(1, value.ndim)
        if self.base is not None:
            is_base = jnp.expand_dims(ids == 0, value_axes)
            value = jnp.where(is_base, self.base.astype(value.dtype), value)
        nans = jnp.expand_dims(_nan_unless_slot(ids, self.n_slots), value_axes)
        return ValueSlots({"value": value + nans.astype(value.dtype)}, per_example=True)

    def take_example(self, arrays: Parts, index: jax.Array) -> Trained:
        """Returns the leaf for one example; see `WeightSlots.take_example`."""
        return Trained(arrays["value"])

    def __repr__(self) -> str:
        return f"ValueSlots(shape={self.shape}, slots={self.n_slots})"


Slots = WeightSlots | ValueSlots


def _take_slots(arrays: Parts, ids: jax.Array, axis: int) -> Parts:
    """Returns the arrays with the slot of each example along the slot axis."""
    return {name: jnp.take(array, ids, axis=axis, mode="clip") for name, array in arrays.items()}


def _nan_unless_slot(ids: jax.Array, n_slots: int) -> jax.Array:
    """Returns 0 for valid slot ids and NaN for others, to report an error with traced ids.

    Callers add it to scales or values, so that the results of these examples become NaN.
    """
    return jnp.where((ids >= 0) & (ids < n_slots), 0.0, jnp.nan).astype(jnp.float32)


def slot_shape(array: Shaped, axis: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of one slot of an array: without the slot axis."""
    return jax.ShapeDtypeStruct((*array.shape[:axis], *array.shape[axis + 1 :]), array.dtype)


def _leaves_of(tree: Tree) -> tuple[list[tuple[str, Leaf]], jax.tree_util.PyTreeDef]:
    """Returns the leaves of a bank's tree with their paths, and its treedef; nodes are leaves."""
    return flatten_with_paths(tree, is_leaf=lambda x: isinstance(x, Slots) or is_leaf(x))


def slots_of(tree: Tree) -> dict[str, Slots]:
    """Returns the nodes of a bank's tree by path."""
    return {path: leaf for path, leaf in _leaves_of(tree)[0] if isinstance(leaf, Slots)}


def map_slots(visit: Callable[[str, Slots], Leaf], tree: Tree) -> Tree:
    """Returns a bank's tree with ``visit(path, node)`` in place of each node."""
    path_leaves, treedef = _leaves_of(tree)
    leaves = [visit(path, leaf) if isinstance(leaf, Slots) else leaf for path, leaf in path_leaves]
    return treedef.unflatten(leaves)


def empty_slots(node: LoraWeight | Trained, n_slots: int) -> Slots:
    """Returns empty slots, which stand for the base, for adapters like a given node.

    On a mesh, A lies as W's in axes do, B as its out axes; slots and ranks are not split.

    Args:
      node: node of a tree that `lorafy` returned; it says ranks, dtypes and variants. The arrays
        beside W may be `jax.ShapeDtypeStruct`\\ s.
      n_slots: the number of slots, the base's included.
    """
    if isinstance(node, Trained):
        return ValueSlots({"value": jnp.repeat(node.value[None], n_slots, axis=0)})
    arrays = {}
    for name in ("a", "b", "scale", *(part.vector for part in node.extras if part.vector)):
        shape = list(node.shape_of(name))
        shape.insert(node.n_batch, n_slots)
        dtype = node.arrays[name].dtype if name in node.arrays else jnp.float32
        array = jnp.full(shape, NEUTRAL.get(name, 0), dtype)
        sharding = _sharding(node, name)
        arrays[name] = array if sharding is None else jax.device_put(array, sharding)
    return WeightSlots(base=node.base, arrays=arrays, roles=node.roles, uses=node.uses)


def _sharding(node: LoraWeight, name: str) -> NamedSharding | None:
    """Returns the sharding of an array of slots; None if W is on one device."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(node.base)]
    named_shardings = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    if not named_shardings or named_shardings[0].mesh.size == 1:
        return None
    weight_sharding = named_shardings[0]
    weight_spec = (*weight_sharding.spec, *[None] * (node.ndim - len(weight_sharding.spec)))
    spec = [None if axis == RANK else weight_spec[axis] for axis in node.layout(name)]
    spec.insert(node.n_batch, None)
    return NamedSharding(weight_sharding.mesh, PartitionSpec(*spec))
