"""Muon's direction: the momentum of each matrix, orthogonalised; AdamW's for all other arrays."""

import math
from typing import Any

import jax
import optax
from optax import contrib
from optax.contrib import MuonDimensionNumbers

from lora_jax.core.axes import KERNEL_NAMES
from lora_jax.core.parts import RANK
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Shaped, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained
from lora_jax.lorafy import map_parts, nodes_of
from lora_jax.select.matching import is_table_or_head

_RMS = 0.2  # of AdamW's updates, as Liu et al. measured it


def orthogonalised(params: Tree, *, momentum: float) -> optax.GradientTransformation:
    """Returns Muon's direction for matrices, and AdamW's for all else that trains.

    A and B of each layer and expert are matrices, [rank, in] and [rank, out]; so are kernels that
    train in full, each layer and expert by itself. Tables, output heads, norms, biases and
    magnitudes are not (Jordan et al., 2024). An orthogonalised matrix is multiplied by
    0.2 sqrt(max(m, n)), so that its root mean square is that of AdamW's updates.

    Args:
      params: the adapted tree, which has the roles of the axes.
      momentum: momentum of the gradient, Nesterov's.

    Source: Jordan et al., *Muon*, 2024; Liu et al., arXiv 2502.16982, section 2.2.
    """
    numbers = dimension_numbers(params)

    def label(path: str, name: str, _: Any) -> str:
        return "adamw" if numbers[path, name] is None else "muon"

    def matrix_alone(path: str, name: str, array: Any) -> Any:
        return array if isinstance(array, optax.MaskedNode) else numbers[path, name]

    def sized(path: str, name: str, array: jax.Array) -> Any:
        axis_groups = numbers[path, name]
        if axis_groups is None or isinstance(array, optax.MaskedNode):
            return array
        m, n = (math.prod(array.shape[axis] for axis in axes) for axes in axis_groups)
        return array * (_RMS * math.sqrt(max(m, n)))

    muon = contrib.scale_by_muon(
        beta=momentum,
        nesterov=True,
        weight_dimension_numbers=lambda updates: map_parts(matrix_alone, updates),
    )
    scale = optax.stateless(lambda updates, _: map_parts(sized, updates))
    return optax.partition(
        {"muon": optax.chain(muon, scale), "adamw": optax.scale_by_adam()},
        lambda adapter: map_parts(label, adapter),
    )


def dimension_numbers(params: Tree) -> dict[tuple[str, str], MuonDimensionNumbers | None]:
    """Returns the axes of each trained array that make its matrix; None where it is none.

    Args:
      params: the adapted tree.

    Returns:
      By (path, name of the array): the axes that are contracted, and those that come out.
    """
    return {
        (path, name): _numbers(path, node, name, array)
        for path, node in nodes_of(params).items()
        for name, array in node.parts().items()
    }


def _numbers(path: str, node: Node, name: str, array: Shaped) -> MuonDimensionNumbers | None:
    if isinstance(node, LoraWeight) and node.axes_of(name).count("rank") == 2:
        return MuonDimensionNumbers((array.ndim - 2,), (array.ndim - 1,))
    if isinstance(node, LoraWeight) and name in ("a", "b"):
        places, labels = node.layout(name), node.labels
        rank = [axis for axis, place in enumerate(places) if place == RANK]
        side = [
            axis for axis, place in enumerate(places) if place != RANK and labels[place] != "batch"
        ]
        return MuonDimensionNumbers(*(side, rank) if name == "a" else (rank, side))
    is_kernel = isinstance(node, Trained) and leaf_name(path) in KERNEL_NAMES
    if not is_kernel or array.ndim < 2 or is_table_or_head(path):
        return None
    return MuonDimensionNumbers(
        (array.ndim - 2,), (array.ndim - 1,)
    )  # Flax's convention; the rest batch


def described(params: Tree) -> str:
    """Returns a line on the number of matrices, and on the arrays that go to AdamW."""
    numbers = dimension_numbers(params)
    others = sorted({path for (path, _), axes in numbers.items() if axes is None})
    n = sum(axes is not None for axes in numbers.values())
    if not others:
        return f"muon on all {n} arrays"
    shown = ", ".join(others[:3]) + ", …" * (len(others) > 3)
    return f"muon on {n} arrays, adamw on {len(numbers) - n} that are no matrices ({shown})"
