"""A stack: adapters of one kind over one base, which one compiled step trains side by side.

The step is `lora_jax.training.make_step` over all slots: gradients under `jax.vmap`, where products
with the base are one product for all, then the update of each, by its own loss, clip and decay.
Slots stand where those of a bank stand, so that a mixed batch reads the arrays that train.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.bank.slots import ValueSlots, WeightSlots
from lora_jax.bank.tenants import Arrays, Kind, Tenant, arrays_of, with_arrays
from lora_jax.lorafy import nodes_of, split, strip
from lora_jax.training.losses import Logits, Sums
from lora_jax.training.neftune import neftune
from lora_jax.training.step import Metrics, State, init_state, make_gradient, make_update
from lora_jax.weight import LoraWeight, Trained, leaves_of

_UPDATES = 1024  # learning rates are stored for a multiple of so many updates


class Numbers(NamedTuple):
    """Holds the numbers that adapters of a kind differ in; in a stack, stacked.

    Attributes:
      rates: [updates] fp32, the learning rate of each update.
      weight_decay, grad_clip: [] fp32.
    """

    rates: Any
    weight_decay: Any
    grad_clip: Any


class Stack:
    """Adapters of one kind in slots.

    Attributes:
      kind: what they have in common.
      names: of the adapters, by slot; None where it is free.
      state: of all slots; see `lora_jax.training.State`.
      fixed: the arrays beside W that do not train: scales, and what factors began with.
    """

    def __init__(
        self,
        kind: Kind,
        forward: Logits,
        like: Tenant,
        slots: int,
        compiler_options: Mapping[str, str] | None = None,
    ) -> None:
        """Makes a stack of free slots.

        Args:
          kind: the adapters' kind.
          forward: the adapted function that the loss calls.
          like: an adapter of the kind.
          slots: their number.
          compiler_options: to compile the step with; see `lora_jax.training.Layout`.
        """
        self.kind = kind
        self.names: list[str | None] = []
        shapes, self._axes, self._where = _form(kind, like)
        self.state, self.fixed = self._empty(slots, shapes)
        sizes: Any = ((slots, 0), (slots,), (slots,))
        self._numbers = Numbers(*(np.zeros(size, np.float32) for size in sizes))
        self._step = _compiled(kind, forward, self._axes, self._where, compiler_options)
        self.names += [None] * slots

    def grow(self, more: int) -> None:
        """Adds free slots; the next step compiles anew."""

        old = (self.state, self.fixed)
        new = self._empty(more, jax.tree.map(_without, old, self._axes))
        longer = lambda *both: jnp.concatenate(both[:2], both[2])  # noqa: E731
        self.state, self.fixed = self._placed(jax.tree.map(longer, old, new, self._axes))
        self._numbers = Numbers(
            *(np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]) for x in self._numbers)
        )
        self.names += [None] * more

    def shrink(self) -> None:
        """Drops the free slots; the next step compiles anew."""
        kept = np.array([slot for slot, name in enumerate(self.names) if name is not None])

        def fewer(array: Any, axis: int) -> Any:
            return array[(slice(None),) * axis + (kept,)]

        content = jax.tree.map(fewer, (self.state, self.fixed), self._axes)
        self.state, self.fixed = self._placed(content)
        self._numbers = Numbers(*(x[kept] for x in self._numbers))
        self.names = [self.names[slot] for slot in kept.tolist()]

    def _empty(self, n: int, shapes: Any) -> Any:
        """Returns n free slots, from the shapes of one."""
        return self._placed(jax.tree.map(functools.partial(_empty, n), shapes, self._axes))

    def _placed(self, content: Any) -> Any:
        return content if self._where is None else jax.device_put(content, self._where)

    def put(self, name: str, tenant: Tenant) -> None:
        """Puts an adapter into a free slot."""
        slot = self.names.index(None)
        content = _content(self.kind, tenant)
        self.state, self.fixed = _put(
            (self.state, self.fixed), content, np.int32(slot), _Axes(self._axes)
        )
        updates = -(-tenant.steps // _UPDATES) * _UPDATES
        rates = np.array(jax.vmap(tenant.schedule)(jnp.arange(updates)), np.float32)
        wide = max(updates, self._numbers.rates.shape[1])
        all_rates = np.zeros((len(self.names), wide), np.float32)
        all_rates[:, : self._numbers.rates.shape[1]] = self._numbers.rates
        all_rates[slot, :updates] = rates
        self._numbers = self._numbers._replace(rates=all_rates)
        self._numbers.weight_decay[slot] = tenant.weight_decay
        self._numbers.grad_clip[slot] = tenant.grad_clip
        self.names[slot] = name

    def take(self, name: str) -> State:
        """Returns a copy of the state of one adapter."""
        slot = self.names.index(name)
        return _taken(self.state, np.int32(slot), _Axes(self._axes[0]))

    def free(self, name: str) -> None:
        """Frees the slot of an adapter."""
        self.names[self.names.index(name)] = None

    def tree(self, name: str, base: Any) -> Any:
        """Returns a copy of one adapter as an adapted tree over the base."""
        slot = np.int32(self.names.index(name))
        state, fixed = _taken((self.state, self.fixed), slot, _Axes(self._axes))
        return tree_of(self.kind, base, state.adapter, fixed)

    def step(self, base: Any, batches: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        """Takes a step with each adapter that has a batch; the others stay as they are.

        Args:
          base: the plain tree.
          batches: by name, arrays [parts, …] of the same shapes.

        Returns:
          The metrics of each adapter, by name; see `lora_jax.training.make_step`.
        """
        self.state, metrics = self._step(self.state, *self._arguments(base, batches))
        found = jax.device_get(metrics)
        return {
            name: {key: float(values[slot]) for key, values in found.items()}
            for slot, name in enumerate(self.names)
            if name is not None and name in batches
        }

    def compiled_bytes(self, base: Any, batch: Any) -> int:
        """Returns the bytes that a step needs beside the base: its state and what it computes with.

        Args:
          base: the plain tree, or its shapes.
          batch: of one adapter.
        """
        names = [name for name in self.names if name is not None]
        arguments = self._arguments(base, dict.fromkeys(names, batch))
        memory: Any = self._step.lower(self.state, *arguments).compile().memory_analysis()
        state = sum(x.nbytes for x in jax.tree.leaves(self.state))
        return state + memory.temp_size_in_bytes

    def _arguments(self, base: Any, batches: Mapping[str, Any]) -> tuple[Any, ...]:
        """Returns the arguments of the compiled step after the state."""
        active = np.array([name in batches for name in self.names])
        blank = jax.tree.map(np.zeros_like, next(iter(batches.values())))
        rows = [batches.get(name or "", blank) for name in self.names]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        return self.fixed, self._numbers, active, base, batch

    def slots(self, base: Any) -> Any:
        """Returns the arrays that train as a bank's tree, whose slot 0 is the base; no copies."""
        leaves, treedef = leaves_of(base)
        own = {path: {**self.state.adapter[path], **self.fixed[path]} for path in self.kind.shells}
        return treedef.unflatten(
            _slots(self.kind.shells[path], leaf, own[path], self.kind.slot_axis(path))
            if path in own
            else leaf
            for path, leaf in leaves
        )


