"""Rules that enter control flow and linear solves, with the weights' factors as operands."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use, fold_dropout_key
from lora_jax.adapt.rules.choices import CommonForm, common_form, convert
from lora_jax.adapt.rules.flow import agreed_sources, may_be_weights, sources
from lora_jax.adapt.rules.layout import moved
from lora_jax.core.base import StackMember, has_rows_kernel, is_base, splittable
from lora_jax.core.factored import Factored
from lora_jax.core.few_rows import KERNEL_ROWS
from lora_jax.core.parts import Axes
from lora_jax.core.types import Forward, Outcome, Tree, Value

Entry = str | tuple[str, ...] | None  # the axes of the mesh along which an axis is split
_State = tuple[Value, dict[int, Value]]  # of a loop: the iteration, if keys need it, and the carry


def _jit(interpreter: Interpreter, use: Use) -> list[Value]:
    jit = eqns.jit_of(use.eqn)
    body = called = interpreter.function(jit.jaxpr, use.live)
    values = [_constrained(v, s) for v, s in zip(use.values, jit.in_shardings, strict=True)]
    if not jit.inline and interpreter.record is None:

        def make() -> Forward:
            def call(*args: Value) -> list[Value]:
                return body(*args)

            call.__name__ = call.__qualname__ = jit.name
            return jax.jit(call, **jit.options)

        called = interpreter.memoised(jit.jaxpr, ("jit", use.live, jit.name), make)
    outputs = called(*values)
    return [_constrained(v, s) for v, s in zip(outputs, jit.out_shardings, strict=True)]


def _constrained(value: Value, sharding: Sharding | None) -> Value:
    if sharding is None or value is None:
        return value
    if not isinstance(value, Factored):
        return lax.with_sharding_constraint(value, sharding)
    if is_base(value.base):
        return value
    return value.replace(base=lax.with_sharding_constraint(value.base, sharding))


def _remat(interpreter: Interpreter, use: Use) -> list[Value]:
    body = interpreter.function(use.params["jaxpr"], use.live)
    if interpreter.record is None:
        how = {name: use.params[name] for name in ("prevent_cse", "policy")}
        body = jax.checkpoint(body, **how)
    return body(*use.values)


def _constants(
    interpreter: Interpreter, use: Use, body: eqns.AnyJaxpr, carries: dict[int, Value], first: int
) -> dict[int, Value]:
    """Takes the weights that a loop carries unchanged out of `carries`; others are merged there.

    Args:
      body: body of the loop.
      carries: by place, from 0; changed.
      first: the place of the first carry among the body's arguments.
    """
    weights = {place: v for place, v in carries.items() if isinstance(v, Factored)}
    origins = sources(body) if weights else ()
    same = [place for place in weights if origins[place] == first + place]
    for place in weights.keys() - same:
        carries[place] = interpreter.plain(weights[place], use, "as a carry")
    return {place: carries.pop(place) for place in same}


def _scan(interpreter: Interpreter, use: Use) -> list[Value]:
    """Slices stacks with their factors; treats a weight that is carried unchanged as a constant.

    A stack of a weight's own slices is that weight.
    """
    scan = eqns.scan_of(use.eqn)
    n_fixed = scan.n_consts + scan.n_carry
    consts = use.values[: scan.n_consts]
    stacks = [_with_whole_shift(interpreter, use, value) for value in use.values[n_fixed:]]
    carries = dict(enumerate(use.values[scan.n_consts : n_fixed]))
    constant = _constants(interpreter, use, scan.body, carries, scan.n_consts)
    rebuilders, sliced = zip(*map(_sliced, stacks), strict=True) if stacks else ((), ())
    same = _restacked(use, scan)
    live = tuple(w and p not in same for p, w in enumerate(use.live))
    live = (*(True,) * scan.n_carry, *live[scan.n_carry :])
    body = interpreter.function(scan.body, None if all(live) else live)
    kernels = _kernel_places(stacks) if _has_few_rows(carries) else []
    steps = jnp.arange(scan.length) if kernels or _has_keys(use.values) else None

    def step(carry: dict[int, Value], xs: Tree) -> tuple[dict[int, Value], list[Value]]:
        parts, index = xs
        slices = [rebuild(part) for rebuild, part in zip(rebuilders, parts, strict=True)]
        for place in kernels:
            member = StackMember(slices[place].base, stacks[place].base, index)
            slices[place] = slices[place].replace(base=member)
        outputs = body(*_arguments(consts, constant, carry, index), *slices)
        outputs = [
            output if place in constant else interpreter.plain(output, use, "as an output")
            for place, output in enumerate(outputs)
        ]
        return {place: outputs[place] for place in carry}, outputs[scan.n_carry :]

    inputs, length, unroll = (sliced, steps), scan.length, scan.unroll
    carry, ys = lax.scan(step, carries, inputs, length, reverse=scan.reverse, unroll=unroll)
    final = constant | carry | dict(enumerate(ys, scan.n_carry)) | same
    return [final[place] for place in range(len(live))]


def _with_whole_shift(interpreter: Interpreter, use: Use, value: Value) -> Value:
    """Returns an operand that a scan slices; merges one that would add a bias in each step."""
    if not isinstance(value, Factored) or value.shift is None:
        return value
    is_cut = value.labels[0] == "in" and value.base.shape[0] > 1
    return interpreter.plain(value, use, "over an in axis") if is_cut else value


def _kernel_places(stacks: Sequence[Value]) -> list[int]:
    """Returns the places of weights whose layers a kernel may read out of their stack."""
    weights = ((place, v) for place, v in enumerate(stacks) if isinstance(v, Factored))
    return [place for place, weight in weights if has_rows_kernel(weight.base)]


def _has_few_rows(carries: dict[int, Value]) -> bool:
    """Returns True if a loop carries an activation of few rows, as decoding does."""
    return any(
        jnp.issubdtype(x.dtype, jnp.floating)
        and x.ndim > 1
        and math.prod(x.shape[:-1]) <= KERNEL_ROWS
        for x in carries.values()
        if isinstance(x, jax.Array)
    )


def _arguments(
    consts: Sequence[Value], constant: dict[int, Value], carry: dict[int, Value], index: Value
) -> list[Value]:
    """Returns the first arguments of a loop's body in an iteration: consts, then the carry."""
    known = {place: fold_dropout_key(value, index) for place, value in constant.items()} | carry
    return [
        *(fold_dropout_key(value, index) for value in consts),
        *map(known.get, range(len(known))),
    ]


