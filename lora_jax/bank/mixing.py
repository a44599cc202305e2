"""Runs any function on a batch whose examples have different adapters."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapt import adapt
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.per_example.axes import ExampleAxes
from lora_jax.adapt.transform import RULES, run
from lora_jax.adapt.user_code import user_line_of_call, warn
from lora_jax.bank.slots import Slots, WeightSlots, map_slots, slot_shape, slots_of
from lora_jax.core.extend import jaxpr_as_fun
from lora_jax.core.factored import ExamplesError
from lora_jax.core.types import Forward, Leaf, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """A bank's tree, with the slot of each example of a batch; see `Bank.choose`.

    Attributes:
      tree: the base with slots in place of adapted weights.
      ids: [examples] int32.
    """

    tree: Tree
    ids: jax.Array

    @property
    def is_side_by_side(self) -> bool:
        """True if all slots are plain factors, without copies, heads, DoRA or biases on B."""
        nodes = slots_of(self.tree).values()
        return all(isinstance(node, WeightSlots) and node.is_side_by_side for node in nodes)

    def batch_tree(self) -> Tree:
        """Returns the adapted tree of all examples; see `lora_jax.adapt.per_example`."""
        return map_slots(lambda _, slots: slots.batch_weight(self.ids), self.tree)  # type: ignore[union-attr]


def choose(tree: Tree, ids: jax.typing.ArrayLike | Sequence[int]) -> Choice:
    """Returns a bank's tree for a batch, to be passed in the place of a tree of parameters.

    Where slots are many, it copies each example's factors: call it once a batch, before a loop.

    Args:
      tree: `Bank.tree`.
      ids: [examples] int, the slot of each example; 0 is the base alone. It may be a tracer; the
        result of an example whose slot does not exist is then NaN.

    Raises:
      ValueError: `ids` has another number of axes, or names a slot that does not exist.
    """
    nodes = slots_of(tree).values()
    if not nodes:
        raise ValueError(
            "choose: the tree does not belong to a bank. Use the tree of a lora_jax.bank.Bank."
        )
    if np.ndim(ids) != 1:
        raise ValueError(
            "choose: ids must have one slot for each example, [n], but has the shape "
            f"{np.shape(ids)}."
        )
    if not isinstance(ids, jax.core.Tracer):
        n_slots = min(node.n_slots for node in nodes)
        unknown_ids = sorted({int(i) for i in np.asarray(ids) if not 0 <= i < n_slots})
        if unknown_ids:
            raise ValueError(
                f"choose: the bank has no slot {unknown_ids[0]}. Its slots are 0 to {n_slots - 1}."
            )
    ids = jnp.asarray(ids, jnp.int32)
    return Choice(map_slots(lambda _, node: node.chosen(ids), tree), ids)


def mixed(
    fn: Forward,
    *,
    in_axes: Tree = 0,
    out_axes: Tree = 0,
    kwarg_axes: Mapping[str, Tree] | None = None,
    one_by_one: bool = False,
    strict: bool = False,
    primitives: Mapping[str, Forward] | None = None,
) -> Forward:
    """Returns `fn` for batches in which each example has its own adapter.

    Pass `Bank.choose(names)` where `fn` takes a tree of parameters. The result of each example is
    that of `fn` with its adapter. Products with the base remain one product for all examples.
    Gradients with respect to the slots' arrays work, and nothing is compiled anew for other
    adapters in the slots or other `ids`.

    `fn` runs once, on the whole batch as it is, where the examples can be followed through all that
    it does; see `lora_jax.adapt.per_example`. Otherwise it runs under `jax.vmap`, on batches of one
    example each, and a `MixedWarning` says why: that is right for any function, but slower for
    some (those that write into a KV cache, say). The two differ for a function whose result for an
    example depends on the batch around it: on its size, or on one key's noise for all rows.

    Dropout is off: train adapters side by side by `lora_jax.bank.Together`.

    Args:
      fn: any function that `lora_jax.adapt` takes.
      in_axes: the axis of the examples in each positional argument, as in `jax.vmap`: an int, or a
        tuple with an entry for each argument, itself a prefix of the argument's tree. None: the
        same for all examples. By default axis 0 of every array, but for scalars and the arguments
        that hold a `Choice`. An object with an attribute `example_axes` (a KV cache of
        `lora_jax.models`) says its own.
      out_axes: the axis of the examples in what `fn` returns, likewise.
      kwarg_axes: `in_axes` of keyword arguments by name; 0 for those that are not named.
      one_by_one: run `fn` on batches of one example each in any case, without a warning.
      strict, primitives: see `lora_jax.adapt`.

    Returns:
      ``forward(*args, **kwargs)``. It raises TypeError where no argument holds a `Choice`, and
      ValueError where arguments differ in their number of examples.

    >>> from lora_jax.bank import Bank, mixed
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> bank = Bank(params, [lj.LoraRule(targets=["dense"], rank=2)], slots=3)
    >>> forward = mixed(lambda params, x: x @ params["dense"]["kernel"])
    >>> forward(bank.choose(["base", "base"]), jnp.ones((2, 4))).shape
    (2, 3)
    """
    adapted = adapt(fn, strict=strict, primitives=primitives)
    interpreter = Interpreter(RULES, strict, tuple((primitives or {}).items()))

    @functools.wraps(fn)
    def forward(*args: Tree, **kwargs: Tree) -> Tree:
        """Runs the function at once on the whole batch, or else example by example."""
        call = _Call.make(args, kwargs, in_axes, dict(kwarg_axes or {}), out_axes)
        if one_by_one or len(call.choice.ids) == 1 or not call.choice.is_side_by_side:
            return _run_one_by_one(adapted, call)
        try:
            return _run_at_once(fn, interpreter, call)
        except ExamplesError as error:
            name = getattr(fn, "__qualname__", repr(fn))
            warn(
                f"mixed({name}) runs one example after another, under jax.vmap: {error}. The "
                "result is right. To accept this without a warning, pass one_by_one=True.",
                MixedWarning,
                user_line_of_call(),
            )
            return _run_one_by_one(adapted, call)

    return forward


class MixedWarning(UserWarning):
    """Warns that a function runs example by example, since its batch axis cannot be followed."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments of a call on a mixed batch.

    Attributes:
      leaves: leaves of (args, kwargs), a `Choice` being one leaf.
      axes: the examples' axis in each of them, None where there is none.
      treedef: structure of (args, kwargs).
      out_axes: see `mixed`.
      choice: the first `Choice` among the leaves.
    """

    leaves: list[Leaf]
    axes: list[int | None]
    treedef: jax.tree_util.PyTreeDef
    out_axes: Tree
    choice: Choice

    @classmethod
    def make(
        cls,
        args: tuple[Tree, ...],
        kwargs: dict[str, Tree],
        in_axes: Tree,
        kwarg_axes: dict[str, Tree],
        out_axes: Tree,
    ) -> "_Call":
        """Checks the arguments of a call, and finds the examples' axes in them."""
        unknown_names = sorted(kwarg_axes.keys() - kwargs.keys())
        if unknown_names:
            raise TypeError(
                f"mixed: kwarg_axes contains {unknown_names[0]!r}, which is not among the "
                "keyword arguments."
            )
        if "dropout_key" in kwargs:
            raise TypeError(
                "A function of `mixed` does not support dropout. Remove dropout_key from the call."
            )
        if not isinstance(in_axes, (tuple, list)):
            in_axes = (in_axes,) * len(args)
        if len(in_axes) != len(args):
            raise TypeError(
                f"mixed: in_axes has {len(in_axes)} entries, but there are {len(args)} arguments."
            )
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_choice)
        choice = next(filter(_is_choice, leaves), None)
        if choice is None:
            raise TypeError(
                "mixed: no argument contains the tree of a bank. Pass bank.choose(names) "
                "where the function takes its parameters."
            )
        prefix = (tuple(in_axes), {name: kwarg_axes.get(name, 0) for name in kwargs})
        declared_axes = _axes_of_leaves(prefix, (args, kwargs))
        axes = [
            _axis(leaf, axis, len(choice.ids))
            for leaf, axis in zip(leaves, declared_axes, strict=True)
        ]
        return cls(leaves=leaves, axes=axes, treedef=treedef, out_axes=out_axes, choice=choice)

    def axes_of(self, result: Tree) -> list[int | None]:
        """Returns the required example axis of each leaf of a result."""
        return _axes_of_leaves(self.out_axes, result)