def traced_step(
    forward: Logits,
    like: Tenant,
    slots: int,
    batch: Any,
    compiler_options: Mapping[str, str] | None = None,
) -> tuple[jax.stages.Traced, State]:
    """Traces the step of a stack that need not be there.

    Args:
      forward: the adapted function that the loss calls.
      like: an adapter; its arrays may be `jax.ShapeDtypeStruct`\\ s with shardings.
      slots: the number of such adapters.
      batch: of all, arrays [slots, parts, …] or their shapes.
      compiler_options: to compile the step with.

    Returns:
      The traced step, and the shapes of its state.
    """
    kind = Kind.of(like)
    shapes, axes, where = _form(kind, like)
    if where is None:
        where = jax.tree.map(lambda _: None, shapes)

    def stacked(one: Any, axis: int, place: Any) -> jax.ShapeDtypeStruct:
        shape = (*one.shape[:axis], slots, *one.shape[axis:])
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=place)

    is_none = lambda x: x is None  # noqa: E731
    state, fixed = jax.tree.map(stacked, shapes, axes, where, is_leaf=is_none)
    sizes: Any = ((slots, _UPDATES), (slots,), (slots,))
    numbers = Numbers(*(jax.ShapeDtypeStruct(size, np.float32) for size in sizes))
    active = jax.ShapeDtypeStruct((slots,), np.bool_)
    step = _compiled(kind, forward, axes, _form(kind, like)[2], compiler_options)
    return step.trace(state, fixed, numbers, active, strip(like.params), batch), state


