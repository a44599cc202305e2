"""Muon: orthogonalised momentum for matrices, and AdamW for all other arrays.

An array is called by its path and its name among the parts of the node there. Its matrix axes are
those that are contracted and those that come out; Optax calls them dimension numbers.
"""

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
from lora_jax.select.named_heads import is_table_or_head

_RMS = 0.2  # of AdamW's updates, as Liu et al. measured it


def orthogonalised(params: Tree, *, momentum: float) -> optax.GradientTransformation:
    """Returns Muon's transformation for matrices, and AdamW's for other trained arrays.

    A and B of each layer and expert are matrices, [rank, in] and [rank, out]; so are kernels that
    train in full, each layer and expert by itself. Tables, output heads, norms, biases and
    magnitudes are not (Jordan et al., 2024). An orthogonalised matrix is multiplied by
    0.2 sqrt(max(m, n)), so that its root mean square is that of AdamW's updates.

    Args:
      params: the adapted tree, which has the roles of the axes.
      momentum: momentum of the gradient, Nesterov's.

    Source: Jordan et al., *Muon*, 2024; Liu et al., arXiv 2502.16982, section 2.2.
    """
    matrix_axes = dimension_numbers(params)

    def optimizer_of_array(path: str, name: str, _: Any) -> str:
        return "adamw" if matrix_axes[path, name] is None else "muon"

    def axes_of_update(path: str, name: str, update: Any) -> Any:
        return update if isinstance(update, optax.MaskedNode) else matrix_axes[path, name]

    def scale_update(path: str, name: str, update: jax.Array) -> Any:
        """Scales the update of one matrix by its shape."""
        axes = matrix_axes[path, name]
        if axes is None or isinstance(update, optax.MaskedNode):
            return update
        n_rows = math.prod(update.shape[axis] for axis in axes.reduction_axis)
        n_columns = math.prod(update.shape[axis] for axis in axes.output_axis)
        return update * (_RMS * math.sqrt(max(n_rows, n_columns)))

    muon = contrib.scale_by_muon(
        beta=momentum,
        nesterov=True,
        weight_dimension_numbers=lambda updates: map_parts(axes_of_update, updates),
    )
    scale = optax.stateless(lambda updates, _: map_parts(scale_update, updates))
    return optax.partition(
        {"muon": optax.chain(muon, scale), "adamw": optax.scale_by_adam()},
        lambda adapter: map_parts(optimizer_of_array, adapter),
    )


def dimension_numbers(params: Tree) -> dict[tuple[str, str], MuonDimensionNumbers | None]:
    """Returns the matrix axes of each trained array; None if it is not a matrix.

    Args:
      params: the adapted tree.

    Returns:
      By (path, name of the array): the axes that are contracted, and those that come out.
    """
    return {
        (path, name): _matrix_axes(path, node, name, array)
        for path, node in nodes_of(params).items()
        for name, array in node.parts().items()
    }


def _matrix_axes(path: str, node: Node, name: str, array: Shaped) -> MuonDimensionNumbers | None:
    """Returns the matrix axes of a node's array; None if it is not a matrix."""
    # Flax's convention: the axes before the last two count layers or experts.
    last_axes = MuonDimensionNumbers((array.ndim - 2,), (array.ndim - 1,))
    if isinstance(node, LoraWeight) and node.axes_of(name).count("rank") == 2:
        return last_axes
    if isinstance(node, LoraWeight) and name in ("a", "b"):
        rank_axes = []
        kernel_axes = []  # in of A, out of B
        for axis, axis_of_kernel in enumerate(node.layout(name)):
            if axis_of_kernel == RANK:
                rank_axes.append(axis)
            elif node.labels[axis_of_kernel] != "batch":
                kernel_axes.append(axis)
        if name == "a":
            return MuonDimensionNumbers(kernel_axes, rank_axes)
        return MuonDimensionNumbers(rank_axes, kernel_axes)
    is_kernel = isinstance(node, Trained) and leaf_name(path) in KERNEL_NAMES
    if not is_kernel or array.ndim < 2 or is_table_or_head(path):
        return None
    return last_axes


def described(params: Tree) -> str:
    """Returns a line with the number of matrices, and the arrays that AdamW updates."""
    matrix_axes = dimension_numbers(params)
    n_matrices = sum(axes is not None for axes in matrix_axes.values())
    adamw_paths = sorted({path for (path, _), axes in matrix_axes.items() if axes is None})
    if not adamw_paths:
        return f"muon on all {n_matrices} arrays"
    path_list = ", ".join(adamw_paths[:3])
    if len(adamw_paths) > 3:
        path_list += ", …"
    n_others = len(matrix_axes) - n_matrices
    return f"muon on {n_matrices} arrays, adamw on {n_others} that are no matrices ({path_list})"
