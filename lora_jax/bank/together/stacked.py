"""The step of a stack of adapters, and the layout of what it works on.

It is `lora_jax.training.make_step` over all slots: gradients under `jax.vmap`, where products with
the base are one product for all, then the update of each, by its own loss, clip and decay. Or over
one slot, where batches of other shapes are not to be filled up.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.bank.together.tenants import Arrays, StackKind, Tenant, arrays_of, replace_arrays
from lora_jax.core.aliases import KeyPath
from lora_jax.core.types import Adapter, Batch, Leaf, Shaped, Tree
from lora_jax.core.weight import map_leaves
from lora_jax.lorafy import nodes_of, split, strip
from lora_jax.training.losses import Logits, Sums
from lora_jax.training.neftune import neftune
from lora_jax.training.step import Metrics, State, init_state, make_gradient, make_update

UPDATES = 1024  # learning rates are stored for a multiple of so many updates


class TenantNumbers(NamedTuple):
    """Holds the numbers that adapters of a kind differ in; in a stack, stacked.

    Attributes:
      rates: [updates] fp32, the learning rate of each update.
      weight_decay, grad_clip: [] fp32.
    """

    rates: Leaf
    weight_decay: Leaf
    grad_clip: Leaf


def traced_step(
    forward: Logits,
    like: Tenant,
    slots: int,
    batch: Batch,
    compiler_options: Mapping[str, str] | None = None,
) -> tuple[jax.stages.Traced, State]:
    """Traces the step of a stack that need not be there.

    Args:
      forward: the adapted function that the loss calls.
      like: an adapter; its arrays may be `jax.ShapeDtypeStruct`\\ s with shardings.
      slots: the number of such adapters.
      batch: batch of all, arrays [slots, parts, …] or their shapes.
      compiler_options: to compile the step with.

    Returns:
      The traced step, and the shapes of its state.
    """
    kind = StackKind.from_tenant(like)
    shapes, axes, where = form_of(kind, like)
    places = jax.tree.map(lambda _: None, shapes) if where is None else where

    def stacked(leaf: Shaped, axis: int, place: NamedSharding | None) -> jax.ShapeDtypeStruct:
        shape = (*leaf.shape[:axis], slots, *leaf.shape[axis:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)

    is_none = lambda x: x is None  # noqa: E731
    state, fixed = jax.tree.map(stacked, shapes, axes, places, is_leaf=is_none)
    sizes: Sequence[tuple[int, ...]] = ((slots, UPDATES), (slots,), (slots,))
    numbers = TenantNumbers(*(jax.ShapeDtypeStruct(size, np.float32) for size in sizes))
    active = jax.ShapeDtypeStruct((slots,), np.bool_)
    steps = compiled_steps(kind, forward, axes, where, compiler_options)
    return steps.step_all.trace(state, fixed, numbers, strip(like.params), active, batch), state


def tree_of(kind: StackKind, base: Tree, adapter: Arrays, fixed: Arrays) -> Tree:
    """Returns an adapted tree of a kind.

    Args:
      kind: kind of the adapter.
      base: the plain tree.
      adapter: the arrays that train.
      fixed: the others beside W.
    """

    def node(path: str, leaf: Leaf) -> Leaf:
        if path not in kind.shells:
            return leaf
        return replace_arrays(kind.shells[path], leaf, {**adapter[path], **fixed[path]})

    return map_leaves(node, base)


def content_of(kind: StackKind, tenant: Tenant) -> tuple[State, Arrays]:
    """Returns a slot's content for an adapter before its first step, or where it goes on."""
    nodes = nodes_of(tenant.params)
    adapter, _ = split(tenant.params)
    optimizer = kind.make_optimizer(
        tenant.schedule, tenant.params, tenant.weight_decay, tenant.grad_clip
    )
    fixed = {
        path: {k: x for k, x in arrays_of(node).items() if k not in adapter[path]}
        for path, node in nodes.items()
    }
    if tenant.state is None:
        return init_state(adapter, optimizer, tenant.key), fixed
    begun: State = jax.eval_shape(lambda a: init_state(a, optimizer, tenant.key), adapter)
    structures: list[jax.tree_util.PyTreeDef] = [
        jax.tree.structure(tree) for tree in (tenant.state, begun)
    ]
    if structures[0] != structures[1]:
        raise ValueError(
            "Tenant: the state to go on from is of another adapter or optimiser: give the params "
            "and the options that it was made with"
        )
    return tenant.state, fixed