def tree_of(kind: Kind, base: Any, adapter: Arrays, fixed: Arrays) -> Any:
    """Returns an adapted tree of a kind.

    Args:
      kind: of the adapter.
      base: the plain tree.
      adapter: the arrays that train.
      fixed: the others beside W.
    """
    leaves, treedef = leaves_of(base)

    def node(path: str, leaf: Any) -> Any:
        if path not in kind.shells:
            return leaf
        return with_arrays(kind.shells[path], leaf, {**adapter[path], **fixed[path]})

    return treedef.unflatten(node(path, leaf) for path, leaf in leaves)


def _content(kind: Kind, tenant: Tenant) -> tuple[State, Arrays]:
    """Returns what a slot holds of an adapter before its first step, or where it goes on."""
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
    begun: Any = jax.eval_shape(lambda a: init_state(a, optimizer, tenant.key), adapter)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (tenant.state, begun)]
    if structures[0] != structures[1]:
        raise ValueError(
            "Tenant: the state to go on from is of another adapter or optimiser: give the params "
            "and the options that it was made with"
        )
    return tenant.state, fixed


def _form(kind: Kind, like: Tenant) -> tuple[Any, Any, Any]:
    """Returns shapes, axes of the slots and stacked shardings of (state, fixed arrays)."""

    def content(params: Any, key: Any) -> tuple[State, Arrays]:
        return _content(kind, dataclasses.replace(like, params=params, key=key))

    shapes: Any = jax.eval_shape(content, like.params, like.key)
    axes = _axes(kind, shapes[0]), _axes_of_arrays(kind, shapes[1])
    return shapes, axes, _shardings(shapes, axes, like)


def _axes(kind: Kind, state: State) -> Any:
    """Returns the axis of the slots in each array of a stacked state.

    An optimiser's arrays have it where the adapter's have it, if they have their shapes.
    """

    def of(keys: Any, array: Any) -> int:
        path, name = (getattr(key, "key", "") for key in (None, None, *keys)[-2:])
        parameter = state.adapter.get(path, {}).get(name)
        if parameter is None or parameter.shape != array.shape:
            return 0
        return kind.slot_axis(path)

    return jax.tree_util.tree_map_with_path(of, state)


def _axes_of_arrays(kind: Kind, arrays: Arrays) -> Any:
    return {path: dict.fromkeys(own, kind.slot_axis(path)) for path, own in arrays.items()}


def _shardings(shapes: Any, axes: Any, like: Tenant) -> Any:
    """Returns the sharding of each stacked array; None where the adapter lies on no mesh.

    Slots are not split: each array lies as the adapter's, an optimiser's as its parameter's.

    Args:
      shapes: of the state and the fixed arrays of one adapter.
      axes: of the slots in each.
      like: the adapter, whose arrays have shardings.
    """
    arrays = {path: arrays_of(node) for path, node in nodes_of(like.params).items()}
    places = [getattr(x, "sharding", None) for x in jax.tree.leaves(arrays)]
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    if not meshes:
        return None

    def of(keys: Any, shape: Any, axis: int) -> NamedSharding:
        path, name = (getattr(key, "key", "") for key in (None, None, *keys)[-2:])
        array = arrays.get(path, {}).get(name)
        spec: list[Any] = []
        if array is not None and array.shape == shape.shape:
            spec = [*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec))]
            spec.insert(axis, None)
        return NamedSharding(meshes[0], PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of, shapes, axes)


class _Axes:
    """Axes of arrays in a tree, as an argument that a compiled function is chosen by."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        leaves, treedef = jax.tree.flatten(tree)
        self._key = (tuple(leaves), treedef)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Axes) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stacked: Any, one: Any, slot: Any, axes: _Axes) -> Any:
    return _replace(stacked, one, slot, axes.tree)


@functools.partial(jax.jit, static_argnums=2)
def _taken(stacked: Any, slot: Any, axes: _Axes) -> Any:
    return _index(stacked, slot, axes.tree)


def _without(array: Any, axis: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of one slot."""
    return jax.ShapeDtypeStruct((*array.shape[:axis], *array.shape[axis + 1 :]), array.dtype)


