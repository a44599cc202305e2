"""Rules for control flow and linear solves: the factors of weights become operands of their bodies.

A loop's **constant weights** are the weights among its carries that each iteration returns as they
are. They are taken out of the carries and handed to each iteration.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use, fold_dropout_key
from lora_jax.adapt.reports import watch
from lora_jax.adapt.rules.choices import CommonForm, common_form, convert_to_form
from lora_jax.adapt.rules.flow import (
    common_sources,
    input_that_selects,
    may_be_weights,
    sources_of_outputs,
)
from lora_jax.adapt.rules.layout import move_axes
from lora_jax.adapt.rules.routed import ROUTED_RULES
from lora_jax.core.base import (
    StackMember,
    has_ragged_kernel,
    has_rows_kernel,
    is_base,
    splittable,
)
from lora_jax.core.factored import Factored
from lora_jax.core.few_rows import MAX_KERNEL_ROWS
from lora_jax.core.parts import Axes
from lora_jax.core.turns import TURNS, add_turns
from lora_jax.core.types import Forward, Outcome, Tree, Value

MeshAxes = str | tuple[str, ...] | None  # the axes of the mesh along which an axis is split
_Body = Callable[..., list[Value]]
# A loop's state: the iteration if dropout keys need it, and the carries by index.
_State = tuple[Value, dict[int, Value]]


def _jit(interpreter: Interpreter, use: Use) -> list[Value]:
    """Calls the inner function under `jax.jit`, with the shardings of the equation."""
    jit = eqns.read_jit(use.eqn)
    if jit.name in ROUTED_RULES and (interpreter.record is None or interpreter.warns):
        outputs = ROUTED_RULES[jit.name](interpreter, use)
        if outputs is not None:
            return outputs
    fn = interpreter.function_of_jaxpr(jit.jaxpr, use.used_outputs)
    values = list(map(_with_sharding_constraint, use.values, jit.in_shardings))
    if not jit.inline and interpreter.record is None:

        def compile_function(fn: _Body = fn) -> Forward:
            """Returns the function under `jax.jit`, with the name of the original one."""

            def call(*args: Value) -> list[Value]:
                return fn(*args)

            call.__name__ = call.__qualname__ = jit.name
            return jax.jit(call, **jit.options)

        fn = interpreter.cached_function(
            jit.jaxpr, ("jit", use.used_outputs, jit.name), compile_function
        )
    with watch(fn):
        outputs = fn(*values)
    return list(map(_with_sharding_constraint, outputs, jit.out_shardings))


def _with_sharding_constraint(value: Value, sharding: Sharding | None) -> Value:
    """Returns an array, or a weight with its base, under a sharding constraint."""
    if sharding is None or value is None:
        return value
    if not isinstance(value, Factored):
        return lax.with_sharding_constraint(value, sharding)
    if is_base(value.base):
        return value
    return value.replace(base=lax.with_sharding_constraint(value.base, sharding))


def _remat(interpreter: Interpreter, use: Use) -> list[Value]:
    """Calls the body under `jax.checkpoint`, with the policy of the equation."""
    body = interpreter.function_of_jaxpr(use.params["jaxpr"], use.used_outputs)
    body_with_remat = body
    if interpreter.record is None:
        body_with_remat = jax.checkpoint(
            body, prevent_cse=use.params["prevent_cse"], policy=use.params["policy"]
        )
    with watch(body):
        outputs = body_with_remat(*use.values)
    return outputs


class _Carries(NamedTuple):
    """The carries of a loop, by index: constant weights, and arrays that iterations change."""

    weights: dict[int, Factored]
    arrays: dict[int, Value]


def _split_carries(
    interpreter: Interpreter,
    use: Use,
    body: eqns.AnyJaxpr,
    carries: Sequence[Value],
    n_consts: int,
) -> _Carries:
    """Separates the weights that a loop carries unchanged; merges the weights that it changes.

    Args:
      interpreter: the interpreter.
      use: the loop.
      body: body of the loop; its arguments are constants, then carries.
      carries: the first carries.
      n_consts: the number of constants.
    """
    has_weight = any(isinstance(value, Factored) for value in carries)
    argument_of_output = sources_of_outputs(body) if has_weight else ()
    split = _Carries(weights={}, arrays={})
    for index, value in enumerate(carries):
        if not isinstance(value, Factored):
            split.arrays[index] = value
        elif argument_of_output[index] == n_consts + index:
            split.weights[index] = value
        else:
            split.arrays[index] = interpreter.as_plain_array(value, use, "as a carry")
    return split


def _scan(interpreter: Interpreter, use: Use) -> list[Value]:
    """Scans over stacks together with their factors; weights carried unchanged become constants.

    A stack of a weight's own slices is that weight. Where the body takes a member of a constant
    stack, the parts of the members are scanned: the gradient of a constant would be a sum of
    arrays as large as the stack.
    """
    scan = eqns.read_scan(use.eqn)
    consts, first_carries, stacks = scan.split(use.values)
    stacks = [_without_sliced_shift(interpreter, use, stack) for stack in stacks]
    carries = _split_carries(interpreter, use, scan.body, first_carries, scan.n_consts)
    scanned_arrays = [_arrays_along_first_axis(stack) for stack in stacks]
    parts_of_members = _parts_of_members(use, scan)
    restacked_weights = _restacked_weights(use, scan)
    used_outputs = tuple(
        index < scan.n_carry or (is_used and index not in restacked_weights)
        for index, is_used in enumerate(use.used_outputs)
    )
    body = interpreter.function_of_jaxpr(scan.body, None if all(used_outputs) else used_outputs)
    kernel_indices = _indices_with_kernel(stacks, _has_few_rows(carries.arrays))
    needs_iteration = bool(kernel_indices) or _has_dropout_keys(use.values)
    iterations = jnp.arange(scan.length) if needs_iteration else None

    def run_iteration(arrays: dict[int, Value], xs: Tree) -> tuple[dict[int, Value], list[Value]]:
        """Runs the body on one slice, and returns the changed carries and the outputs."""
        slices_of_arrays, member_parts, iteration = xs
        slices = list(map(_slice_of_operand, stacks, slices_of_arrays))
        for index in kernel_indices:
            layer = StackMember(slices[index].base, stacks[index].base, iteration)
            slices[index] = slices[index].replace(base=layer)
        arguments = _first_arguments_of_body(consts, carries.weights, arrays, iteration)
        for index, parts in member_parts.items():
            # An axis of size one: the body finds its only member at any index.
            expanded_parts = {name: part[None] for name, part in parts.items()}
            arguments[index] = consts[index].replace(**expanded_parts)
        outputs = body(*arguments, *slices)
        for index, output in enumerate(outputs):
            if index not in carries.weights:
                outputs[index] = interpreter.as_plain_array(output, use, "as an output")
        return {index: outputs[index] for index in arrays}, outputs[scan.n_carry :]

    last_arrays, ys = lax.scan(
        run_iteration,
        carries.arrays,
        (scanned_arrays, parts_of_members, iterations),
        scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    results: dict[int, Value] = {**carries.weights, **last_arrays}
    results |= enumerate(ys, scan.n_carry)
    results |= restacked_weights
    return [results[index] for index in range(len(used_outputs))]


def _without_sliced_shift(interpreter: Interpreter, use: Use, stack: Value) -> Value:
    """Returns a scanned operand, merged if each iteration would add its bias again."""
    if not isinstance(stack, Factored) or stack.shift is None:
        return stack
    is_sliced_along_in_axis = stack.labels[0] == "in" and stack.base.shape[0] > 1
    if is_sliced_along_in_axis:
        return interpreter.as_plain_array(stack, use, "over an in axis")
    return stack


def _indices_with_kernel(stacks: Sequence[Value], has_few_rows: bool) -> list[int]:
    """Returns the indices of stacks whose layers a TPU kernel may read in place.

    These are kernels for few rows, and those of experts, which are stacks in each layer.
    """
    indices: list[int] = []
    for index, stack in enumerate(stacks):
        if not isinstance(stack, Factored):
            continue
        has_experts = has_ragged_kernel(stack.base) and len(stack.base.shape) == 4
        if has_experts or (has_few_rows and has_rows_kernel(stack.base)):
            indices.append(index)
    return indices


def _has_few_rows(carries: Mapping[int, Value]) -> bool:
    """Returns True if a loop carries an activation with few rows, as decoding does."""
    return any(
        jnp.issubdtype(x.dtype, jnp.floating)
        and x.ndim > 1
        and math.prod(x.shape[:-1]) <= MAX_KERNEL_ROWS
        for x in carries.values()
        if isinstance(x, jax.Array)
    )


def _first_arguments_of_body(
    consts: Sequence[Value],
    constant_weights: Mapping[int, Value],
    arrays: Mapping[int, Value],
    iteration: Value,
) -> list[Value]:
    """Returns the constants and the carries for one iteration of a loop's body."""
    carries = dict(arrays)
    for index, weight in constant_weights.items():
        carries[index] = fold_dropout_key(weight, iteration)
    arguments = [fold_dropout_key(const, iteration) for const in consts]
    arguments += [carries[index] for index in range(len(carries))]
    return arguments


