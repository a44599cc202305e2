"""Sums of adapters: exact ones to machine precision, and what cannot be summed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models, peft
from lora_jax.bank import combine, extract
from lora_jax.bank.sums.lowrank import nearest_product
from tests.support import assert_close, assert_identical, draw, lorafied, with_random_factors

WEIGHTS = [1.25, -0.5, 0.75]
QUERY, EXPERTS, OUT = ("layers", "q", "kernel"), ("layers", "experts", "kernel"), ("out", "kernel")


def plain(dtype=jnp.float32):
    """Stacked kernels beside a bias, stacked experts, a kernel with two out axes, a tied table."""
    return {
        "layers": {
            "q": {"kernel": draw(1, (3, 5, 7), dtype), "bias": draw(2, (3, 7), dtype)},
            "experts": {"kernel": draw(3, (3, 2, 5, 11), dtype)},
        },
        "out": {"kernel": draw(4, (5, 2, 3), dtype)},
        "embed": {"embedding": draw(5, (13, 5), dtype)},
        "norm": draw(6, (5,), dtype),
    }


def adapted(params, rules, seed, dtype=jnp.float32):
    lora = [rule for rule in rules if isinstance(rule, lj.LoraRule)]
    rules = [dataclasses.replace(r, dtype=dtype) if r in lora else r for r in rules]
    return with_random_factors(lorafied(params, rules), seed)


@functools.cache
def three_trees():
    """Returns a base in float64, and three adapted trees over it that no test changes.

    Their targets, ranks, alphas, layers and initialisers differ; one has a bias on B.
    """
    params, dtype = plain(jnp.float64), jnp.float64
    out = lj.LoraRule(targets=["out"], rank=3, alpha=5.0, in_axes=[0], out_axes=[1, 2])
    first = [
        lj.LoraRule(targets=["q"], layers=[0], rank=4, alpha=3.0, dropout=0.1),
        lj.LoraRule(targets=["q"], layers=[2], rank=2, alpha=5.0, dropout=0.1),
        lj.LoraRule(targets=["experts"], rank=2, alpha=3.0),
    ]
    second = [lj.LoraRule(targets=["q"], rank=3, alpha=7.0, bias_on_b=True), out]
    third = [
        lj.LoraRule(targets=["q"], rank=2, alpha=3.0, init=lj.init.pissa),
        lj.LoraRule(targets=["experts"], layers=[1], rank=4, alpha=2.0),
        dataclasses.replace(out, rank=1),
    ]
    trees = [adapted(params, rules, i, dtype) for i, rules in enumerate((first, second, third))]
    return params, trees


@functools.cache
def exact_sum():
    """Returns the sum of `three_trees`, and the merged tree that it stands for."""
    params, trees = three_trees()
    return combine(trees, WEIGHTS), summed(params, three_merged(), WEIGHTS)


@functools.cache
def three_merged():
    return [*map(lj.merge, three_trees()[1])]


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def summed(params, merged, weights):
    """Returns W + Σ w(merged − W), leaf by leaf, in NumPy."""

    def of_leaf(before, *after):
        before, *after = (np.asarray(leaf, np.float64) for leaf in (before, *after))
        return before + sum(w * (leaf - before) for w, leaf in zip(weights, after, strict=True))

    return jax.tree.map(of_leaf, params, *merged)


def merged_sum(params, trees, weights):
    return summed(params, [*map(lj.merge, trees)], weights)


PARAMS = plain()


def test_exact(float64):
    params, trees = three_trees()
    both, expected = exact_sum()
    merged = lj.merge(both)
    assert_close(merged, expected, 1e-12)
    for weights in ([1.25, 0.5, 0.75], [1.0, -0.5, 0.75]):  # the control
        with pytest.raises(AssertionError):
            assert_close(merged, summed(params, three_merged(), weights), 1e-3)
    query, experts = at(both, QUERY), at(both, EXPERTS)
    assert (query.ranks, query.dropout) == ((11, 7, 9), 0.1)  # PiSSA's rank counts twice
    assert (experts.ranks, at(both, OUT).ranks) == ((2, 6, 2), (4,))
    assert query.base is at(params, QUERY) and query.start is None
    negated = combine(trees[:1], [-1.0])
    assert_close(lj.merge(negated), summed(params, three_merged()[:1], [-1.0]), 1e-12)


# By default, the largest rank of a layer among the trees (PiSSA's counts twice); never more than
# the sum has.
@pytest.mark.parametrize(
    ("rank", "ranks"),
    [
        (3, {QUERY: (3,), EXPERTS: (2, 3, 2), OUT: (3,)}),
        pytest.param(None, {QUERY: (4,), EXPERTS: (2, 4, 2), OUT: (3,)}, marks=pytest.mark.slow),
    ],
)
def test_svd_is_the_best_approximation(rank, ranks, float64):
    params, trees = three_trees()
    low = combine(trees, WEIGHTS, how="svd", rank=rank)
    exact, expected = exact_sum()
    for path, of_layers in ranks.items():
        node, base = at(low, path), np.asarray(at(params, path))
        assert node.ranks == of_layers
        stack = base.shape[: node.n_batch]
        change = (at(expected, path) - base).reshape(*stack, 5, -1)
        best = np.zeros_like(change)
        for index in np.ndindex(stack):
            u, s, vt = np.linalg.svd(change[index], full_matrices=False)
            r = of_layers[index[0] if len(of_layers) > 1 else 0]
            best[index] = u[:, :r] * s[:r] @ vt[:r]
        found = np.asarray(node.merged()) - base
        assert_close(found.reshape(change.shape), best, 1e-9)
    assert_close(at(low, QUERY).bias, at(exact, QUERY).bias, 1e-12)


def decomposed(fn, *args):
    """Returns the shape of each array that a function decomposes, loops and inner functions too."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("geqrf", "qr", "svd"):
                found.append(eqn.invars[0].aval.shape)
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def test_matrices_of_a_stack_are_decomposed_one_by_one():
    """Two batches at once wait for each other forever on some CPUs."""
    a, b = draw(1, (3, 2, 5, 11)), draw(2, (3, 2, 5, 7))
    shapes = decomposed(lambda a, b: nearest_product(a, b, 2), a, b)
    assert len(shapes) >= 3 and {len(shape) for shape in shapes} == {2}
    assert {len(s) for s in decomposed(jnp.linalg.qr, a)} == {4}  # the control


