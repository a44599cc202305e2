"""Reads JAX's equations, every parameter that differs between releases, and applies them again."""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.adapt.user_code import user_context
from lora_jax.core.extend import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from lora_jax.core.types import EqnParams, Forward, Leaf, Value

AnyJaxpr = ClosedJaxpr | Jaxpr
Atom = Var | Literal  # an operand of an equation
_NOT_COMPILED = ("device_put",)  # where an array lies is no part of a program


def opened(jaxpr: AnyJaxpr) -> tuple[Jaxpr, Sequence[Value]]:
    """Returns a jaxpr and its constants (from 0.12 on, every jaxpr is closed)."""
    inner: Value = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def is_literal(atom: Atom) -> TypeGuard[Literal]:
    """Returns True if an operand is a constant written into the jaxpr."""
    return isinstance(atom, Literal)


def type_of(atom: Atom) -> Leaf:
    """Returns the type of an equation's operand or output: shape, dtype, sharding."""
    return atom.aval


def trace_with(
    fn: Forward, leaves: Sequence[Leaf], treedef: jax.tree_util.PyTreeDef, places: Sequence[int]
) -> Callable[..., list[Value]]:
    """Returns a function of the leaves at `places` alone, the others being closed over.

    It calls ``fn(*args)`` with all leaves as `treedef` has them, and returns the traced outputs.
    """

    def traced(*values: Value) -> list[Value]:
        given = dict(zip(places, values, strict=True))
        args = treedef.unflatten(given.get(place, leaf) for place, leaf in enumerate(leaves))
        return [out for out in jax.tree.leaves(fn(*args)) if isinstance(out, jax.core.Tracer)]

    return traced


