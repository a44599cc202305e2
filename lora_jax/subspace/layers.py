"""The tensors of a tree, their layers, and the logical paths that seed their projections.

A scanned **stack** holds layer i on the first axis of its leaves. In an unrolled tree, the same
tensor has a leaf of its own, with i in its path. The **logical path** of a tensor is the same in
both: ``model/layers/3/mlp/kernel``. For a stack ``model/layers``, the number of the layer is put
after the stack's name. In an unrolled tree, ``layers_3`` is read as ``layers/3``.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from lora_jax.core.paths import has_segments
from lora_jax.core.types import Leaf

# The names of modules that hold scanned layers in `lora_jax.models`, and by custom in other code.
STACKS = ("layers", "encoder/layer", "transformer/h")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One leaf of the tree: a tensor, or a stack with one tensor for each layer.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf.
      names: the logical path of each tensor, from which its projection is drawn.
      layers: the number of each tensor's layer, whose λ scales the tensor's change.
      is_stack: whether the leaf's first axis is the axis of the layers.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    layers: tuple[int, ...]
    is_stack: bool

    @property
    def size(self) -> int:
        """The number of elements of the leaf."""
        return math.prod(self.shape)


def find_tensors(
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
    names_of_leaf = {path: _logical_paths(path, leaf, stacks) for path, leaf in leaves.items()}
    _check_stacks(names_of_leaf, stacks)
    # Projections are drawn from logical paths, so two tensors must not have the same one.
    all_names = [name for names in names_of_leaf.values() for name in names]
    if len(set(all_names)) < len(all_names):
        repeated = next(name for name in all_names if all_names.count(name) > 1)
        paths = [path for path, names in names_of_leaf.items() if repeated in names]
        raise ValueError(
            f"The leaves {paths} have the same logical path, {repeated!r}, so they would share "
            "one projection. Rename one of them."
        )
    layer_of_name = _layer_of_each_name(all_names)
    layers = tuple(sorted(set(layer_of_name.values()), key=_natural_order))
    index_of_layer = {layer: index for index, layer in enumerate(layers)}
    tensors: list[Tensor] = []
    for path, names in names_of_leaf.items():
        tensor = Tensor(
            path=path,
            shape=tuple(leaves[path].shape),
            names=names,
            layers=tuple(index_of_layer[layer_of_name[name]] for name in names),
            is_stack=_stack_of_leaf(path, stacks) is not None,
        )
        tensors.append(tensor)
    return tuple(tensors), layers


def _stack_of_leaf(path: str, stacks: Sequence[str]) -> str | None:
    """Returns the path of the stack that contains a leaf; None if no stack contains it.

    ``layers/3/kernel`` is a leaf of an unrolled layer, and a leaf ``layers`` is no module.
    """
    segments = path.split("/")
    for n_segments in range(1, len(segments)):
        module = "/".join(segments[:n_segments])
        if any(_ends_with_segments(module, name) for name in stacks):
            is_unrolled = segments[n_segments].isdecimal()
            return None if is_unrolled else module
    return None


def _ends_with_segments(path: str, name: str) -> bool:
    """Returns True if a path ends with the segments of a name."""
    return has_segments(path, name) and f"/{path}".endswith(f"/{name}")


def _logical_paths(path: str, leaf: Leaf, stacks: Sequence[str]) -> tuple[str, ...]:
    """Returns the logical path of each tensor of a leaf.

    Raises:
      ValueError: the leaf lies in a stack and has no axes.
    """
    stack = _stack_of_leaf(path, stacks)
    if stack is None:
        return (_split_numbers(path),)
    if not leaf.shape:
        raise ValueError(_not_stack_message(stack, f"{path!r} is a scalar"))
    stack_name = _split_numbers(stack)
    name_in_layer = _split_numbers(path.removeprefix(f"{stack}/"))
    return tuple(f"{stack_name}/{layer}/{name_in_layer}" for layer in range(leaf.shape[0]))


def _split_numbers(path: str) -> str:
    """Returns a path with each segment ``name_3`` split into ``name/3``."""
    return re.sub(r"(?<![^/])(\w*[a-zA-Z])_(\d+)(?![^/])", r"\1/\2", path)


def _check_stacks(names_of_leaf: Mapping[str, Sequence[str]], stacks: Sequence[str]) -> None:
    """Raises a ValueError if leaves of one stack differ in their number of layers."""
    first_leaves: dict[str, str] = {}  # by stack
    for path, names in names_of_leaf.items():
        stack = _stack_of_leaf(path, stacks)
        if stack is None:
            continue
        first_path = first_leaves.setdefault(stack, path)
        n_layers = len(names_of_leaf[first_path])
        if len(names) != n_layers:
            problem = f"{first_path!r} begins with {n_layers}, {path!r} with {len(names)}"
            raise ValueError(_not_stack_message(stack, problem))


def _not_stack_message(stack: str, problem: str) -> str:
    """Returns the message for a module that has the name of a stack, but is none."""
    return (
        f"By its name, {stack!r} is a stack of layers, but {problem}. Name the modules whose "
        "leaves have layers on their first axis with stacks=[…], or pass stacks=() if there are "
        "none."
    )


def _layer_of_each_name(names: Sequence[str]) -> dict[str, str]:
    """Returns the layer of each logical path; see `find_tensors`.

    The **parents** are the modules that hold blocks, and the module that holds all tensors. A
    tensor outside of blocks belongs to the module directly below the closest parent.
    """
    segments_of_name = {name: name.split("/") for name in names}
    number_index_of_name = {
        name: _number_index(segments) for name, segments in segments_of_name.items()
    }
    parents = {
        tuple(segments_of_name[name][:index])
        for name, index in number_index_of_name.items()
        if index is not None
    }
    modules = [segments[:-1] for segments in segments_of_name.values()]
    parents.add(tuple(_common_start(*modules)))

    def layer_of(name: str) -> str:
        """Returns the layer of one logical path."""
        segments = segments_of_name[name]
        number_index = number_index_of_name[name]
        # A tensor in a block.
        if number_index is not None:
            return "/".join(segments[: number_index + 1])
        # A tensor in the module directly below the closest parent.
        n_shared = max(len(_common_start(segments, parent)) for parent in parents)
        return "/".join(segments[: min(n_shared + 1, len(segments) - 1)])

    return {name: layer_of(name) for name in names}


def _number_index(segments: Sequence[str]) -> int | None:
    """Returns the index of the first numeric segment, not counting the last, or None."""
    for index, segment in enumerate(segments[:-1]):
        if segment.isdecimal():
            return index
    return None


def _natural_order(path: str) -> list[tuple[bool, int, str]]:
    """Returns a sort key that puts layer 2 before layer 10."""
    return [
        (False, int(segment), segment) if segment.isdecimal() else (True, 0, segment)
        for segment in path.split("/")
    ]


def _common_start(*paths: Sequence[str]) -> list[str]:
    """Returns the leading segments that all paths share."""
    common = []
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        common.append(segments[0])
    return common
