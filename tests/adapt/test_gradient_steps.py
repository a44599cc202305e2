"""Functions that take gradient steps on adapted weights, or differentiate through a solver."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.weight import leaves_of
from tests.support import assert_close, draw, with_random_factors

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
    with pytest.raises(ValueError, match="'a/weight'.*no axis roles.*in_axes"):
        lj.lorafy(params, [lj.LoraRule(targets=".*", rank=2)], trace=(fn, params, X))
