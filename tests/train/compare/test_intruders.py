"""Intruder dimensions: planted in a matrix, and counted in trees against NumPy's own SVD."""

import numpy as np
from pytest import approx

import lora_jax as lj
from tests.support import over
from train.compare.intruders import (
    MIN_COSINE,
    N_LEADING_VECTORS,
    count_intruders,
    mean_intruders,
    right_vectors,
)


def matrix(rows, columns, seed=0):
    """A random matrix whose singular values fall from 5 to 1."""
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u, _ = np.linalg.qr(rng.normal(size=(rows, n)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, n)))
    return (u * np.linspace(5, 1, n)) @ v.T


def by_svd(base, trained):
    """The definition, in PyTorch's layout [out, in], by NumPy's SVD."""
    u0, u1 = (np.linalg.svd(m.T, full_matrices=False)[0] for m in (base, trained))
    return sum(np.abs(u0.T @ u1[:, j]).max() < MIN_COSINE for j in range(N_LEADING_VECTORS))


@over("shape", [(107, 131), (131, 107), (113, 113)], often=["(107, 131)"])
def test_planted_directions_are_counted(shape):
    base = matrix(*shape)
    rng = np.random.default_rng(1)
    planted = base.copy()
    for strength in (40, 30, 20):
        planted += strength * np.outer(
            *(x / np.linalg.norm(x) for x in (rng.normal(size=shape[0]), rng.normal(size=shape[1])))
        )
    vectors = right_vectors(base)
    assert count_intruders(vectors, base) == 0
    assert count_intruders(vectors, base * 1.5) == 0, "scaled: the same directions"
    assert count_intruders(vectors, planted) == by_svd(base, planted) == 3  # at random: cos ≈ 0.3
    turned = base + 0.4 * rng.normal(size=shape)
    assert count_intruders(vectors, turned) == by_svd(base, turned), "a change of full rank"


def test_a_tree_counts_each_layer_of_a_stack_and_no_table():
    layers = np.stack([matrix(24, 17, seed) for seed in range(3)])
    base = {
        "embed": {"embedding": np.float32(matrix(50, 24))},
        "layers": {"up": {"kernel": np.float32(layers), "bias": np.zeros((3, 17), np.float32)}},
    }
    tree = lj.lorafy(base, [lj.LoraRule(targets=["up"], rank=1, alpha=1)])
    weight = tree["layers"]["up"]["kernel"]
    b = np.zeros((3, 1, 17), np.float32)
    b[1] = 30 * np.random.default_rng(2).normal(size=17)
    strong = weight.replace(b=b, a=np.asarray(weight.a) * 5)
    trained = lj.merge({**base, "layers": {"up": {**base["layers"]["up"], "kernel": strong}}})
    assert mean_intruders(base, base) == 0
    changed = np.asarray(trained["layers"]["up"]["kernel"])
    by_hand = [by_svd(layers[i], changed[i]) for i in range(3)]
    known = {}
    assert by_hand == [0, 1, 0] and mean_intruders(base, trained, base_vectors=known) == approx(
        1 / 3
    )
    assert [index for _, index in known] == [(0,), (1,), (2,)]
    assert mean_intruders(trained, trained) == 0
    assert mean_intruders(trained, trained, base_vectors=known) == approx(1 / 3), (
        "the base is known"
    )
