"""NNX modules, called as they are and inside NNX's own transforms."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from tests.foreign.case import Case, Made

# Takes a function of a module and arguments, and returns what is run in its place.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function."""
    return run


def transformed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function inside `nnx.remat` and `nnx.jit`, which write the module back."""
    return nnx.jit(nnx.remat(run))


def both(
    library: str, model: str, run: str, weights: int, make: Callable[[Wrap], Made], **settings: Any
) -> tuple[Case, Case]:
    """Returns the cases of a module called as it is, and inside the transforms.

    Args:
      library, model, run, weights, **settings: of both cases; see `Case`.
      make: takes the wrap of the function that calls the module.
    """
    inside = f"{run}; in nnx.jit and nnx.remat"
    return (
        Case(library, model, run, weights, lambda: make(as_it_is), **settings),
        Case(library, model, inside, weights, lambda: make(transformed), **settings),
    )
