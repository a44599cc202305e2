"""Optimisers over whole adapted trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weight import is_node
from tests.support import MORE_PROGRAMS, PROGRAMS, assert_close, assert_identical, over

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_freeze_base_leaves_the_base_bitwise_and_without_slots():
    program = PROGRAMS[1]
    _, tree, x = program.inputs()
    optimizer = lj.optim.freeze_base(optax.adamw(1e-2, weight_decay=0.1))
    state = optimizer.init(tree)
    trained, _ = lj.count_params(tree)
    padding = sum(v.size for v in jax.tree.leaves(lj.split(tree)[0])) - trained
    slots = sum(leaf.size for leaf in jax.tree.leaves(state) if np.ndim(leaf))
    assert slots == 2 * (trained + padding), "two moments for each trained parameter, no more"

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return jnp.sum(jnp.sin(lj.adapt(program.run)(tree, x)))

        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    new = tree
    for _ in range(3):
        new, state = step(new, state)
    assert_identical(lj.split(new)[1], lj.split(tree)[1])
    before, after = jax.device_get((lj.split(tree)[0], lj.split(new)[0]))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(changed))


def test_trainable_mask_names_what_trains():
    tree = lj.lorafy(
        {"w": jnp.ones((5, 7)), "bias": jnp.ones(7), "norm": jnp.ones(5)},
        [lj.LoraRule(targets=["w"], rank=2), lj.TrainRule(targets=["bias"])],
    )
    mask = lj.trainable_mask(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    weight = mask["w"]
    assert (weight.base, weight.a, weight.b, weight.scale) == (False, True, True, False)
    assert (mask["bias"].value, mask["norm"]) == (True, False)


def answer_after(steps, program, tree, x, optimizer):
    """Returns what a program answers with a tree after steps of an optimiser."""
    adapter, base = lj.split(tree)
    forward = lj.adapt(program.run)

    def step(_, state):
        adapter, state = state
        loss = lambda adapter: jnp.sum(jnp.square(forward(lj.join(adapter, base), x) - 1))  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    @jax.jit
    def trained(adapter):
        adapter, _ = lax.fori_loop(0, steps, step, (adapter, optimizer.init(adapter)))
        return program.run(lj.merge(lj.join(adapter, base)), x)

    return np.asarray(trained(adapter))


@over("program", [PROGRAMS[2], MORE_PROGRAMS[0]], often=[])
def test_scaling_is_right_everywhere_at_once(program, float64):
    """α → α/(pq), A → p·A, B → q·B, lr_A → p·lr_A, lr_B → q·lr_B leaves Adam's steps unchanged."""
    p, q, lr = 3.0, 0.25, 1e-2
    params, tree, x = program.inputs(jnp.float64)
    seen = functools.partial(answer_after, 20, program, x=x)
    adam = optax.adam(lr, eps=1e-30)
    adapter, base = lj.split(tree)
    moved = {path: {"a": v["a"] * p, "b": v["b"] * q} for path, v in adapter.items()}
    rules = [
        dataclasses.replace(r, alpha=r.alpha / (p * q), dtype=jnp.float64) for r in program.rules
    ]
    other = lj.join(moved, lj.split(lj.lorafy(params, rules))[1])
    both = optax.chain(adam, lj.optim.scale_factors(a=p, b=q))
    expected = seen(tree=tree, optimizer=adam)
    before = jax.jit(lambda tree, x: program.run(lj.merge(tree), x))(tree, x)
    assert np.abs(expected - np.asarray(before)).max() > 1e-2, "it must have moved"
    assert_close(seen(tree=other, optimizer=both), expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(seen(tree=other, optimizer=adam), expected, 1e-5)


def test_lora_plus_on_an_adapter_and_on_a_whole_tree():
    program = PROGRAMS[1]
    params, tree, _ = program.inputs()
    adapter, _ = lj.split(tree)
    optimizer = optax.chain(optax.sgd(0.5), lj.optim.lora_plus(16))
    ones = jax.tree.map(np.ones_like, adapter)
    updates, _ = jax.jit(optimizer.update)(ones, optimizer.init(adapter), adapter)
    for parts in jax.device_get(updates).values():
        assert float(parts["a"].max()) == float(parts["a"].min()) == -0.5
        assert float(parts["b"].max()) == float(parts["b"].min()) == -8.0
    whole = lj.optim.freeze_base(optimizer)
    gradient = jax.tree.map(np.ones_like, tree)
    updates, _ = jax.jit(whole.update)(gradient, whole.init(tree), tree)
    node = jax.device_get(updates["layers"]["up"]["kernel"])
    assert float(node.a.max()) == -0.5 and float(node.b.min()) == -8.0
    assert float(jnp.abs(node.base).max()) == float(jnp.abs(node.scale).max()) == 0.0
    with pytest.raises(ValueError, match="positive number"):
        lj.optim.lora_plus(-1)


def test_lora_plus_has_a_rate_for_embeddings():
    _, tree, _ = MORE_PROGRAMS[0].inputs()
    adapter, _ = lj.split(tree)
    plus = lj.optim.lora_plus(16, embedding=0.125)
    ones = jax.tree.map(np.ones_like, adapter)
    updates, _ = jax.jit(plus.update)(ones, plus.init(adapter))
    assert {float(v.max()) for v in jax.device_get(jax.tree.leaves(updates))} == {0.125}


@over("program", PROGRAMS[1:3], often=[PROGRAMS[2].name])
def test_project_b_steps_as_near_to_full_fine_tuning_as_b_can(program, float64):
    """Least squares: of all B, s·A·ΔB is nearest to the step that W itself would take."""
    rules = tuple(dataclasses.replace(rule, freeze_a=True) for rule in program.rules)
    program = dataclasses.replace(program, rules=rules)
    params, tree, x = program.inputs(jnp.float64)
    project = lj.optim.project_b(tree, damping=0.0)
    adapter, base = lj.split(tree)
    loss = lambda run, tree: jnp.sum(jnp.sin(run(tree, x)))  # noqa: E731

    @jax.jit
    def both(adapter, tree):
        g = jax.grad(lambda ad: loss(lj.adapt(program.run), lj.join(ad, base)))(adapter)
        steps, _ = project.update(g, project.init(adapter))
        return steps, jax.grad(lambda params: loss(program.run, params))(lj.merge(tree))

    steps, full = jax.device_get(both(adapter, tree))
    full, _ = flatten_with_paths(full)
    nodes, _ = flatten_with_paths(tree, is_leaf=is_node)
    for path, node in nodes:
        if not is_node(node):
            continue
        n = node.n_batch
        rows = np.prod(node.roles.sizes(node.shape, "in"))
        a, scales = np.asarray(node.a).reshape(-1, node.rank, rows), np.asarray(node.scale).ravel()
        step = steps[path]["b"].reshape(len(a), node.rank, -1)
        wanted = dict(full)[path].reshape(len(a), a.shape[-1], -1)
        for layer in range(len(a)):
            s = scales[layer if n else 0]
            if s:
                best = np.linalg.lstsq(s * a[layer].T, wanted[layer])[0]
                assert_close(step[layer], best, 1e-9)
    with pytest.raises(ValueError, match="freeze_a=True"):
        lj.optim.project_b(PROGRAMS[1].inputs()[1])


def test_learning_rate_rule():
    rate = lj.optim.learning_rate
    assert rate(2000) == pytest.approx(5e-4)
    assert rate(4096, family="llama") == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert rate(1024, family="qwen", steps=99) == pytest.approx(7.5e-4 * (2000 / 1024) ** 0.0775)
    assert rate(4096) == pytest.approx(10 * rate(4096, full=True))
    assert rate(576, steps=35) == pytest.approx(1.5 * rate(576, steps=100))
    with pytest.raises(ValueError, match="family='gpt'"):
        rate(100, family="gpt")
    assert [lj.optim.expert_rank(16, active=k) for k in (1, 2, 8, 32)] == [16, 8, 2, 1]
    with pytest.raises(ValueError, match="at least 1"):
        lj.optim.expert_rank(16, active=0)
