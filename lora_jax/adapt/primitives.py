"""The rule for each primitive that knows what to do with an adapted weight.

`dot_general` multiplies in factored form; layout primitives carry the factors along
(`lora_jax.adapt.layout`); control flow is entered. Everything else merges.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, RoleError, Rule, Use, at_site
from lora_jax.adapt.layout import LAYOUT_RULES, relabelled
from lora_jax.product import Factored, dot


def _dot_general(_: Interpreter, use: Use) -> list[Any] | None:
    left, right = use.values
    (contract, batch) = use.params["dimension_numbers"]
    if isinstance(left, Factored) and isinstance(right, Factored):
        return None
    weight_first = isinstance(left, Factored)
    x, weight = (right, left) if weight_first else (left, right)
    if weight_first:
        contract, batch = contract[::-1], batch[::-1]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    contract = (tuple(contract[0]), tuple(contract[1]))
    batch = (tuple(batch[0]), tuple(batch[1]))
    roles = {weight.labels[axis] for axis in contract[1] if weight.base.shape[axis] != 1}
    if not roles or roles == {"in", "out"}:
        return None
    _check_roles(weight, contract[1], batch[1], use)
    weight = _with_unit_roles(weight, contract[1], batch[1])
    params = {
        name: use.params[name] for name in ("precision", "preferred_element_type", "out_sharding")
    }
    return [dot(x, weight, contract=contract, batch=batch, weight_first=weight_first, **params)]


def _with_unit_roles(weight: Factored, contract: Sequence[int], batch: Sequence[int]) -> Factored:
    """The weight with the axes of size one in the roles that a product uses them in."""
    labels = list(weight.labels)
    role = next(labels[axis] for axis in contract if weight.base.shape[axis] != 1)
    for axis, size in enumerate(weight.base.shape):
        if size == 1 and axis in contract:
            labels[axis] = role
        elif size == 1 and (axis in batch or labels[axis] == role):
            labels[axis] = "batch"
    return weight if tuple(labels) == weight.labels else relabelled(weight, weight.base, labels)


def _check_roles(weight: Factored, contract: Sequence[int], batch: Sequence[int], use: Use) -> None:
    """A product contracts all in axes, or all out axes, and batches batch axes only."""
    shape = weight.base.shape

    def long(axes: Sequence[int]) -> set[int]:
        return {axis for axis in axes if shape[axis] != 1}

    contracted, batched = long(contract), long(batch)
    whole = contracted in (long(weight.axes("in")), long(weight.axes("out")))
    if whole and batched <= set(weight.axes("batch")):
        return
    file, line = eqns.user_line(use.eqn)
    roles = ", ".join(f"{n}: {label}" for n, label in zip(shape, weight.labels, strict=True))
    sizes = " and ".join(
        f"{verb} {[shape[axis] for axis in sorted(axes)]}"
        for verb, axes in (("contracts the axes of sizes", contracted), ("batches", batched))
        if axes
    )
    raise RoleError(
        f"the weight {weight.path!r} is recorded with the axes ({roles}), but the function "
        f"{sizes} at {file}:{line}. LoRA needs all in axes contracted, or all out axes, and batch "
        "axes left alone. Record what the function does with LoraRule(in_axes=…, out_axes=…), or "
        "leave this weight out of the rules"
    )


def _jit(interpreter: Interpreter, use: Use) -> list[Any]:
    jit = eqns.jit_of(use.eqn)
    body = interpreter.function(jit.jaxpr, use.live)
    values = [_constrained(v, s) for v, s in zip(use.values, jit.in_shardings, strict=True)]
    if jit.inline:
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
    if isinstance(value, Factored):
        base = lax.with_sharding_constraint(value.base, sharding)
        return _with_base(value, base)
    return lax.with_sharding_constraint(value, sharding)


def _with_base(weight: Factored, base: Any) -> Factored:
    return relabelled(weight, base, weight.labels)


def _remat(interpreter: Interpreter, use: Use) -> list[Any]:
    body = interpreter.function(use.params["jaxpr"], use.live)
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


def _sliced(value: Any) -> tuple[Any, Any]:
    """The parts of an operand that a scan slices along axis 0, and how a slice is made of them.

    Of a weight: the base, and each factor that has the axis; the others stay whole.
    """
    if not isinstance(value, Factored):
        return (lambda part: part), value
    label, labels = value.labels[0], value.labels[1:]
    n_batch = len(value.axes("batch"))
    stacked = {"base": value.base}
    if label != "out":
        stacked["a"] = jnp.moveaxis(value.a, n_batch + 1, 0) if label == "in" else value.a
    if label != "in":
        stacked["b"] = jnp.moveaxis(value.b, n_batch + 1, 0) if label == "out" else value.b
    if label == "batch":
        stacked["scale"] = value.scale
        if value.key is not None:
            stacked["key"] = value.key
    whole = {name: getattr(value, name) for name in ("a", "b", "scale", "key")}

    def rebuild(part: dict[str, Any]) -> Factored:
        return Factored(**(whole | part), labels=labels, dropout=value.dropout, path=value.path)

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


def _cond(interpreter: Interpreter, use: Use) -> list[Any]:
    index, *operands = use.values

    def branch(jaxpr: eqns.AnyJaxpr) -> Any:
        body = interpreter.function(jaxpr, use.live)
        return lambda *args: [
            _plain(interpreter, output, use, "cond (as an output)") for output in body(*args)
        ]

    branches = [branch(jaxpr) for jaxpr in use.params["branches"]]
    if isinstance(index, Factored):
        return None  # type: ignore[return-value]
    return lax.switch(index, branches, *operands)


def _plain(interpreter: Interpreter, value: Any, use: Use, place: str) -> Any:
    """A value as an array: a weight that would leave a loop or a branch is merged."""
    return interpreter.merged(value, place, use.eqn) if isinstance(value, Factored) else value


def _has_keys(values: Sequence[Any]) -> bool:
    return any(isinstance(v, Factored) and v.key is not None for v in values)


RULES: dict[str, Rule] = {
    **LAYOUT_RULES,
    "dot_general": _dot_general,
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
