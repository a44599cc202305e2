"""Traces a function to find the axis roles of leaves, the heads, and kernels that always merge."""

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence

from lora_jax.adapt.always_merged import first_merges
from lora_jax.adapt.heads import product_orders
from lora_jax.adapt.roles import PRODUCT_OF_LEAVES, Observation, observe
from lora_jax.adapt.transform import RULES
from lora_jax.core.axes import MERGED, AxisRoles, ObservedRoles
from lora_jax.core.types import Leaf

SECONDS_BEFORE_PROGRESS = 5.0

Roles = dict[str, ObservedRoles | str]


def traced_roles(
    trace: Sequence[object] | None, leaves: Iterable[tuple[str, Leaf]]
) -> Roles | None:
    """Returns the axis roles of leaves, by path, from a trace of a function; see `observe`.

    Args:
      trace: ``(fn, *args)``; see `lora_jax.lorafy`. None: nothing is known.
      leaves: leaves of the tree with their paths.

    Raises:
      TypeError: `trace` is no tuple of a function and its arguments.
    """
    if trace is None:
        return None
    if not isinstance(trace, Sequence) or not trace or not callable(trace[0]):
        raise TypeError(
            f"trace must be a tuple of a function and its arguments, not {trace!r}. Pass "
            "trace=(fn, params, x), where fn(params, x) calls your model."
        )
    path_of_leaf = {id(leaf): path for path, leaf in leaves}
    with _progress_line():
        observation = observe(trace[0], trace[1:], path_of_leaf)
        roles = observation.roles | _roles_with_orders(observation)
        return roles | _roles_of_merged(observation)


@contextlib.contextmanager
def _progress_line() -> Iterator[None]:
    """Prints a line on stderr if the block takes more than some seconds."""

    def print_line() -> None:
        """Prints that the trace is still running."""
        print(
            "lora_jax still traces your function to find its kernels. A function that writes out "
            "many layers takes longer than one that scans them.",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(SECONDS_BEFORE_PROGRESS, print_line)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _roles_with_orders(observation: Observation) -> Roles:
    """Returns the roles of kernels, with the positions of their products."""
    orders = product_orders(
        observation.jaxpr, observation.path_of_input, observation.multiplied_paths
    )
    roles: Roles = {}
    for path, order in orders.items():
        observed = observation.roles[path]
        if isinstance(observed, ObservedRoles):
            roles[path] = dataclasses.replace(observed, product_order=order)
    return roles


def _roles_of_merged(observation: Observation) -> Roles:
    """Returns the roles of kernels that `adapt` would always merge, with that reason."""
    roles_of_kernel: dict[str, AxisRoles] = {}
    for path, operations in observation.operations.items():
        observed = observation.roles[path]
        may_merge = PRODUCT_OF_LEAVES in operations or not operations <= RULES.keys()
        if isinstance(observed, ObservedRoles) and not observed.not_kernel_reason and may_merge:
            roles_of_kernel[path] = observed.roles
    if not roles_of_kernel:  # as in most functions: no second walk
        return {}
    merges = first_merges(
        observation.jaxpr, observation.inputs, observation.path_of_input, roles_of_kernel
    )
    roles: Roles = {}
    for path, use in merges.items():
        reason = f"{use.primitive} at {use.place} {use.why}"
        roles[path] = ObservedRoles(roles_of_kernel[path], reason, not_kernel_kind=MERGED)
    return roles
