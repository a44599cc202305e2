"""Infers axis roles from what a function does with each axis of each weight.

The function is run abstractly by the interpreter that `adapt` uses, with other rules: a weight
without factors is followed to the products that use it, each of its axes labelled by the axes of
the leaf that it holds. Axes that are contracted with the activation are in axes, axes that come
out are out axes; what is indexed, sliced off, scanned over or batched is a batch axis.

An array that is computed from leaves alone (their norms, say) is followed too, without labels: what
is added to a leaf is an activation only where it is computed from something else.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.contractions import (
    NOTHING,
    Contents,
    Contraction,
    LeafAxis,
    composed,
    contractions,
    contracts,
    indexed,
    labelled,
    paths_of,
    union,
)
from lora_jax.adapt.interpreter import Interpreter, Rule, Use, WeightUse
from lora_jax.adapt.rules.axis_maps import axis_map
from lora_jax.adapt.rules.control import CONTROL_RULES, SOLVE_RULES
from lora_jax.adapt.user_code import place_of
from lora_jax.core.aliases import flatten, resolved
from lora_jax.core.axes import AxisRoles, ObservedRoles
from lora_jax.core.base import is_abstract, is_base, stand_in
from lora_jax.core.factored import Factored
from lora_jax.core.types import Forward, Leaf, Tree, Value


def traced_roles(
    trace: Sequence[object] | None, leaves: Iterable[tuple[str, Leaf]]
) -> dict[str, ObservedRoles | str] | None:
    """Returns the roles of a tree's leaves, by path, as a function uses them; see `infer_roles`.

    Args:
      trace: ``(fn, *args)``; see `lora_jax.lorafy`. None: nothing is known.
      leaves: leaves of the tree with their paths.

    Raises:
      TypeError: `trace` is no tuple of a function and its arguments.
    """
    if trace is None:
        return None
    if not isinstance(trace, Sequence) or not trace or not callable(trace[0]):
        raise TypeError(f"trace must be a tuple of a function and its arguments, not {trace!r}.")
    return infer_roles(trace[0], trace[1:], {id(leaf): path for path, leaf in leaves})


def infer_roles(
    fn: Forward, args: Sequence[Tree], paths: Mapping[int, str]
) -> dict[str, ObservedRoles | str]:
    """Returns the roles of the leaves of `args` whose identities are the keys of `paths`.

    Args:
      fn: called with `args`; traced, not run.
      args: as `fn` is called; arrays may be `jax.ShapeDtypeStruct`\\ s.
      paths: ``{id(leaf): path}``.

    Returns:
      By path, the roles of each leaf that `fn` multiplies by or reads rows of, or a sentence that
      says why there are none.
    """
    log = _Log()
    interpreter = Interpreter(log.rules(), record=log.merged, default=log.other)
    keyed_leaves, treedef = flatten(tuple(args), is_base)
    leaves = [leaf for _, leaf in keyed_leaves]
    input_indices = [
        index for index, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)
    ]

    def with_labels(index: int, array: jax.Array) -> Value:
        path = paths.get(id(leaves[index]))
        if path is None:
            return array
        return labelled(array, [frozenset({LeafAxis(path, axis)}) for axis in range(array.ndim)])

    def fn_of_resolved(*args: Tree) -> Tree:
        return fn(*resolved(args))

    def walk(arrays: list[Value]) -> None:
        fn_of_arrays = eqns.trace_with(fn_of_resolved, leaves, treedef, input_indices)
        jaxpr = jax.make_jaxpr(fn_of_arrays)(*arrays)
        interpreter.evaluate(jaxpr, list(map(with_labels, input_indices, arrays)))

    jax.eval_shape(walk, [stand_in(leaves[index]) for index in input_indices])
    roles: dict[str, ObservedRoles | str] = {}
    for leaf in leaves:
        if id(leaf) in paths:
            path = paths[id(leaf)]
            uses = log.contractions.get(path, [])
            roles[path] = _agreed_roles(uses, log.lost.get(path), len(leaf.shape))
    return roles


def _agreed_roles(
    uses: list[Contraction], lost_reason: str | None, ndim: int
) -> ObservedRoles | str:
    """Returns the roles that all uses agree on: each contracts the in axes, or all the out axes.

    Args:
      uses: uses of one leaf.
      lost_reason: where its axes could no longer be followed, if anywhere.
      ndim: the number of its axes.
    """
    if not uses:
        unseen = "the function never multiplies by it"
        if lost_reason is None:
            return unseen
        return f"{unseen}, as far as it can be followed: {lost_reason}"
    uses_of_leaf_alone = [use for use in uses if not use.is_added]
    uses = uses_of_leaf_alone or uses
    clearest = min(uses, key=_unclearness)
    for use in uses:
        axes_with_both_roles = use.contracted & use.free
        if axes_with_both_roles:
            return (
                f"its axes {sorted(axes_with_both_roles)} are one axis, or parts of one, where "
                f"{use}. Keep them apart: a reshape to one axis (ravel, ravel_pytree) loses them"
            )
        if {use.contracted, use.free} != {clearest.contracted, clearest.free}:
            return f"the function uses it in ways that contradict each other: {clearest}, but {use}"
    if not clearest.contracted:
        return f"no axis of it is contracted in the product: {clearest}"
    if not clearest.free:
        return f"no axis of it comes out of the product: {clearest}"
    roles = AxisRoles.from_axes(sorted(clearest.contracted), sorted(clearest.free), ndim)
    is_kernel = not clearest.is_lookup and any(not use.not_kernel_reason for use in uses)
    return ObservedRoles(roles, "" if is_kernel else clearest.not_kernel_reason)


def _unclearness(use: Contraction) -> tuple[bool, ...]:
    """Returns a sort key: first come the uses that say most clearly which axes are the in axes.

    Products with vectors or with other leaves come last: they may be a norm's.
    """
    return not use.is_lookup, use.with_leaf, bool(use.not_kernel_reason), use.with_vector


class _Log:
    """The rules that follow leaves, and their notes.

    Attributes:
      contractions: the products with each leaf, by path.
      lost: for a leaf whose axes could no longer be followed somewhere, the first such line.
    """

    def __init__(self) -> None:
        self.contractions: dict[str, list[Contraction]] = {}
        self.lost: dict[str, str] = {}

    def rules(self) -> dict[str, Rule]:
        """Returns the rule for each primitive but those that `other` is for."""
        products = ("dot_general", "ragged_dot_general", "conv_general_dilated")
        moves = ("transpose", "squeeze", "broadcast_in_dim", "reshape", "stack")
        return {
            **CONTROL_RULES,
            **SOLVE_RULES,
            **dict.fromkeys(products, self._product),
            **dict.fromkeys(moves, self._moved),
            "gather": self._look_up,
        }

    def merged(self, record: WeightUse) -> None:
        """Notes that leaves leave a loop or a branch as plain arrays."""
        self._lose(record.path.splitlines(), record.primitive, record.place)

    def _lose(self, paths: Iterable[str], primitive: str, line: str) -> None:
        for path in paths:
            self.lost.setdefault(path, f"{primitive!r} at {line} loses its axes")

    def _note_lost(self, use: Use, outputs: list[Value]) -> list[Value]:
        """Returns the outputs; notes the leaves among the operands that none of them holds."""
        lost_paths: set[str] = set()
        for value in use.values:
            if isinstance(value, Factored):
                lost_paths |= set(value.path.splitlines())
        for output in outputs:
            if isinstance(output, Factored):
                lost_paths -= paths_of(output.labels, "", "scaled", "added")
        if lost_paths:
            self._lose(lost_paths, use.name, str(place_of(use.eqn)))
        return outputs

    def _note_contractions(self, use: Use) -> list[dict[str, Contraction]]:
        """Notes the axes of leaves that a product contracts.

        Returns:
          For each operand that holds leaves, the contraction of each leaf, by path.
        """
        contractions_of_operand: list[dict[str, Contraction]] = []
        for side, value in enumerate(use.values[:2]):
            labels: Any = value.labels if isinstance(value, Factored) else ()
            axes = contracts(use, side, labels) if labels else None
            if axes is None:
                continue
            with_leaf = _is_leaf(use.values[1 - side])
            contraction_of_path = contractions(use, side, axes, with_leaf)
            for path, contraction in contraction_of_path.items():
                self.contractions.setdefault(path, []).append(contraction)
            contractions_of_operand.append(contraction_of_path)
        return contractions_of_operand

    def _look_up(self, _: Interpreter, use: Use) -> list[Value]:
        """Notes the axes of a leaf that a look-up indexes; follows the axes that it leaves."""
        self._note_contractions(use)
        output = _gathered(use)
        return [output] if isinstance(output, Factored) else self._note_lost(use, [output])

    def _product(self, _: Interpreter, use: Use) -> list[Value]:
        """Notes the axes of leaves that a product contracts; follows a product of two leaves."""
        contractions_of_operand = self._note_contractions(use)
        (result,) = use.bind(use.bases)
        if _mixing(use):
            return [result]
        if use.name == "dot_general" and all(map(_is_leaf, use.values)):
            left, right = contractions_of_operand
            are_different_leaves = left.keys().isdisjoint(right)
            is_stretched = any(
                contraction.is_stretched for contraction in [*left.values(), *right.values()]
            )
            if are_different_leaves and not is_stretched:
                return [labelled(result, composed(use))]
        return [labelled(result, [NOTHING] * result.ndim)]

    def _moved(self, _: Interpreter, use: Use) -> list[Value]:
        """Moves axes as the axis map says; one that is stretched is lost."""
        (result,) = use.bind(use.bases)
        source_axes_of_result = axis_map(use.eqn)
        if source_axes_of_result is None:
            return self._note_lost(use, [result])
        contents_of_weights: list[list[Contents]] = []
        for value in use.values:
            if not isinstance(value, Factored):
                continue
            labels: Any = value.labels
            contents_of_axis: list[Contents] = []
            for source_axes, size in zip(source_axes_of_result, result.shape, strict=True):
                if use.name == "broadcast_in_dim":
                    shape = value.base.shape
                    source_axes = tuple(axis for axis in source_axes if shape[axis] == size)
                contents_of_axis.append(union(labels[axis] for axis in source_axes))
            contents_of_weights.append(contents_of_axis)
        return [labelled(result, _joined(contents_of_weights, _mixing(use)))]

    def other(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Enters functions; keeps axes in place in element-wise operations, else drops them."""
        body = use.params.get("jaxpr", use.params.get("call_jaxpr"))
        if body is not None:
            inner, _ = eqns.opened(body)
            if len(inner.invars) == len(use.values):
                return interpreter.function(body, use.used_outputs)(*use.values)
        if use.name == "unstack":
            return interpreter.evaluate(eqns.unstacked(use.eqn), use.values, use.used_outputs)
        outputs = use.bind(use.bases)
        mixing = _mixing(use)
        labelled_outputs: list[Value] = []
        for output_index, output in enumerate(outputs):
            contents_of_operands = []
            for operand in _operands_of_output(use, output_index):
                contents = _contents_in_place(operand, output, use.name)
                if contents is not None:
                    contents_of_operands.append(contents)
            is_floating = output.ndim > 0 and jnp.issubdtype(output.dtype, jnp.floating)
            if contents_of_operands:
                output = labelled(output, _joined(contents_of_operands, mixing))
            elif not mixing and is_floating:  # computed from leaves alone
                output = labelled(output, [NOTHING] * output.ndim)
            labelled_outputs.append(output)
        return self._note_lost(use, labelled_outputs)


