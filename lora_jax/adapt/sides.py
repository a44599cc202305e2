"""Notices weights whose in and out axes a function only uses the other way round.

The result is right, as xW and xWᵀ are both products. But A and B have changed places: A, random at
first, stands on the side where B = 0 should, and whatever treats the two differently (DoRA's
magnitude, LoRA+, LoRA-FA, PiSSA, OLoRA) acts on the wrong side.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Literal

import jax

from lora_jax.adapt import eqns
from lora_jax.adapt.roles import infer_roles
from lora_jax.adapt.user_code import SourceLine, place_of, warn
from lora_jax.core.axes import EMBEDDING_NAMES, AxisRoles, ObservedRoles
from lora_jax.core.extend import JaxprEqn, jaxpr_as_fun
from lora_jax.core.factored import Factored
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Value

Side = Literal["in", "out"]  # the axes that a product contracts
# By the path of a weight, the sides that products contract. For "out", the line of the first one.
NotedSides = dict[str, dict[Side, SourceLine | None]]
_NOTED: contextvars.ContextVar[NotedSides | None] = contextvars.ContextVar("noted", default=None)


class RoleWarning(UserWarning):
    """A function does something else with a weight than its axis roles say, or what is not known.

    It only uses the weight the other way round, or `lorafy(…, trace=…)` could not read the roles
    from it, and took the convention for the weight's name.
    """


def note(weight: Factored, side: Side, eqn: JaxprEqn) -> None:
    """Notes a product with a weight, or a look-up in it, where `noted` collects them."""
    noted_sides = _NOTED.get()
    has_sides = bool(weight.parts) and weight.uses == "all"
    if noted_sides is None or not has_sides:
        return
    sides = noted_sides.setdefault(str(weight.path), {})
    if side not in sides:
        sides[side] = place_of(eqn) if side == "out" else None


@contextlib.contextmanager
def noted() -> Iterator[NotedSides]:
    """Collects the uses that are noted inside."""
    noted_sides: NotedSides = {}
    token = _NOTED.set(noted_sides)
    try:
        yield noted_sides
    finally:
        _NOTED.reset(token)


def warn_of_swapped(noted_sides: NotedSides, jaxpr: eqns.AnyJaxpr, inputs: Sequence[Value]) -> None:
    """Warns of weights whose out axes are contracted, and never their in axes.

    Args:
      noted_sides: what was noted while `jaxpr` was evaluated. An inner function from the cache
        notes nothing, so the jaxpr is checked as well.
      jaxpr: jaxpr of the function.
      inputs: inputs of the jaxpr, weights among them.
    """
    line_of_suspect = {
        path: sides["out"]
        for path, sides in noted_sides.items()
        if "in" not in sides and leaf_name(path) not in EMBEDDING_NAMES
    }
    if not line_of_suspect:
        return
    shapes: list[jax.ShapeDtypeStruct] = []
    path_of_shape: dict[int, str] = {}  # by identity
    for value in inputs:
        array = value.base if isinstance(value, Factored) else value
        shapes.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
        if isinstance(value, Factored):
            path_of_shape[id(shapes[-1])] = str(value.path)
    roles_in_jaxpr = infer_roles(jaxpr_as_fun(jaxpr), shapes, path_of_shape)
    for weight in inputs:
        if not isinstance(weight, Factored) or str(weight.path) not in line_of_suspect:
            continue
        path = str(weight.path)
        recorded_roles = _roles_of(weight)
        swapped_roles = AxisRoles(recorded_roles.out_axes, recorded_roles.in_axes)
        observed_roles = roles_in_jaxpr[path]
        if isinstance(observed_roles, ObservedRoles) and observed_roles.roles == swapped_roles:
            line = line_of_suspect[path]
            assert line is not None, "a use of the out axes has a line"
            _warn(path, recorded_roles, line)


def _roles_of(weight: Factored) -> AxisRoles:
    """Returns the recorded roles of a weight, its axes counted from the end."""
    ndim = len(weight.labels)
    return AxisRoles(
        in_axes=tuple(axis - ndim for axis in weight.axes("in")),
        out_axes=tuple(axis - ndim for axis in weight.axes("out")),
    )


def _warn(path: str, roles: AxisRoles, line: SourceLine) -> None:
    """Warns of a weight that a function only uses the other way round, at a line of it."""
    warn(
        f"the weight {path!r} is recorded with {roles}, but the function only uses it the other "
        f"way round, as at {line}. The result is right, but A and B have changed places: DoRA's "
        "magnitude, LoRA+, LoRA-FA, PiSSA and OLoRA act on the wrong side. Record what the "
        "function does: by looking, lorafy(params, rules, trace=(fn, params, x)), or by hand with "
        "LoraRule(in_axes=…, out_axes=…).",
        RoleWarning,
        line,
    )
