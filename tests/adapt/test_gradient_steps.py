"""Functions that take gradient steps on adapted weights, or differentiate through a solver."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.scipy.sparse.linalg import bicgstab, cg, gmres

import lora_jax as lj
from lora_jax.adapt.uses import uses
from lora_jax.core.weight import leaves_of
from tests.support import assert_close, draw, over, with_random_factors

X = draw(9, (13, 5))
PARAMS = {"a": {"kernel": draw(1, (5, 7))}, "b": {"kernel": draw(2, (7, 3))}}


def tuned(params, x):
    """The product after three steps of descent, inside a loop."""

    def loss(w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    def step(w, _):
        return w - 0.1 * jax.grad(loss)(w), None

    w, _ = lax.scan(step, params["a"]["kernel"], None, length=3)
    return jnp.tanh(x @ w) @ params["b"]["kernel"]


def contradicting(params, x):
    w = params["a"]["kernel"]
    return jnp.tanh(x @ w) @ params["b"]["kernel"] + (x * w.sum(1)).sum() + (w[0] @ w[1])


def roles_of(tree):
    nodes = {path: leaf for path, leaf in leaves_of(tree)[0] if lj.is_node(leaf)}
    return {path: (node.roles.in_axes, node.roles.out_axes) for path, node in nodes.items()}


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (tuned, r"'scan \(as a carry\)' at .*test_gradient_steps.py:.* loses its axes"),
        (contradicting, "in ways that contradict each other"),
    ],
    ids=["lost in a loop", "contradictory"],
)
def test_a_kernel_whose_roles_trace_cannot_read_gets_those_of_its_name(fn, why):
    rules = [lj.LoraRule(targets=".*", rank=2, alpha=3.0)]
    with pytest.warns(lj.RoleWarning, match=f"'a/kernel'.*{why}") as caught:
        tree = with_random_factors(lj.lorafy(PARAMS, rules, trace=(fn, PARAMS, X)))
    assert [w.filename for w in caught] == [__file__]
    assert roles_of(tree) == dict.fromkeys(("a/kernel", "b/kernel"), ((-2,), (-1,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lj.MergeWarning)
        y = jax.jit(lj.adapt(fn))(tree, X)
    assert_close(y, jax.jit(fn)(lj.merge(tree), X), 1e-5)


def test_a_kernel_without_a_conventional_name_needs_roles():
    params = {"a": {"weight": PARAMS["a"]["kernel"]}, "b": PARAMS["b"]}
    fn = lambda p, x: tuned({"a": {"kernel": p["a"]["weight"]}, "b": p["b"]}, x)  # noqa: E731
    with pytest.raises(ValueError, match="'a/weight'.*does not show the roles of.*in_axes"):
        lj.lorafy(params, [lj.LoraRule(targets=".*", rank=2)], trace=(fn, params, X))


SHIFT = 3.0


def symmetric(w, x):
    return lambda v: v + (v @ w) @ w.T


def general(w, x):
    return lambda v: SHIFT * v + x.sum() * (v @ w)[:5]


def by(solver, operator):
    def fn(params, x):
        return solver(operator(params["a"]["kernel"], x), x[0], tol=1e-13)[0]

    return fn


def with_aux(params, x):
    def solve(matvec, b):
        y, _ = cg(matvec, b, tol=1e-13)
        return y, {"residual": 1.0 + jnp.linalg.norm(matvec(y) - b)}

    operator = symmetric(params["a"]["kernel"], x)
    return lax.custom_linear_solve(operator, x[0], solve, solve, symmetric=True, has_aux=True)


def batched(params, x):
    """JAX then has a loop whose condition has a value for each example."""
    return jax.vmap(lambda row: by(cg, symmetric)(params, row[None]))(x[:3])


SOLVES = {
    "cg": by(cg, symmetric),
    "cg under vmap": batched,
    "bicgstab": by(bicgstab, general),
    "gmres": by(gmres, general),
    "with auxiliary results": with_aux,
    "a gradient inside": jax.grad(lambda params, x: by(cg, symmetric)(params, x).sum(), argnums=1),
}


def solved(run, adapter, base, x):
    outputs = jax.tree.leaves(run(lj.join(adapter, base), x))
    return sum(jnp.sum(jnp.sin(y)) for y in outputs), outputs


def of_dtype64(**settings):
    rule = lj.LoraRule(targets=["a"], rank=2, alpha=3.0, dtype=jnp.float64, **settings)
    params = {"a": {"kernel": draw(1, (5, 7), jnp.float64), "bias": jnp.zeros(7)}}
    return with_random_factors(lj.lorafy(params, [rule])), draw(9, (13, 5), jnp.float64)


@over("name", SOLVES, often=["cg"])
def test_solves_are_factored_with_their_implicit_derivative(name, float64):
    fn, (tree, x) = SOLVES[name], of_dtype64()
    adapter, base = lj.split(tree)

    def of(run):
        grad = jax.value_and_grad(lambda *args: solved(run, *args), argnums=(0, 2), has_aux=True)
        return jax.jit(grad)(adapter, base, x)

    ours, theirs = of(lj.adapt(fn, strict=True)), of(lambda tree, x: fn(lj.merge(tree), x))
    assert_close(ours, theirs, 1e-9)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(ours[1][0])), "each factor trains"
    assert {record.how for record in uses(fn, tree, x)} == {"factored"}


def test_a_solve_that_is_not_linear_is_refused_by_name(float64):
    run = lj.adapt(SOLVES["cg"])
    biased, x = of_dtype64(bias_on_b=True)
    with pytest.raises(lj.MergeError, match="'a/kernel' meets 'custom_linear_solve'.*bias on B"):
        run(biased, x)
    with pytest.raises(lj.MergeError, match="'a/kernel' meets 'custom_linear_solve'.*dropout"):
        run(of_dtype64(dropout=0.5)[0], x, dropout_key=jax.random.key(0))


def test_a_weight_on_the_right_of_a_solve_is_merged_alone(float64):
    """The operator's stays factored."""
    tree, x = of_dtype64()

    def fn(params, x):
        w = params["a"]["kernel"]
        return cg(lambda v: 2.0 * v + w @ (w.T @ v), w, tol=1e-13)[0]

    found = {(record.primitive, record.how) for record in uses(fn, tree, x)}
    assert found == {("custom_linear_solve", "merged"), ("dot_general", "factored")}
    with pytest.warns(lj.MergeWarning, match="custom_linear_solve"):
        y = jax.jit(lj.adapt(fn))(tree, x)
    assert_close(y, jax.jit(fn)(lj.merge(tree), x), 1e-9)


def test_a_loop_under_vmap_goes_on_while_one_example_does():
    def fn(params, x):
        def one(row):
            step = lambda y: y + 0.3 * jnp.tanh(y @ params["a"]["kernel"])[:5] + 0.1  # noqa: E731
            return lax.while_loop(lambda y: jnp.abs(y).sum() < 7.0, step, row)

        return jax.vmap(one)(x)

    tree = with_random_factors(lj.lorafy(PARAMS, [lj.LoraRule(targets=["a"], rank=2, alpha=3.0)]))
    expected = jax.jit(fn)(lj.merge(tree), X)
    assert_close(jax.jit(lj.adapt(fn, strict=True))(tree, X), expected, 1e-5)