@pytest.mark.slow
def test_each_use_of_a_tied_table_has_its_own_sum(float64):
    params = plain(jnp.float64)
    rules = [lj.LoraRule(targets=["embed"], rank=r, alpha=5.0, uses="each") for r in (2, 3)]
    trees = [adapted(params, [rule], i, jnp.float64) for i, rule in enumerate(rules)]

    def change(tree, use):
        return np.asarray(tree["embed"]["embedding"].factored().seen_by_use(use).delta(jnp.float64))

    for how, rank in (("exact", 5), ("svd", 3)):
        both = combine(trees, [2.0, -0.5], how=how)
        assert both["embed"]["embedding"].ranks == (2 * rank,)
        for use in ("lookup", "product"):
            expected = 2.0 * change(trees[0], use) - 0.5 * change(trees[1], use)
            u, s, vt = np.linalg.svd(expected, full_matrices=False)
            assert_close(change(both, use), u[:, :rank] * s[:rank] @ vt[:rank], 1e-9)
    # Tables of several models, one beside the other.
    rule = lj.LoraRule(targets=["embed"], rank=2, uses="each", in_axes=[1], out_axes=[2])
    tables = {"embed": {"embedding": draw(6, (3, 13, 5), jnp.float64)}}
    trees = [adapted(tables, [rule], i, jnp.float64) for i in (0, 1)]
    both = combine(trees, [2.0, -0.5])
    expected = 2.0 * change(trees[0], "lookup") - 0.5 * change(trees[1], "lookup")
    assert_close(change(both, "lookup"), expected, 1e-9)