def _restacked(use: Use, scan: eqns.Scan) -> dict[int, Factored]:
    """Returns, by the place of an output, the weight whose slices a scan stacks up again."""
    n_fixed = scan.n_consts + scan.n_carry
    if not any(isinstance(value, Factored) for value in use.values[n_fixed:]):
        return {}
    stacked = enumerate(sources(scan.body)[scan.n_carry :], scan.n_carry)
    restacked = {p: use.values[s] for p, s in stacked if s is not None and s >= n_fixed}
    return {place: value for place, value in restacked.items() if isinstance(value, Factored)}


def _sliced(value: Value) -> tuple[Callable[[Tree], Value], Tree]:
    """Returns a function that makes a slice of an operand, and the parts that a scan slices for it.

    Of a weight: its base, and each part that has the axis; the others stay whole.
    """
    if not isinstance(value, Factored):
        return (lambda part: part), value
    stacked: list[Value] = []

    def collect(array: Value, axes: Axes) -> Value:
        if 0 in axes:
            stacked.append(jnp.moveaxis(array, axes.index(0), 0))
        return array

    moved(value, collect, [0])

    def rebuild(slices: list[Value]) -> Factored:
        left = iter(slices)
        put = lambda array, axes: next(left) if 0 in axes else array  # noqa: E731
        return moved(value, put, [0]).replace(labels=value.labels[1:])

    return rebuild, stacked


