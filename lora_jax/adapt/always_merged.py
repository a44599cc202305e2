"""Finds the kernels that `adapt` would merge at every use, so that factors would save nothing."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.merging import CUSTOM_DERIVATIVES
from lora_jax.adapt.reports import WeightUse
from lora_jax.adapt.transform import RULES
from lora_jax.core.axes import AxisRoles
from lora_jax.core.factored import Factored
from lora_jax.core.types import Value


def first_merges(
    jaxpr: eqns.AnyJaxpr,
    inputs: Sequence[jax.ShapeDtypeStruct],
    path_of_input: Sequence[str | None],
    roles_of_path: Mapping[str, AxisRoles],
) -> dict[str, WeightUse]:
    """Returns the first use of each kernel whose every use would form W + s·AB, by path.

    A kernel that enters a function with a derivative of its own does not count: the user can give
    `adapt` a rule for that function, or adapt what it calls.

    Args:
      jaxpr: the jaxpr of a function.
      inputs: shapes and dtypes of its inputs.
      path_of_input: the path in the tree of each input; None for data.
      roles_of_path: the axis roles of the kernels to judge.
    """
    uses: list[WeightUse] = []
    interpreter = Interpreter(RULES, record=uses.append)

    def evaluate_with_factors(arrays: list[jax.Array]) -> list[Value]:
        """Evaluates the jaxpr with each kernel as a weight with factors."""
        values: list[Value] = []
        for path, array in zip(path_of_input, arrays, strict=True):
            if path is None or path not in roles_of_path:
                values.append(array)
            else:
                values.append(_factored(array, path, roles_of_path[path]))
        return interpreter.evaluate(jaxpr, values)

    jax.eval_shape(evaluate_with_factors, list(inputs))
    merged_uses: dict[str, WeightUse] = {}
    for path in roles_of_path:
        uses_of_path = [use for use in uses if use.path == path]
        if uses_of_path and all(_is_merged(use) for use in uses_of_path):
            merged_uses[path] = uses_of_path[0]
    return merged_uses


def _is_merged(use: WeightUse) -> bool:
    """Returns True if a use merges the kernel, and no rule of the user could prevent it."""
    return use.how == "merged" and use.primitive not in CUSTOM_DERIVATIVES


def _factored(array: jax.Array, path: str, roles: AxisRoles) -> Factored:
    """Returns an array as a weight with factors of rank one."""
    batch, fan_in, fan_out = (roles.sizes(array.shape, label) for label in ("batch", "in", "out"))
    parts = {
        "a": jnp.zeros((*batch, 1, *fan_in)),
        "b": jnp.zeros((*batch, 1, *fan_out)),
        "scale": jnp.ones(batch),
    }
    return Factored(array, parts, roles.labels(array.ndim), path=path)
