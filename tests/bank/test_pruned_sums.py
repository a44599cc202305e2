"""Sums of pruned adapters by PEFT's formulas in NumPy, and sums of what trains in full."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.bank import combine
from lora_jax.bank.sums.arithmetic import METHODS, CombineMethod, combined
from tests.support import array, assert_close, assert_identical, draw

WEIGHTS = np.array([1.25, -0.5, 0.75])
SCALES = np.array([[1.5, 0.7], [0.8, 2.0], [3.0, 0.4]])  # [adapters, layers]
A, B = (np.asarray(draw(seed, (3, 2, 4, n))) for seed, n in ((1, 5), (2, 7)))


def pruned(tensor, density):
    """PEFT's ``magnitude_based_pruning``: the int(density·n) largest elements."""
    order = np.argsort(-np.abs(tensor).ravel(), kind="stable")
    largest = order[: int(density * tensor.size)]
    kept = np.zeros(tensor.size, bool)
    kept[largest] = True
    return np.where(kept.reshape(tensor.shape), tensor, 0)


def elected(tensors, weights, sign):
    """PEFT's ``calculate_majority_sign_mask`` and ``disjoint_merge``; no majority is positive."""
    votes = (tensors if sign == "total" else np.sign(tensors)).sum(0)
    agrees = np.sign(tensors) == np.where(votes >= 0, 1, -1)
    return (tensors * weights * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def summed(tensors, weights, density, sign):
    """The weighted sum of one layer's tensors [adapters, rows, columns]."""
    tensors = np.stack([pruned(tensor, density) for tensor in tensors])
    weights = np.asarray(weights)[:, None, None]
    return (tensors * weights).sum(0) if sign is None else elected(tensors, weights, sign)


CASES = [
    ("magnitude_prune", 0.3, None),
    ("ties", 0.3, "total"),
    ("ties", 0.6, "frequency"),
    ("magnitude_prune_svd", 0.3, None),
    ("ties_svd", 0.6, "total"),
    ("ties_svd", 0.3, "frequency"),
    ("ties_svd", 1.0, "total"),
]


@functools.cache
def all_sums():
    """Returns the factors of all cases, by one program."""

    @jax.jit
    def run(a, b, scales, weights, key):
        factors = [*zip(a, b, strict=True)]
        results = []
        for how, density, sign in CASES:
            method = dataclasses.replace(METHODS[how], density=density, sign=sign or "total")
            results.append(combined(factors, [*scales], weights, key, method=method, rank=3))
        return results

    return jax.device_get(run(A, B, array(SCALES, "f4"), array(WEIGHTS, "f4"), jax.random.key(0)))


@pytest.mark.parametrize(("how", "density", "sign"), CASES)
def test_a_pruned_sum_is_pefts(how, density, sign):
    a, b = all_sums()[CASES.index((how, density, sign))]
    for layer in range(2):
        if how.endswith("_svd"):
            changes = np.einsum("n,nri,nro->nio", SCALES[:, layer], A[:, layer], B[:, layer])
            u, s, vt = np.linalg.svd(summed(changes, WEIGHTS, density, sign))
            assert_close(a[layer].T @ b[layer], u[:, :3] * s[:3] @ vt[:3], 1e-5)
            continue
        # PEFT takes √|w·s| for both, and gives the sign to A.
        factor = WEIGHTS * SCALES[:, layer]
        root = np.sqrt(np.abs(factor))
        assert_close(a[layer], summed(A[:, layer], np.sign(factor) * root, density, sign), 1e-5)
        assert_close(b[layer], summed(B[:, layer], root, density, sign), 1e-5)


def test_elements_without_a_majority_count_as_positive():
    """PEFT: torch.where(votes >= 0, 1, -1). Two adapters disagree, and the positive one stays."""
    ones = [np.full((1, 2), value, np.float32) for value in (1.0, -1.0)]
    eye = np.ones((1, 1), np.float32)
    method = CombineMethod("changes", "magnitude", True, True, "ties_svd", 1.0, "total")
    a, b = jax.jit(functools.partial(combined, method=method, rank=1))(
        [(eye, one) for one in ones],
        [np.float32(1.0), np.float32(1.0)],
        array([3.0, 5.0], "f4"),
        jax.random.key(0),
    )
    assert_close(np.asarray(a).T @ np.asarray(b), np.full((1, 2), 3.0), 1e-6)


def tree_of(norm, rows, table, *, is_adapted=True):
    """A tree in which a vector trains in full and a table in some rows."""
    rules = [lj.TrainRule(targets=["norm"]), lj.TrainRule(targets=["embed"], rows=rows)]
    tree = lj.lorafy(PARAMS, rules)
    return tree | {
        "norm": tree["norm"].replace(value=array(norm)),
        "embed": tree["embed"].replace(value=array(table)),
    }


PARAMS = {
    "norm": array(np.arange(3), "f4"),
    "embed": array(np.arange(10).reshape(5, 2), "f4"),
    "kernel": draw(3, (2, 3)),
}


def test_what_trains_in_full_is_summed_from_where_it_began():
    """v₀ + Σ wᵢ(vᵢ − v₀): rows that one adapter alone trains move by its share alone."""
    rng = np.random.default_rng(5)
    norms = rng.standard_normal((2, 3)).astype("f4")
    tables = rng.standard_normal((2, 2, 2)).astype("f4")
    trees = [tree_of(norms[0], [3, 1], tables[0]), tree_of(norms[1], [1, 4], tables[1])]
    both = combine(trees, [2.0, -0.5], base=PARAMS)
    start = np.arange(3)
    assert_close(
        both["norm"].value, start + 2 * (norms[0] - start) - 0.5 * (norms[1] - start), 1e-6
    )
    table = np.arange(10.0).reshape(5, 2)
    expected = table.copy()
    for tree, weight in zip(trees, (2.0, -0.5), strict=True):
        rows = list(tree["embed"].rows)
        expected[rows] += weight * (np.asarray(tree["embed"].value) - table[rows])
    assert both["embed"].rows == (1, 3, 4)
    assert_close(both["embed"].value, expected[[1, 3, 4]], 1e-6)
    # Beside rows of a table, the whole table: the sum is whole.
    whole = lj.lorafy(PARAMS, [lj.TrainRule(targets=["embed"])])
    whole = whole | {"embed": whole["embed"].replace(value=array(table + 1, "f4"))}
    mixed = combine([trees[0], whole], [2.0, -0.5], base=PARAMS)["embed"]
    expected = table - 0.5
    rows = list(trees[0]["embed"].rows)
    expected[rows] += 2.0 * (np.asarray(trees[0]["embed"].value) - table[rows])
    assert mixed.value.dtype == np.float32
    assert_close(mixed.value, expected, 1e-6)


def test_a_common_value_needs_no_earlier_one():
    """Weights that sum to 1 leave a value that all trees share; others need what it was before."""
    norm, table = np.ones(3, "f4"), np.ones((2, 2), "f4")
    trees = [tree_of(norm, [3, 1], table) for _ in range(2)]
    same = combine(trees, [0.25, 0.75])
    assert_identical(same["norm"].value, array(norm))
    assert same["norm"].value is not trees[0]["norm"].value
    other = tree_of(norm + 1, [3, 1], table)
    for chosen, weights in ((trees, [0.25, 0.5]), ([trees[0], other], [0.25, 0.75])):
        with pytest.raises(ValueError, match="'norm' is trained in full.*base=params"):
            combine(chosen, weights)
    adapted = lj.lorafy(PARAMS, [lj.LoraRule(targets=["kernel"], rank=1)])
    with pytest.raises(ValueError, match="base must be the plain tree"):
        combine(trees, [1.0, 1.0], base=adapted)
    with pytest.raises(ValueError, match=r"trees\[1\] has no adapter at 'kernel'"):
        combine([adapted, lj.split(adapted)[1]], [1.0, 1.0])
    with pytest.raises(ValueError, match="majority_sign_method='mean' is unknown. Choose"):
        combine([adapted], [1.0], how="ties", density=0.5, majority_sign_method="mean")