def _restacked_weights(use: Use, scan: eqns.Scan) -> dict[int, Factored]:
    """Returns the weights whose slices a scan stacks again, by the index of the output."""
    _, _, stacks = scan.split(use.values)
    if not any(isinstance(stack, Factored) for stack in stacks):
        return {}
    n_unsliced = scan.n_consts + scan.n_carry
    restacked_weights = {}
    for output_index, argument_index in enumerate(sources_of_outputs(scan.body)):
        is_carry = output_index < scan.n_carry
        if is_carry or argument_index is None or argument_index < n_unsliced:
            continue
        stack = use.values[argument_index]
        if isinstance(stack, Factored):
            restacked_weights[output_index] = stack
    return restacked_weights


def _parts_of_members(use: Use, scan: eqns.Scan) -> dict[int, dict[str, jax.Array]]:
    """Returns the parts of the members that a scan takes from constant stacks, by operand and name.

    A stack counts if the indices of its members are known and consecutive, as those of layers.
    """
    parts_of_members: dict[int, dict[str, jax.Array]] = {}
    for operand_index, stack in enumerate(use.values[: scan.n_consts]):
        if not isinstance(stack, Factored) or stack.labels[0] != "batch":
            continue
        selector_index = input_that_selects(scan.body, operand_index)
        if selector_index is None or selector_index < scan.n_consts + scan.n_carry:
            continue
        members = use.values[selector_index]
        if isinstance(members, jax.core.Tracer):
            continue
        first, last = int(members[0]), int(members[-1])
        if last < stack.base.shape[0] and [*members] == [*range(first, last + 1)]:
            parts_of_members[operand_index] = {
                name: lax.slice_in_dim(part, first, last + 1)
                for name, part in stack.parts.items()
                if 0 in stack.layout(name)
            }
    return parts_of_members


