"""Reads and re-applies equations of a jaxpr, and hides the differences between JAX releases."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeGuard, TypeVar

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec, Sharding

from lora_jax.adapt.user_code import UserContext
from lora_jax.core.extend import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from lora_jax.core.types import EqnParams, Forward, Leaf, Value

AnyJaxpr = ClosedJaxpr | Jaxpr
Atom = Var | Literal  # an operand of an equation
_NOT_COMPILED = ("device_put",)  # where an array lies is no part of a program
_T = TypeVar("_T")


def jaxpr_and_consts(jaxpr: AnyJaxpr) -> tuple[Jaxpr, Sequence[Value]]:
    """Returns a jaxpr and its constants (from 0.12 on, every jaxpr is closed)."""
    open_jaxpr: Value = getattr(jaxpr, "jaxpr", jaxpr)
    return open_jaxpr, getattr(jaxpr, "consts", ())


def is_literal(atom: Atom) -> TypeGuard[Literal]:
    """Returns True if an operand is a constant written into the jaxpr."""
    return isinstance(atom, Literal)


def type_of(atom: Atom) -> Leaf:
    """Returns the type of an equation's operand or output: shape, dtype, sharding."""
    return atom.aval


def function_of_inputs(
    fn: Forward,
    leaves: Sequence[Leaf],
    treedef: jax.tree_util.PyTreeDef,
    input_indices: Sequence[int],
) -> Callable[..., list[Value]]:
    """Returns a function of the leaves at `input_indices`; it closes over the others.

    It calls ``fn(*args)`` with all leaves as `treedef` has them, and returns the traced outputs.
    """

    def traced(*inputs: Value) -> list[Value]:
        """Calls the function and returns the traced arrays among its outputs."""
        all_leaves = list(leaves)
        for index, value in zip(input_indices, inputs, strict=True):
            all_leaves[index] = value
        outputs = jax.tree.leaves(fn(*treedef.unflatten(all_leaves)))
        return [output for output in outputs if isinstance(output, jax.core.Tracer)]

    return traced


