"""Trains many adapters over one base at once, each as if it trained by itself.

Batches of the adapters of one stack are filled up to the same shapes, since its compiled step takes
them at once.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lora_jax.bank.bank import OneBase, locked
from lora_jax.bank.mixing import Choice, choose
from lora_jax.bank.stored import BankError
from lora_jax.bank.together.stack import Stack
from lora_jax.bank.together.tenants import StackKind, Tenant
from lora_jax.core.aliases import alias_repeated_objects
from lora_jax.core.opaque import unwrap_opaque_leaves, wrap_opaque_leaves
from lora_jax.core.types import ArrayBatch, Tree
from lora_jax.lorafy import nodes_of
from lora_jax.training.losses import Logits
from lora_jax.training.remat import step_bytes
from lora_jax.training.step import State

BASE = "base"  # the name by which a batch chooses the base alone


class Together:
    """Adapters over one base that train side by side.

    Adapters of one kind (shapes, dropout, loss, optimiser) lie in a stack and take their step in
    one compiled function; those of other kinds have stacks of their own. Memory is that of the
    adapters at their own ranks. Each has its own data, learning rate, schedule, decay, clipping and
    number of steps, joins and leaves when it likes, and is what it would have become alone, with
    the random numbers that it would have drawn alone. One whose loss is not finite keeps its
    weights (see `lora_jax.training.make_step`); the others do not notice. Threads may share it.

    >>> from lora_jax import training
    >>> from lora_jax.bank import Tenant, Together
    >>> params = {"kernel": jnp.zeros((4, 3))}
    >>> def squares(forward, params, batch, dropout_key):
    ...     error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    ...     return training.Sums(error, jnp.float32(len(batch["x"])), {})
    >>> loss = training.Loss(squares)
    >>> def tenant(rate):
    ...     tree = lj.lorafy(params, [lj.LoraRule(targets=["kernel"], rank=2)])
    ...     return Tenant(params=tree, schedule=optax.constant_schedule(rate), steps=9, loss=loss)
    >>> together = Together(lj.adapt(lambda params, x: x @ params["kernel"]), params)
    >>> together.add({"slow": tenant(1e-3), "fast": tenant(1e-1)})
    >>> batch = {"x": jnp.ones((1, 8, 4)), "y": jnp.ones((1, 8, 3))}  # one part, eight rows
    >>> for _ in range(9):
    ...     metrics = together.step({"slow": batch, "fast": batch})
    >>> metrics["fast"]["loss"] < metrics["slow"]["loss"]
    True
    """

    def __init__(
        self, forward: Logits, base: Tree, *, compiler_options: Mapping[str, str] | None = None
    ) -> None:
        """Starts without adapters.

        Args:
          forward: the adapted function that the losses call.
          base: the plain tree that all share; it is not copied.
          compiler_options: to compile steps with: those of a `lora_jax.training.Layout`.
        """
        self._forward = forward
        self._base = wrap_opaque_leaves(alias_repeated_objects(base))
        self._compiler_options = compiler_options
        self._shared = OneBase(base)
        self._lock = threading.RLock()  # held by all that reads or changes what follows
        self._stacks: dict[StackKind, Stack] = {}
        self._stack_of: dict[str, Stack] = {}
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}

    @property
    @locked
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, finished ones included."""
        return tuple(self._stack_of)

    @property
    @locked
    def unfinished(self) -> tuple[str, ...]:
        """The names of the adapters that still have steps to take."""
        return tuple(name for name in self._stack_of if self._done[name] < self._steps[name])

    @locked
    def done(self, name: str) -> int:
        """Returns the number of steps that an adapter has taken."""
        self._check_name(name)
        return self._done[name]

    @locked
    def add(self, tenants: Mapping[str, Tenant], *, allow_base_mismatch: bool = False) -> None:
        """Adds adapters, before the first step or between two steps.

        Where a stack has no free slots, it grows, and its next step compiles anew.

        Args:
          tenants: by name.
          allow_base_mismatch: accept adapters of another base of the same shapes.

        Raises:
          BankError: a name is taken, or an adapter is over another base; none was added.
        """
        sealed_tenants = {
            name: replace(tenant, params=wrap_opaque_leaves(tenant.params))
            for name, tenant in tenants.items()
        }
        for name, tenant in sealed_tenants.items():
            if name == BASE:
                raise BankError(f"together: the name {name!r} is reserved for the base.")
            if name in self._stack_of:
                raise BankError(f"together: the name {name!r} is taken.")
            self._check_shapes(name, tenant)
            if not allow_base_mismatch:
                self._shared.check(f"together: {name!r}", tenant.params)
        names_of_kind: dict[StackKind, list[str]] = {}
        for name, tenant in sealed_tenants.items():
            names_of_kind.setdefault(StackKind.from_tenant(tenant), []).append(name)
        for kind, names in names_of_kind.items():
            if kind not in self._stacks:
                self._stacks[kind] = Stack(
                    kind=kind,
                    forward=self._forward,
                    tenant=sealed_tenants[names[0]],
                    n_slots=len(names),
                    compiler_options=self._compiler_options,
                )
            stack = self._stacks[kind]
            n_missing = len(names) - stack.names.count(None)
            if n_missing > 0:
                stack.grow(n_missing)
            for name in names:
                tenant = sealed_tenants[name]
                stack.put(name, tenant)
                self._stack_of[name] = stack
                self._steps[name] = tenant.steps
                self._done[name] = tenant.done

    @locked
    def step(self, batches: Mapping[str, ArrayBatch]) -> dict[str, dict[str, float]]:
        """Takes one step with each adapter that has a batch; the others stay unchanged.

        Args:
          batches: by name, arrays [parts, …] as `lora_jax.training.make_step` takes them. Those of
            adapters of one kind have the same shapes; with an array "weights" among them, in which
            0 is for what does not count, they are filled up to the largest with zeros. Where there
            is dropout or noise, which draws by shape, adapters of one kind whose batches differ in
            shape take their steps one after the other, in one compiled function for each shape.

        Returns:
          The metrics by name; see `lora_jax.training.make_step`.

        Raises:
          BankError: there is no adapter of a name, it is done, or shapes differ in a stack.
        """
        for name in batches:
            self._check_name(name)
            if self._done[name] == self._steps[name]:
                raise BankError(
                    f"together: {name!r} has already taken its {self._steps[name]} steps."
                )
        metrics: dict[str, dict[str, float]] = {}
        for stack, calls in self._calls(batches):
            metrics |= stack.step(self._base, calls)
        for name in batches:
            self._done[name] += 1
        return {name: metrics[name] for name in batches}

    @locked
    def compile(self, batches: Mapping[str, ArrayBatch]) -> int | None:
        """Compiles the programs that `step` would run for these batches, without running them.

        Args:
          batches: by name; see `step`.

        Returns:
          The bytes of a device that the largest program takes, with the state of adapters in other
          stacks; None where the compiler does not say.

        Raises:
          BankError: see `step`.
        """
        all_state_bytes = sum(_bytes_of_device(stack.state) for stack in self._stacks.values())
        total_bytes = []
        is_known = True
        for stack, calls in self._calls(batches):
            other_state_bytes = all_state_bytes - _bytes_of_device(stack.state)
            for program in stack.compile(self._base, calls):
                program_bytes = step_bytes(program)
                if program_bytes is None:
                    is_known = False
                else:
                    total_bytes.append(program_bytes + other_state_bytes)
        return max(total_bytes) if total_bytes and is_known else None

    @locked
    def use(self, forward: Logits) -> None:
        """Uses another adapted function of the same model for the following steps."""
        self._forward = forward
        for stack in self._stacks.values():
            stack.use(forward)

    def _calls(
        self, batches: Mapping[str, ArrayBatch]
    ) -> list[tuple[Stack, Sequence[Mapping[str, ArrayBatch]]]]:
        """Returns each stack with the calls of its step, before any call is made."""
        calls_of_stacks = []
        for kind, stack in self._stacks.items():
            stack_batches = {name: batch for name, batch in batches.items() if name in stack.names}
            if stack_batches:
                calls_of_stacks.append((stack, calls_of(stack_batches, draws=kind.dropout)))
        return calls_of_stacks

    @locked
    def tree(self, name: str) -> Tree:
        """Returns an adapter as an adapted tree over the base, with copied arrays.

        Raises:
          BankError: there is no adapter of the name.
        """
        self._check_name(name)
        return unwrap_opaque_leaves(self._stack_of[name].tree(name, self._base))

    @locked
    def state(self, name: str) -> State:
        """Returns the training state of an adapter, with copied arrays.

        Raises:
          BankError: there is no adapter of the name.
        """
        self._check_name(name)
        return self._stack_of[name].take(name)

    @locked
    def remove(self, name: str) -> Tree:
        """Removes an adapter, frees its slot, and returns its tree as `tree` does.

        Raises:
          BankError: there is no adapter of the name.
        """
        tree = self.tree(name)
        self._stack_of.pop(name).free(name)
        del self._steps[name], self._done[name]
        return tree

    @locked
    def shrink(self, steps: int = 1) -> None:
        """Removes the free slots of stacks that are at least half empty.

        Their next step compiles anew, for fewer adapters, so the last bits of what they compute may
        change.

        Args:
          steps: only stacks shrink in which an adapter has to take as many.
        """
        for kind, stack in list(self._stacks.items()):
            names = [name for name in stack.names if name is not None]
            if not names:
                del self._stacks[kind]
                continue
            is_half_free = 2 * len(names) <= len(stack.names)
            steps_left = max(self._steps[name] - self._done[name] for name in names)
            if is_half_free and steps_left >= steps:
                stack.shrink()

    @locked
    def choose(self, names: list[str]) -> Choice:
        """Returns the base with the trained arrays, for a batch of a `mixed` function.

        Nothing is copied or compiled: samplers read the present weights. A choice stays as it is
        while someone holds it: the next step then works on a copy of the weights, and otherwise
        takes their memory.

        Args:
          names: the adapter of each example, all of one kind; "base" is the base alone.

        Raises:
          BankError: there is no adapter of a name, or they are of several kinds.
        """
        adapter_of_stack: dict[int, str] = {}
        for name in names:
            if name != BASE:
                self._check_name(name)
                adapter_of_stack[id(self._stack_of[name])] = name
        adapters = list(adapter_of_stack.values())
        if len(adapters) != 1:
            listing = ", ".join(map(repr, adapters)) or "the base alone"
            raise BankError(
                f"together: {listing} are of different kinds. All adapters of one batch need "
                "the same rank, targets and loss. Put the others into another batch."
            )
        stack = self._stack_of[adapters[0]]
        slot_ids = [0 if name == BASE else stack.names.index(name) + 1 for name in names]
        return choose(stack.slots(self._base), slot_ids)

    def _check_name(self, name: str) -> None:
        """Raises a BankError if no adapter has this name."""
        if name not in self._stack_of:
            listing = ", ".join(map(repr, self._stack_of)) or "none"
            raise BankError(f"together: there is no adapter {name!r}. The adapters are {listing}.")

    def _check_shapes(self, name: str, tenant: Tenant) -> None:
        """Raises a BankError if an adapter's weights differ in shape from the base."""
        for path, node in nodes_of(tenant.params).items():
            leaf = self._shared.leaves.get(path)
            base_shape = None if leaf is None else tuple(leaf.shape)
            if base_shape != node.shape:
                content = "nothing there" if leaf is None else f"the shape {base_shape}"
                raise BankError(
                    f"together: {name!r} adapts {path!r} of shape {node.shape}, but the base "
                    f"has {content} there."
                )


