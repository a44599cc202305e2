"""Finds weights whose in and out axes a function uses only in swapped roles.

The result is right, because xW and xWᵀ are both products. But A and B are swapped: A, which starts
at random, is on the side where B = 0 should be. Everything that treats A and B differently (DoRA's
magnitude, LoRA+, LoRA-FA, PiSSA, OLoRA) then acts on the wrong side.

The **side** of a product is the axes of the weight that it contracts: "in" or "out".
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Literal

import jax

from lora_jax.adapt import eqns
from lora_jax.adapt.reports import note_report
from lora_jax.adapt.roles import infer_roles
from lora_jax.adapt.user_code import SourceLine, user_line_of, warn
from lora_jax.core.axes import EMBEDDING_NAMES, AxisRoles, ObservedRoles
from lora_jax.core.extend import JaxprEqn, jaxpr_as_fun
from lora_jax.core.factored import Factored
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Value

Side = Literal["in", "out"]  # the axes that a product contracts
# By the path of a weight, its sides. For "out" the value is the line of the first such product.
SidesByPath = dict[str, dict[Side, SourceLine | None]]
_COLLECTED_SIDES: contextvars.ContextVar[SidesByPath | None] = contextvars.ContextVar(
    "noted", default=None
)


class RoleWarning(UserWarning):
    """Warns that a weight's axis roles differ from its use, or could not be checked.

    The function only uses the weight with in and out axes swapped. Or `lorafy(…, trace=…)` could
    not read the roles from the function, and used the convention for the weight's name.
    """


def note_side(weight: Factored, side: Side, eqn: JaxprEqn) -> None:
    """Records the side of a product with a weight, or of a look-up, inside `collect_sides`."""
    sides_by_path = _COLLECTED_SIDES.get()
    has_sides = bool(weight.parts) and weight.uses == "all"
    if sides_by_path is None or not has_sides:
        return
    sides = sides_by_path.setdefault(str(weight.path), {})
    if side not in sides:
        sides[side] = user_line_of(eqn) if side == "out" else None
    if _is_suspect(str(weight.path), sides):
        note_report()


@contextlib.contextmanager
def collect_sides() -> Iterator[SidesByPath]:
    """Collects the sides that `note_side` records inside the block."""
    sides_by_path: SidesByPath = {}
    token = _COLLECTED_SIDES.set(sides_by_path)
    try:
        yield sides_by_path
    finally:
        _COLLECTED_SIDES.reset(token)


def warn_of_swapped_roles(
    sides_by_path: SidesByPath, jaxpr: eqns.AnyJaxpr, inputs: Sequence[Value]
) -> None:
    """Warns of each weight whose products contract only its out axes.

    Args:
      sides_by_path: the sides that were collected while `jaxpr` was evaluated. An inner function
        from the cache records no sides, so the jaxpr is checked as well.
      jaxpr: jaxpr of the function.
      inputs: inputs of the jaxpr, weights among them.
    """
    # Weights whose recorded sides are "out" alone, each with a line of the user's code.
    line_of_suspect: dict[str, SourceLine] = {}
    for path, sides in sides_by_path.items():
        line = sides.get("out")
        if line is not None and _is_suspect(path, sides):
            line_of_suspect[path] = line
    if not line_of_suspect:
        return
    # Infer the roles of all weights from the whole jaxpr, with shapes in place of arrays.
    shapes: list[jax.ShapeDtypeStruct] = []
    path_of_shape: dict[int, str] = {}  # by identity
    for value in inputs:
        array = value.base if isinstance(value, Factored) else value
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        shapes.append(shape)
        if isinstance(value, Factored):
            path_of_shape[id(shape)] = str(value.path)
    roles_in_jaxpr = infer_roles(jaxpr_as_fun(jaxpr), shapes, path_of_shape)
    # Warn of the suspects whose inferred roles are the recorded roles with in and out swapped.
    for weight in inputs:
        if not isinstance(weight, Factored) or str(weight.path) not in line_of_suspect:
            continue
        path = str(weight.path)
        recorded_roles = _recorded_roles(weight)
        swapped_roles = AxisRoles(recorded_roles.out_axes, recorded_roles.in_axes)
        observed_roles = roles_in_jaxpr[path]
        if isinstance(observed_roles, ObservedRoles) and observed_roles.roles == swapped_roles:
            _warn_of_swap(path, recorded_roles, line_of_suspect[path])


def _is_suspect(path: str, sides: dict[Side, SourceLine | None]) -> bool:
    """Returns True if these sides suggest that A and B of a weight are swapped."""
    return sides.keys() == {"out"} and leaf_name(path) not in EMBEDDING_NAMES


def _recorded_roles(weight: Factored) -> AxisRoles:
    """Returns the recorded roles of a weight, with axes counted from the end."""
    ndim = len(weight.labels)
    return AxisRoles(
        in_axes=tuple(axis - ndim for axis in weight.axes("in")),
        out_axes=tuple(axis - ndim for axis in weight.axes("out")),
    )


def _warn_of_swap(path: str, roles: AxisRoles, line: SourceLine) -> None:
    """Warns of a weight that a function uses only with in and out axes swapped."""
    warn(
        f"The weight {path!r} is recorded with {roles}, but the function only uses it the other "
        f"way round, as at {line}. The result is right, but A and B are swapped. DoRA's "
        "magnitude, LoRA+, LoRA-FA, PiSSA and OLoRA therefore act on the wrong side. Let lorafy "
        "read the roles with lorafy(params, rules, trace=(fn, params, x)), or give them in "
        "LoraRule(in_axes=…, out_axes=…).",
        RoleWarning,
        line,
    )
