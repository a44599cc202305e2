"""Vectors that several weights train as one (TinyLoRA's weight_tying)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.weight import leaves_of
from lora_jax.select.ties import vector_index_of_module
from tests.support import assert_close, assert_identical, draw, with_random_factors

PARAMS = {
    "layers": {"up": {"kernel": draw(1, (3, 5, 7))}, "down": {"kernel": draw(2, (3, 7, 5))}},
    "out": {"kernel": draw(3, (5, 7))},
}
UP, DOWN, OUT = "layers/up/kernel", "layers/down/kernel", "out/kernel"
X = draw(4, (11, 5))


def rule(tying, **more):
    given = {"targets": ["layers", "out"], "rank": 2, "u": 4} | more
    return lj.LoraRule(tinylora=True, weight_tying=tying, **given)


def ties_of(tree):
    return {path: leaf.ties for path, leaf in leaves_of(tree)[0] if lj.is_node(leaf)}


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 7, 12])
def test_groups_are_pefts(n, tying):
    """PEFT's formula, written out."""
    groups = max(1, round(n * (1.0 - tying)))
    size = max(1, n // groups)
    numbers = [vector_index_of_module(index, n, tying) for index in range(n)]
    assert numbers == [min(index // size, groups - 1) for index in range(n)]
    assert sorted(set(numbers)) == list(range(groups))


@pytest.mark.slow
def test_layers_are_counted_one_after_the_other():
    order = [UP, DOWN, OUT]
    tree = lj.lorafy(PARAMS, [rule(0.5)], kinds=dict.fromkeys(order, "mlp"))
    assert ties_of(tree) == {UP: (0, 2, 3), DOWN: (1, 3, 3), OUT: (3,)}
    tree = lj.lorafy(PARAMS, [rule(0.5)])  # in the order of the leaves
    assert ties_of(tree) == {DOWN: (0, 2, 3), UP: (1, 3, 3), OUT: (3,)}
    planned = lj.lorafy(jax.eval_shape(lambda: PARAMS), [rule(0.5)])
    assert jax.tree.structure(planned) == jax.tree.structure(tree)
    assert lj.count_params(planned)[0] == 4 * 4
    tree = lj.lorafy(PARAMS, [rule(1.0, layers=[0, 2], targets=["layers"])])
    assert ties_of(tree) == {UP: (0, -1, 0), DOWN: (0, -1, 0)}
    assert lj.count_params(tree)[0] == 4
    numbered = {f"h_{i}": {"kernel": draw(i, (5, 6))} for i in (10, 11, 2)}
    tree = lj.lorafy(numbered, [rule(1 / 3, targets=[*numbered])])
    assert ties_of(tree) == {"h_10/kernel": (1,), "h_11/kernel": (1,), "h_2/kernel": (0,)}
    two = lj.lorafy(PARAMS, [rule(1.0, targets=["layers"]), rule(1.0, targets=["out"], u=3)])
    assert ties_of(two) == {UP: (0,) * 3, DOWN: (0,) * 3, OUT: (6,)}
    assert lj.count_params(two)[0] == 4 + 3
    assert_identical(lj.join(*lj.split(with_random_factors(two))), with_random_factors(two))


@pytest.mark.slow
def test_members_train_one_vector(tmp_path):
    """The gradient of a shared vector is the sum of those that each would have alone."""
    tree = with_random_factors(lj.lorafy(PARAMS, [rule(0.5)]))
    adapter, base = lj.split(tree)
    assert lj.count_params(tree)[0] == 4 * 4
    apart = jax.tree.map(
        lambda x: x.replace(ties=()) if lj.is_node(x) else x, tree, is_leaf=lj.is_node
    )
    assert lj.count_params(apart)[0] == 7 * 4

    def run(params, x):
        for i in range(3):
            up, down = (params["layers"][n]["kernel"][i] for n in ("up", "down"))
            x = x + jnp.tanh(x @ up) @ down
        return x @ params["out"]["kernel"]

    def gradients(tree):
        adapter, base = lj.split(tree)
        loss = lambda adapter: jnp.sum(jnp.sin(lj.adapt(run)(lj.join(adapter, base), X)))  # noqa: E731
        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(adapter))

    together, alone = gradients(tree), gradients(apart)
    totals, firsts = {}, {}
    for path, numbers in ties_of(tree).items():
        for member, number in enumerate(numbers):
            at = (path, member if path != OUT else ())
            firsts.setdefault(number, at)
            totals[number] = totals.get(number, 0) + alone[path]["v"][at[1]]
    for path, numbers in ties_of(tree).items():
        for member, number in enumerate(numbers):
            at = (path, member if path != OUT else ())
            expected = totals[number] if firsts[number] == at else np.zeros(4, np.float32)
            assert_close(together[path]["v"][at[1]], expected, 1e-5)
    assert np.abs(together[DOWN]["v"]).max() > 1e-3

    moved = lj.join(jax.tree.map(lambda x: 2 * x, adapter), base)
    assert_close(moved["out"]["kernel"].v, moved["layers"]["up"]["kernel"].v[2], 0)
    first = lj.split(tree)[0]
    first[DOWN]["v"] = jnp.asarray(first[DOWN]["v"]).at[2].set(9.0)  # the first leaf of number 3
    assert (lj.join(first, base)["layers"]["up"]["kernel"].v[1] == 9).all()
    assert_identical(lj.join(*lj.split(tree)), tree)
    lj.save_adapter(tmp_path / "adapter", tree)
    assert_identical(lj.load_adapter(tmp_path / "adapter", PARAMS), tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": 3}, "u=3 has no effect without tinylora=True"),
        ({"weight_tying": 0.5}, "weight_tying=0.5 has no effect without tinylora=True"),
        ({"tinylora": True, "u": 0}, "u=0 must be a number of at least 1"),
        ({"tinylora": True, "weight_tying": 2}, "weight_tying=2 must be a share from 0 to 1"),
        ({"tinylora": True, "weight_tying": -0.5}, "weight_tying=-0.5 must be a share from 0"),
        ({"tinylora": True, "xs": True}, "xs cannot be combined with tinylora"),
    ],
)
def test_rules_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        lj.LoraRule(targets=["up"], rank=2, **changes)


@pytest.mark.slow
def test_an_optimiser_of_the_whole_tree_would_train_them_apart():
    with pytest.raises(ValueError, match="shares the A or the vector of another weight"):
        lj.trainable_mask(lj.lorafy(PARAMS, [rule(0.5)]))
