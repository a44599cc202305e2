"""Adapters on the host: what a bank keeps of each, and what goes into a slot."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.slots import Slots, ValueSlots, WeightSlots
from lora_jax.core.parts import NEUTRAL, rank_axis
from lora_jax.core.paths import nearest
from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained
from lora_jax.lorafy import nodes_of
from lora_jax.variants import variant_of

Adapter = dict[str, LoraWeight | Trained]  # by path, without the base, its arrays on the host


class BankError(ValueError):
    """An adapter does not fit into a bank, or is not there."""


def adapter_values(name: str, tree: Tree, slots: Mapping[str, Slots]) -> Adapter:
    """Returns an adapter as a bank keeps it, once it fits.

    Args:
      name: name of the adapter, for messages.
      tree: an adapted tree over the bank's base.
      slots: slots of the bank, by path.

    Raises:
      BankError: the bank has no room for it.
    """
    nodes = nodes_of(tree)
    if not nodes:
        raise BankError(f"bank: {name!r} is a plain tree: give an adapted one, or a folder")
    for path, node in nodes.items():
        _check_fits(name, path, node, slots)
    alone = {p: n.replace(base=None) if isinstance(n, LoraWeight) else n for p, n in nodes.items()}
    copies: Adapter = jax.tree.map(np.array, alone)  # callers may write into theirs
    return copies


def _check_fits(name: str, path: str, node: Node, slots: Mapping[str, Slots]) -> None:
    if path not in slots:
        raise BankError(
            f"bank: {name!r} adapts {path!r}, which the bank has no slots for; the nearest that "
            f"it has are {nearest(path, slots, n=3)}. Make the bank with rules that select it"
        )
    there = slots[path]
    if not node.is_on:
        raise BankError(
            f"bank: {name!r} has no adapter at {path!r}: this is the base half of a tree; join "
            "the halves first"
        )
    wanted = "in full" if isinstance(there, ValueSlots) else "by factors"
    if isinstance(there, ValueSlots) != isinstance(node, Trained) or not isinstance(
        node, (LoraWeight, Trained)
    ):
        raise BankError(f"bank: {name!r} trains {path!r} otherwise than {wanted}, as the bank has")
    if node.shape != there.shape:
        raise BankError(
            f"bank: {name!r} has {path!r} in the shape {node.shape}, the bank's base in "
            f"{there.shape}: it belongs to another base"
        )
    if isinstance(node, Trained) or isinstance(there, ValueSlots):
        return
    if node.invocation is not None:
        raise BankError(
            f"bank: {name!r} is an activated LoRA, which acts from its invocation on, and a slot "
            "acts on all tokens: run it by lora_jax.adapt"
        )
    rank = node.rank * (2 if node.start is not None else 1)
    if rank > there.rank:
        both = f", twice {node.rank} as its factors began in W" if node.start is not None else ""
        raise BankError(
            f"bank: {name!r} has rank {rank} at {path!r}{both}, and the bank has room for "
            f"{there.rank}: make it with a larger rank"
        )
    if (node.roles, node.uses) != (there.roles, there.uses):
        raise BankError(
            f"bank: {name!r} adapts {path!r} with {node.roles} for {node.uses!r} uses; the bank "
            f"has {there.roles} and {there.uses!r}: give its rule these in_axes, out_axes and uses"
        )
    for part in node.extras:
        if part.vector and part.vector not in there.arrays:
            variant = variant_of(part)
            remedy = f"{variant.option}=True" if variant else "the same part"
            raise BankError(
                f"bank: {name!r} has the part {part.name!r} at {path!r}, which the bank has no "
                f"room for: give its rule {remedy}"
            )


def values_of(
    adapter: Adapter, slots: Mapping[str, Slots], base: Mapping[str, BaseLike]
) -> dict[str, dict[str, Leaf]]:
    """Returns the arrays of a slot that holds an adapter, by path and name.

    They have the shapes of the slots' arrays, less the slot axis.

    Args:
      adapter: see `adapter_values`.
      slots: slots of the bank, by path.
      base: the base's leaves by path, which stand where the adapter has nothing.
    """
    return {path: _values(adapter.get(path), slots[path], base[path]) for path in slots}


def _values(node: Leaf, slots: Slots, base: BaseLike) -> dict[str, Leaf]:
    if isinstance(slots, ValueSlots):
        return {"value": base if node is None else node.value}
    n = slots.slot_axis
    shapes = {k: (*x.shape[:n], *x.shape[n + 1 :]) for k, x in slots.arrays.items()}
    values = {
        name: np.full(shape, NEUTRAL.get(name, 0), slots.arrays[name].dtype)
        for name, shape in shapes.items()
    }
    if node is None:
        return values
    if node.is_compact:
        node = node.replace(base=slots.base).as_lora()
    parts = {name: getattr(node, name) for name in ("a", "b", "scale")}
    if node.extras:
        parts = _parts_of_variant(node, slots)
    elif node.start is not None:
        (a0, b0) = node.start
        parts["a"] = np.concatenate([node.a, a0], axis=n)
        parts["b"] = np.concatenate([node.b, -b0], axis=n)
    for name, array in parts.items():
        used = tuple(slice(size) for size in array.shape)  # ranks may be smaller than the bank's
        values[name][used] = np.asarray(array, values[name].dtype)
    return values


def _parts_of_variant(node: LoraWeight, slots: WeightSlots) -> dict[str, Leaf]:
    """Returns a, b and scale of an adapter with further parts, and its gain and shift.

    Factors are first filled up to the bank's rank, so that adapters of all ranks run the same
    compiled function.
    """
    most = slots.rank // (2 if node.start is not None else 1)
    arrays: dict[str, Leaf] = {}
    for name, array in node.arrays.items():
        axis = rank_axis(node.axes_of(name), node.roles.labels(len(slots.shape)))
        arrays[name] = array
        if axis >= 0:
            more = [(0, 0)] * array.ndim
            more[axis] = (0, most - array.shape[axis])
            arrays[name] = np.pad(array, more)
    parts = {k: np.array(v) for k, v in _factored_parts(_alike(node, slots, arrays, most)).items()}
    for layer, rank in enumerate(node.ranks if len(node.ranks) > 1 else ()):
        if not rank:  # not adapted
            for name in parts.keys() & {"gain", "shift"}:
                parts[name][layer] = NEUTRAL.get(name, 0)
    return parts


def compile_variant(node: LoraWeight, slots: WeightSlots) -> None:
    """Compiles the function from an adapter with further parts to the arrays of a slot.

    Args:
      node: as adapters have it, of the bank's rank; its arrays may be shapes.
      slots: slots of the same weight.
    """
    arrays = {name: np.zeros(x.shape, x.dtype) for name, x in node.arrays.items()}
    _factored_parts(_alike(node, slots, arrays, node.rank))


def _alike(
    node: LoraWeight, slots: WeightSlots, arrays: Mapping[str, Leaf], rank: int
) -> LoraWeight:
    """Returns a node over the slots' base that differs from others of its kind in arrays alone."""
    return node.replace(
        base=slots.base, arrays=arrays, ranks=(rank,), dropout=0.0, frozen=(), a_of=None
    )


@jax.jit
def _factored_parts(node: LoraWeight) -> dict[str, jax.Array]:
    parts = node.factored().parts
    return {name: jnp.asarray(array) for name, array in parts.items()}