def _empty(n: int, one: Any, axis: int) -> jax.Array:
    """Returns n free slots."""
    shape = (*one.shape[:axis], n, *one.shape[axis:])
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), n)
    return jnp.zeros(shape, one.dtype)


def _compiled(
    kind: Kind,
    forward: Logits,
    both_axes: tuple[Any, Any],
    where: tuple[Any, Any] | None,
    compiler_options: Mapping[str, str] | None,
) -> Any:
    """Returns ``(state, fixed, numbers, active, base, batch) -> (state, metrics)``: a stack's step.

    Gradients are taken side by side, updates one after the other: an update is as it is alone, and
    what it computes with is held for one adapter at a time. A slot that is not active stays as it
    is, bit by bit.
    """
    axes, axes_of_fixed = both_axes
    noisy = neftune(forward, kind.noise) if kind.noise else forward
    gradient = make_gradient(noisy, dropout=kind.dropout, loss=kind.loss)

    def gradient_of_one(state: State, fixed: Arrays, base: Any, batch: Any) -> tuple[Sums, Any]:
        whole = tree_of(kind, base, state.adapter, fixed)
        return gradient(state, split(whole)[1], batch)

    gradients = jax.vmap(
        gradient_of_one, in_axes=(axes, axes_of_fixed, None, 0), out_axes=(0, axes.adapter)
    )

    def visit(xs: Any, state: State, slot: Any) -> tuple[State, Metrics]:
        """Updates the adapter in one slot, in the memory of the stack."""
        fixed, numbers, active, base, sums, grads = xs
        one, own = _index(state, slot, axes), _index(fixed, slot, axes_of_fixed)
        rates, weight_decay, grad_clip = (x[slot] for x in numbers)

        def schedule(count: Any) -> Any:
            return rates[jnp.minimum(count, rates.shape[0] - 1)]

        whole = tree_of(kind, base, one.adapter, own)
        optimizer = kind.make_optimizer(schedule, whole, weight_decay, grad_clip)

        def either(is_good: Any, update: Callable[[], Any], skip: Callable[[], Any]) -> Any:
            return lax.cond(is_good & active[slot], update, skip)

        update = make_update(optimizer, schedule, kind.loss, either=either)
        mine = jax.tree.map(lambda x: x[slot], sums)
        new, metrics = update(one, mine, _index(grads, slot, axes.adapter))
        new = new._replace(step=jnp.where(active[slot], new.step, one.step))
        return _replace(state, new, slot, axes), metrics

    def step(
        state: State, fixed: Arrays, numbers: Numbers, active: Any, base: Any, batch: Any
    ) -> tuple[State, Metrics]:
        sums, grads = gradients(state, fixed, base, batch)
        xs = (fixed, numbers, active, base, sums, grads)
        return lax.scan(functools.partial(visit, xs), state, jnp.arange(active.shape[0]))

    out = None if where is None else (where[0], None)
    options = dict(compiler_options) if compiler_options else None
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


def _index(stacked: Any, slot: Any, axes: Any) -> Any:
    """Returns what one slot holds."""
    take = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda x, axis: take(x, slot, axis), stacked, axes)


def _replace(stacked: Any, one: Any, slot: Any, axes: Any) -> Any:
    """Returns stacked arrays with others in one slot."""
    put = lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new, axis: put(x, new, slot, axis), stacked, one, axes)


def _slots(shell: Any, base: Any, arrays: Mapping[str, Any], axis: int) -> Any:
    """Returns the slots of one weight, less the base's."""
    if isinstance(shell, Trained):
        return ValueSlots({"value": arrays["value"]}, base=base)
    if not isinstance(shell, LoraWeight) or shell.extras or "start_a" in arrays:
        raise ValueError(
            "slots: factors that began in W, DoRA and other variants have no slots in a bank as "
            "they train; add the trees that they come to, by Together.tree(name), to a Bank"
        )
    parts = {name: arrays[name] for name in ("a", "b", "scale")}
    return WeightSlots(base, parts, shell.roles, shell.uses, has_base=False)
