"""Tensors of a tree, their layers, and the names that their projections are drawn by.

A scanned stack holds layer i on its first axis; unrolled, the same tensor has a path with i in it.
Both have one logical path, ``model/layers/3/mlp/kernel``: of a stack ``model/layers``, the layer's
number is put behind its name; unrolled, ``layers_3`` is read as ``layers/3``.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

from lora_jax.core.paths import has_run
from lora_jax.core.types import Leaf

# The modules that hold scanned layers in `lora_jax.models`, and by custom elsewhere.
STACKS = ("layers", "encoder/layer", "transformer/h")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of the tree: a tensor, or a stack of them, one for each layer.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf.
      names: the logical path of each tensor, from which its projection is drawn.
      layers: for each tensor, the number of its layer, whose λ it has.
      is_stack: whether the leaf's first axis is that of the layers.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    layers: tuple[int, ...]
    is_stack: bool

    @property
    def size(self) -> int:
        """The number of entries of the leaf."""
        return math.prod(self.shape)


def tensors_of(
    leaves: Mapping[str, Leaf], stacks: Sequence[str]
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """Returns the tensors of a tree, and the names of their layers.

    A layer is a numbered block, of a list of modules or of a scanned stack. Outside of blocks, it
    is a module that stands beside them or beside a module that holds them: in BERT, the
    embeddings, the pooler and the head are a layer each.

    Args:
      leaves: arrays by path, or anything with a shape.
      stacks: names of modules whose leaves have the layers on their first axis; a name equals a
        run of whole path segments.

    Raises:
      ValueError: the leaves of a stack differ in their numbers of layers, or two leaves have one
        logical path.
    """
    named = {path: _names(path, leaf, stacks) for path, leaf in leaves.items()}
    _check_stacks(named, stacks)
    every = [name for names in named.values() for name in names]
    if len(set(every)) < len(every):
        twice = next(name for name in every if every.count(name) > 1)
        both = [path for path, names in named.items() if twice in names]
        raise ValueError(
            f"the leaves {both} have one logical path, {twice!r}, so one projection: rename one"
        )
    layer_of = _layers(every)
    numbers = {layer: i for i, layer in enumerate(sorted(set(layer_of.values()), key=_natural))}
    tensors = tuple(
        Tensor(
            path,
            tuple(leaves[path].shape),
            names,
            tuple(numbers[layer_of[name]] for name in names),
            _stack_of(path, stacks) is not None,
        )
        for path, names in named.items()
    )
    return tensors, tuple(numbers)


def _stack_of(path: str, stacks: Sequence[str]) -> str | None:
    """Returns the path of the stack that a leaf lies in; None if it lies in none.

    ``layers/3/kernel`` is a leaf of an unrolled layer, and ``layers`` alone no module.
    """
    segments = path.split("/")
    for end in range(1, len(segments)):
        head = "/".join(segments[:end])
        if any(_ends_with(head, name) for name in stacks):
            return None if segments[end].isdecimal() else head
    return None


def _ends_with(path: str, name: str) -> bool:
    return has_run(path, name) and f"/{path}".endswith(f"/{name}")


def _names(path: str, leaf: Leaf, stacks: Sequence[str]) -> tuple[str, ...]:
    stack = _stack_of(path, stacks)
    if stack is None:
        return (_logical(path),)
    if not leaf.shape:
        raise ValueError(_no_stack(stack, f"{path!r} has no axes"))
    before, rest = _logical(stack), path.removeprefix(f"{stack}/")
    return tuple(f"{before}/{layer}/{_logical(rest)}" for layer in range(leaf.shape[0]))


def _logical(path: str) -> str:
    """Returns a path with each segment ``name_3`` in two, ``name/3``."""
    return re.sub(r"(?<![^/])(\w*[a-zA-Z])_(\d+)(?![^/])", r"\1/\2", path)


def _check_stacks(named: Mapping[str, Sequence[str]], stacks: Sequence[str]) -> None:
    lengths: dict[str, tuple[str, int]] = {}
    for path, names in named.items():
        if (stack := _stack_of(path, stacks)) is not None:
            first, length = lengths.setdefault(stack, (path, len(names)))
            if length != len(names):
                problem = f"{first!r} begins with {length}, {path!r} with {len(names)}"
                raise ValueError(_no_stack(stack, problem))


def _no_stack(stack: str, problem: str) -> str:
    return (
        f"{stack!r} is taken for a stack of layers, by its name, and {problem}: say which modules "
        "hold layers on their leaves' first axis with stacks=[…], or stacks=() for none"
    )


def _layers(names: Sequence[str]) -> dict[str, str]:
    """Returns the layer of each logical path."""
    split = {name: name.split("/") for name in names}
    numbered = {
        name: next((i for i, segment in enumerate(segments[:-1]) if segment.isdecimal()), None)
        for name, segments in split.items()
    }
    holders = {tuple(split[name][:i]) for name, i in numbered.items() if i is not None}
    holders.add(tuple(_common(*(segments[:-1] for segments in split.values()))))

    def layer(name: str) -> str:
        segments, i = split[name], numbered[name]
        if i is not None:
            return "/".join(segments[: i + 1])
        shared = max(len(_common(segments, holder)) for holder in holders)
        return "/".join(segments[: min(shared + 1, len(segments) - 1)])

    return {name: layer(name) for name in names}


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Returns a key that sorts layer 2 before layer 10, in an unrolled tree as in a stack."""
    segments = path.split("/")
    return [(not s.isdecimal(), int(s) if s.isdecimal() else 0, s) for s in segments]


def _common(*paths: Sequence[str]) -> list[str]:
    """Returns the first segments that paths share."""
    each = itertools.takewhile(lambda same: len({*same}) == 1, zip(*paths, strict=False))
    return [segments[0] for segments in each]