def _is_leaf(value: Value) -> bool:
    """Returns True if a value holds a leaf that is mixed with nothing else."""
    return isinstance(value, Factored) and bool(paths_of(value.labels, ""))


def _operands_of_output(use: Use, output_index: int) -> list[Value]:
    """Returns the operands whose axes an output may have: of several outputs, one operand each."""
    is_one_for_all = len(use.eqn.outvars) == 1 or use.name == "split"
    return use.values if is_one_for_all else use.values[output_index : output_index + 1]


def _contents_in_place(operand: Value, output: Value, primitive: str) -> list[Contents] | None:
    """Returns the contents of an output's axes that an operand has in place; None if none are.

    An axis along which the operand is stretched loses its contents.
    """
    if not isinstance(operand, Factored) or len(operand.labels) != output.ndim:
        return None
    labels: Any = operand.labels
    if primitive in _SAME_RANK:
        return list(labels)
    contents_of_axis: list[Contents] = []
    sizes = zip(operand.base.shape, output.shape, strict=True)
    for contents, (size, output_size) in zip(labels, sizes, strict=True):
        if size not in (1, output_size):
            return None
        contents_of_axis.append(contents if size == output_size else NOTHING)
    return contents_of_axis


_ADDS = ("add", "sub", "add_any", "concatenate", "stack")


