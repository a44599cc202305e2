"""Adapters that train side by side are what each would be alone, whatever the others do."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import BankError, Tenant, Together, mixed
from tests.support import assert_close, assert_identical, draw, with_random_factors


@pytest.fixture(autouse=True)
def strict_promotion():
    """Optax's schedules promote types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


PARAMS = {
    "layers": {"up": {"kernel": draw(1, (3, 5, 11))}, "down": {"kernel": draw(2, (3, 11, 5))}},
    "out": {"kernel": draw(3, (5, 7)), "bias": draw(4, (7,))},
}


def run(params, x):
    def layer(x, weights):
        hidden = jnp.tanh(x @ weights["up"]["kernel"])
        return x + hidden @ weights["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["out"]["kernel"] + params["out"]["bias"]


FORWARD = lj.adapt(run)


def squares(forward, params, batch, dropout_key):
    more = {} if dropout_key is None else {"dropout_key": dropout_key}
    error = forward(params, batch["x"], **more) - batch["y"]
    return training.Sums(jnp.sum(error**2), jnp.float32(error.shape[0]), {})


def distances(forward, params, batch, dropout_key):
    error = forward(params, batch["x"]) - batch["y"]
    return training.Sums(jnp.sum(jnp.abs(error)), jnp.float32(error.shape[0]), {})


SQUARES, DISTANCES = training.Loss(squares), training.Loss(distances, reduction="sum")


def tenant(seed, steps=6, rate=3e-2, rules=None, loss=SQUARES, **more):
    rules = rules or [lj.LoraRule(targets=["up", "down"], rank=2, alpha=3.0 + seed)]
    tree = with_random_factors(lj.lorafy(PARAMS, rules), seed=seed)
    schedule = training.warmed_up(rate, steps, kind="cosine", warmup=2)
    key = jax.random.key(seed)
    return Tenant(params=tree, schedule=schedule, steps=steps, loss=loss, key=key, **more)


def one_rule(**rule):
    return [lj.LoraRule(**{"targets": ["up", "down"], "rank": 2, "alpha": 3.0} | rule)]


# Rank, targets, variants, loss, rate, schedule, optimiser, decay and clipping differ.
CROWD = {
    "plain": tenant(1),
    "another rate": tenant(2, rate=1e-1, weight_decay=0.1, grad_clip=0.05, steps=4),
    "rank": tenant(3, rules=one_rule(rank=5)),
    "targets": tenant(4, rules=one_rule(targets=["out"], rank=3)),
    "ranks that differ": tenant(5, rules=[*one_rule(layers=[0]), *one_rule(rank=4)]),
    "loss": tenant(6, loss=DISTANCES, rate=1e-3, grad_clip=0.0),
    "optimiser": tenant(7, optimizer="lion", rate=1e-3, options={"beta2": 0.95}),
    "dropout": tenant(8, rules=one_rule(dropout=0.4), lora_plus=4.0),
    "DoRA": tenant(9, rules=one_rule(dora=True)),
    "began in W": tenant(10, rules=one_rule(init=lj.init.pissa, targets=["out"])),
    "head": tenant(11, rules=[*one_rule(), lj.TrainRule(targets=["out"])], weight_decay=0.2),
    "frozen A": tenant(12, rules=one_rule(freeze_a=True, targets=["out"])),
    "LoRA-XS": tenant(13, rules=one_rule(xs=True)),
    "VeRA": tenant(14, rules=one_rule(vera=True, rank=6), rate=1e-1),
}


def batches(name, step, rows=4):
    """Two parts, to be accumulated; each adapter has data of its own."""
    rng = np.random.default_rng([len(name), ord(name[0]), step])
    shapes = {"x": (2, rows, 5), "y": (2, rows, 7)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def alone(name, steps=None, tenants=CROWD, forward=FORWARD, make=batches):
    """Returns the adapter after its steps, and its metrics, by the step of a run of its own."""
    one = tenants[name]
    adapter, base = lj.split(one.params)
    optimizer = training.make_optimizer(
        one.optimizer,
        one.schedule,
        one.params,
        weight_decay=one.weight_decay,
        grad_clip=one.grad_clip,
        lora_plus=one.lora_plus,
        options=one.options,
    )
    dropout = any(
        node.dropout
        for node in jax.tree.leaves(one.params, is_leaf=lj.is_node)
        if isinstance(node, lj.LoraWeight)
    )
    step = jax.jit(
        training.make_step(forward, optimizer, one.schedule, dropout=dropout, loss=one.loss)
    )
    state, metrics = training.init_state(adapter, optimizer, one.key), []
    for number in range(one.steps if steps is None else steps):
        state, found = step(state, base, make(name, number))
        metrics.append({key: float(value) for key, value in found.items()})
    return state, metrics


def train(together, names, steps):
    """Takes steps with some adapters; returns the metrics of each by name."""
    found = {name: [] for name in names}
    for _ in range(steps):
        given = {name: batches(name, together.done(name)) for name in names}
        for name, metrics in together.step(given).items():
            found[name].append(metrics)
    return found


@pytest.mark.slow
def test_a_crowd():
    """They join and leave at different steps; each is within 1e-5 of itself alone."""
    together = Together(FORWARD, PARAMS)
    early = ["plain", "rank", "loss", "DoRA", "head", "frozen A"]
    together.add({name: CROWD[name] for name in early})
    train(together, early, 2)
    late = [name for name in CROWD if name not in early]
    together.add({name: CROWD[name] for name in late})
    while together.unfinished:
        train(together, together.unfinished, 1)
        if together.done("plain") == 4:
            left = together.remove("DoRA")  # before its end
            assert_close(lj.split(left)[0], alone("DoRA", steps=4)[0].adapter, 1e-5)
    assert "DoRA" not in together.names
    for name in together.names:
        state = together.state(name)
        expected, _ = alone(name)
        assert int(state.step) == CROWD[name].steps
        assert_close(state.adapter, expected.adapter, 1e-5)
        assert_close(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state), 1e-5)
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        began, _ = lj.split(CROWD[name].params)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.adapter, began)
        assert max(jax.tree.leaves(moved)) > 1e-3


