"""Rules for control flow: it is entered, with the weights' factors as further operands."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use, at_site
from lora_jax.adapt.layout import moved
from lora_jax.base import is_base, movable
from lora_jax.factored import Factored
from lora_jax.parts import RANK, Axes


def _jit(interpreter: Interpreter, use: Use) -> list[Any]:
    jit = eqns.jit_of(use.eqn)
    body = interpreter.function(jit.jaxpr, use.live)
    values = [_constrained(v, s) for v, s in zip(use.values, jit.in_shardings, strict=True)]
    if jit.inline or interpreter.record is not None:
        outputs = body(*values)
    else:

        def make() -> Any:
            def call(*args: Any) -> list[Any]:
                return body(*args)

            call.__name__ = call.__qualname__ = jit.name
            return jax.jit(
                call,
                keep_unused=jit.keep_unused,
                compiler_options=jit.compiler_options or None,
            )

        outputs = interpreter.memoised(jit.jaxpr, ("jit", use.live, jit.name), make)(*values)
    return [_constrained(v, s) for v, s in zip(outputs, jit.out_shardings, strict=True)]


def _constrained(value: Any, sharding: Any) -> Any:
    if sharding is None or value is None:
        return value
    if not isinstance(value, Factored):
        return lax.with_sharding_constraint(value, sharding)
    if is_base(value.base):
        return value
    return value.replace(base=lax.with_sharding_constraint(value.base, sharding))


def _remat(interpreter: Interpreter, use: Use) -> list[Any]:
    body = interpreter.function(use.params["jaxpr"], use.live)
    if interpreter.record is not None:
        return body(*use.values)
    rematerialised = jax.checkpoint(
        body, prevent_cse=use.params["prevent_cse"], policy=use.params["policy"]
    )
    return rematerialised(*use.values)


def _scan(interpreter: Interpreter, use: Use) -> list[Any]:
    """Stacks are sliced with their factors; a weight carried unchanged is a constant."""
    scan = eqns.scan_of(use.eqn)
    inner, _ = eqns.opened(scan.body)
    n_fixed = scan.n_consts + scan.n_carry
    fixed, stacks = use.values[:n_fixed], use.values[n_fixed:]
    constant = dict(enumerate(fixed[: scan.n_consts]))
    for place in range(scan.n_consts, n_fixed):
        if isinstance(fixed[place], Factored):
            if inner.outvars[place - scan.n_consts] is inner.invars[place]:
                constant[place] = fixed[place]
            else:
                fixed[place] = interpreter.merged(fixed[place], "scan (as a carry)", use.eqn)
    carried = [place for place in range(n_fixed) if place not in constant]
    rebuilders, sliced = zip(*map(_sliced, stacks), strict=True) if stacks else ((), ())
    body = interpreter.function(scan.body)
    steps = jnp.arange(scan.length) if _has_keys(use.values) else None

    def step(carry: list[Any], xs: Any) -> tuple[list[Any], list[Any]]:
        parts, index = xs
        values = {place: at_site(value, index) for place, value in constant.items()}
        values |= dict(zip(carried, carry, strict=True))
        slices = [rebuild(part) for rebuild, part in zip(rebuilders, parts, strict=True)]
        outputs = body(*(values[place] for place in range(n_fixed)), *slices)
        outputs = [
            output
            if place < scan.n_carry and scan.n_consts + place in constant
            else _plain(interpreter, output, use, "scan (as an output)")
            for place, output in enumerate(outputs)
        ]
        carry = [outputs[place - scan.n_consts] for place in carried]
        return carry, outputs[scan.n_carry :]

    carry, ys = lax.scan(
        step,
        [fixed[place] for place in carried],
        (sliced, steps),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    final = constant | dict(zip(carried, carry, strict=True))
    return [*(final[place] for place in range(scan.n_consts, n_fixed)), *ys]


def _sliced(value: Any) -> tuple[Callable[[Any], Any], Any]:
    """The parts of an operand that a scan slices along axis 0, and how a slice is made of them.

    Of a weight: its base, and each part that has the axis; the others stay whole.
    """
    if not isinstance(value, Factored):
        return (lambda part: part), value
    stacked: list[Any] = []

    def collect(array: Any, axes: Axes) -> Any:
        if 0 in axes:
            stacked.append(jnp.moveaxis(array, axes.index(0), 0))
        return array

    moved(value, collect, [0])

    def rebuild(slices: list[Any]) -> Factored:
        left = iter(slices)
        put = lambda array, axes: next(left) if 0 in axes else array  # noqa: E731
        return moved(value, put, [0]).replace(labels=value.labels[1:])

    return rebuild, stacked


def _while(interpreter: Interpreter, use: Use) -> list[Any]:
    """Constants keep their factors; so does a weight that is carried unchanged."""
    loop = eqns.while_of(use.eqn)
    inner, _ = eqns.opened(loop.body)
    n_condition, n_body = loop.n_condition_consts, loop.n_body_consts
    of_condition = use.values[:n_condition]
    of_body = use.values[n_condition : n_condition + n_body]
    init = use.values[n_condition + n_body :]
    constant = {}
    for place, value in enumerate(init):
        if isinstance(value, Factored):
            if inner.outvars[place] is inner.invars[n_body + place]:
                constant[place] = value
            else:
                init[place] = interpreter.merged(value, "while (as a carry)", use.eqn)
    carried = [place for place in range(len(init)) if place not in constant]
    condition, body = map(interpreter.function, (loop.condition, loop.body))

    def whole(carry: list[Any], index: Any) -> list[Any]:
        values = {place: at_site(value, index) for place, value in constant.items()}
        values |= dict(zip(carried, carry, strict=True))
        return [values[place] for place in range(len(init))]

    def go_on(state: tuple[Any, list[Any]]) -> jax.Array:
        index, carry = state
        consts = [at_site(value, index) for value in of_condition]
        return condition(*consts, *whole(carry, index))[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        index, carry = state
        consts = [at_site(value, index) for value in of_body]
        outputs = body(*consts, *whole(carry, index))
        kept = [_plain(interpreter, outputs[place], use, "while (as a carry)") for place in carried]
        return (None if index is None else index + 1), kept

    start = jnp.int32(0) if _has_keys(use.values) else None
    _, carry = lax.while_loop(go_on, step, (start, [init[place] for place in carried]))
    final = constant | dict(zip(carried, carry, strict=True))
    return [final[place] for place in range(len(init))]


def _cond(interpreter: Interpreter, use: Use) -> list[Any] | None:
    index, *operands = use.values
    if isinstance(index, Factored):
        return None

    def branch(jaxpr: eqns.AnyJaxpr) -> Any:
        body = interpreter.function(jaxpr, use.live)
        return lambda *args: [
            _plain(interpreter, output, use, "cond (as an output)") for output in body(*args)
        ]

    branches = [branch(jaxpr) for jaxpr in use.params["branches"]]
    return lax.switch(index, branches, *operands)


def _plain(interpreter: Interpreter, value: Any, use: Use, place: str) -> Any:
    """A value as an array: a weight that would leave a loop or a branch is merged."""
    return interpreter.merged(value, place, use.eqn) if isinstance(value, Factored) else value


def _has_keys(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Factored) and v.key is not None for v in values)


def _shard_map(interpreter: Interpreter, use: Use) -> list[Any]:
    """A's in axes are laid out as the weight's are, B's out axes too, and the rank not at all."""
    there = eqns.shard_map_of(use.eqn)
    body = interpreter.function(there.body)
    operands = [
        v.replace(base=movable(v.base)) if isinstance(v, Factored) else v for v in use.values
    ]

    def run(*values: Any) -> list[Any]:
        return [
            _plain(interpreter, output, use, "shard_map (as an output)") for output in body(*values)
        ]

    return jax.shard_map(
        run,
        mesh=there.mesh,
        in_specs=tuple(_specs(v, s) for v, s in zip(operands, there.in_specs, strict=True)),
        out_specs=list(there.out_specs),
        axis_names=there.manual_axes,
        check_vma=there.check_vma,
    )(*operands)


def _specs(value: Any, spec: PartitionSpec) -> Any:
    if not isinstance(value, Factored):
        return spec
    names = [*spec, *[None] * (len(value.labels) - len(spec))]

    def of(_: Any, axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(None if axis == RANK else names[axis] for axis in axes))

    return moved(value, of)


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
