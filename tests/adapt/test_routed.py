"""One part of a mixture's experts, on sorted rows: equal to each expert by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt.rules import routed as rules
from lora_jax.core import routed
from lora_jax.models.decoder import dispatch
from lora_jax.models.decoder.experts import apply_blocks, apply_ragged
from tests.adapted_trees import lorafied, with_random_factors
from tests.support import array, assert_close

EXPERTS, OTHERS, WIDTH, INNER, TOKENS, CHOSEN = 4, 2, 12, 10, 20, 2
NAMES = ("gate", "up", "down")
RULES = {
    "LoRA": [{"rank": 3, "alpha": 7}],
    "rsLoRA of one kernel": [{"rank": 3, "alpha": 7, "scaling": "alpha/sqrt(rank)", "of": ["up"]}],
    "ranks of their own": [{"rank": 2, "alpha": 5, "of": ["gate"]}, {"rank": 3, "of": ["down"]}],
    "one A": [{"rank": 3, "alpha": 7, "share_a": True, "of": ["gate", "up"]}],
    "DoRA": [{"rank": 3, "alpha": 7, "dora": True}],
    "LoRA-FA": [{"rank": 3, "alpha": 7, "freeze_a": True}],
    "LoRA-XS": [{"rank": 3, "alpha": 7, "xs": True}],
    "VeRA": [{"rank": 3, "vera": True}],
    "a bias on B": [{"rank": 3, "alpha": 7, "bias_on_b": True}],
}


def gated(gate, up):
    return jax.nn.silu(gate) * up


@functools.cache
def case(name, choice="uneven"):
    """An adapter and its base, biases of experts, tokens, routing weights, and the choice."""
    rng = np.random.default_rng(5)

    def normal(*shape):
        return array(rng.normal(size=shape), jnp.float32)

    params = {name: {"kernel": normal(EXPERTS, WIDTH, INNER)} for name in NAMES[:2]}
    params["down"] = {"kernel": normal(EXPERTS, INNER, WIDTH)}
    chosen = rng.permuted(np.tile(np.arange(EXPERTS + OTHERS), (TOKENS, 1)), axis=1)[:, :CHOSEN]
    if choice == "uneven":  # all of this part, more than the first turn has rows for
        chosen = np.broadcast_to([2, 0], chosen.shape)
    made = [
        lj.LoraRule(targets=rule.get("of", list(NAMES)), **{k: rule[k] for k in rule if k != "of"})
        for rule in RULES[name]
    ]
    tree = with_random_factors(lorafied(params, made))
    biases = tuple(normal(EXPERTS, size) for size in (INNER, INNER, WIDTH))
    weights = array(rng.uniform(0.1, 1, (CHOSEN, TOKENS)), jnp.float32)
    return lj.split(tree), biases, normal(TOKENS, WIDTH), weights, array(chosen.T, jnp.int32)


def part(tree, tokens, weights, chosen, biases, experts=apply_ragged):
    kernels = (tree[name]["kernel"] for name in NAMES)
    return dispatch.apply_part_of_experts(
        experts, 2, gated, tokens, weights, chosen, *kernels, biases=biases
    )


def by_hand(tree, tokens, weights, chosen, biases):
    """Every token goes through every expert, and a mask takes those that it chose."""

    def multiply(x, name, bias):
        product = jnp.einsum(f"{'ted' if x.ndim == 3 else 'td'},edf->tef", x, tree[name]["kernel"])
        return product + bias if biases else product

    gate_bias, up_bias, down_bias = biases or (None,) * 3
    features = gated(multiply(tokens, "gate", gate_bias), multiply(tokens, "up", up_bias))
    out = multiply(features, "down", down_bias)
    is_chosen = chosen[..., None] == jnp.arange(EXPERTS)  # [k, tokens, experts]
    return jnp.einsum("kt,kte,ted->td", weights, is_chosen.astype(out.dtype), out)


def run(fn, name, choice="uneven", biased=False):
    """The sums of a function, and its gradients to adapter, tokens and weights."""
    (adapter, base), biases, tokens, weights, chosen = case(name, choice)
    biases = biases if biased else ()

    def loss(adapter, tokens, weights):
        forward = lj.adapt(fn, strict=True)
        out = forward(lj.join(adapter, base), tokens, weights, chosen, biases)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(adapter, tokens, weights)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases of experts"])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_those_of_each_expert_by_hand(name, biased):
    tolerance = 1e-4 if name == "LoRA-XS" else 5e-5  # whose values are large
    assert_close(run(part, name, biased=biased), run(by_hand, name, biased=biased), tolerance)


@pytest.mark.parametrize("experts", [apply_ragged, apply_blocks])
def test_an_even_choice(experts):
    ours = run(functools.partial(part, experts=experts), "DoRA", "even")
    assert_close(ours, run(by_hand, "DoRA", "even"), 2e-5)


def test_products_of_rows_where_all_columns_are_too_many(monkeypatch):
    monkeypatch.setattr(rules, "_MAX_COLUMNS", 0)
    assert_close(run(part, "DoRA"), run(by_hand, "DoRA"), 5e-5)


def poisoned(x, kernel, group_sizes, *args):
    """A ragged product that writes NaN into rows of no group, forward and backward."""

    def with_nan(rows, group_sizes):
        in_group = jnp.arange(len(rows)) < group_sizes.sum()
        return jnp.where(in_group[:, None], rows, jnp.nan)

    @jax.custom_vjp
    def multiply(x, kernel, group_sizes):
        return with_nan(RAGGED_DOT(x, kernel, group_sizes, *args), group_sizes)

    def backward(residuals, cotangent):
        *operands, group_sizes = residuals
        product = functools.partial(RAGGED_DOT, group_sizes=group_sizes)
        x_gradient, kernel_gradient = jax.vjp(product, *operands)[1](cotangent)
        return with_nan(x_gradient, group_sizes), kernel_gradient, None

    multiply.defvjp(lambda *operands: (multiply(*operands), operands), backward)
    return multiply(x, kernel, group_sizes)


RAGGED_DOT = lax.ragged_dot


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "a bias on B"])
def test_what_a_kernel_leaves_in_rows_of_no_group_is_never_seen(name, monkeypatch):
    expected = run(by_hand, name, "even", biased=True)
    jax.clear_caches()
    monkeypatch.setattr(routed.lax, "ragged_dot", poisoned)
    assert_close(run(part, name, "even", biased=True), expected, 2e-5)
    # The control: nothing sets the rows to zero.
    jax.clear_caches()
    for module in (routed, rules):
        monkeypatch.setattr(module, "zero_rows_without_group", lambda rows, _: rows)
    seen = jax.tree.leaves(run(part, name, "even", biased=True))
    assert any(np.isnan(leaf).any() for leaf in seen)
    jax.clear_caches()


def add_turns_in_a_branch(turn, n_turns, total, *operands):
    """The control: a conditional around a scan, in place of `add_turns`."""

    def add(total):
        def body(total, index):
            return total + turn(index, *operands), None

        return lax.scan(jax.checkpoint(body), total, jnp.arange(1))[0]

    return lax.cond(n_turns > 0, add, lambda total: total, total)


def test_a_step_has_no_branch_that_fills_kernels_with_zeros(monkeypatch):
    def compiled():
        """The HLO of the gradient of recomputed layers."""
        (adapter, base), _, tokens, weights, chosen = case("LoRA")
        stack = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)  # noqa: E731
        names = jax.checkpoint_policies.save_only_these_names("lora_xA")

        def layers(tree, x):
            def layer(x, tree):
                return x + part(tree, x, weights, chosen, ()), None

            return lax.scan(jax.checkpoint(layer, policy=names), x, tree)[0]

        def loss(adapter, base, x):
            return jnp.sum(lj.adapt(layers, strict=True)(lj.join(adapter, base), x) ** 2)

        run = jax.jit(jax.grad(loss))
        return run.lower(stack(adapter), stack(base), tokens).as_text("hlo")

    kernels = re.compile(
        rf"f32\[(?:3,)?{EXPERTS},(?:{WIDTH},{INNER}|{INNER},{WIDTH})\]\S* broadcast"
    )
    text = compiled()
    assert " conditional(" not in text and not kernels.search(text)
    monkeypatch.setattr(dispatch, "add_turns", add_turns_in_a_branch)
    text = compiled()
    assert " conditional(" in text, "the control"
    assert kernels.search(text) or jax.__version_info__ >= (0, 12), "newer JAX keeps no kernels"
