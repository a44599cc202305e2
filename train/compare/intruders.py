"""Intruder dimensions: strong directions of a trained weight that the base does not have.

Shuttleworth et al., arXiv 2410.21228: of the first `FIRST` left singular vectors of a trained
matrix, those whose cosine with every left singular vector of the base's matrix is below `ALIKE`.
Few or none in full fine-tuning, several in LoRA of a low rank; they go along with forgetting.
"""

import itertools
from collections.abc import Mapping

import jax
import numpy as np
import scipy.linalg

from lora_jax.core.factored import matrices_of
from lora_jax.core.types import Tree
from lora_jax.core.weight import leaves_of
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.rules import ALL_LINEAR, LoraRule

FIRST = 10
ALIKE = 0.5
MOST = 60  # matrices of a model, evenly spread: each costs two decompositions
_KEPT = 2**29  # bytes of the base's singular vectors

Place = tuple[str, tuple[int, ...]]  # the path of a leaf, and the index of a matrix in it


def mean_intruders(
    base: Tree,
    trained: Tree,
    kinds: Mapping[str, str] | None = None,
    known: dict[Place, np.ndarray] | None = None,
) -> float:
    """Returns the number of intruder dimensions of a matrix, averaged over matrices of all layers.

    Args:
      base: the parameters before training.
      trained: parameters after training, merged.
      kinds: the part of the model that each leaf belongs to; see `lora_jax.lorafy`.
      known: singular vectors of the base, from earlier calls with the same one; this call adds
        to them, up to half a gigabyte.
    """
    known = {} if known is None else known
    outline = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)
    rule = LoraRule(targets=ALL_LINEAR, rank=1)
    adapted: dict[str, Tree] = nodes_of(lorafy(outline, [rule], kinds=kinds))
    before, after = (dict(leaves_of(tree)[0]) for tree in (base, trained))
    places = [
        (path, index)
        for path, node in adapted.items()
        for index in np.ndindex(*node.roles.sizes(node.shape, "batch"))
    ]
    chosen = np.linspace(0, len(places) - 1, min(len(places), MOST)).round().astype(int)
    counts = []
    for path, group in itertools.groupby((places[i] for i in chosen), lambda place: place[0]):
        roles = adapted[path].roles
        old, new = (np.asarray(matrices_of(leaves[path], roles)) for leaves in (before, after))
        for place in group:
            index = place[1]
            vectors = known.get(place)
            if vectors is None:
                vectors = right_vectors(old[index])
                if sum(x.nbytes for x in known.values()) + vectors.nbytes <= _KEPT:
                    known[place] = vectors
            counts.append(intruders(vectors, new[index]))
    return float(np.mean(counts))


def intruders(vectors: np.ndarray, trained: np.ndarray) -> int:
    """Counts the first singular vectors of a trained matrix that are foreign to the base's.

    Args:
      vectors: `right_vectors` of the base's matrix.
      trained: [in, out], as ``x @ W`` uses it; PyTorch's left singular vectors, of [out, in], are
        its right ones.
    """
    cosines = np.abs(right_vectors(trained, FIRST) @ vectors.T)
    return int(np.sum(cosines.max(axis=1) < ALIKE))


def right_vectors(matrix: np.ndarray, most: int | None = None) -> np.ndarray:
    """Returns the right singular vectors as rows, the strongest first.

    From the eigenvectors of the smaller Gram matrix, which is several times as fast as an SVD.

    Args:
      matrix: [in, out].
      most: how many at most; None for all.
    """
    matrix = matrix.astype(np.float64)
    rows, columns = matrix.shape
    if columns <= rows:
        return _eigh(matrix.T @ matrix, most)[1].T[::-1]
    squares, left = _eigh(matrix @ matrix.T, most)
    order = np.argsort(squares)[::-1]
    order = order[squares[order] > squares.max() * np.finfo(np.float64).eps * rows]
    return (left[:, order].T @ matrix) / np.sqrt(squares[order])[:, None]


def _eigh(matrix: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `most` largest eigenvalues, or all, in rising order, and their vectors."""
    if most is None:
        values, vectors = np.linalg.eigh(matrix)  # divides and conquers: quicker for all of them
        return values, vectors
    n = len(matrix)
    return scipy.linalg.eigh(matrix, subset_by_index=(max(0, n - most), n - 1))
