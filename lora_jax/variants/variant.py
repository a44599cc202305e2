"""The declaration of a variant of LoRA, with all facts that other code reads about it.

Arrays of a variant are **derived** if they can be computed from W or from a seed. A file then holds
a **recipe** in their place.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from lora_jax.core.axes import AxisRoles
from lora_jax.core.types import BaseLike, Fields, JsonObject, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part


class KernelFacts(NamedTuple):
    """The facts about a kernel from which a variant computes A and B.

    Attributes:
      path: the kernel's path in the tree.
      shape: the shape of W.
      roles: the roles of W's axes.
      ranks: r of each layer of the first batch axis, or one r for all.
      dtype: the dtype of A and B.
      settings: the values of the variant's settings, by name.
    """

    path: str
    shape: tuple[int, ...]
    roles: AxisRoles
    ranks: tuple[int, ...]
    dtype: DTypeLike
    settings: Mapping[str, Any] = {}

    @property
    def sizes_of_sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the in axes, and the sizes of the out axes."""
        return self.roles.sizes(self.shape, "in"), self.roles.sizes(self.shape, "out")


MakeFactors = Callable[[BaseLike, KernelFacts], Parts]  # (W, its facts) -> arrays by name
Remake = Callable[[str, LoraWeight, Fields], Parts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived:
    """Arrays that are computed from W or a seed, so that files need not store them.

    A file holds a recipe in their place, and a few of their elements for a comparison.

    Attributes:
      names: the names of the arrays.
      recipe_entry: the name of the recipe among a weight's settings in the file.
      recipe: (weight, all weights of the variant) -> the recipe, a JSON object of all that the
        arrays are made from beside W; None for arrays that do not follow from it.
      remake_function: (nodes of the tree that the adapter is loaded onto, by path) -> a function of
        (path, weight without the arrays, recipe) that makes the arrays again.
      difference_message: the end of the error for arrays that differ from those of the training; a
        format of {path}, {name} (of the array) and the recipe.
    """

    names: tuple[str, ...]
    recipe_entry: str
    recipe: Callable[[LoraWeight, Sequence[LoraWeight]], JsonObject | None]
    remake_function: Callable[[Mapping[str, Leaf]], Remake]
    difference_message: str


class InPeft(NamedTuple):
    """The representation of a variant in PEFT's LoraConfig.

    Attributes:
      field: the field that turns it on; None for a plain LoRA that trains in another way.
      tensor: the end of the key of its part's tensors.
      fill: the elements of that tensor in modules without the part; None where PEFT has the part in
        all modules or in none.
    """

    field: str | None = None
    tensor: str = ""
    fill: float | None = None


class Setting(NamedTuple):
    """A numeric setting of a variant: a field of `lora_jax.LoraRule`, and an option.

    Attributes:
      name: the name of the field and of the option.
      default: the default value.
      help: the option's help in the scripts.
      fits: returns True for a valid value.
      needed: the valid values, as a part of a sentence.
    """

    name: str
    default: int | float
    help: str
    fits: Callable[[Any], bool]
    needed: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """A variant of LoRA.

    Attributes:
      option: the field of `lora_jax.LoraRule`, and the option of the scripts, that turns it on.
      name: the name that people write.
      help: the option's help in the scripts.
      parts: the arrays that train beside A and B, or in their place.
      settings: numbers that it takes beside the rank.
      frozen: the factors that do not train.
      start: (the kernels of a tree that have the variant, a PRNG key) -> a function of W and its
        kernel that returns the arrays in the place of a drawn A and B. None: A and B are drawn.
      derived: the arrays that follow from W or a seed.
      alone: source of A and B, as a part of a sentence, in a variant that freezes both and goes
        with no other; "" in others.
      alone_in_scripts: the same, for the scripts' options.
      not_with: the reasons why it does not go with other variants, by option.
      in_peft: the form in a LoraConfig. None: PEFT has a configuration of its own for it
        (`lora_jax.peft.forms`), or does not have it: a compact one is then written as plain LoRA.
      rate: the learning rate by default, from plain LoRA's; None for the same.
      alpha_is_rank: whether alpha is the rank by default.
      ranks: the ranks that `train.compare` tries by default; None for those of LoRA.
      is_compared: whether it is a method of `train.compare`.
    """

    option: str
    name: str
    help: str
    parts: tuple[Part, ...] = ()
    settings: tuple[Setting, ...] = ()
    frozen: tuple[str, ...] = ()
    start: Callable[[Sequence[KernelFacts], jax.Array], MakeFactors] | None = None
    derived: Derived | None = None
    alone: str = ""
    alone_in_scripts: str = ""
    not_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    in_peft: InPeft | None = None
    rate: Callable[[float], float] | None = None
    alpha_is_rank: bool = False
    ranks: tuple[int, ...] | None = None
    is_compared: bool = True

    @property
    def method(self) -> str:
        """The name of the variant's method in `train.compare`."""
        return self.name.lower()
