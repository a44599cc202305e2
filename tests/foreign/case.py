"""A case of the table: a model that others wrote, the call to run, and the merges allowed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lora_jax as lj


def rule(targets: lj.rules.Targets, **settings: Any) -> tuple[lj.LoraRule, ...]:
    """One rule of rank 2 whose scale is not one."""
    return (lj.LoraRule(targets=targets, rank=2, alpha=3.0, **settings),)


ALL_LINEAR = rule("all-linear")
EVERY_MATRIX = rule(".*")


class Made(NamedTuple):
    """A function of a tree with its arguments: ``fn(params, *args)``.

    Attributes:
      fn: returns a pytree with arrays.
      params: the tree that is adapted.
      args: what else `fn` is called with. Inputs that are floats are differentiated, too.
      rules: for `lorafy`, which reads the axis roles by looking at `fn`.
      adapted: in the place of ``adapt(fn)``, where `adapt` stands inside the function.
    """

    fn: Callable[..., Any]
    params: Any
    args: Sequence[Any]
    rules: Sequence[lj.LoraRule] = ALL_LINEAR
    adapted: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. Making it imports the library; naming it does not.

    Attributes:
      library: the name of the distribution.
      model: the layer or model.
      run: what of it is run.
      weights: how many weights are adapted.
      make: draws the parameters.
      merges: the (weight, place) pairs that merge.
      why: of the merges, and of a tolerance that is not the default.
      tolerance: of max|Δ| / max(1, max|ref|).
      by_hand: too long for the tests; only the command that prints the table runs it.
    """

    library: str
    model: str
    run: str
    weights: int
    make: Callable[[], Made]
    merges: int = 0
    why: str = ""
    tolerance: float = 1e-5
    by_hand: bool = False

    def __post_init__(self) -> None:
        if (self.merges or self.tolerance != 1e-5) and not self.why:
            raise ValueError(f"{self.name}: say why it merges, or why its tolerance is looser")

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.library}: {self.model}, {self.run}"