def apply_equation(eqn: JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Applies the equation as it stands to plain arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with UserContext(eqn):
        outputs = eqn.primitive.bind(*values, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def types_of_outputs(eqn: JaxprEqn, _: Sequence[Value]) -> list[Leaf]:
    """Returns the types of an equation's outputs, in place of `apply_equation`."""
    return [type_of(variable) for variable in eqn.outvars]


def equation_key(eqn: JaxprEqn) -> tuple[Hashable, ...]:
    """Returns a key that two equations share if they compute the same from equal types.

    The equation itself, where its parameters can't be compared.
    """
    types = tuple(type_of(atom) for atom in (*eqn.invars, *eqn.outvars))
    key = (eqn.primitive, tuple(sorted(eqn.params.items())), types)
    try:
        hash(key)
    except TypeError:
        return (id(eqn),)
    return key


def equations_of_unstack(eqn: JaxprEqn) -> ClosedJaxpr:
    """Returns the equations of an `unstack`: a slice and a squeeze for each output.

    Since JAX 0.12, ``for w in stack`` is an `unstack`.
    """
    axis = eqn.params["axis"]

    def members(stack: jax.Array) -> list[jax.Array]:
        return [
            lax.squeeze(lax.slice_in_dim(stack, index, index + 1, axis=axis), (axis,))
            for index in range(stack.shape[axis])
        ]

    traced: ClosedJaxpr = jax.make_jaxpr(members)(type_of(eqn.invars[0]))
    # Messages name the user's line.
    own_eqns = [inner.replace(source_info=eqn.source_info) for inner in traced.jaxpr.eqns]
    body: ClosedJaxpr = traced.replace(jaxpr=traced.jaxpr.replace(eqns=own_eqns))
    return body


class Scan(NamedTuple):
    """A `scan` equation; its operands are consts, then carries, then xs."""

    body: AnyJaxpr
    n_consts: int
    n_carry: int
    length: int
    reverse: bool
    unroll: int

    def split(self, operands: list[_T]) -> tuple[list[_T], list[_T], list[_T]]:
        """Splits a list with an element for each operand: for consts, for carries, for xs."""
        n_unsliced = self.n_consts + self.n_carry
        consts = operands[: self.n_consts]
        carries = operands[self.n_consts : n_unsliced]
        return consts, carries, operands[n_unsliced:]


def read_scan(eqn: JaxprEqn) -> Scan:
    """Reads a `scan` by the ranks of its operands, which no release changes.

    A carry has the body's rank inside and outside; an x has one axis more outside.
    """
    params = eqn.params
    body = params["jaxpr"]
    inner, _ = jaxpr_and_consts(body)
    n_ys = _count_stacked(eqn.outvars, inner.outvars)
    n_xs = _count_stacked(eqn.invars, inner.invars)
    n_carry = len(eqn.outvars) - n_ys
    return Scan(
        body=body,
        n_consts=len(eqn.invars) - n_carry - n_xs,
        n_carry=n_carry,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


def _count_stacked(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
    """Returns the number of variables with another rank outside a scan than in its body."""
    pairs = zip(outside, inside, strict=True)
    return sum(type_of(stack).ndim != type_of(element).ndim for stack, element in pairs)


class While(NamedTuple):
    """A `while` equation; its operands are the condition's consts, the body's, then carries."""

    condition: AnyJaxpr
    body: AnyJaxpr
    n_condition_consts: int
    n_body_consts: int

    def split(self, operands: list[_T]) -> tuple[list[_T], list[_T], list[_T]]:
        """Splits a list with an element for each operand: for both kinds of consts, for carries."""
        n_consts = self.n_condition_consts + self.n_body_consts
        condition_consts = operands[: self.n_condition_consts]
        body_consts = operands[self.n_condition_consts : n_consts]
        return condition_consts, body_consts, operands[n_consts:]


def read_while(eqn: JaxprEqn) -> While:
    """Reads a `while`."""
    params = eqn.params
    return While(
        condition=params["cond_jaxpr"],
        body=params["body_jaxpr"],
        n_condition_consts=params["cond_nconsts"],
        n_body_consts=params["body_nconsts"],
    )


class Jit(NamedTuple):
    """A `jit` equation; a sharding that is not specified is None."""

    jaxpr: AnyJaxpr
    name: str
    inline: bool
    options: EqnParams  # of `jax.jit`
    in_shardings: list[Sharding | None]
    out_shardings: list[Sharding | None]


def read_jit(eqn: JaxprEqn) -> Jit:
    """Reads a `jit`."""
    params = eqn.params
    inline = params["inline"]  # a flag, or a member of an enum
    compiler_options = dict(params["compiler_options_kvs"])
    return Jit(
        jaxpr=params["jaxpr"],
        name=params["name"],
        inline=inline is True or getattr(inline, "name", "") == "ALWAYS",
        options={
            "keep_unused": params["keep_unused"],
            "compiler_options": compiler_options or None,
        },
        in_shardings=_none_if_unspecified(params["in_shardings"]),
        out_shardings=_none_if_unspecified(params["out_shardings"]),
    )


def _none_if_unspecified(shardings: Sequence[object]) -> list[Sharding | None]:
    """Returns shardings, with None for those that are not specified."""
    return [sharding if isinstance(sharding, Sharding) else None for sharding in shardings]


class ShardMap(NamedTuple):
    """A `shard_map` equation."""

    body: AnyJaxpr
    mesh: Mesh
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]
    manual_axes: frozenset[str]
    check_vma: bool


def read_shard_map(eqn: JaxprEqn) -> ShardMap:
    """Reads a `shard_map`."""
    params = eqn.params
    return ShardMap(
        body=params["jaxpr"],
        mesh=params["mesh"],
        in_specs=params["in_specs"],
        out_specs=params["out_specs"],
        manual_axes=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


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


def read_linear_solve(eqn: JaxprEqn) -> LinearSolve:
    """Reads a `custom_linear_solve`."""
    jaxprs = eqn.params["jaxprs"]
    n_consts = eqn.params["const_lengths"]  # of each function, by the same names
    functions: dict[str, SolverFunction] = {}
    start = 0
    for name in n_consts._fields:
        stop = start + getattr(n_consts, name)
        functions[name] = SolverFunction(getattr(jaxprs, name), slice(start, stop))
        start = stop
    has_transpose = jaxprs.transpose_solve is not None
    return LinearSolve(
        matvec=functions["matvec"],
        solve=functions["solve"],
        transpose_solve=functions["transpose_solve"] if has_transpose else None,
        right=slice(start, None),
        is_symmetric=jaxprs.vecmat is jaxprs.matvec,
    )


class PallasKernel(NamedTuple):
    """A `pallas_call` or a `flash_kernel` equation: a kernel written for an accelerator."""

    name: str


def read_kernel(eqn: JaxprEqn) -> PallasKernel | None:
    """Reads a kernel's equation; returns None for any other one."""
    if eqn.primitive.name not in ("pallas_call", "flash_kernel"):
        return None
    return PallasKernel(eqn.params.get("name") or "")


def scope_of(eqn: JaxprEqn) -> str:
    """Returns the names of the scopes around an equation, within its jaxpr."""
    return str(eqn.source_info.name_stack)


def function_name(eqn: JaxprEqn) -> str | None:
    """Returns the name of the function that a jit, custom_vjp or custom_jvp equation calls."""
    if "name" in eqn.params and "jaxpr" in eqn.params:
        name: str = eqn.params["name"]
        return name
    if "call_jaxpr" in eqn.params:
        inner, _ = jaxpr_and_consts(eqn.params["call_jaxpr"])
        return inner.debug_info.func_name
    return None


class EagerSteps:
    """The compiled equations of one jaxpr, which repeated eager calls use again.

    Each is a program of its own, as in JAX's own eager mode, so that results are the same to the
    bit; a product with a weight and its factors is one program. Equations that do the same share a
    program.
    """

    def __init__(self) -> None:
        self._program_of_eqn: dict[tuple[int, Hashable], Forward] = {}
        self._shared_programs: dict[Hashable, Forward] = {}

    def apply_equation(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        """Applies an equation to plain arrays."""
        is_traced = any(isinstance(value, jax.core.Tracer) for value in values)
        if is_traced or eqn.effects or eqn.primitive.name in _NOT_COMPILED:
            return apply_equation(eqn, values)
        program = self.compiled_program(eqn, None, lambda values: apply_equation(eqn, values))
        outputs: list[Value] = program(values)
        return outputs

    def compiled_program(self, eqn: JaxprEqn, variant: Hashable, call: Forward) -> Forward:
        """Returns the compiled form of `call`, a variant of the equation."""
        program = self._program_of_eqn.get((id(eqn), variant))
        if program is None:
            program = self._shared_programs.setdefault((*equation_key(eqn), variant), jax.jit(call))
            self._program_of_eqn[id(eqn), variant] = program
        return program