def _while(interpreter: Interpreter, use: Use) -> list[Value]:
    """Keeps the factors of constants, and of weights that are carried unchanged.

    Under `jax.vmap`, a condition has one value for each example: the loop goes on while one of them
    does, and the others keep their state.
    """
    loop = eqns.while_of(use.eqn)
    n_condition, n_body = loop.n_condition_consts, loop.n_body_consts
    of_condition = use.values[:n_condition]
    of_body = use.values[n_condition : n_condition + n_body]
    init = dict(enumerate(use.values[n_condition + n_body :]))
    n_carry = len(init)
    constant = _constants(interpreter, use, loop.body, init, n_body)
    condition, body = map(interpreter.function, (loop.condition, loop.body))
    n_axes = eqns.type_of(eqns.opened(loop.condition)[0].outvars[0]).ndim

    def goes_on(state: _State) -> jax.Array:
        index, carry = state
        wanted: jax.Array = condition(*_arguments(of_condition, constant, carry, index))[0]
        return wanted

    def step(state: _State) -> _State:
        index, before = state
        outputs = body(*_arguments(of_body, constant, before, index))
        kept = {p: interpreter.plain(outputs[p], use, "as a carry") for p in before}
        if n_axes:
            wanted = goes_on(state)
            for p, after in kept.items():
                axes = range(n_axes, after.ndim)
                kept[p] = jnp.where(lax.expand_dims(wanted, axes), after, before[p])
        return (None if index is None else index + 1), kept

    start = jnp.int32(0) if _has_keys(use.values) else None
    any_goes_on = (lambda state: goes_on(state).any()) if n_axes else goes_on
    _, carry = lax.while_loop(any_goes_on, step, (start, init))
    final = constant | carry
    return [final[place] for place in range(n_carry)]


def _cond(interpreter: Interpreter, use: Use) -> Outcome:
    """Enters the branches; returns a weight where each branch returns one, all of one form."""
    index, *operands = use.values
    if isinstance(index, Factored):
        return None
    unchanged = {
        place: operands[origin]
        for place, origin in enumerate(agreed_sources(use.params["branches"]))
        if origin is not None and isinstance(operands[origin], Factored)
    }
    live = tuple(wanted and place not in unchanged for place, wanted in enumerate(use.live))
    bodies = [interpreter.function(jaxpr, live) for jaxpr in use.params["branches"]]
    forms = _forms(use, bodies, operands, live)

    def branch(body: Callable[..., list[Value]]) -> Callable[..., list[Value]]:
        def leave(place: int, value: Value) -> Value:
            if place in forms:
                return convert(value, forms[place])
            return interpreter.plain(value, use, "as an output")

        return lambda *args: list(map(leave, range(len(live)), body(*args)))

    outputs = lax.switch(index, list(map(branch, bodies)), *operands)
    return [unchanged.get(place, output) for place, output in enumerate(outputs)]


def _forms(
    use: Use,
    bodies: Sequence[Callable[..., list[Value]]],
    operands: Sequence[Value],
    live: Sequence[bool],
) -> dict[int, CommonForm]:
    """Returns, by the place of an output, the form of the weights that the branches return."""
    given = [isinstance(value, Factored) and bool(value.parts) for value in operands]
    each = [may_be_weights(jaxpr, given) for jaxpr in use.params["branches"]]
    may_be = [all(branches) for branches in zip(*each, strict=True)]
    if not any(wanted and may for wanted, may in zip(live, may_be, strict=True)):
        return {}
    forms: dict[int, CommonForm] = {}
    outputs = zip(*(jax.eval_shape(body, *operands) for body in bodies), strict=True)
    for place, values in enumerate(outputs):
        if all(isinstance(value, Factored) for value in values):
            form = common_form(values)
            forms |= {} if form is None else {place: form}
    return forms