def calls_of(
    batches: Mapping[str, ArrayBatch], *, draws: bool
) -> Sequence[Mapping[str, ArrayBatch]]:
    """Returns the calls of a step: one for all batches, or one for each.

    Batches of other shapes are filled up and share a call; see `alike`. Those of other arrays, such
    as prompts that completions share and prompts of their own, have another. Where the loss draws
    random numbers, each has a call of its own instead: what is drawn for an array depends on its
    shape, and an adapter draws what it draws alone.

    Args:
      batches: a dictionary of arrays for each adapter, by the adapter's name.
      draws: whether the loss draws random numbers (dropout, noise).

    Raises:
      BankError: see `alike`.
    """
    shapes_of_batches = [_shapes(batch) for batch in batches.values()]
    has_equal_shapes = all(shapes == shapes_of_batches[0] for shapes in shapes_of_batches)
    if draws and not has_equal_shapes:
        return [{name: batch} for name, batch in batches.items()]
    batches_of_form: dict[Any, dict[str, ArrayBatch]] = {}
    for name, batch in batches.items():
        form = frozenset((key, np.ndim(array)) for key, array in batch.items())
        batches_of_form.setdefault(form, {})[name] = batch
    return [alike(form_batches) for form_batches in batches_of_form.values()]


def alike(batches: Mapping[str, ArrayBatch]) -> Mapping[str, ArrayBatch]:
    """Returns batches padded with zeros to the same shapes.

    Args:
      batches: a dictionary of arrays for each adapter, by the adapter's name.

    Raises:
      BankError: they have other shapes, and no "weights", of which 0 is for what does not count.
    """
    shapes_of = {name: _shapes(batch) for name, batch in batches.items()}
    adapter, *other_adapters = batches
    differing_adapters = [n for n in other_adapters if shapes_of[n] != shapes_of[adapter]]
    if not differing_adapters:
        return batches
    keys = batches[adapter].keys()
    has_weights = all("weights" in batch and batch.keys() == keys for batch in batches.values())
    if not has_weights:
        differing_adapter = differing_adapters[0]
        raise BankError(
            f"together: {adapter!r} and {differing_adapter!r} train in one stack, but their "
            f"batches have different shapes, {shapes_of[adapter]} and "
            f'{shapes_of[differing_adapter]}, and no "weights" by which they could be '
            "padded. Give them the same shapes."
        )
    largest_shapes = {}
    for key in keys:
        array_shapes = [np.shape(batch[key]) for batch in batches.values()]
        largest_shapes[key] = np.max(array_shapes, axis=0)

    def fill_up(array: jax.Array | np.ndarray, shape: np.ndarray) -> np.ndarray:
        padding = [(0, n_zeros) for n_zeros in shape - np.shape(array)]
        return np.pad(array, padding)

    filled_batches = {}
    for name, batch in batches.items():
        filled_batches[name] = {
            key: fill_up(array, largest_shapes[key]) for key, array in batch.items()
        }
    return filled_batches


def _bytes_of_device(tree: Tree) -> int:
    """Returns the bytes that a tree's arrays take on one device."""
    arrays = jax.tree.leaves(tree)
    return sum(array.addressable_shards[0].data.nbytes for array in arrays)


def _shapes(batch: ArrayBatch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in batch.items()}