def _run_at_once(fn: Forward, interpreter: Interpreter, call: _Call) -> Tree:
    """Runs a function once on the whole batch.

    Raises:
      ExamplesError: its examples cannot be followed, or the result has them along other axes than
        `out_axes` says.
    """

    def run_batch(args: Tree, kwargs: Tree) -> Tree:
        return fn(*args, **kwargs)

    def axes_of(result: Tree) -> Tree:
        return jax.tree.unflatten(jax.tree.structure(result), call.axes_of(result))

    leaves = [leaf.batch_tree() if _is_choice(leaf) else leaf for leaf in call.leaves]
    axes = ExampleAxes(call.treedef.unflatten(call.axes), axes_of)
    return run(run_batch, interpreter, call.treedef.unflatten(leaves), {}, None, axes=axes)


def _run_one_by_one(adapted: Forward, call: _Call) -> Tree:
    """Runs an adapted function on each example by itself, several at a time by `jax.vmap`."""
    treedef: jax.tree_util.PyTreeDef
    varying_trees, axes_trees = zip(*map(_varying_arrays, call.leaves, call.axes), strict=True)
    arrays, treedef = jax.tree.flatten(varying_trees)
    axes = jax.tree.leaves(axes_trees)

    def run_example(index: jax.Array, *example_arrays: Leaf) -> Tree:
        """Runs the function on one example."""
        leaves = [
            _take_example(leaf, example_tree, index)
            for leaf, example_tree in zip(
                call.leaves, treedef.unflatten(example_arrays), strict=True
            )
        ]
        args, kwargs = call.treedef.unflatten(leaves)
        return adapted(*args, **kwargs)

    ids = call.choice.ids
    slot = jax.ShapeDtypeStruct((), ids.dtype)
    jaxpr, result_shape = jax.make_jaxpr(run_example, return_shape=True)(
        slot, *map(slot_shape, arrays, axes)
    )
    out_tree: jax.tree_util.PyTreeDef
    structs, out_tree = jax.tree.flatten(result_shape)
    shapes = [struct.shape for struct in structs]
    out_axes = call.axes_of(result_shape)
    for i, (shape, axis) in enumerate(zip(shapes, out_axes, strict=True)):
        if axis is None:
            continue
        if shape == ():
            out_axes[i] = 0  # a number of each example becomes an array of all
        elif axis >= len(shape) or shape[axis] != 1:
            raise ValueError(
                "mixed: for a batch of one example, the function returns an array of shape "
                f"{shape}, which has no axis {axis} for the examples. Give their axis with "
                "out_axes."
            )
    if len(ids) == 1:
        results = jaxpr_as_fun(jaxpr)(ids[0], *map(jnp.squeeze, arrays, axes))
        for i, (shape, axis) in enumerate(zip(shapes, out_axes, strict=True)):
            if shape == () and axis is not None:
                results[i] = jnp.expand_dims(results[i], 0)
        return out_tree.unflatten(results)
    run_examples = jax.vmap(jaxpr_as_fun(jaxpr), in_axes=(0, *axes), out_axes=out_axes)
    results = run_examples(ids, *arrays)
    for i, (shape, axis) in enumerate(zip(shapes, out_axes, strict=True)):
        if shape != () and axis is not None:
            results[i] = jnp.squeeze(results[i], axis + 1)
    return out_tree.unflatten(results)


