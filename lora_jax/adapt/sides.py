"""Notices weights whose in and out axes a function only uses the other way round.

The result is right, as xW and xWᵀ are both products. But A and B have changed places: A, random at
first, stands on the side where B = 0 should, and whatever treats the two differently (DoRA's
magnitude, LoRA+, LoRA-FA, PiSSA, OLoRA) acts on the wrong side.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax

from lora_jax.adapt import eqns
from lora_jax.adapt.roles import infer_roles
from lora_jax.adapt.user_code import SourceLine, warn
from lora_jax.core.axes import EMBEDDING_NAMES, AxisRoles, ObservedRoles
from lora_jax.core.extend import jaxpr_as_fun
from lora_jax.core.factored import Factored
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Shaped, Value

Side = Literal["in", "out"]  # the axes that a product contracts
# By the path of a weight, and the side: the place of the first such use, where it is to be told.
Noted = dict[str, dict[Side, SourceLine | None]]
_SEEN: contextvars.ContextVar[Noted | None] = contextvars.ContextVar("seen", default=None)


class RoleWarning(UserWarning):
    """A function does something else with a weight than its axis roles say, or what is not known.

    It only uses the weight the other way round, or `lorafy(…, trace=…)` could not read the roles
    from it, and took the convention for the weight's name.
    """


def note(weight: Factored, side: Side, place: Callable[[], SourceLine]) -> None:
    """Notes a product with a weight, or a look-up in it."""
    seen = _SEEN.get()
    if seen is not None and weight.parts and weight.uses == "all":
        sides = seen.setdefault(str(weight.path), {})
        if side not in sides:
            sides[side] = place() if side == "out" else None


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """Collects the uses that are noted inside."""
    seen: Noted = {}
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def warn_of_swapped(seen: Noted, jaxpr: eqns.AnyJaxpr, inputs: Sequence[Value]) -> None:
    """Warns of weights whose out axes are contracted, and never their in axes.

    Args:
      seen: what was noted while `jaxpr` was evaluated. An inner function from the cache notes
        nothing, so the jaxpr is checked as well.
      jaxpr: jaxpr of the function.
      inputs: inputs of the jaxpr, weights among them.
    """
    swapped = {path for path, sides in seen.items() if "in" not in sides}
    swapped = {path for path in swapped if leaf_name(path) not in EMBEDDING_NAMES}
    if not swapped:
        return
    weights = {place: w for place, w in enumerate(inputs) if isinstance(w, Factored)}
    shapes = [_shape(v.base if isinstance(v, Factored) else v) for v in inputs]
    paths = {id(shapes[place]): str(weight.path) for place, weight in weights.items()}
    inferred = infer_roles(jaxpr_as_fun(jaxpr), shapes, paths)
    for weight in weights.values():
        path, ndim = str(weight.path), len(weight.labels)
        if path not in swapped:
            continue
        ins, outs = (tuple(a - ndim for a in weight.axes(side)) for side in ("in", "out"))
        there = inferred[path]
        if isinstance(there, ObservedRoles) and there.roles == AxisRoles(outs, ins):
            place = seen[path]["out"]
            assert place is not None
            _warn(path, AxisRoles(ins, outs), place)


def _shape(array: Shaped) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _warn(path: str, roles: AxisRoles, place: SourceLine) -> None:
    warn(
        f"the weight {path!r} is recorded with {roles}, but the function only uses it the other "
        f"way round, as at {place}. The result is right, but A and B have changed places: DoRA's "
        "magnitude, LoRA+, LoRA-FA, PiSSA and OLoRA act on the wrong side. Record what the "
        "function does: by looking, lorafy(params, rules, trace=(fn, params, x)), or by hand with "
        "LoraRule(in_axes=…, out_axes=…).",
        RoleWarning,
        place,
    )