def bind(eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Applies the equation as it stands to plain arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with user_context(eqn):
        outputs = eqn.primitive.bind(*values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def identity(eqn: JaxprEqn) -> tuple[Hashable, ...]:
    """Returns a key that is equal for equations that do the same to operands of the same types.

    The equation itself, where its parameters can't be compared.
    """
    avals = tuple(atom.aval for atom in (*eqn.invars, *eqn.outvars))
    same = (eqn.primitive, tuple(sorted(eqn.params.items())), avals)
    try:
        hash(same)
    except TypeError:
        return (id(eqn),)
    return same


class Scan(NamedTuple):
    """A `scan` equation; its operands are consts, then carries, then xs."""

    body: AnyJaxpr
    n_consts: int
    n_carry: int
    length: int
    reverse: bool
    unroll: int


def scan_of(eqn: JaxprEqn) -> Scan:
    """Reads a `scan` by the ranks of its operands, which no release changes.

    A carry has the body's rank inside and outside; an x has one axis more outside.
    """
    body = eqn.params["jaxpr"]
    inner, _ = opened(body)

    def are_sliced(outside: Sequence[Atom], inside: Sequence[Atom]) -> list[bool]:
        pairs = zip(outside, inside, strict=True)
        return [type_of(one).ndim != type_of(other).ndim for one, other in pairs]

    n_carry = are_sliced(eqn.outvars, inner.outvars).count(False)
    n_xs = sum(are_sliced(eqn.invars, inner.invars))
    n_consts = len(eqn.invars) - n_carry - n_xs
    return Scan(body, n_consts, n_carry, *_params(eqn, "length", "reverse", "unroll"))


class While(NamedTuple):
    """A `while` equation; its operands are the condition's consts, the body's, then carries."""

    condition: AnyJaxpr
    body: AnyJaxpr
    n_condition_consts: int
    n_body_consts: int


def while_of(eqn: JaxprEqn) -> While:
    """Reads a `while`."""
    return While(*_params(eqn, "cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"))


class Jit(NamedTuple):
    """A `jit` equation; a sharding that is not specified is None."""

    jaxpr: AnyJaxpr
    name: str
    inline: bool
    options: EqnParams  # of `jax.jit`
    in_shardings: list[Sharding | None]
    out_shardings: list[Sharding | None]


def jit_of(eqn: JaxprEqn) -> Jit:
    """Reads a `jit`."""
    body, name, inline = _params(eqn, "jaxpr", "name", "inline")
    keep_unused, compiler, *shardings = _params(
        eqn, "keep_unused", "compiler_options_kvs", "in_shardings", "out_shardings"
    )
    options = {"keep_unused": keep_unused, "compiler_options": dict(compiler) or None}
    known = [[s if isinstance(s, Sharding) else None for s in side] for side in shardings]
    is_inline = inline is True or getattr(inline, "name", "") == "ALWAYS"
    return Jit(body, name, is_inline, options, *known)


class ShardMap(NamedTuple):
    """A `shard_map` equation."""

    body: AnyJaxpr
    mesh: Mesh
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    manual_axes: frozenset[str]
    check_vma: bool


def shard_map_of(eqn: JaxprEqn) -> ShardMap:
    """Reads a `shard_map`."""
    names = ("jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes", "check_vma")
    return ShardMap(*_params(eqn, *names))


class SolverFunction(NamedTuple):
    """A function in a `custom_linear_solve`, and its operands that come before the vector."""

    jaxpr: AnyJaxpr
    consts: slice


class LinearSolve(NamedTuple):
    """A `custom_linear_solve` equation; its last operands are the right-hand side."""

    matvec: SolverFunction
    solve: SolverFunction
    transpose_solve: SolverFunction | None
    right: slice
    is_symmetric: bool


def linear_solve_of(eqn: JaxprEqn) -> LinearSolve:
    """Reads a `custom_linear_solve`."""
    jaxprs, lengths = _params(eqn, "jaxprs", "const_lengths")
    ends = list(itertools.accumulate(lengths, initial=0))
    consts = {name: slice(*ends[n : n + 2]) for n, name in enumerate(lengths._fields)}

    def part(name: str) -> SolverFunction:
        return SolverFunction(getattr(jaxprs, name), consts[name])

    back = None if jaxprs.transpose_solve is None else part("transpose_solve")
    right, is_symmetric = slice(ends[-1], None), jaxprs.vecmat is jaxprs.matvec
    return LinearSolve(part("matvec"), part("solve"), back, right, is_symmetric)


class PallasKernel(NamedTuple):
    """A `pallas_call` or a `flash_kernel` equation: a kernel written for an accelerator."""

    name: str


def kernel_of(eqn: JaxprEqn) -> PallasKernel | None:
    """Reads a kernel's equation; returns None for any other one."""
    if eqn.primitive.name not in ("pallas_call", "flash_kernel"):
        return None
    return PallasKernel(eqn.params.get("name") or "")


def scope_of(eqn: JaxprEqn) -> str:
    """Returns the names of the scopes that an equation stands in, within its jaxpr."""
    return str(eqn.source_info.name_stack)


def _params(eqn: JaxprEqn, *names: str) -> list[Any]:
    return [eqn.params[name] for name in names]


def function_name(eqn: JaxprEqn) -> str | None:
    """Returns the name of the function that a jit, custom_vjp or custom_jvp equation calls."""
    if "name" in eqn.params and "jaxpr" in eqn.params:
        name: str = eqn.params["name"]
        return name
    if "call_jaxpr" in eqn.params:
        inner, _ = opened(eqn.params["call_jaxpr"])
        return inner.debug_info.func_name
    return None


class EagerSteps:
    """Compiled equations of one jaxpr, for eager calls to run again and again.

    Each is a program of its own, as in JAX's own eager mode, so that results are the same to the
    bit; a product with a weight and its factors is one program. Equations that do the same share a
    program.
    """

    def __init__(self) -> None:
        self._of_equation: dict[tuple[int, Hashable], Forward] = {}
        self._shared: dict[Hashable, Forward] = {}

    def bind(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Applies an equation to plain arrays."""
        is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
        if is_traced or eqn.effects or eqn.primitive.name in _NOT_COMPILED:
            return bind(eqn, values)
        outputs: list[Value] = self.compiled(eqn, None, lambda values: bind(eqn, values))(values)
        return outputs

    def compiled(self, eqn: JaxprEqn, how: Hashable, call: Forward) -> Forward:
        """Returns `call`, compiled, which applies the equation; `how` tells its variants apart."""
        known = self._of_equation.get((id(eqn), how))
        if known is None:
            known = self._shared.setdefault((*identity(eqn), how), jax.jit(call))
            self._of_equation[id(eqn), how] = known
        return known
