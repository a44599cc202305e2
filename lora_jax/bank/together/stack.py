"""A stack of adapters of one kind over one base, trained side by side by one compiled step.

Slots stand where those of a bank stand, so that a mixed batch reads the arrays that train. The
*content* of a slot is the state of its adapter, and the *fixed* arrays beside W, which do not
train. In a stack, each array has an axis for the slots; `axes` is a tree of these axes.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.bank.bank import HeldNodes
from lora_jax.bank.slots import ValueSlots, WeightSlots, slot_shape
from lora_jax.bank.together.stacked import (
    UPDATES,
    StackSteps,
    TenantNumbers,
    compiled_steps,
    content_of,
    form_of,
    indexed,
    replaced,
    tree_of,
)
from lora_jax.bank.together.tenants import StackKind, Tenant
from lora_jax.core.types import ArrayBatch, BaseLike, Leaf, Shaped, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained, map_leaves
from lora_jax.training.losses import Logits
from lora_jax.training.step import State


class Stack:
    """Adapters of one kind, each in a slot of stacked arrays.

    Attributes:
      kind: what they have in common.
      names: names of the adapters, by slot; None where it is free.
      state: state of all slots; see `lora_jax.training.State`.
      fixed: the arrays beside W that do not train: scales, and what factors began with.
    """

    def __init__(
        self,
        kind: StackKind,
        forward: Logits,
        tenant: Tenant,
        n_slots: int,
        compiler_options: Mapping[str, str] | None = None,
    ) -> None:
        """Makes a stack whose slots are all free.

        Args:
          kind: the adapters' kind.
          forward: the adapted function that the loss calls.
          tenant: an adapter of the kind.
          n_slots: their number.
          compiler_options: to compile the step with; see `lora_jax.training.Layout`.
        """
        self.kind = kind
        self.names: list[str | None] = []
        slot_shapes, self._axes, self._shardings = form_of(kind, tenant)
        self.state, self.fixed = self._free_slots(n_slots, slot_shapes)
        self._track_new_choices()
        self._numbers = TenantNumbers(
            rates=np.zeros((n_slots, 0), np.float32),
            weight_decay=np.zeros(n_slots, np.float32),
            grad_clip=np.zeros(n_slots, np.float32),
        )
        self._compiler_options = compiler_options
        self._steps_by_forward: dict[Logits, StackSteps] = {}
        self.names += [None] * n_slots
        self.use(forward)

    def use(self, forward: Logits) -> None:
        """Uses another model function for the following steps; compiles each function once."""
        if forward not in self._steps_by_forward:
            self._steps_by_forward[forward] = compiled_steps(
                self.kind, forward, self._axes, self._shardings, self._compiler_options
            )
        self._steps = self._steps_by_forward[forward]

    def grow(self, n_new: int) -> None:
        """Adds free slots; the next step is compiled again."""

        def append(array: jax.Array, new_slots: jax.Array, axis: int) -> jax.Array:
            return jnp.concatenate([array, new_slots], axis)

        def append_zeros(numbers: np.ndarray) -> np.ndarray:
            zeros = np.zeros((n_new, *numbers.shape[1:]), numbers.dtype)
            return np.concatenate([numbers, zeros])

        content = (self.state, self.fixed)
        slot_shapes = jax.tree.map(slot_shape, content, self._axes)
        new_slots = self._free_slots(n_new, slot_shapes)
        self.state, self.fixed = self._placed(jax.tree.map(append, content, new_slots, self._axes))
        self._track_new_choices()
        self._numbers = jax.tree.map(append_zeros, self._numbers)
        self.names += [None] * n_new

    def shrink(self) -> None:
        """Removes the free slots; the next step is compiled again."""
        used_slots = np.array([slot for slot, name in enumerate(self.names) if name is not None])

        def select_used(array: jax.Array, axis: int) -> jax.Array:
            return array[(slice(None),) * axis + (used_slots,)]

        content = jax.tree.map(select_used, (self.state, self.fixed), self._axes)
        self.state, self.fixed = self._placed(content)
        self._track_new_choices()
        self._numbers = jax.tree.map(lambda numbers: numbers[used_slots], self._numbers)
        self.names = [self.names[slot] for slot in used_slots.tolist()]

    def _free_slots(self, n_slots: int, slot_shapes: Tree) -> Tree:
        """Returns the contents of free slots, made from the shapes of one slot."""
        make_array = functools.partial(_empty_array, n_slots)
        return self._placed(jax.tree.map(make_array, slot_shapes, self._axes))

    def _placed(self, content: Tree) -> Tree:
        """Returns slot contents placed on the stack's mesh, if it has one."""
        return content if self._shardings is None else jax.device_put(content, self._shardings)

    def _track_new_choices(self) -> None:
        """Starts to track choices of the current arrays, after these were replaced."""
        self._held_adapters = HeldNodes()
        self._held_fixed = HeldNodes()

    def _writable_state(self) -> State:
        """Returns the state for donation; choices that callers hold keep their arrays."""
        adapter = self._held_adapters.writable(self.state.adapter)
        state: State = self.state._replace(adapter=adapter)
        return state

    def put(self, name: str, tenant: Tenant) -> None:
        """Puts an adapter into a free slot."""
        slot = self.names.index(None)
        slot_content = content_of(self.kind, tenant)
        content = (self._writable_state(), self._held_fixed.writable(self.fixed))
        self.state, self.fixed = _put(content, slot_content, np.int32(slot), _flat(self._axes))
        self._numbers = self._numbers._replace(rates=self._rates_with_tenant(slot, tenant))
        self._numbers.weight_decay[slot] = tenant.weight_decay
        self._numbers.grad_clip[slot] = tenant.grad_clip
        self.names[slot] = name

    def _rates_with_tenant(self, slot: int, tenant: Tenant) -> np.ndarray:
        """Returns the learning rates of all slots, [slots, updates], with one adapter's added."""
        old_rates = self._numbers.rates
        n_updates = -(-tenant.steps // UPDATES) * UPDATES
        rates_of_updates = jax.vmap(tenant.schedule)(jnp.arange(n_updates))
        rates = np.zeros((len(self.names), max(n_updates, old_rates.shape[1])), np.float32)
        rates[:, : old_rates.shape[1]] = old_rates
        rates[slot, :n_updates] = np.array(rates_of_updates, np.float32)
        return rates

    def take(self, name: str) -> State:
        """Returns a copy of the state of one adapter."""
        slot = self.names.index(name)
        state_axes = self._axes[0]
        state: State = _take(self.state, np.int32(slot), _flat(state_axes))
        return state

    def free(self, name: str) -> None:
        """Frees the slot of an adapter."""
        self.names[self.names.index(name)] = None

    def tree(self, name: str, base: Tree) -> Tree:
        """Returns a copy of one adapter as an adapted tree over the base."""
        slot = np.int32(self.names.index(name))
        state, fixed = _take((self.state, self.fixed), slot, _flat(self._axes))
        return tree_of(self.kind, base, state.adapter, fixed)

    def step(
        self, base: Tree, calls: Sequence[Mapping[str, ArrayBatch]]
    ) -> dict[str, dict[str, float]]:
        """Takes a step with each adapter that has a batch; the others stay unchanged.

        Args:
          base: the plain tree.
          calls: batches by name, arrays [parts, …], as `calls_of` returned them.

        Returns:
          The metrics of each adapter, by name; see `lora_jax.training.make_step`.
        """
        metrics_of: dict[str, Tree] = {}
        if len(calls) == 1:
            batches = calls[0]
            arguments = self._arguments(base, batches)
            self.state, stacked_metrics = self._steps.step_all(self._writable_state(), *arguments)
            stacked_metrics = jax.device_get(stacked_metrics)
            for name in batches:
                index = self.names.index(name)
                metrics_of[name] = {key: values[index] for key, values in stacked_metrics.items()}
        else:
            for name, batch in _named_batches(calls):
                slot = np.int32(self.names.index(name))
                self.state, metrics_of[name] = self._steps.step_one(
                    self._writable_state(), self.fixed, self._numbers, base, slot, batch
                )
        numbers_of: dict[str, dict[str, float]] = {}
        for name, metrics in jax.device_get(metrics_of).items():
            numbers_of[name] = {key: float(value) for key, value in metrics.items()}
        return numbers_of

    def compile(
        self, base: Tree, calls: Sequence[Mapping[str, ArrayBatch]]
    ) -> list[jax.stages.Compiled]:
        """Compiles the programs that `step` would run for these batches, without running them.

        Args:
          base, calls: see `step`.
        """
        if len(calls) == 1:
            arguments = self._arguments(base, calls[0])
            return [self._steps.step_all.lower(self.state, *arguments).compile()]
        programs = []
        for name, batch in _named_batches(calls):
            slot = np.int32(self.names.index(name))
            lowered = self._steps.step_one.lower(
                self.state, self.fixed, self._numbers, base, slot, batch
            )
            programs.append(lowered.compile())
        return programs

    def _arguments(self, base: Tree, batches: Mapping[str, ArrayBatch]) -> tuple[Tree, ...]:
        """Returns the arguments of the joint step after the state."""
        is_active = np.array([name in batches for name in self.names])
        any_batch = list(batches.values())[0]
        blank_batch = jax.tree.map(np.zeros_like, any_batch)
        batch_of_slots = [batches.get(name or "", blank_batch) for name in self.names]
        stacked_batch = jax.tree.map(lambda *arrays: np.stack(arrays), *batch_of_slots)
        return self.fixed, self._numbers, base, is_active, stacked_batch

    def slots(self, base: Tree) -> Tree:
        """Returns the trained arrays as a bank's tree without copies; its slot 0 is the base.

        While the tree is held, no step changes it.
        """

        def with_slots(path: str, leaf: Leaf) -> Tree:
            if path not in self.kind.shells:
                return leaf
            arrays = {**self.state.adapter[path], **self.fixed[path]}
            return _slots(self.kind.shells[path], leaf, arrays)

        tree = map_leaves(with_slots, base)
        self._held_adapters.watch(tree)
        self._held_fixed.watch(tree)
        return tree


def _named_batches(
    calls: Sequence[Mapping[str, ArrayBatch]],
) -> list[tuple[str, ArrayBatch]]:
    """Returns the (adapter name, batch) pairs of all calls."""
    return [(name, batch) for call in calls for name, batch in call.items()]


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stacked: Tree, slot_tree: Tree, slot: jax.typing.ArrayLike, axes: tuple[int, ...]) -> Tree:
    return replaced(stacked, slot_tree, slot, jax.tree.unflatten(jax.tree.structure(stacked), axes))


