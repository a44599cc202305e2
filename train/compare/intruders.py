"""Intruder dimensions: strong directions of a trained weight that the base does not have.

An intruder dimension is one of the first `N_LEADING_VECTORS` left singular vectors of a trained
matrix whose cosine with every left singular vector of the base's matrix is below `MIN_COSINE`
(Shuttleworth et al., arXiv 2410.21228). Full fine-tuning has few or none of them, and LoRA of a low
rank has several. They correlate with forgetting.
"""

from collections.abc import Mapping

import jax
import numpy as np
import scipy.linalg

from lora_jax.core.factored import as_matrices
from lora_jax.core.types import Tree
from lora_jax.core.weight import leaves_of
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.rules import ALL_LINEAR, LoraRule

N_LEADING_VECTORS = 10
MIN_COSINE = 0.5
MAX_MATRICES = 60  # matrices of a model, evenly spread: each costs two decompositions
_CACHE_BYTES = 2**29  # of the base's singular vectors, at most

MatrixIndex = tuple[str, tuple[int, ...]]  # the path of a leaf, and the index of a matrix in it


def mean_intruders(
    base: Tree,
    trained: Tree,
    kinds: Mapping[str, str] | None = None,
    base_vectors: dict[MatrixIndex, np.ndarray] | None = None,
) -> float:
    """Returns the number of intruder dimensions of a matrix, averaged over matrices of all layers.

    Args:
      base: the parameters before training.
      trained: parameters after training, merged.
      kinds: the part of the model that each leaf belongs to; see `lora_jax.lorafy`.
      base_vectors: singular vectors of the base, from earlier calls with the same one; this call
        adds to them, up to half a gigabyte.
    """
    base_vectors = {} if base_vectors is None else base_vectors
    outline = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
    rule = LoraRule(targets=ALL_LINEAR, rank=1)
    nodes: dict[str, Tree] = nodes_of(lorafy(outline, [rule], kinds=kinds))
    base_leaves = dict(leaves_of(base)[0])
    trained_leaves = dict(leaves_of(trained)[0])
    # Compare each chosen matrix with the base's, whose singular vectors are cached.
    counts: list[int] = []
    for path, indices in _choose_matrices(nodes).items():
        roles = nodes[path].roles
        base_matrices = np.asarray(as_matrices(base_leaves[path], roles))
        trained_matrices = np.asarray(as_matrices(trained_leaves[path], roles))
        for index in indices:
            vectors = base_vectors.get((path, index))
            if vectors is None:
                vectors = right_vectors(base_matrices[index])
                cached_bytes = sum(cached.nbytes for cached in base_vectors.values())
                if cached_bytes + vectors.nbytes <= _CACHE_BYTES:
                    base_vectors[path, index] = vectors
            counts.append(count_intruders(vectors, trained_matrices[index]))
    return float(np.mean(counts))


def _choose_matrices(nodes: Mapping[str, Tree]) -> dict[str, list[tuple[int, ...]]]:
    """Chooses matrices to measure, evenly spread: the path of each leaf -> indices of matrices."""
    places: list[MatrixIndex] = []
    for path, node in nodes.items():
        batch_shape = node.roles.sizes(node.shape, "batch")
        places += [(path, index) for index in np.ndindex(*batch_shape)]
    n_measured = min(len(places), MAX_MATRICES)
    measured = np.linspace(0, len(places) - 1, n_measured).round().astype(int)
    indices_of_path: dict[str, list[tuple[int, ...]]] = {}
    for place in measured:
        path, index = places[place]
        indices_of_path.setdefault(path, []).append(index)
    return indices_of_path


def count_intruders(base_vectors: np.ndarray, trained: np.ndarray) -> int:
    """Counts a trained matrix's leading singular vectors that the base's matrix does not have.

    Args:
      base_vectors: `right_vectors` of the base's matrix.
      trained: [in, out], as ``x @ W`` uses it; PyTorch's left singular vectors, of [out, in], are
        its right ones.
    """
    cosines = np.abs(right_vectors(trained, N_LEADING_VECTORS) @ base_vectors.T)
    is_intruder = cosines.max(axis=1) < MIN_COSINE
    return int(np.sum(is_intruder))


def right_vectors(matrix: np.ndarray, limit: int | None = None) -> np.ndarray:
    """Returns the right singular vectors as rows, the strongest first.

    From the eigenvectors of the smaller Gram matrix, which is several times as fast as an SVD.

    Args:
      matrix: [in, out].
      limit: how many at most; None for all.
    """
    matrix = matrix.astype(np.float64)
    n_rows, n_columns = matrix.shape
    # The Gram matrix of the columns is the smaller one, and its eigenvectors are the result.
    if n_columns <= n_rows:
        _, vectors = _largest_eigenvectors(matrix.T @ matrix, limit)
        return vectors.T[::-1]
    squared_values, left_vectors = _largest_eigenvectors(matrix @ matrix.T, limit)
    order = np.argsort(squared_values)[::-1]
    # Vectors of singular values that are zero but for rounding have no direction.
    tolerance = squared_values.max() * np.finfo(np.float64).eps * n_rows
    order = order[squared_values[order] > tolerance]
    singular_values = np.sqrt(squared_values[order])
    return (left_vectors[:, order].T @ matrix) / singular_values[:, None]


def _largest_eigenvectors(matrix: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `limit` largest eigenvalues (None for all) in ascending order, with vectors."""
    if limit is None:
        values, vectors = np.linalg.eigh(matrix)  # divides and conquers: quicker for all of them
        return values, vectors
    n = len(matrix)
    return scipy.linalg.eigh(matrix, subset_by_index=(max(0, n - limit), n - 1))
