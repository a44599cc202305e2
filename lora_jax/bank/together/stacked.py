"""The compiled step of a stack of adapters, and the layout of its stacked arrays.

It is `lora_jax.training.make_step` over all slots: gradients under `jax.vmap`, where products with
the base are one product for all, then the update of each, by its own loss, clip and decay. Or over
one slot, where batches of other shapes are not to be filled up.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
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
    """Numbers in which adapters of one kind may differ; stacked by slot in a stack.

    Attributes:
      rates: [updates] fp32, the learning rate of each update.
      weight_decay, grad_clip: [] fp32.
    """

    rates: Leaf
    weight_decay: Leaf
    grad_clip: Leaf


def traced_step(
    forward: Logits,
    tenant: Tenant,
    n_slots: int,
    batch: Batch,
    compiler_options: Mapping[str, str] | None = None,
) -> tuple[jax.stages.Traced, State]:
    """Traces the step that a stack of such adapters would have, without making the stack.

    Args:
      forward: the adapted function that the loss calls.
      tenant: an adapter; its arrays may be `jax.ShapeDtypeStruct`\\ s with shardings.
      n_slots: the number of such adapters.
      batch: batch of all, arrays [slots, parts, …] or their shapes.
      compiler_options: to compile the step with.

    Returns:
      The traced step, and the shapes of its state.
    """
    kind = StackKind.from_tenant(tenant)
    slot_shapes, axes, shardings = form_of(kind, tenant)
    sharding_tree = shardings
    if shardings is None:
        sharding_tree = jax.tree.map(lambda _: None, slot_shapes)

    def stack_shape(leaf: Shaped, axis: int, sharding: NamedSharding | None) -> Shaped:
        shape = (*leaf.shape[:axis], n_slots, *leaf.shape[axis:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    state, fixed = jax.tree.map(
        stack_shape, slot_shapes, axes, sharding_tree, is_leaf=lambda x: x is None
    )
    numbers = TenantNumbers(
        rates=jax.ShapeDtypeStruct((n_slots, UPDATES), np.float32),
        weight_decay=jax.ShapeDtypeStruct((n_slots,), np.float32),
        grad_clip=jax.ShapeDtypeStruct((n_slots,), np.float32),
    )
    active = jax.ShapeDtypeStruct((n_slots,), np.bool_)
    steps = compiled_steps(kind, forward, axes, shardings, compiler_options)
    base = strip(tenant.params)
    return steps.step_all.trace(state, fixed, numbers, base, active, batch), state


def tree_of(kind: StackKind, base: Tree, adapter: Arrays, fixed: Arrays) -> Tree:
    """Returns the adapted tree of an adapter of a kind.

    Args:
      kind: kind of the adapter.
      base: the plain tree.
      adapter: the arrays that train.
      fixed: the others beside W.
    """

    def to_node(path: str, leaf: Leaf) -> Leaf:
        if path not in kind.shells:
            return leaf
        return replace_arrays(kind.shells[path], leaf, {**adapter[path], **fixed[path]})

    return map_leaves(to_node, base)


def content_of(kind: StackKind, tenant: Tenant) -> tuple[State, Arrays]:
    """Returns the contents of a slot for an adapter, before its first step or when it resumes."""
    adapter, _ = split(tenant.params)
    optimizer = kind.make_optimizer(
        tenant.schedule, tenant.params, tenant.weight_decay, tenant.grad_clip
    )
    fixed: Arrays = {}
    for path, node in nodes_of(tenant.params).items():
        arrays = arrays_of(node)
        fixed[path] = {name: array for name, array in arrays.items() if name not in adapter[path]}

    def make_state(adapter: Adapter) -> State:
        return init_state(adapter, optimizer, tenant.key)

    if tenant.state is None:
        return make_state(adapter), fixed
    first_state: State = jax.eval_shape(make_state, adapter)
    structure: jax.tree_util.PyTreeDef = jax.tree.structure(tenant.state)
    first_structure: jax.tree_util.PyTreeDef = jax.tree.structure(first_state)
    if structure != first_structure:
        raise ValueError(
            "Tenant: the state belongs to another adapter or optimizer. Pass the params and "
            "the options that it was made with."
        )
    return tenant.state, fixed


def form_of(kind: StackKind, tenant: Tenant) -> tuple[Tree, Tree, Tree]:
    """Returns the shapes of a slot's contents, their slot axes, and their shardings."""

    def content(params: Tree, key: jax.Array) -> tuple[State, Arrays]:
        return content_of(kind, dataclasses.replace(tenant, params=params, key=key))

    slot_shapes: tuple[State, Arrays] = jax.eval_shape(content, tenant.params, tenant.key)
    state, fixed = slot_shapes
    fixed_axes: dict[str, dict[str, int]] = {}
    for path, arrays in fixed.items():
        fixed_axes[path] = {name: kind.slot_axis(path, name) for name in arrays}
    axes = (_state_axes(kind, state), fixed_axes)
    return slot_shapes, axes, _shardings(slot_shapes, axes, tenant)