def _arrays_along_first_axis(stack: Value) -> Tree:
    """Returns the arrays of an operand that a scan slices.

    Of a weight: its base, and each part that has the first axis.
    """
    if not isinstance(stack, Factored):
        return stack
    arrays: list[Value] = []

    def collect(array: Value, layout: Axes) -> Value:
        if 0 in layout:
            arrays.append(jnp.moveaxis(array, layout.index(0), 0))
        return array

    move_axes(stack, collect, [0])
    return arrays


def _slice_of_operand(stack: Value, slices: Tree) -> Value:
    """Returns one slice of an operand, made of the slices of its arrays."""
    if not isinstance(stack, Factored):
        return slices
    remaining_slices = iter(slices)

    def replace_sliced(array: Value, layout: Axes) -> Value:
        return next(remaining_slices) if 0 in layout else array

    return move_axes(stack, replace_sliced, [0]).replace(labels=stack.labels[1:])


def _while(interpreter: Interpreter, use: Use) -> list[Value]:
    """Runs a while loop; constants and weights that are carried unchanged keep their factors.

    Under `jax.vmap`, a condition has one value for each example: the loop goes on while one of them
    does, and the others keep their state.
    """
    loop = eqns.read_while(use.eqn)
    condition_consts, body_consts, first_carries = loop.split(use.values)
    carries = _split_carries(interpreter, use, loop.body, first_carries, loop.n_body_consts)
    condition = interpreter.function_of_jaxpr(loop.condition)
    body = interpreter.function_of_jaxpr(loop.body)
    condition_jaxpr, _ = eqns.jaxpr_and_consts(loop.condition)
    n_example_axes = eqns.type_of(condition_jaxpr.outvars[0]).ndim

    def goes_on(state: _State) -> jax.Array:
        """Returns the value of the loop's condition."""
        iteration, arrays = state
        arguments = _first_arguments_of_body(condition_consts, carries.weights, arrays, iteration)
        is_true: jax.Array
        (is_true,) = condition(*arguments)
        return is_true

    def any_example_goes_on(state: _State) -> jax.Array:
        is_true = goes_on(state)
        return is_true.any() if n_example_axes else is_true

    def run_iteration(state: _State) -> _State:
        """Runs the body once; examples whose condition is False keep their state."""
        iteration, arrays = state
        outputs = body(*_first_arguments_of_body(body_consts, carries.weights, arrays, iteration))
        next_arrays = {
            index: interpreter.as_plain_array(outputs[index], use, "as a carry") for index in arrays
        }
        if n_example_axes:
            is_running = goes_on(state)
            for index, array in next_arrays.items():
                mask = lax.expand_dims(is_running, range(n_example_axes, array.ndim))
                next_arrays[index] = jnp.where(mask, array, arrays[index])
        next_iteration = None if iteration is None else iteration + 1
        return next_iteration, next_arrays

    first_iteration = jnp.int32(0) if _has_dropout_keys(use.values) else None
    first_state = (first_iteration, carries.arrays)
    _, last_arrays = lax.while_loop(any_example_goes_on, run_iteration, first_state)
    results: dict[int, Value] = {**carries.weights, **last_arrays}
    return [results[index] for index in range(len(first_carries))]