def _is_choice(value: object) -> bool:
    return isinstance(value, Choice)


def _axes_of_leaves(prefix: Tree, tree: Tree) -> list[int | None]:
    """Returns the example axis of each leaf of a tree; a `Choice` counts as one leaf.

    Args:
      prefix: an axis or None for each subtree, as in `jax.vmap`.
      tree: arguments, or the shapes of results.
    """
    axes: list[int | None] = []

    def append(axis: int | None, subtree: Tree) -> None:
        axes.extend([axis] * len(jax.tree.leaves(subtree)))

    def visit(axis: int | None, subtree: Tree) -> None:
        """Appends the axes of the leaves of a subtree."""
        for value in jax.tree.leaves(subtree, is_leaf=_has_axes):
            if _is_choice(value):
                axes.append(None)
            elif axis is not None and hasattr(value, "example_axes"):
                jax.tree.map(append, value.example_axes, value, is_leaf=_is_none)
            else:
                append(axis, value)

    jax.tree.map(visit, prefix, tree, is_leaf=_is_none)
    return axes


def _has_axes(value: object) -> bool:
    """Returns True for values that define the example axes of their own arrays."""
    return _is_choice(value) or hasattr(value, "example_axes")


def _is_none(value: object) -> bool:
    return value is None


def _axis(leaf: Leaf, axis: int | None, n_examples: int) -> int | None:
    """Returns the example axis of an argument, or None if it is the same for all examples."""
    if axis is None or not hasattr(leaf, "dtype") or not np.ndim(leaf):
        return None
    if axis >= leaf.ndim or leaf.shape[axis] != n_examples:
        raise ValueError(
            f"mixed: {n_examples} adapters are chosen, but an argument of shape {leaf.shape} "
            f"does not have {n_examples} examples along axis {axis}. Give the axis of the "
            "examples with in_axes or kwarg_axes."
        )
    return axis


def _varying_arrays(leaf: Leaf, axis: int | None) -> tuple[Tree, Tree]:
    """Returns the arrays of an argument that differ between examples, with their axes.

    Args:
      leaf: a `Choice`, an array, or anything else.
      axis: axis of the examples, None where there are none.
    """
    if _is_choice(leaf):
        arrays, axes = {}, {}
        for path, node in slots_of(leaf.tree).items():
            if node.per_example:
                arrays[path] = node.arrays
                axes[path] = dict.fromkeys(node.arrays, node.slot_axis)
        return arrays, axes
    if axis is None:
        return None, None
    # The axis of size one that a batch of one example has is put in here rather than under vmap,
    # which would move the examples to the front first, and the array with them.
    return jnp.expand_dims(leaf, axis + 1), axis


def _take_example(leaf: Leaf, example_arrays: Tree, index: jax.Array) -> Leaf:
    """Returns the part of an argument that belongs to one example.

    Args:
      leaf: the argument for the batch.
      example_arrays: the arrays of this example, where each example has its own.
      index: [] int32, the slot of the example.
    """
    if _is_choice(leaf):

        def take(path: str, node: Slots) -> Leaf:
            return node.take_example(example_arrays.get(path, node.arrays), index)

        return map_slots(take, leaf.tree)
    return leaf if example_arrays is None else example_arrays