def test_dare_prunes_at_random_and_keeps_the_mean():
    trees = [adapted(PARAMS, [lj.LoraRule(targets=["q"], rank=2, alpha=3.0)], i) for i in (0, 1)]
    linear = at(combine(trees, [1.0, -0.5], how="linear"), QUERY)
    # As PEFT sums factors: each by the root of |w·s|, and A by the sign of w, too.
    first, second = (at(tree, QUERY) for tree in trees)
    roots = np.sqrt([1.0 * 1.5, 0.5 * 1.5])
    assert_close(linear.a, roots[0] * first.a - roots[1] * second.a, 1e-6)
    assert_close(linear.b, roots[0] * first.b + roots[1] * second.b, 1e-6)

    @jax.jit
    @jax.vmap
    def drawn(key):
        kwargs = {"how": "dare_linear", "density": 0.7, "key": key}
        node = at(combine(trees, [1.0, -0.5], **kwargs), QUERY)
        alone = at(combine(trees[:1], [1.0], **kwargs), QUERY)
        return (node.a, node.b, node.merged()), alone.a

    keys = jax.random.split(jax.random.key(3), 1500)
    (a, b, merged), alone = jax.device_get(drawn(keys))
    for draws, mean in ((a, linear.a), (b, linear.b), (merged, linear.merged())):
        error = np.abs(draws.mean(0) - mean) / (draws.std(0) / np.sqrt(len(draws)) + 1e-9)
        assert error.max() < 4.5, "standard errors"
    assert np.abs(np.mean(alone != 0) - 0.7) < 0.01
    assert len(np.unique(alone[:, 0, 0, 0])) == 2, "pruned, or divided by the density"


TRAINED = [
    lj.TrainRule(targets=["norm"]),
    lj.TrainRule(targets=["embed"], rows=[2, 7]),
    lj.LoraRule(targets=["out"], rank=1),
]
OTHER_ROWS = [*TRAINED[:1], lj.TrainRule(targets=["embed"], rows=[7, 1]), TRAINED[2]]


@pytest.mark.slow
def test_leaves_that_train_in_full_are_summed():
    trees = [adapted(PARAMS, rules, i) for i, rules in enumerate((TRAINED, OTHER_ROWS))]
    expected = merged_sum(PARAMS, trees, [2.0, -0.5])
    both = combine(trees, [2.0, -0.5], base=PARAMS)
    assert_close(lj.merge(both), expected, 1e-6)
    assert both["embed"]["embedding"].rows == (1, 2, 7)
    with pytest.raises(ValueError, match="'norm' is trained in full.*base=params"):
        combine(trees, [2.0, -0.5])
    # The value before training is known from a tree that leaves it alone, or does not matter.
    third = adapted(PARAMS, TRAINED[2:], 3)
    known = combine([*trees, third], [2.0, -0.5, 0.0])
    assert_close(lj.merge(known)["norm"], expected["norm"], 1e-6)
    same = combine([trees[0], trees[0]], [0.25, 0.75])
    assert_identical(same["norm"].value, trees[0]["norm"].value)