def _cond(interpreter: Interpreter, use: Use) -> Outcome:
    """Runs the branches; an output is a weight if all branches return weights of a common form."""
    branch_index, *operands = use.values
    if isinstance(branch_index, Factored):
        return None
    unchanged_weights: dict[int, Factored] = {}
    for output_index, operand_index in enumerate(common_sources(use.params["branches"])):
        if operand_index is not None and isinstance(operands[operand_index], Factored):
            unchanged_weights[output_index] = operands[operand_index]
    used_outputs = tuple(
        is_used and index not in unchanged_weights for index, is_used in enumerate(use.used_outputs)
    )
    bodies = [
        interpreter.function_of_jaxpr(jaxpr, used_outputs) for jaxpr in use.params["branches"]
    ]
    forms = _output_forms(use, bodies, operands, used_outputs)

    def branch_of(body: _Body) -> _Body:
        """Returns a branch whose outputs are arrays, or weights in the common forms."""

        def branch(*args: Value) -> list[Value]:
            """Runs the branch and converts its outputs."""
            outputs = body(*args)
            for index, output in enumerate(outputs):
                if index in forms:
                    outputs[index] = convert_to_form(output, forms[index])
                else:
                    outputs[index] = interpreter.as_plain_array(output, use, "as an output")
            return outputs

        return branch

    outputs = lax.switch(branch_index, [branch_of(body) for body in bodies], *operands)
    return [unchanged_weights.get(index, output) for index, output in enumerate(outputs)]


def _output_forms(
    use: Use, bodies: Sequence[_Body], operands: Sequence[Value], used_outputs: Sequence[bool]
) -> dict[int, CommonForm]:
    """Returns the common form of the weights that the branches return, by output index."""
    has_factors = [isinstance(value, Factored) and bool(value.parts) for value in operands]
    may_be_weights_by_branch = [
        may_be_weights(jaxpr, has_factors) for jaxpr in use.params["branches"]
    ]
    may_be_weight = [all(flags) for flags in zip(*may_be_weights_by_branch, strict=True)]
    if not any(map(all, zip(used_outputs, may_be_weight, strict=True))):
        return {}
    forms: dict[int, CommonForm] = {}
    outputs_by_branch = [jax.eval_shape(body, *operands) for body in bodies]
    for index, values in enumerate(zip(*outputs_by_branch, strict=True)):
        if all(isinstance(value, Factored) for value in values):
            form = common_form(values)
            if form is not None:
                forms[index] = form
    return forms


def _has_dropout_keys(values: Sequence[Value]) -> bool:
    return any(isinstance(value, Factored) and value.key is not None for value in values)


def _shard_map(interpreter: Interpreter, use: Use) -> list[Value]:
    """Runs a shard_map; A and B are sharded like W's axes, and the rank is replicated."""
    shard_map = eqns.read_shard_map(use.eqn)
    body = interpreter.function_of_jaxpr(shard_map.body)
    operands = [
        _with_splittable_base(value, spec, shard_map.mesh)
        for value, spec in zip(use.values, shard_map.in_specs, strict=True)
    ]

    def run_on_device(*values: Value) -> list[Value]:
        return [interpreter.as_plain_array(output, use, "as an output") for output in body(*values)]

    return jax.shard_map(
        run_on_device,
        mesh=shard_map.mesh,
        in_specs=tuple(map(_partition_specs, operands, shard_map.in_specs)),
        out_specs=list(shard_map.out_specs),
        axis_names=shard_map.manual_axes,
        check_vma=shard_map.check_vma,
    )(*operands)


