"""Stores adapters on the host, and computes the arrays that fill a slot.

A slot's values are the arrays that one adapter writes into it: factors of the bank's rank, and
neutral values for parts that the adapter lacks.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.slots import Slots, ValueSlots, WeightSlots, slot_shape
from lora_jax.core.parts import NEUTRAL, rank_axis
from lora_jax.core.paths import most_similar
from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained
from lora_jax.lorafy import nodes_of
from lora_jax.variants import variant_of

Adapter = dict[str, LoraWeight | Trained]  # by path, without the base, its arrays on the host


class BankError(ValueError):
    """An adapter does not fit into a bank, or the bank does not contain it."""


def adapter_values(name: str, tree: Tree, slots: Mapping[str, Slots]) -> Adapter:
    """Returns an adapter's nodes in the form that a bank stores, after a check that it fits.

    Args:
      name: name of the adapter, for messages.
      tree: an adapted tree over the bank's base.
      slots: slots of the bank, by path.

    Raises:
      BankError: the bank has no room for it.
    """
    nodes = nodes_of(tree)
    if not nodes:
        raise BankError(
            f"bank: {name!r} is a plain tree. Pass an adapted tree or the folder of an adapter."
        )
    for path, node in nodes.items():
        _check_fits(name, path, node, slots)
    nodes_without_base = {
        path: node.replace(base=None) if isinstance(node, LoraWeight) else node
        for path, node in nodes.items()
    }
    adapter: Adapter = jax.tree.map(np.array, nodes_without_base)  # copies: callers may write later
    return adapter


def _check_fits(name: str, path: str, node: Node, slots: Mapping[str, Slots]) -> None:
    """Raises a BankError if the slots of a path cannot hold an adapter's node."""
    if path not in slots:
        raise BankError(
            f"bank: {name!r} adapts {path!r}, but the bank has no slots for it. The most "
            f"similar paths with slots are {most_similar(path, slots, n=3)}. Make the bank with "
            f"rules that select {path!r}."
        )
    leaf_slots = slots[path]
    if not node.is_on:
        raise BankError(
            f"bank: {name!r} has no adapter at {path!r}, because this is the base half of a "
            "tree. Join the halves with lora_jax.join first."
        )
    is_value = isinstance(leaf_slots, ValueSlots)
    if is_value != isinstance(node, Trained) or not isinstance(node, (LoraWeight, Trained)):
        method = "in full" if is_value else "by factors"
        raise BankError(f"bank: the bank trains {path!r} {method}, but {name!r} does not.")
    if node.shape != leaf_slots.shape:
        raise BankError(
            f"bank: {path!r} has the shape {node.shape} in {name!r}, but {leaf_slots.shape} "
            "in the base of the bank. The adapter belongs to another base."
        )
    if isinstance(node, LoraWeight) and isinstance(leaf_slots, WeightSlots):
        _check_weight_fits(name, path, node, leaf_slots)


def _check_weight_fits(name: str, path: str, node: LoraWeight, slots: WeightSlots) -> None:
    """Raises a BankError if the slots have no room for a weight's rank, roles or parts."""
    if node.invocation is not None:
        raise BankError(
            f"bank: {name!r} is an activated LoRA, which acts only from its invocation on, "
            "but a slot acts on all tokens. Run it with lora_jax.adapt instead."
        )
    rank = node.rank
    reason = ""
    if node.start is not None:
        rank = 2 * node.rank
        reason = f" (twice {node.rank}, because its factors were initialized from W)"
    if rank > slots.rank:
        raise BankError(
            f"bank: {name!r} has rank {rank} at {path!r}{reason}, but the slots of the bank "
            f"have rank {slots.rank}. Make the bank with a larger rank."
        )
    if (node.roles, node.uses) != (slots.roles, slots.uses):
        raise BankError(
            f"bank: {name!r} adapts {path!r} with {node.roles} for {node.uses!r} uses, but "
            f"the bank with {slots.roles} for {slots.uses!r} uses. Make the bank with a rule "
            "that has the in_axes, out_axes and uses of the adapter."
        )
    for part in node.extras:
        if part.vector and part.vector not in slots.arrays:
            variant = variant_of(part)
            remedy = f"{variant.option}=True" if variant else "the same part"
            raise BankError(
                f"bank: {name!r} has the part {part.name!r} at {path!r}, but the slots of "
                f"the bank do not. Make the bank with a rule that has {remedy}."
            )