def form_of(kind: StackKind, like: Tenant) -> tuple[Tree, Tree, Tree]:
    """Returns shapes, axes of the slots and stacked shardings of (state, fixed arrays)."""

    def content(params: Tree, key: jax.Array) -> tuple[State, Arrays]:
        return content_of(kind, dataclasses.replace(like, params=params, key=key))

    shapes: tuple[State, Arrays] = jax.eval_shape(content, like.params, like.key)
    state, fixed = shapes
    of_fixed = {p: {name: kind.slot_axis(p, name) for name in own} for p, own in fixed.items()}
    axes = _axes(kind, state), of_fixed
    return shapes, axes, _shardings(shapes, axes, like)


def _axes(kind: StackKind, state: State) -> Tree:
    """Returns the axis of the slots in each array of a stacked state.

    An optimiser's arrays have it where the adapter's have it, if they have their shapes.
    """

    def slot_axis(keys: KeyPath, array: Shaped) -> int:
        path, parameter = _array_at(state.adapter, keys)
        if parameter is None or parameter.shape != array.shape:
            return 0
        return kind.slot_axis(path)

    return jax.tree_util.tree_map_with_path(slot_axis, state)


def _array_at(arrays: Mapping[str, Mapping[str, Leaf]], keys: KeyPath) -> tuple[str, Leaf]:
    """Returns the path that a key path ends with, and the array there: a weight's, or None."""
    path, name = (getattr(key, "key", "") for key in (None, None, *keys)[-2:])
    return path, arrays.get(path, {}).get(name)


