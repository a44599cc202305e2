"""Intruder dimensions: strong directions of a trained weight that the base does not have.

Shuttleworth et al., arXiv 2410.21228: of the first `FIRST` left singular vectors of a trained
matrix, those whose cosine with every left singular vector of the base's matrix is below `ALIKE`.
Few or none in full fine-tuning, several in LoRA of a low rank; they go along with forgetting.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.axes import AxisRoles
from lora_jax.base import as_array
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.rules import ALL_LINEAR, LoraRule
from lora_jax.weight import LoraWeight, leaves_of

FIRST = 10
ALIKE = 0.5
MOST = 60  # matrices of a model, evenly spread: each costs two decompositions


def mean_intruders(base: Any, trained: Any, kinds: Mapping[str, str] | None = None) -> float:
    """Returns the number of intruder dimensions of a matrix, averaged over matrices of all layers.

    Args:
      base: the parameters before training.
      trained: those after it, merged.
      kinds: the part of the model that each leaf belongs to; see `lora_jax.lorafy`.
    """
    outline = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
    adapted = nodes_of(lorafy(outline, [LoraRule(targets=ALL_LINEAR, rank=1)], kinds=kinds))
    before, after = (dict(leaves_of(tree)[0]) for tree in (base, trained))
    places = [
        (path, node.roles, index)
        for path, node in adapted.items()
        if isinstance(node, LoraWeight)
        for index in np.ndindex(*node.roles.sizes(node.shape, "batch"))
    ]
    chosen = np.linspace(0, len(places) - 1, min(len(places), MOST)).round().astype(int)
    counts = [
        intruders(_matrix(before[path], roles, index), _matrix(after[path], roles, index))
        for path, roles, index in (places[i] for i in chosen)
    ]
    return float(np.mean(counts))


def intruders(base: np.ndarray, trained: np.ndarray) -> int:
    """Returns how many of a trained matrix's first singular vectors are foreign to the base's.

    Args:
      base, trained: [in, out], as ``x @ W`` uses them; PyTorch's left singular vectors, of
        [out, in], are their right ones.
    """
    first = _right_vectors(trained)[:FIRST]
    cosines = np.abs(first @ _right_vectors(base).T)
    return int(np.sum(cosines.max(axis=1) < ALIKE))


def _right_vectors(matrix: np.ndarray) -> np.ndarray:
    """Returns the right singular vectors as rows, the strongest first.

    From the eigenvectors of the smaller Gram matrix, which is several times as fast as an SVD.
    """
    matrix = matrix.astype(np.float64)
    rows, columns = matrix.shape
    if columns <= rows:
        return np.linalg.eigh(matrix.T @ matrix)[1].T[::-1]
    squares, left = np.linalg.eigh(matrix @ matrix.T)
    order = np.argsort(squares)[::-1]
    order = order[squares[order] > squares.max() * np.finfo(np.float64).eps * rows]
    return (left[:, order].T @ matrix) / np.sqrt(squares[order])[:, None]


def _matrix(leaf: Any, roles: AxisRoles, index: tuple[int, ...]) -> np.ndarray:
    """Returns one matrix [in, out] of a kernel.

    Args:
      leaf: the kernel.
      roles: of its axes.
      index: along its batch axes.
    """
    labels = roles.labels(leaf.ndim)
    order = [axis for role in ("batch", "in", "out") for axis in _axes(labels, role)]
    array = np.asarray(as_array(leaf), np.float32).transpose(order)[index]
    fan_in = int(np.prod(roles.sizes(leaf.shape, "in")))
    return array.reshape(fan_in, -1)


def _axes(labels: Sequence[str], role: str) -> list[int]:
    return [axis for axis, label in enumerate(labels) if label == role]