def _state_axes(kind: StackKind, state: State) -> Tree:
    """Returns the slot axis of each array of a stacked state.

    An optimiser's arrays have it where the adapter's have it, if they have their shapes.
    """

    def slot_axis(keys: KeyPath, array: Shaped) -> int:
        path, parameter = _array_at(state.adapter, keys)
        if parameter is None or parameter.shape != array.shape:
            return 0
        return kind.slot_axis(path)

    return jax.tree_util.tree_map_with_path(slot_axis, state)


def _array_at(arrays: Mapping[str, Mapping[str, Leaf]], keys: KeyPath) -> tuple[str, Leaf]:
    """Returns the path at the end of a key path, and the array there, if any."""
    if len(keys) < 2:
        return "", None
    path = getattr(keys[-2], "key", "")
    name = getattr(keys[-1], "key", "")
    return path, arrays.get(path, {}).get(name)


def _shardings(slot_shapes: Tree, axes: Tree, tenant: Tenant) -> Tree:
    """Returns the sharding of each stacked array; None if the adapter is not on a mesh.

    Slots are not split: each array lies as the adapter's, an optimiser's as its parameter's.

    Args:
      slot_shapes: shapes of the state and the fixed arrays of one adapter.
      axes: axes of the slots in each.
      tenant: the adapter, whose arrays have shardings.
    """
    arrays = {path: arrays_of(node) for path, node in nodes_of(tenant.params).items()}
    shardings = [getattr(array, "sharding", None) for array in jax.tree.leaves(arrays)]
    meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
    if not meshes:
        return None

    def stacked_sharding(keys: KeyPath, shape: Shaped, slot_axis: int) -> NamedSharding:
        """Returns the sharding of one array, replicated over the slots."""
        _, array = _array_at(arrays, keys)
        if array is None or array.shape != shape.shape:
            return NamedSharding(meshes[0], PartitionSpec())
        spec: list[str | tuple[str, ...] | None] = [*array.sharding.spec]
        spec += [None] * (array.ndim - len(spec))
        spec.insert(slot_axis, None)
        return NamedSharding(meshes[0], PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(stacked_sharding, slot_shapes, axes)


class StackSteps(NamedTuple):
    """Holds the compiled steps of a stack, which donate its state.

    Attributes:
      step_all: ``(state, fixed, numbers, base, active, batch) -> (state, metrics)``. `active` says
        which slots take a step; the others stay as they are, bit by bit. Arrays of the batch and
        metrics are stacked.
      step_one: ``(state, fixed, numbers, base, slot, batch) -> (state, metrics)``, with one batch.
    """

    step_all: jax.stages.Wrapped
    step_one: jax.stages.Wrapped


def _make_slot_update(
    kind: StackKind, axes: Tree, fixed_axes: Tree
) -> Callable[..., tuple[State, Metrics]]:
    """Returns the function that updates the adapter in one slot of a stack."""

    def update_slot(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        is_active: jax.Array | bool,
        slot: jax.typing.ArrayLike,
        sums: Sums,
        grads: Adapter,
    ) -> tuple[State, Metrics]:
        """Updates the adapter in one slot if it is active, in place."""
        slot_state = indexed(state, slot, axes)
        slot_fixed = indexed(fixed, slot, fixed_axes)
        slot_numbers: TenantNumbers = jax.tree.map(lambda array: array[slot], numbers)

        def schedule(count: jax.Array) -> Leaf:
            last_update = slot_numbers.rates.shape[0] - 1
            return slot_numbers.rates[jnp.minimum(count, last_update)]

        tree = tree_of(kind, base, slot_state.adapter, slot_fixed)
        optimizer = kind.make_optimizer(
            schedule, tree, slot_numbers.weight_decay, slot_numbers.grad_clip
        )

        def either(
            is_good: jax.Array, update: Callable[[], Tree], skip: Callable[[], Tree]
        ) -> Tree:
            return lax.cond(is_good & is_active, update, skip)

        update = make_update(optimizer, schedule, kind.loss, either=either)
        updated_state, metrics = update(slot_state, sums, grads)
        step = jnp.where(is_active, updated_state.step, slot_state.step)
        updated_state = updated_state._replace(step=step)
        return replaced(state, updated_state, slot, axes), metrics

    return update_slot


def compiled_steps(
    kind: StackKind,
    forward: Logits,
    axes: tuple[Tree, Tree],
    shardings: tuple[Tree, Tree] | None,
    compiler_options: Mapping[str, str] | None,
) -> StackSteps:
    """Returns the compiled steps of a stack.

    Gradients are taken side by side, updates one after the other: an update is as it is alone, and
    what it computes with is held for one adapter at a time.

    Args:
      kind: the kind of the adapters.
      forward: the adapted function that the loss calls.
      axes, shardings: axes and shardings of the state and the fixed arrays; see `form_of`.
      compiler_options: to compile the steps with.
    """
    state_axes, fixed_axes = axes
    noisy_forward = neftune(forward, kind.noise) if kind.noise else forward
    gradient = make_gradient(noisy_forward, dropout=kind.dropout, loss=kind.loss)
    update_slot = _make_slot_update(kind, state_axes, fixed_axes)

    def slot_gradient(
        state: State, fixed: Arrays, base: Tree, batch: Batch
    ) -> tuple[Sums, Adapter]:
        _, base_half = split(tree_of(kind, base, state.adapter, fixed))
        return gradient(state, base_half, batch)

    gradients = jax.vmap(
        slot_gradient,
        in_axes=(state_axes, fixed_axes, None, 0),
        out_axes=(0, state_axes.adapter),
    )

    def step_all(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        active: jax.Array,
        batch: Batch,
    ) -> tuple[State, Metrics]:
        """Takes a step with all active adapters."""
        sums, grads = gradients(state, fixed, base, batch)

        def visit(state: State, slot: jax.Array) -> tuple[State, Metrics]:
            """Updates one slot with its part of the sums and gradients."""
            slot_sums = jax.tree.map(lambda array: array[slot], sums)
            slot_grads = indexed(grads, slot, state_axes.adapter)
            return update_slot(
                state, fixed, numbers, base, active[slot], slot, slot_sums, slot_grads
            )

        return lax.scan(visit, state, jnp.arange(active.shape[0]))

    def step_one(
        state: State,
        fixed: Arrays,
        numbers: TenantNumbers,
        base: Tree,
        slot: jax.typing.ArrayLike,
        batch: Batch,
    ) -> tuple[State, Metrics]:
        """Takes a step with the adapter in one slot."""
        slot_state = indexed(state, slot, state_axes)
        slot_fixed = indexed(fixed, slot, fixed_axes)
        sums, grads = slot_gradient(slot_state, slot_fixed, base, batch)
        return update_slot(state, fixed, numbers, base, True, slot, sums, grads)

    state_shardings = None if shardings is None else shardings[0]
    jit = functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=None if shardings is None else (state_shardings, None),
        compiler_options=dict(compiler_options) if compiler_options else None,
    )
    return StackSteps(step_all=jit(step_all), step_one=jit(step_one))


def indexed(stacked: Tree, slot: jax.typing.ArrayLike, axes: Tree) -> Tree:
    """Returns the contents of one slot."""

    def take(array: jax.Array, axis: int) -> jax.Array:
        slot_array: jax.Array = lax.dynamic_index_in_dim(array, slot, axis, keepdims=False)
        return slot_array

    return jax.tree.map(take, stacked, axes)


def replaced(stacked: Tree, content: Tree, slot: jax.typing.ArrayLike, axes: Tree) -> Tree:
    """Returns stacked arrays with new contents in one slot."""

    def put(array: jax.Array, slot_array: jax.Array, axis: int) -> jax.Array:
        updated: jax.Array = lax.dynamic_update_index_in_dim(array, slot_array, slot, axis)
        return updated

    return jax.tree.map(put, stacked, content, axes)