def test_metrics_and_the_tree():
    together = Together(FORWARD, PARAMS)
    together.add({"plain": CROWD["plain"], "another rate": CROWD["another rate"]})
    found = train(together, together.names, 3)
    for name in together.names:
        expected, metrics = alone(name, steps=3)
        for mine, theirs in zip(found[name], metrics, strict=True):
            assert mine.keys() == theirs.keys()
            assert_close(mine, theirs, 1e-5)
        x = draw(9, (4, 5))
        ours, base = FORWARD(together.tree(name), x), lj.split(CROWD[name].params)[1]
        assert_close(ours, FORWARD(lj.join(expected.adapter, base), x), 1e-5)


def weighted(forward, params, batch, dropout_key):
    error = (forward(params, batch["x"]) - batch["y"]) ** 2
    return training.Sums(
        jnp.sum(jnp.expand_dims(batch["weights"], -1) * error), jnp.sum(batch["weights"]), {}
    )


def test_batches_of_other_sizes_are_filled_up():
    """With weights, in which what is filled up has 0."""
    loss = training.Loss(weighted)
    tenants = {name: dataclasses.replace(CROWD[name], loss=loss) for name in ("plain", "DoRA")}
    tenants["another rate"] = dataclasses.replace(CROWD["another rate"], loss=loss)

    def make(name, step):
        rows = {"plain": 4, "another rate": 3}[name]
        return batches(name, step, rows) | {"weights": np.ones((2, rows), np.float32)}

    together = Together(FORWARD, PARAMS)
    names = ["plain", "another rate"]
    together.add({name: tenants[name] for name in names})
    for step in range(3):
        together.step({name: make(name, step) for name in names})
    for name in names:
        state, _ = alone(name, steps=3, tenants=tenants, make=make)
        assert_close(together.state(name).adapter, state.adapter, 1e-5)


def test_one_that_diverges_leaves_the_others_bitwise_as_they_were():
    poisoned = dataclasses.replace(CROWD["another rate"], steps=6)

    def trained(poison):
        together = Together(FORWARD, PARAMS)
        together.add({"plain": CROWD["plain"], "other": poisoned})
        for number in range(4):
            bad = batches("other", number)
            if poison and number >= 1:
                bad["x"][0, 1, 2] = np.nan
            metrics = together.step({"plain": batches("plain", number), "other": bad})
        return together, metrics

    healthy, _ = trained(False)
    ill, metrics = trained(True)
    assert_identical(healthy.state("plain").adapter, ill.state("plain").adapter)
    assert (metrics["other"]["skipped"], metrics["plain"]["skipped"]) == (1, 0)
    kept = ill.state("other")
    assert int(kept.step) == 4 and not any(
        jnp.isnan(x).any() for x in jax.tree.leaves(kept.adapter)
    )


def test_going_on_from_a_state_is_never_having_stopped():
    whole, began = Together(FORWARD, PARAMS), Together(FORWARD, PARAMS)
    names = ["plain", "another rate"]
    for together, steps in ((whole, 4), (began, 2)):
        together.add({name: CROWD[name] for name in names})
        train(together, names, steps)
    states = {name: began.state(name) for name in names}
    again = Together(FORWARD, PARAMS)
    again.add({n: dataclasses.replace(CROWD[n], state=state) for n, state in states.items()})
    assert [again.done(name) for name in names] == [2, 2]
    train(again, names, 2)
    for name in names:
        assert_identical(again.state(name).adapter, whole.state(name).adapter)
        assert_identical(again.state(name).opt_state, whole.state(name).opt_state)
    assert again.unfinished == ("plain",)
    with pytest.raises(ValueError, match="2 steps are done, more than the 1 given"):
        dataclasses.replace(CROWD["plain"], state=states["plain"], steps=1)
    other = dataclasses.replace(CROWD["optimiser"], state=states["plain"])
    with pytest.raises(ValueError, match="of another adapter or optimiser"):
        Together(FORWARD, PARAMS).add({"other": other})


