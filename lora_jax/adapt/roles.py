"""Infers axis roles from what a function does with each axis of each weight.

The interpreter that `adapt` uses walks over the function's jaxpr, with other rules. Its values are
types in place of arrays, so that it traces only loops and branches again. A leaf is followed to the
products that use it, and each axis of an array is labelled by the axes of the leaf that it holds.
Axes that are contracted with the activation are in axes, axes that come out are out axes; what is
indexed, sliced off, scanned over or batched is a batch axis.

An array that is computed from leaves alone (their norms, say) is followed too, without labels: what
is added to a leaf is an activation only where it is computed from something else.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.contractions import (
    NO_CONTENTS,
    Contents,
    Contraction,
    LeafAxis,
    axes_indexed_by_gather,
    contents_of_leaf_product,
    contracted_axes,
    contractions_by_path,
    label_axes,
    paths_in_contents,
    union_of_sets,
)
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.adapt.reports import WeightUse
from lora_jax.adapt.rules.axis_maps import axis_map
from lora_jax.adapt.rules.control import CONTROL_RULES, SOLVE_RULES
from lora_jax.adapt.user_code import user_line_of
from lora_jax.core.aliases import flatten_with_aliases, resolve_aliases
from lora_jax.core.axes import ACTIVATION, ADDED, GAIN, LOOKED_UP, AxisRoles, ObservedRoles
from lora_jax.core.base import is_abstract, is_base, stand_in
from lora_jax.core.factored import Factored
from lora_jax.core.types import Forward, Outcome, Tree, Value

PRODUCT_OF_LEAVES = "product of leaves"  # among `Observation.operations`


class Observation(NamedTuple):
    """Describes the use of a tree's leaves by a function.

    Attributes:
      jaxpr: the jaxpr of the function.
      inputs: shapes and dtypes of its inputs.
      path_of_input: the path in the tree of each input; None for data.
      roles: by path, the roles of each leaf that the function multiplies by or reads rows of, or a
        sentence that says why there are none.
      multiplied_paths: paths of the leaves that the function multiplies by.
      operations: by path, names of the other primitives that a leaf enters. An element-wise product
        of two leaves is `PRODUCT_OF_LEAVES`.
    """

    jaxpr: eqns.AnyJaxpr
    inputs: list[jax.ShapeDtypeStruct]
    path_of_input: list[str | None]
    roles: dict[str, ObservedRoles | str]
    multiplied_paths: frozenset[str]
    operations: dict[str, set[str]]


def infer_roles(
    fn: Forward, args: Sequence[Tree], paths: Mapping[int, str]
) -> dict[str, ObservedRoles | str]:
    """Returns the roles of the leaves of `args` whose ids are the keys of `paths`.

    Args and roles are those of `observe`.
    """
    return observe(fn, args, paths).roles


def observe(fn: Forward, args: Sequence[Tree], paths: Mapping[int, str]) -> Observation:
    """Traces a function, and follows the leaves whose ids are the keys of `paths`.

    Args:
      fn: called with `args`; traced once, not run.
      args: as `fn` is called; arrays may be `jax.ShapeDtypeStruct`\\ s.
      paths: ``{id(leaf): path}``.
    """
    tracker = _LeafTracker()
    interpreter = Interpreter(
        tracker.rule_of_primitive(),
        record=tracker.record_merged_leaves,
        default=tracker.follow_other_equation,
        apply_equation=eqns.types_of_outputs,
    )
    keyed_leaves, treedef = flatten_with_aliases(tuple(args), is_base)
    leaves = [leaf for _, leaf in keyed_leaves]
    # Only the tree's leaves and abstract arrays are traced. All other arguments are constants.
    input_indices = [
        index for index, leaf in enumerate(leaves) if id(leaf) in paths or is_abstract(leaf)
    ]
    inputs = [stand_in(leaves[index]) for index in input_indices]
    path_of_input = [paths.get(id(leaves[index])) for index in input_indices]

    def fn_of_resolved(*args: Tree) -> Tree:
        return fn(*resolve_aliases(args))

    def label_input(path: str | None, variable: eqns.Atom) -> Value:
        array = eqns.type_of(variable)
        if path is None:
            return array
        return label_axes(array, [frozenset({LeafAxis(path, axis)}) for axis in range(array.ndim)])

    fn_of_inputs = eqns.function_of_inputs(fn_of_resolved, leaves, treedef, input_indices)
    jaxpr = jax.make_jaxpr(fn_of_inputs)(*inputs)
    inner, _ = eqns.jaxpr_and_consts(jaxpr)
    interpreter.evaluate(jaxpr, list(map(label_input, path_of_input, inner.invars)))
    # The tracker holds the products of each leaf now.
    roles: dict[str, ObservedRoles | str] = {}
    for leaf in leaves:
        if id(leaf) in paths:
            path = paths[id(leaf)]
            uses = tracker.contractions.get(path, [])
            lost_reason = tracker.lost_reasons.get(path)
            roles[path] = _roles_from_uses(uses, lost_reason, len(leaf.shape))
    return Observation(
        jaxpr=jaxpr,
        inputs=inputs,
        path_of_input=path_of_input,
        roles=roles,
        multiplied_paths=tracker.multiplied_paths(),
        operations=tracker.operations,
    )


def _roles_from_uses(
    uses: list[Contraction], lost_reason: str | None, ndim: int
) -> ObservedRoles | str:
    """Returns the roles that all uses of a leaf agree on, or the reason why they do not.

    Uses agree where each contracts the in axes, or each contracts either all in axes or all out
    axes.

    Args:
      uses: uses of one leaf.
      lost_reason: where its axes could no longer be followed, if anywhere.
      ndim: the number of its axes.
    """
    # The function never multiplies by the leaf.
    if not uses:
        if lost_reason is None:
            return "the function never multiplies by this leaf"
        return (
            "the function never multiplies by this leaf before its axes become unknown, because "
            f"{lost_reason}"
        )
    # Products of a sum with an activation count only if there are no others.
    uses_of_leaf_alone = [use for use in uses if not use.is_added]
    if uses_of_leaf_alone:
        uses = uses_of_leaf_alone
    clearest = min(uses, key=_clarity_order)
    # All uses must agree with the clearest one.
    for use in uses:
        axes_with_both_roles = use.contracted & use.free
        if axes_with_both_roles:
            return (
                f"the axes {sorted(axes_with_both_roles)} of this leaf are flattened to one axis "
                f"where {use}. Do not flatten the leaf (ravel, ravel_pytree, reshape)"
            )
        if {use.contracted, use.free} != {clearest.contracted, clearest.free}:
            return (
                "the function uses this leaf in ways that contradict each other: "
                f"{clearest}, but {use}"
            )
    if not clearest.contracted:
        return f"no axis of this leaf is contracted where {clearest}"
    if not clearest.free:
        return f"no axis of this leaf comes out of the product where {clearest}"
    roles = AxisRoles.from_axes(sorted(clearest.contracted), sorted(clearest.free), ndim)
    # One use as a kernel makes the leaf a kernel.
    is_kernel = not clearest.is_lookup and any(not use.not_kernel_reason for use in uses)
    if is_kernel:
        return ObservedRoles(roles)
    return ObservedRoles(roles, clearest.not_kernel_reason, not_kernel_kind=_kind_of(clearest))


def _kind_of(use: Contraction) -> str:
    """Returns the kind of a leaf that is not a kernel in any product."""
    if use.is_lookup:
        return LOOKED_UP
    if use.is_added:
        return ADDED
    return GAIN if use.is_stretched else ACTIVATION


def _clarity_order(use: Contraction) -> tuple[bool, ...]:
    """Returns a sort key: uses that show the in axes most clearly come first.

    Products with vectors or with other leaves come last: they may be a norm's.
    """
    return not use.is_lookup, use.with_leaf, bool(use.not_kernel_reason), use.with_vector


class _LeafTracker:
    """Holds the rules that follow leaves through a function, and their records.

    Attributes:
      contractions: the products with each leaf, by path.
      lost_reasons: for each leaf whose axes could not be followed further at some equation, the
        first such equation in words, by path.
      operations: see `Observation`.
    """

    def __init__(self) -> None:
        self.contractions: dict[str, list[Contraction]] = {}
        self.lost_reasons: dict[str, str] = {}
        self.operations: dict[str, set[str]] = {}

    def multiplied_paths(self) -> frozenset[str]:
        """Returns the paths of the leaves that the function multiplies by."""
        paths: set[str] = set()
        for path, uses in self.contractions.items():
            if any(not use.not_kernel_reason for use in uses):
                paths.add(path)
        return frozenset(paths)

    def rule_of_primitive(self) -> dict[str, Rule]:
        """Returns the rules by primitive; `follow_other_equation` has the rest."""
        products = ("dot_general", "ragged_dot_general", "conv_general_dilated")
        moves = ("transpose", "squeeze", "broadcast_in_dim", "reshape", "stack")
        rules_on_types: dict[str, Rule] = {}
        for name, rule in (CONTROL_RULES | SOLVE_RULES).items():
            if name not in _INLINED:
                rules_on_types[name] = _rule_on_types(rule)
        return {
            **rules_on_types,
            **dict.fromkeys(products, self._follow_product),
            **dict.fromkeys(moves, self._follow_moved_axes),
            "gather": self._follow_look_up,
        }

    def record_merged_leaves(self, record: WeightUse) -> None:
        """Records that leaves come out of a loop or branch as plain arrays."""
        self._record_loss(record.path.splitlines(), record.primitive, record.place)

    def _record_loss(self, paths: Iterable[str], primitive: str, line: str) -> None:
        """Records the equation after which the axes of leaves are unknown."""
        for path in paths:
            self.lost_reasons.setdefault(path, f"{primitive!r} at {line} loses its axes")

    def _record_lost_leaves(self, use: Use, outputs: list[Value]) -> list[Value]:
        """Records leaves whose axes no output holds, and returns the outputs."""
        lost_paths: set[str] = set()
        for value in use.values:
            if isinstance(value, Factored):
                lost_paths |= set(value.path.splitlines())
        for output in outputs:
            if isinstance(output, Factored):
                lost_paths -= paths_in_contents(output.labels, "", "scaled", "added")
        if lost_paths:
            self._record_loss(lost_paths, use.name, str(user_line_of(use.eqn)))
        return outputs

    def _record_operation(self, use: Use) -> None:
        """Records an operation that is neither a product nor a move, by leaf."""
        is_product_of_leaves = use.name in ("mul", "div") and all(
            map(_holds_unmixed_leaf, use.values)
        )
        operation = PRODUCT_OF_LEAVES if is_product_of_leaves else use.name
        for value in use.values:
            if _holds_unmixed_leaf(value):
                for path in value.path.splitlines():
                    self.operations.setdefault(path, set()).add(operation)

    def _record_contractions(self, use: Use) -> list[dict[str, Contraction]]:
        """Records the axes of leaves that a product contracts.

        Returns:
          For each operand that holds leaves, the contraction of each leaf, by path.
        """
        contractions_of_operand: list[dict[str, Contraction]] = []
        for side, operand in enumerate(use.values[:2]):
            if not isinstance(operand, Factored) or not operand.labels:
                continue
            labels: Any = operand.labels
            axes = contracted_axes(use, side, labels)
            if axes is None:
                continue
            with_leaf = _holds_unmixed_leaf(use.values[1 - side])
            contraction_of_path = contractions_by_path(use, side, axes, with_leaf)
            for path, contraction in contraction_of_path.items():
                self.contractions.setdefault(path, []).append(contraction)
            contractions_of_operand.append(contraction_of_path)
        return contractions_of_operand

    def _follow_look_up(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Records the axes of a leaf that a look-up indexes, and follows the remaining axes."""
        self._record_contractions(use)
        (result,) = interpreter.apply_equation(use.eqn, use.bases)
        output = _label_gathered(use, result)
        if isinstance(output, Factored):
            return [output]
        return self._record_lost_leaves(use, [output])

    def _follow_product(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Records the axes of leaves that a product contracts; follows a product of two leaves."""
        contractions_of_operand = self._record_contractions(use)
        (result,) = interpreter.apply_equation(use.eqn, use.bases)
        # The product with an activation is an activation, which is not followed.
        if _mixing_of_equation(use):
            return [result]
        # The product of two leaves has the axes of both.
        if use.name == "dot_general" and all(map(_holds_unmixed_leaf, use.values)):
            left, right = contractions_of_operand
            are_different_leaves = left.keys().isdisjoint(right)
            is_stretched = any(
                contraction.is_stretched for contraction in [*left.values(), *right.values()]
            )
            if are_different_leaves and not is_stretched:
                return [label_axes(result, contents_of_leaf_product(use))]
        return [label_axes(result, [NO_CONTENTS] * result.ndim)]

    def _follow_moved_axes(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Moves the labels of axes; a broadcast axis loses its label."""
        (result,) = interpreter.apply_equation(use.eqn, use.bases)
        source_axes_of_result = axis_map(use.eqn)
        if source_axes_of_result is None:
            return self._record_lost_leaves(use, [result])
        contents_of_weights: list[list[Contents]] = []
        for operand in use.values:
            if not isinstance(operand, Factored):
                continue
            labels: Any = operand.labels
            contents_of_axis: list[Contents] = []
            for source_axes, size in zip(source_axes_of_result, result.shape, strict=True):
                # A broadcast stretches the axes of other sizes.
                if use.name == "broadcast_in_dim":
                    shape = operand.base.shape
                    source_axes = tuple(axis for axis in source_axes if shape[axis] == size)
                contents_of_axis.append(union_of_sets(labels[axis] for axis in source_axes))
            contents_of_weights.append(contents_of_axis)
        return [label_axes(result, _join_contents(contents_of_weights, _mixing_of_equation(use)))]

    def follow_other_equation(self, interpreter: Interpreter, use: Use) -> list[Value]:
        """Follows leaves through an equation whose primitive has no rule of its own.

        An inner function is entered. The outputs of an element-wise operation have the labels of
        its operands. Other outputs have no labels.
        """
        # The equation calls an inner function with the same operands.
        body = use.params.get("jaxpr", use.params.get("call_jaxpr"))
        if body is not None:
            inner, _ = eqns.jaxpr_and_consts(body)
            if len(inner.invars) == len(use.values):
                return interpreter.function_of_jaxpr(body, use.used_outputs)(*use.values)
        if use.name == "unstack":
            return interpreter.evaluate(
                eqns.equations_of_unstack(use.eqn), use.values, use.used_outputs
            )
        self._record_operation(use)
        outputs = interpreter.apply_equation(use.eqn, use.bases)
        mixing = _mixing_of_equation(use)
        labelled_outputs: list[Value] = []
        for output_index, output in enumerate(outputs):
            # Take the labels of the operands whose axes the output has in place.
            contents_of_operands = []
            for operand in _operands_of_output(use, output_index):
                contents = _contents_in_place(operand, output, use.name)
                if contents is not None:
                    contents_of_operands.append(contents)
            is_floating = output.ndim > 0 and jnp.issubdtype(output.dtype, jnp.floating)
            if contents_of_operands:
                output = label_axes(output, _join_contents(contents_of_operands, mixing))
            elif not mixing and is_floating:  # computed from leaves alone
                output = label_axes(output, [NO_CONTENTS] * output.ndim)
            labelled_outputs.append(output)
        return self._record_lost_leaves(use, labelled_outputs)


def _rule_on_types(rule: Rule) -> Rule:
    """Returns a rule whose values are types of arrays, from a rule that needs arrays.

    The equation is traced. Inside the trace, all values are arrays.
    """

    def apply(interpreter: Interpreter, use: Use) -> Outcome:
        is_traced = interpreter.apply_equation is eqns.apply_equation
        if is_traced:
            return rule(interpreter, use)
        tracing_interpreter = dataclasses.replace(interpreter, apply_equation=eqns.apply_equation)

        def apply_to_arrays(values: list[Value]) -> Outcome:
            return rule(tracing_interpreter, dataclasses.replace(use, values=values))

        outputs: Outcome = jax.eval_shape(apply_to_arrays, use.values)
        return outputs

    return apply


def _holds_unmixed_leaf(value: Value) -> bool:
    """Returns True if a value is a leaf that is not mixed with other values."""
    return isinstance(value, Factored) and bool(paths_in_contents(value.labels, ""))


def _operands_of_output(use: Use, output_index: int) -> list[Value]:
    """Returns the operands that an output's axes may come from."""
    is_one_for_all = len(use.eqn.outvars) == 1 or use.name == "split"
    return use.values if is_one_for_all else use.values[output_index : output_index + 1]


def _contents_in_place(operand: Value, output: Value, primitive: str) -> list[Contents] | None:
    """Returns the contents of the axes that an operand shares with an output, or None.

    An axis along which the operand is stretched loses its contents.
    """
    if not isinstance(operand, Factored) or len(operand.labels) != output.ndim:
        return None
    labels: Any = operand.labels
    if primitive in _KEEP_AXES_IN_PLACE:
        return list(labels)
    contents_of_axis: list[Contents] = []
    sizes = zip(operand.base.shape, output.shape, strict=True)
    for contents, (size, output_size) in zip(labels, sizes, strict=True):
        if size not in (1, output_size):
            return None
        contents_of_axis.append(contents if size == output_size else NO_CONTENTS)
    return contents_of_axis


_ADDING_PRIMITIVES = ("add", "sub", "add_any", "concatenate", "stack")


def _mixing_of_equation(use: Use) -> str:
    """Returns "added" or "scaled" if an equation mixes leaves with other arrays, else ""."""
    if all(_is_computed_from_leaves(value) for value in use.values):
        return ""
    return "added" if use.name in _ADDING_PRIMITIVES else "scaled"


def _is_computed_from_leaves(value: Value) -> bool:
    """Returns True for a scalar, and for an array computed only from leaves."""
    if isinstance(value, Factored):
        return not paths_in_contents(value.labels, "scaled", "added")
    return math.prod(getattr(value, "shape", ())) == 1


def _join_contents(contents_of_arrays: Sequence[Sequence[Contents]], mixing: str) -> list[Contents]:
    """Returns the joined contents of each axis of several arrays, marked with `mixing`."""
    joined_contents: list[Contents] = []
    for contents_of_axis in zip(*contents_of_arrays, strict=True):
        contents = union_of_sets(contents_of_axis)
        if mixing:
            contents = frozenset(_mark_mixed(leaf_axis, mixing) for leaf_axis in contents)
        joined_contents.append(contents)
    return joined_contents


def _mark_mixed(leaf_axis: LeafAxis, mixing: str) -> LeafAxis:
    """Returns a leaf axis marked with `mixing`; an axis marked "added" stays unchanged."""
    return leaf_axis if leaf_axis.mixed == "added" else leaf_axis._replace(mixed=mixing)


def _label_gathered(use: Use, result: Value) -> Value:
    """Returns a gathered member of a stack with its labels, or a gathered row without them."""
    weight = use.values[0]
    if not isinstance(weight, Factored):
        return result
    labels: Any = weight.labels
    dimension_numbers = use.params["dimension_numbers"]
    indexed_axes = axes_indexed_by_gather(use, len(labels))
    n_axes_with_leaf = 0
    slice_contents: list[Contents] = []  # of the axes that come out
    for axis, label in enumerate(labels):
        contents = NO_CONTENTS if axis in indexed_axes else label
        if contents:
            n_axes_with_leaf += 1
        if axis not in dimension_numbers.collapsed_slice_dims:
            slice_contents.append(contents)
    is_row = n_axes_with_leaf < 2
    if is_row or len(slice_contents) != len(dimension_numbers.offset_dims):
        return result
    # The gather puts the axes of its slice at `offset_dims` of the result.
    contents_of_axis = dict(zip(dimension_numbers.offset_dims, slice_contents, strict=True))
    return label_axes(
        result, [contents_of_axis.get(axis, NO_CONTENTS) for axis in range(result.ndim)]
    )


# Calls of a function that `_LeafTracker.follow_other_equation` enters.
_INLINED = ("jit", "pjit", "remat2", "checkpoint")
_KEEP_AXES_IN_PLACE = ("slice", "dynamic_slice", "split", "concatenate", "pad", "rev", "all_gather")