def _mixing(use: Use) -> str:
    """Returns the way an equation mixes leaves with arrays that are computed from other things."""
    if all(map(_is_of_leaves_alone, use.values)):
        return ""
    return "added" if use.name in _ADDS else "scaled"


def _is_of_leaves_alone(value: Value) -> bool:
    """Returns True for a number, and for an array that is computed from leaves alone."""
    if isinstance(value, Factored):
        return not paths_of(value.labels, "scaled", "added")
    return math.prod(jnp.shape(value)) == 1


def _joined(contents_of_arrays: Sequence[Sequence[Contents]], mixing: str) -> list[Contents]:
    """Returns the contents of each axis of several arrays, marked as mixed; "added" stays."""
    joined_contents: list[Contents] = []
    for contents_of_axis in zip(*contents_of_arrays, strict=True):
        contents = union(contents_of_axis)
        if mixing:
            contents = frozenset(_marked(leaf_axis, mixing) for leaf_axis in contents)
        joined_contents.append(contents)
    return joined_contents


def _marked(leaf_axis: LeafAxis, mixing: str) -> LeafAxis:
    return leaf_axis if leaf_axis.mixed == "added" else leaf_axis._replace(mixed=mixing)


def _gathered(use: Use) -> Value:
    """Returns the rest of a weight whose stack is indexed, or a looked-up row without labels."""
    weight = use.values[0]
    dimension_numbers = use.params["dimension_numbers"]
    (result,) = use.bind(use.bases)
    if not isinstance(weight, Factored):
        return result
    labels: Any = weight.labels
    indexed_axes = indexed(use, len(labels))
    n_axes_with_leaf = 0
    slice_contents: list[Contents] = []  # of the axes that come out
    for axis, label in enumerate(labels):
        contents = NOTHING if axis in indexed_axes else label
        n_axes_with_leaf += bool(contents)
        if axis not in dimension_numbers.collapsed_slice_dims:
            slice_contents.append(contents)
    is_row = n_axes_with_leaf < 2
    if is_row or len(slice_contents) != len(dimension_numbers.offset_dims):
        return result
    contents_of_axis = dict(zip(dimension_numbers.offset_dims, slice_contents, strict=True))
    return labelled(result, [contents_of_axis.get(axis, NOTHING) for axis in range(result.ndim)])


_SAME_RANK = ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather")