def test_free_slots_are_dropped():
    whole, fewer = Together(FORWARD, PARAMS), Together(FORWARD, PARAMS)
    for together in (whole, fewer):
        together.add({name: CROWD[name] for name in ("another rate", "plain", "head")})
        train(together, ["another rate", "plain"], 2)
    fewer.remove("another rate")
    fewer.remove("head")
    fewer.shrink(5)  # no adapter has as many steps to take
    assert [len(stack.names) for stack in fewer._stacks.values()] == [2]
    fewer.shrink(4)
    assert [stack.names for stack in fewer._stacks.values()] == [["plain"]]
    for together in (whole, fewer):
        train(together, ["plain"], 2)
    assert_close(fewer.state("plain").adapter, whole.state("plain").adapter, 1e-5)
    fewer.add({"another rate": CROWD["another rate"]})
    assert [stack.names for stack in fewer._stacks.values()] == [["plain", "another rate"]]


def test_samplers_read_the_arrays_that_train():
    """No copies: the factors of a choice are the very arrays of the step's state."""
    together = Together(FORWARD, PARAMS)
    names = ["plain", "another rate"]
    together.add({name: CROWD[name] for name in names})
    forward, x = jax.jit(mixed(run)), draw(9, (3, 5))
    for _ in range(2):
        train(together, names, 1)
        choice = together.choose(["another rate", "base", "plain"])
        found = forward(choice, x)
        assert_close(found[:1], FORWARD(together.tree("another rate"), x[:1]), 1e-5)
        assert_close(found[1:2], run(PARAMS, x[1:2]), 1e-5)
        assert_close(found[2:], FORWARD(together.tree("plain"), x[2:]), 1e-5)
    assert forward._cache_size() == 1
    stack = next(iter(together._stacks.values()))
    assert (
        choice.tree["layers"]["up"]["kernel"].arrays["a"]
        is stack.state.adapter["layers/up/kernel"]["a"]
    )
    # The control: an adapter of another kind has arrays of its own.
    together.add({"rank": CROWD["rank"]})
    with pytest.raises(BankError, match="'plain', 'rank': a batch reads the arrays of one stack"):
        together.choose(["plain", "rank"])


@pytest.mark.slow
def test_memory():
    """The state and what a step needs beside it: 1.1 times weights, gradient and two moments."""
    names = [f"{kind} {n}" for kind in ("up", "down") for n in range(6)]
    shapes = {"up": (16, 256), "down": (256, 16)}
    params = {name: {"kernel": draw(1, shapes[name.split()[0]])} for name in names}

    def chain(params, x):
        for n in range(6):
            x = x + jnp.tanh(x @ params[f"up {n}"]["kernel"]) @ params[f"down {n}"]["kernel"]
        return x

    def needed(ranks):
        together, rules = Together(lj.adapt(chain), params), {}
        for seed, rank in enumerate(ranks):
            rules[f"{seed}"] = lj.lorafy(params, one_rule(rank=rank, targets=names))
        together.add({k: dataclasses.replace(CROWD["plain"], params=t) for k, t in rules.items()})
        batch = {"x": np.zeros((1, 1, 16), np.float32), "y": np.zeros((1, 1, 16), np.float32)}
        return sum(stack.compiled_bytes(params, batch) for stack in together._stacks.values())

    ranks = [16] * 24 + [48] * 24
    wanted = 4 * 4 * sum(rank * 12 * (16 + 256) for rank in ranks)
    assert wanted <= needed(ranks) <= 1.1 * wanted
    assert needed([48] * 48) > 1.4 * wanted  # the control: all filled up to the largest rank


def test_what_is_refused():
    together = Together(FORWARD, PARAMS)
    together.add({"plain": CROWD["plain"], "another rate": CROWD["another rate"]})
    with pytest.raises(BankError, match="'plain' is taken"):
        together.add({"plain": CROWD["rank"]})
    with pytest.raises(BankError, match="no adapter 'rank'; there are 'plain', 'another rate'"):
        together.step({"rank": batches("rank", 0)})
    with pytest.raises(
        BankError, match='train in one stack, and their batches .* without "weights"'
    ):
        together.step({"plain": batches("plain", 0), "another rate": batches("x", 0, rows=5)})
    train(together, ["another rate"], 4)
    with pytest.raises(BankError, match="has taken its 4 steps"):
        together.step({"another rate": batches("x", 0)})
    other = {"out": {"kernel": jnp.ones((5, 9)), "bias": jnp.ones(9)}}
    tree = lj.lorafy(other, [lj.LoraRule(targets=["out"], rank=2)])
    with pytest.raises(
        BankError, match=re.escape("of shape (5, 9), the base has the shape (5, 7)")
    ):
        together.add({"other": dataclasses.replace(CROWD["plain"], params=tree)})
    with pytest.raises(ValueError, match="is a plain tree"):
        dataclasses.replace(CROWD["plain"], params=PARAMS)
    with pytest.raises(ValueError, match="0 steps: at least 1"):
        dataclasses.replace(CROWD["plain"], steps=0)
