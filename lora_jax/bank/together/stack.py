"""A stack: adapters of one kind over one base, which one compiled step trains side by side.

Slots stand where those of a bank stand, so that a mixed batch reads the arrays that train.
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
    """Adapters of one kind in slots.

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
        shapes, self._axes, self._where = form_of(kind, like)
        self.state, self.fixed = self._empty(slots, shapes)
        self._forget_choices()
        sizes: Sequence[tuple[int, ...]] = ((slots, 0), (slots,), (slots,))
        self._numbers = TenantNumbers(*(np.zeros(size, np.float32) for size in sizes))
        self._options = compiler_options
        self._steps_by_forward: dict[Logits, StackSteps] = {}
        self.names += [None] * slots
        self.use(forward)

    def use(self, forward: Logits) -> None:
        """Takes the steps from now on with a function; compiles once for each function."""
        if forward not in self._steps_by_forward:
            self._steps_by_forward[forward] = compiled_steps(
                self.kind, forward, self._axes, self._where, self._options
            )
        self._steps = self._steps_by_forward[forward]

    def grow(self, more: int) -> None:
        """Adds free slots; the next step compiles anew."""

        old = (self.state, self.fixed)
        new = self._empty(more, jax.tree.map(slot_shape, old, self._axes))
        longer = lambda *both: jnp.concatenate(both[:2], both[2])  # noqa: E731
        self.state, self.fixed = self._placed(jax.tree.map(longer, old, new, self._axes))
        self._forget_choices()
        self._numbers = TenantNumbers(
            *(np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]) for x in self._numbers)
        )
        self.names += [None] * more

    def shrink(self) -> None:
        """Drops the free slots; the next step compiles anew."""
        kept = np.array([slot for slot, name in enumerate(self.names) if name is not None])

        def fewer(array: jax.Array, axis: int) -> jax.Array:
            return array[(slice(None),) * axis + (kept,)]

        content = jax.tree.map(fewer, (self.state, self.fixed), self._axes)
        self.state, self.fixed = self._placed(content)
        self._forget_choices()
        self._numbers = TenantNumbers(*(x[kept] for x in self._numbers))
        self.names = [self.names[slot] for slot in kept.tolist()]

    def _empty(self, n: int, shapes: Tree) -> Tree:
        """Returns n free slots, from the shapes of one."""
        return self._placed(jax.tree.map(functools.partial(_empty, n), shapes, self._axes))

    def _placed(self, content: Tree) -> Tree:
        return content if self._where is None else jax.device_put(content, self._where)

    def _forget_choices(self) -> None:
        """Begins to watch choices of new arrays: of what trains, and of what does not."""
        self._held, self._fixed_held = HeldNodes(), HeldNodes()

    def _writable_state(self) -> State:
        """Returns the state, whose memory may be taken; choices that are held keep their arrays."""
        state: State = self.state._replace(adapter=self._held.writable(self.state.adapter))
        return state

    def put(self, name: str, tenant: Tenant) -> None:
        """Puts an adapter into a free slot."""
        slot = self.names.index(None)
        content = content_of(self.kind, tenant)
        mine = (self._writable_state(), self._fixed_held.writable(self.fixed))
        self.state, self.fixed = _put(mine, content, np.int32(slot), _flat(self._axes))
        updates = -(-tenant.steps // UPDATES) * UPDATES
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
        state: State = _taken(self.state, np.int32(slot), _flat(self._axes[0]))
        return state

    def free(self, name: str) -> None:
        """Frees the slot of an adapter."""
        self.names[self.names.index(name)] = None

    def tree(self, name: str, base: Tree) -> Tree:
        """Returns a copy of one adapter as an adapted tree over the base."""
        slot = np.int32(self.names.index(name))
        state, fixed = _taken((self.state, self.fixed), slot, _flat(self._axes))
        return tree_of(self.kind, base, state.adapter, fixed)

    def step(
        self, base: Tree, calls: Sequence[Mapping[str, ArrayBatch]]
    ) -> dict[str, dict[str, float]]:
        """Takes a step with each adapter that has a batch; the others stay as they are.

        Args:
          base: the plain tree.
          calls: batches by name, arrays [parts, …], as `calls_of` returned them.

        Returns:
          The metrics of each adapter, by name; see `lora_jax.training.make_step`.
        """
        metrics_of: dict[str, Tree] = {}
        if len(calls) == 1:
            (batches,) = calls
            self.state, metrics = self._steps.step_all(
                self._writable_state(), *self._arguments(base, batches)
            )
            slots = {name: self.names.index(name) for name in batches}
            whole = jax.device_get(metrics)
            metrics_of = {n: {key: x[i] for key, x in whole.items()} for n, i in slots.items()}
        else:
            for name, batch in ((name, batch) for call in calls for name, batch in call.items()):
                slot = np.int32(self.names.index(name))
                self.state, metrics_of[name] = self._steps.step_one(
                    self._writable_state(), self.fixed, self._numbers, base, slot, batch
                )
        return {
            name: {key: float(value) for key, value in metrics.items()}
            for name, metrics in jax.device_get(metrics_of).items()
        }

    def compile(
        self, base: Tree, calls: Sequence[Mapping[str, ArrayBatch]]
    ) -> list[jax.stages.Compiled]:
        """Compiles the programs by which `step` takes such a step; takes none.

        Args:
          base, calls: see `step`.
        """
        if len(calls) == 1:
            arguments = self._arguments(base, calls[0])
            return [self._steps.step_all.lower(self.state, *arguments).compile()]
        return [
            self._steps.step_one.lower(
                self.state, self.fixed, self._numbers, base, np.int32(self.names.index(name)), batch
            ).compile()
            for call in calls
            for name, batch in call.items()
        ]

    def _arguments(self, base: Tree, batches: Mapping[str, ArrayBatch]) -> tuple[Tree, ...]:
        """Returns the arguments of the step of all slots after the state."""
        active = np.array([name in batches for name in self.names])
        blank = jax.tree.map(np.zeros_like, next(iter(batches.values())))
        rows = [batches.get(name or "", blank) for name in self.names]
        batch = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        return self.fixed, self._numbers, base, active, batch

    def slots(self, base: Tree) -> Tree:
        """Returns the arrays that train as a bank's tree, whose slot 0 is the base; no copies.

        While the tree is held, no step changes it.
        """

        def slots(path: str, leaf: Leaf) -> Tree:
            if path not in self.kind.shells:
                return leaf
            arrays = {**self.state.adapter[path], **self.fixed[path]}
            return _slots(self.kind.shells[path], leaf, arrays)

        tree = map_leaves(slots, base)
        self._held.watch(tree)
        self._fixed_held.watch(tree)
        return tree


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(stacked: Tree, slot_tree: Tree, slot: jax.typing.ArrayLike, axes: tuple[int, ...]) -> Tree:
    return replaced(stacked, slot_tree, slot, jax.tree.unflatten(jax.tree.structure(stacked), axes))


@functools.partial(jax.jit, static_argnums=2)
def _taken(stacked: Tree, slot: jax.typing.ArrayLike, axes: tuple[int, ...]) -> Tree:
    return indexed(stacked, slot, jax.tree.unflatten(jax.tree.structure(stacked), axes))


def _flat(axes: Tree) -> tuple[int, ...]:
    """Returns the axes of a tree's arrays, as an argument that a compiled function is chosen by."""
    return tuple(jax.tree.leaves(axes))


def _empty(n: int, leaf: Shaped, axis: int) -> jax.Array:
    """Returns n free slots."""
    shape = (*leaf.shape[:axis], n, *leaf.shape[axis:])
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), n)
    return jnp.zeros(shape, leaf.dtype)


def _slots(shell: Node, base: BaseLike, arrays: Mapping[str, jax.Array]) -> Tree:
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