@functools.partial(jax.jit, static_argnums=2)
def _take(stacked: Tree, slot: jax.typing.ArrayLike, axes: tuple[int, ...]) -> Tree:
    return indexed(stacked, slot, jax.tree.unflatten(jax.tree.structure(stacked), axes))


def _flat(axes: Tree) -> tuple[int, ...]:
    """Returns the axes of a tree's arrays as a hashable argument."""
    return tuple(jax.tree.leaves(axes))


def _empty_array(n_slots: int, leaf: Shaped, axis: int) -> jax.Array:
    """Returns an array of free slots, from the shape of one slot and the slot axis."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), n_slots)
    shape = (*leaf.shape[:axis], n_slots, *leaf.shape[axis:])
    return jnp.zeros(shape, leaf.dtype)


def _slots(shell: Node, base: BaseLike, arrays: Mapping[str, jax.Array]) -> Tree:
    """Returns the slots of one weight, without a slot for the base."""
    if isinstance(shell, Trained):
        return ValueSlots({"value": arrays["value"]}, base=base)
    if not isinstance(shell, LoraWeight) or shell.extras or "start_a" in arrays:
        raise ValueError(
            "Factors that were initialized from W, DoRA and other variants cannot train in "
            "the slots of a bank. Train them, and add the result to a Bank with "
            "Together.tree(name)."
        )
    return WeightSlots(
        base=base,
        arrays={name: arrays[name] for name in ("a", "b", "scale")},
        roles=shell.roles,
        uses=shell.uses,
        has_base=False,
    )