def _shardings(shapes: Tree, axes: Tree, like: Tenant) -> Tree:
    """Returns the sharding of each stacked array; None where the adapter lies on no mesh.

    Slots are not split: each array lies as the adapter's, an optimiser's as its parameter's.

    Args:
      shapes: shapes of the state and the fixed arrays of one adapter.
      axes: axes of the slots in each.
      like: the adapter, whose arrays have shardings.
    """
    arrays = {path: arrays_of(node) for path, node in nodes_of(like.params).items()}
    places = [getattr(x, "sharding", None) for x in jax.tree.leaves(arrays)]
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    if not meshes:
        return None

    def sharding(keys: KeyPath, shape: Shaped, axis: int) -> NamedSharding:
        _, array = _array_at(arrays, keys)
        spec: list[str | tuple[str, ...] | None] = []
        if array is not None and array.shape == shape.shape:
            spec = [*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))]
            spec.insert(axis, None)
        return NamedSharding(meshes[0], PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


class StackSteps(NamedTuple):
    """Holds the compiled steps of a stack, which take its state's memory.

    Attributes:
      step_all: ``(state, fixed, numbers, base, active, batch) -> (state, metrics)``. `active` says
        which slots take a step; the others stay as they are, bit by bit. Arrays of the batch and
        metrics are stacked.
      step_one: ``(state, fixed, numbers, base, slot, batch) -> (state, metrics)``, with one batch.
    """

    step_all: jax.stages.Wrapped
    step_one: jax.stages.Wrapped


def _make_slot_update(
    kind: StackKind, axes: Tree, axes_of_fixed: Tree
) -> Callable[..., tuple[State, Metrics]]:
    """Returns the function that updates the adapter in one slot of a stack."""

    def updated(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        active: jax.Array | bool,
        slot: jax.typing.ArrayLike,
        sums: Sums,
        grads: Adapter,
    ) -> tuple[State, Metrics]:
        """Updates the adapter in one slot, if it is active, in the memory of the stack."""
        slot_state, own = indexed(state, slot, axes), indexed(fixed, slot, axes_of_fixed)
        mine: TenantNumbers = jax.tree.map(lambda x: x[slot], numbers)

        def schedule(count: jax.Array) -> Leaf:
            return mine.rates[jnp.minimum(count, mine.rates.shape[0] - 1)]

        whole = tree_of(kind, base, slot_state.adapter, own)
        optimizer = kind.make_optimizer(schedule, whole, mine.weight_decay, mine.grad_clip)

        def either(
            is_good: jax.Array, update: Callable[[], Tree], skip: Callable[[], Tree]
        ) -> Tree:
            return lax.cond(is_good & active, update, skip)

        update = make_update(optimizer, schedule, kind.loss, either=either)
        new, metrics = update(slot_state, sums, grads)
        new = new._replace(step=jnp.where(active, new.step, slot_state.step))
        return replaced(state, new, slot, axes), metrics

    return updated


def compiled_steps(
    kind: StackKind,
    forward: Logits,
    both_axes: tuple[Tree, Tree],
    where: tuple[Tree, Tree] | None,
    compiler_options: Mapping[str, str] | None,
) -> StackSteps:
    """Returns a stack's steps.

    Gradients are taken side by side, updates one after the other: an update is as it is alone, and
    what it computes with is held for one adapter at a time.
    """
    axes, axes_of_fixed = both_axes
    noisy = neftune(forward, kind.noise) if kind.noise else forward
    gradient = make_gradient(noisy, dropout=kind.dropout, loss=kind.loss)
    updated = _make_slot_update(kind, axes, axes_of_fixed)

    def gradient_of_one(
        state: State, fixed: Arrays, base: Tree, batch: Batch
    ) -> tuple[Sums, Adapter]:
        whole = tree_of(kind, base, state.adapter, fixed)
        return gradient(state, split(whole)[1], batch)

    gradients = jax.vmap(
        gradient_of_one, in_axes=(axes, axes_of_fixed, None, 0), out_axes=(0, axes.adapter)
    )

    def step_all(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        active: jax.Array,
        batch: Batch,
    ) -> tuple[State, Metrics]:
        sums, grads = gradients(state, fixed, base, batch)

        def visit(state: State, slot: jax.Array) -> tuple[State, Metrics]:
            mine = jax.tree.map(lambda x: x[slot], sums), indexed(grads, slot, axes.adapter)
            return updated(state, fixed, numbers, base, active[slot], slot, *mine)

        return lax.scan(visit, state, jnp.arange(active.shape[0]))

    def step_one(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        slot: jax.typing.ArrayLike,
        batch: Batch,
    ) -> tuple[State, Metrics]:
        slot_state, own = indexed(state, slot, axes), indexed(fixed, slot, axes_of_fixed)
        sums_and_gradients = gradient_of_one(slot_state, own, base, batch)
        return updated(state, fixed, numbers, base, True, slot, *sums_and_gradients)

    out = None if where is None else (where[0], None)
    options = dict(compiler_options) if compiler_options else None
    jitted = functools.partial(
        jax.jit, donate_argnums=0, out_shardings=out, compiler_options=options
    )
    return StackSteps(jitted(step_all), jitted(step_one))


def indexed(stacked: Tree, slot: jax.typing.ArrayLike, axes: Tree) -> Tree:
    """Returns the content of one slot."""
    take = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda x, axis: take(x, slot, axis), stacked, axes)


def replaced(stacked: Tree, tree: Tree, slot: jax.typing.ArrayLike, axes: Tree) -> Tree:
    """Returns stacked arrays with others in one slot."""
    put = lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new, axis: put(x, new, slot, axis), stacked, tree, axes)