def rule(**fields):
    return [lj.LoraRule(targets=["q"], **{"rank": 2, "alpha": 3.0} | fields)]


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ([rule()], {"weights": [1.0, 2.0]}, "1 trees, but 2 weights"),
        ([], {"weights": []}, "0 trees"),
        ([rule()], {"weights": [float("nan")]}, "not a finite number"),
        ([rule()], {"how": "cat"}, "Choose one of .*PEFT's 'cat' is 'exact'"),
        ([rule()], {"rank": 2}, "rank has no effect with how='exact'"),
        ([rule()], {"how": "svd", "density": 0.5}, "density has no effect"),
        ([rule()], {"how": "linear", "majority_sign_method": "total"}, "has no effect"),
        ([rule()], {"how": "ties", "density": 0.5, "key": 1}, "key has no effect"),
        ([rule()], {"how": "ties"}, "needs density"),
        ([rule()], {"how": "ties", "density": 0.0}, r"must be in \(0, 1\]"),
        ([rule()], {"how": "dare_ties", "density": 0.5}, "draws random numbers. Pass key="),
        ([rule()], {"how": "svd", "rank": 0}, "at least 1"),
        ([rule(), rule(dora=True)], {}, "part 'magnitude'.*cannot be summed.*extract"),
        ([rule(), rule(rank=3)], {"how": "linear"}, r"ranks \[2, 3\].*needs the same rank"),
        ([rule(init=lj.init.pissa)], {"how": "linear"}, "was initialized from its base"),
        ([rule(), rule(in_axes=[-1], out_axes=[-2])], {}, "has roles"),
        ([rule(), [lj.TrainRule(targets=["q"])]], {}, r"trees\[1\] trains it"),
        ([[]], {}, r"trees\[0\] is a plain tree"),
    ],
)
def test_mistakes(rules, options, message):
    trees = [lj.lorafy(PARAMS, each) if each else PARAMS for each in rules]
    weights = options.pop("weights", [1.0] * len(trees))
    with pytest.raises(ValueError, match=message):
        combine(trees, weights, **options)


def test_another_base_is_refused_and_a_copy_is_not():
    tree = adapted(PARAMS, rule(), 1)
    copy = adapted(jax.tree.map(jnp.array, PARAMS), rule(), 2)
    assert_close(
        lj.merge(combine([tree, copy], [1.0, 1.0])),
        merged_sum(PARAMS, [tree, copy], [1.0, 1.0]),
        1e-6,
    )
    other = lj.lorafy(PARAMS | {"norm": PARAMS["norm"] + 1}, rule())
    with pytest.raises(ValueError, match=r"trees\[0\] and trees\[1\] have different.*norm"):
        combine([tree, other], [1.0, 1.0])
    smaller = lj.lorafy(PARAMS | {"norm": jnp.zeros(3)}, rule())
    with pytest.raises(ValueError, match=r"'norm' has the shape \(5,\).*\(3,\)"):
        combine([tree, smaller], [1.0, 1.0])
    with pytest.raises(ValueError, match="different leaves, .*'more'"):
        combine([tree, lj.lorafy(PARAMS | {"more": jnp.zeros(3)}, rule())], [1.0, 1.0])


@pytest.mark.slow
def test_a_sum_is_saved_as_any_adapter_is(tmp_path, float64):
    part, base = ({"q": tree["layers"]["q"]} for tree in (exact_sum()[0], three_trees()[0]))
    lj.save_adapter(tmp_path / "sum", part)
    assert_identical(lj.load_adapter(tmp_path / "sum", base), part)


@pytest.mark.slow
def test_layers_that_differ_are_written_for_peft(tmp_path):
    fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 16}
    model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    params = model.init(jax.random.key(0), jnp.array([[1, 2, 3]]))["params"]
    rules = [
        [lj.LoraRule(targets=["c_attn"], layers=[0, 2], rank=2, alpha=3.0)],
        [lj.LoraRule(targets=["c_attn"], layers=[0], rank=3, alpha=4.0)],
    ]
    both = combine([adapted(params, each, i) for i, each in enumerate(rules)], [1.0, -2.0])
    extracted, _ = extract(params, lj.merge(both), energy=1 - 1e-6)
    for name, tree in (("sum", both), ("extracted", extracted)):
        found = {n.ranks for n in jax.tree.leaves(tree, is_leaf=lj.is_node) if lj.is_node(n)}
        assert found == {(5, 0, 2)}
        peft.save(tmp_path / name, model, tree)
        again = peft.load(tmp_path / name, model, params)
        assert_close(lj.merge(again), lj.merge(both), 1e-6)