def _with_splittable_base(value: Value, spec: PartitionSpec, mesh: Mesh) -> Value:
    """Returns a weight whose base can be split over devices; an array is unchanged."""
    if not isinstance(value, Factored):
        return value
    in_axes = value.axes("in")
    split_names = [*value.split]
    n_pieces: list[int] = []  # along each axis
    for axis, mesh_axes in enumerate(_mesh_axes_of_weight(value, spec)):
        names = _mesh_axis_names(mesh_axes)
        n_pieces.append(math.prod(mesh.shape[name] for name in names))
        if value.shift is not None and axis in in_axes:
            split_names += [name for name in names if mesh.shape[name] > 1]
    base = splittable(value.base, n_pieces)
    return dataclasses.replace(value, base=base, split=tuple(split_names))


def _mesh_axes_of_weight(weight: Factored, spec: PartitionSpec) -> list[MeshAxes]:
    """Returns the mesh axes of each axis of a weight."""
    n_unnamed_axes = len(weight.labels) - len(spec)
    return [*spec, *[None] * n_unnamed_axes]


def _mesh_axis_names(entry: MeshAxes) -> tuple[str, ...]:
    """Returns the names in one entry of a PartitionSpec."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return tuple(name for name in names if name)


def _partition_specs(value: Value, spec: PartitionSpec) -> Value:
    """Returns the PartitionSpec of an array, or of each array of a weight."""
    if not isinstance(value, Factored):
        return spec
    mesh_axes = _mesh_axes_of_weight(value, spec)

    def part_spec(_: object, layout: Axes) -> PartitionSpec:
        return PartitionSpec(*(None if axis < 0 else mesh_axes[axis] for axis in layout))

    return move_axes(value, part_spec)


def _turns(interpreter: Interpreter, use: Use) -> Outcome:
    """Adds up turns whose operands have factors; see `lora_jax.core.turns`."""
    n_turns, total, *operands = use.values
    if isinstance(n_turns, Factored) or isinstance(total, Factored):
        return None
    body = interpreter.function_of_jaxpr(use.params["jaxpr"])

    def run_turn(index: jax.Array, *operands: Value) -> Value:
        operands = tuple(fold_dropout_key(operand, index) for operand in operands)
        (addend,) = body(index, *operands)
        return interpreter.as_plain_array(addend, use, "as an output")

    return [add_turns(run_turn, n_turns, total, *operands)]


CONTROL_RULES: dict[str, Rule] = {
    TURNS: _turns,
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}


def _linear_solve(interpreter: Interpreter, use: Use) -> Outcome:
    """Solves with factored weights in the operator; merges a weight on the right-hand side.

    The operator and the solvers of a linear solve with an implicit derivative, as
    `jax.scipy.sparse.linalg.cg` has, are entered, and the solve is made again of what they become.
    Its derivative is taken of the operator alone, by JAX, as before.

    None where the operator would not be linear (a bias on B), or not the same in each step
    (dropout).
    """
    weights = [value for value in use.values if isinstance(value, Factored)]
    if any(weight.shift is not None or weight.key is not None for weight in weights):
        return None
    solve = eqns.read_linear_solve(use.eqn)
    right_side = [interpreter.as_plain_array(value, use) for value in use.values[solve.right]]
    n_unknowns = len(right_side)
    has_aux = len(use.eqn.outvars) > n_unknowns

    def entered(function: eqns.SolverFunction) -> Callable[[Sequence[Value]], list[Value]]:
        """Returns a function of the solve as a function of the vector only."""
        body = interpreter.function_of_jaxpr(function.jaxpr)
        consts = use.values[function.consts]

        def call(vector: Sequence[Value]) -> list[Value]:
            return [interpreter.as_plain_array(output, use) for output in body(*consts, *vector)]

        return call

    def solver(function: eqns.SolverFunction) -> Forward:
        """Returns a solver with the arguments (operator, vector) that JAX passes."""
        call = entered(function)

        def solver_of_operator(_: object, vector: Sequence[Value]) -> Value:
            outputs = call(vector)
            return (outputs[:n_unknowns], outputs[n_unknowns:]) if has_aux else outputs

        return solver_of_operator

    transpose_solve = solve.transpose_solve
    outputs: list[Value] = lax.custom_linear_solve(
        entered(solve.matvec),
        right_side,
        solver(solve.solve),
        None if transpose_solve is None else solver(transpose_solve),
        symmetric=solve.is_symmetric,
        has_aux=has_aux,
    )
    if not has_aux:
        return outputs
    solution, aux = outputs
    return [*solution, *aux]


SOLVE_RULES: dict[str, Rule] = {"custom_linear_solve": _linear_solve}