def _has_keys(values: Sequence[Value]) -> bool:
    return any(isinstance(v, Factored) and v.key is not None for v in values)


def _shard_map(interpreter: Interpreter, use: Use) -> list[Value]:
    """Shards A's in axes and B's out axes as the weight's are; the rank is replicated."""
    mapped = eqns.shard_map_of(use.eqn)
    body = interpreter.function(mapped.body)
    pairs = zip(use.values, mapped.in_specs, strict=True)
    operands = [_splittable(value, spec, mapped.mesh) for value, spec in pairs]

    def run(*values: Value) -> list[Value]:
        return [interpreter.plain(output, use, "as an output") for output in body(*values)]

    return jax.shard_map(
        run,
        mesh=mapped.mesh,
        in_specs=tuple(_specs(v, s) for v, s in zip(operands, mapped.in_specs, strict=True)),
        out_specs=list(mapped.out_specs),
        axis_names=mapped.manual_axes,
        check_vma=mapped.check_vma,
    )(*operands)


def _splittable(value: Value, spec: PartitionSpec, mesh: Mesh) -> Value:
    """Returns a weight with a base that each device can have a piece of."""
    if not isinstance(value, Factored):
        return value
    each = [names if isinstance(names, tuple) else (names,) for names in _axis_names(value, spec)]
    parts = [math.prod(mesh.shape[name] for name in names if name) for names in each]
    split = value.split
    if value.shift is not None:
        for axis in value.axes("in"):
            split += tuple(name for name in each[axis] if name and mesh.shape[name] > 1)
    return dataclasses.replace(value, base=splittable(value.base, parts), split=split)


def _axis_names(value: Factored, spec: PartitionSpec) -> list[Entry]:
    return [*spec, *[None] * (len(value.labels) - len(spec))]


def _specs(value: Value, spec: PartitionSpec) -> Value:
    if not isinstance(value, Factored):
        return spec
    names = _axis_names(value, spec)

    def partition(_: object, axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(None if axis < 0 else names[axis] for axis in axes))

    return moved(value, partition)


CONTROL_RULES: dict[str, Rule] = {
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
    """Keeps the factors of weights that the operator multiplies by; merges a right-hand side.

    The operator and the solvers of a linear solve with an implicit derivative, as
    `jax.scipy.sparse.linalg.cg` has, are entered, and the solve is made again of what they become.
    Its derivative is taken of the operator alone, by JAX, as before.

    None where the operator would not be linear (a bias on B), or not the same in each step
    (dropout).
    """
    weights = [value for value in use.values if isinstance(value, Factored)]
    if any(weight.shift is not None or weight.key is not None for weight in weights):
        return None
    solve = eqns.linear_solve_of(use.eqn)

    def plain(value: Value) -> Value:
        return interpreter.plain(value, use)

    def called(part: eqns.SolverFunction) -> Callable[[Sequence[Value]], list[Value]]:
        body, consts = interpreter.function(part.jaxpr), use.values[part.consts]
        return lambda vector: list(map(plain, body(*consts, *vector)))

    right = list(map(plain, use.values[solve.right]))
    n, has_aux = len(right), len(use.eqn.outvars) > len(right)

    def solver(part: eqns.SolverFunction) -> Forward:
        run = called(part)

        def solved(_: object, vector: Sequence[Value]) -> Value:
            outputs = run(vector)
            return (outputs[:n], outputs[n:]) if has_aux else outputs

        return solved

    back = solve.transpose_solve
    outputs = lax.custom_linear_solve(
        called(solve.matvec),
        right,
        solver(solve.solve),
        None if back is None else solver(back),
        symmetric=solve.is_symmetric,
        has_aux=has_aux,
    )
    return [*outputs[0], *outputs[1]] if has_aux else outputs


SOLVE_RULES: dict[str, Rule] = {"custom_linear_solve": _linear_solve}