def values_of(
    adapter: Adapter, slots: Mapping[str, Slots], base: Mapping[str, BaseLike]
) -> dict[str, dict[str, Leaf]]:
    """Returns the values that an adapter puts into a slot, by path and name of the array.

    They have the shapes of the slots' arrays, less the slot axis.

    Args:
      adapter: see `adapter_values`.
      slots: slots of the bank, by path.
      base: the base's leaves by path, for the paths that the adapter does not adapt.
    """
    return {path: _values(adapter.get(path), slots[path], base[path]) for path in slots}


def _values(node: Leaf, slots: Slots, base: BaseLike) -> dict[str, Leaf]:
    """Returns the values that one leaf puts into a slot; without a node, those of the base."""
    if isinstance(slots, ValueSlots):
        return {"value": base if node is None else node.value}
    slot_axis = slots.slot_axis
    values = {}
    for name, array in slots.arrays.items():
        shape = slot_shape(array, slot_axis).shape
        values[name] = np.full(shape, NEUTRAL.get(name, 0), array.dtype)
    if node is None:
        return values
    if node.is_compact:
        node = node.replace(base=slots.base).as_lora()
    parts = {name: getattr(node, name) for name in ("a", "b", "scale")}
    if node.extras:
        parts = _parts_of_variant(node, slots)
    elif node.start is not None:
        a0, b0 = node.start
        parts["a"] = np.concatenate([node.a, a0], axis=slot_axis)
        parts["b"] = np.concatenate([node.b, -b0], axis=slot_axis)
    for name, array in parts.items():
        region = tuple(slice(size) for size in array.shape)  # its rank may be below the bank's
        values[name][region] = np.asarray(array, values[name].dtype)
    return values


def _parts_of_variant(node: LoraWeight, slots: WeightSlots) -> dict[str, Leaf]:
    """Returns a, b, scale, gain and shift of an adapter whose variant has more parts.

    Factors are first padded to the bank's rank, so that adapters of all ranks run the same compiled
    function.
    """
    rank = slots.rank // (2 if node.start is not None else 1)
    padded_arrays: dict[str, Leaf] = {}
    array: Leaf
    for name, array in node.arrays.items():
        axis = rank_axis(node.axes_of(name), node.roles.labels(len(slots.shape)))
        if axis >= 0:
            padding = [(0, 0)] * array.ndim
            padding[axis] = (0, rank - array.shape[axis])
            array = np.pad(array, padding)
        padded_arrays[name] = array
    factored_parts = _factored_parts(_canonical_node(node, slots, padded_arrays, rank))
    parts = {name: np.array(array) for name, array in factored_parts.items()}
    vectors = parts.keys() & {"gain", "shift"}
    if len(node.ranks) > 1:
        for layer, layer_rank in enumerate(node.ranks):
            is_adapted = layer_rank > 0
            for name in vectors:
                if not is_adapted:
                    parts[name][layer] = NEUTRAL.get(name, 0)
    return parts


def compile_variant(node: LoraWeight, slots: WeightSlots) -> None:
    """Compiles the function that converts a variant's arrays to the arrays of a slot.

    Args:
      node: as adapters have it, of the bank's rank; its arrays may be shapes.
      slots: slots of the same weight.
    """
    arrays = {name: np.zeros(array.shape, array.dtype) for name, array in node.arrays.items()}
    _factored_parts(_canonical_node(node, slots, arrays, node.rank))


def _canonical_node(
    node: LoraWeight, slots: WeightSlots, arrays: Mapping[str, Leaf], rank: int
) -> LoraWeight:
    """Returns a node over the slots' base, with settings that do not vary within a variant.

    So all of them share one compiled function.
    """
    return node.replace(
        base=slots.base, arrays=arrays, ranks=(rank,), dropout=0.0, frozen=(), a_of=None
    )


@jax.jit
def _factored_parts(node: LoraWeight) -> dict[str, jax.Array]:
    """Returns the arrays with which a node's variant computes its products."""
    parts = node.factored().parts
    return {name: jnp.asarray(array) for name, array in parts.items()}
