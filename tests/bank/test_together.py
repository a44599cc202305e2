"""Adapters that train side by side are what each would be alone, whatever the others do."""

import dataclasses
import functools
import re

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import BankError, Tenant, Together, mixed
from tests.support import assert_close, assert_identical, draw, lorafied, with_random_factors

pytestmark = pytest.mark.usefixtures("standard_promotion")
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
    tree = with_random_factors(lorafied(PARAMS, rules), seed=seed)
    schedule = training.warmed_up(rate, steps, kind="cosine", warmup=2)
    key = jax.random.key(seed)
    return Tenant(params=tree, schedule=schedule, steps=steps, loss=loss, key=key, **more)


def one_rule(**rule):
    return [lj.LoraRule(**{"targets": ["up", "down"], "rank": 2, "alpha": 3.0} | rule)]


# Rank, targets, variants, loss, rate, schedule, optimiser, decay and clipping differ. Each is made
# when it is asked for.
CROWD = {
    "plain": lambda: tenant(1),
    "another rate": lambda: tenant(2, rate=1e-1, weight_decay=0.1, grad_clip=0.05, steps=4),
    "rank": lambda: tenant(3, rules=one_rule(rank=5)),
    "targets": lambda: tenant(4, rules=one_rule(targets=["out"], rank=3)),
    "ranks that differ": lambda: tenant(5, rules=[*one_rule(layers=[0]), *one_rule(rank=4)]),
    "loss": lambda: tenant(6, loss=DISTANCES, rate=1e-3, grad_clip=0.0),
    "optimiser": lambda: tenant(7, optimizer="lion", rate=1e-3, options={"beta2": 0.95}),
    "dropout": lambda: tenant(8, rules=one_rule(dropout=0.4), lora_plus=4.0),
    "DoRA": lambda: tenant(9, rules=one_rule(dora=True)),
    "initialized from W": lambda: tenant(10, rules=one_rule(init=lj.init.pissa, targets=["out"])),
    "head": lambda: tenant(
        11, rules=[*one_rule(), lj.TrainRule(targets=["out"])], weight_decay=0.2
    ),
    "frozen A": lambda: tenant(12, rules=one_rule(freeze_a=True, targets=["out"])),
    "LoRA-XS": lambda: tenant(13, rules=one_rule(xs=True)),
    "VeRA": lambda: tenant(14, rules=one_rule(vera=True, rank=6), rate=1e-1),
}


@functools.cache
def member(name):
    return CROWD[name]()


def batches(name, step, rows=4):
    """Two parts, to be accumulated; each adapter has data of its own."""
    rng = np.random.default_rng([len(name), ord(name[0]), step])
    shapes = {"x": (2, rows, 5), "y": (2, rows, 7)}
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def alone(one, name, steps=None, make=batches):
    """Returns a tenant's adapter after its steps, and its metrics, by a step of its own."""
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
        training.make_step(FORWARD, optimizer, one.schedule, dropout=dropout, loss=one.loss)
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
    together.add({name: member(name) for name in early})
    train(together, early, 2)
    late = [name for name in CROWD if name not in early]
    together.add({name: member(name) for name in late})
    while together.unfinished:
        train(together, together.unfinished, 1)
        if together.done("plain") == 4:
            left = together.remove("DoRA")  # before its end
            assert_close(lj.split(left)[0], alone(member("DoRA"), "DoRA", steps=4)[0].adapter, 1e-5)
    assert "DoRA" not in together.names
    for name in together.names:
        state = together.state(name)
        expected, _ = alone(member(name), name)
        assert int(state.step) == member(name).steps
        assert_close(state.adapter, expected.adapter, 1e-5)
        assert_close(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state), 1e-5)
        assert jax.tree.structure(state) == jax.tree.structure(expected)
        began, _ = lj.split(member(name).params)
        after, began = jax.device_get((state.adapter, began))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, began)
        assert max(jax.tree.leaves(moved)) > 1e-3


def weighted(forward, params, batch, dropout_key):
    error = (forward(params, batch["x"]) - batch["y"]) ** 2
    return training.Sums(
        jnp.sum(jnp.expand_dims(batch["weights"], -1) * error), jnp.sum(batch["weights"]), {}
    )


@pytest.mark.slow
def test_metrics_the_tree_and_batches_of_other_sizes():
    """Smaller batches are filled up: with weights, in which what is filled up has 0."""
    loss, names = training.Loss(weighted), ("plain", "another rate")
    tenants = {name: dataclasses.replace(member(name), loss=loss) for name in names}

    def make(name, step):
        rows = {"plain": 4, "another rate": 3}[name]
        return batches(name, step, rows) | {"weights": np.ones((2, rows), np.float32)}

    together, found = Together(FORWARD, PARAMS), []
    together.add(tenants)
    for step in range(3):
        found.append(together.step({name: make(name, step) for name in names}))
    x = np.asarray(draw(9, (4, 5)))
    for name, one in tenants.items():
        expected, metrics = alone(one, name, steps=3, make=make)
        for mine, theirs in zip(found, metrics, strict=True):
            assert mine[name].keys() == theirs.keys()
            assert_close(mine[name], theirs, 1e-5)
        assert_close(together.state(name).adapter, expected.adapter, 1e-5)
        base = lj.split(one.params)[1]
        forward = jax.jit(FORWARD)
        tree = lj.join(expected.adapter, base)
        assert_close(forward(together.tree(name), x), forward(tree, x), 1e-5)


@pytest.fixture(scope="module")
def whole():
    """Returns a run of two adapters over four steps, and their states after two; not to change."""
    together, names = Together(FORWARD, PARAMS), ("plain", "another rate")
    with jax.numpy_dtype_promotion("standard"):
        together.add({name: member(name) for name in names})
        train(together, names, 2)
        states = {name: together.state(name) for name in names}
        train(together, names, 2)
    return together, states


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_bitwise_as_they_were(whole):
    healthy, _ = whole
    ill = Together(FORWARD, PARAMS)
    ill.add({name: member(name) for name in healthy.names})
    for number in range(4):
        bad = batches("another rate", number)
        if number >= 1:
            bad["x"][0, 1, 2] = np.nan
        metrics = ill.step({"plain": batches("plain", number), "another rate": bad})
        rate = float(member("plain").schedule(number))
        assert metrics["plain"]["lr"] == pytest.approx(rate, rel=1e-6) and rate > 0
    assert_identical(healthy.state("plain").adapter, ill.state("plain").adapter)
    assert (metrics["another rate"]["skipped"], metrics["plain"]["skipped"]) == (1, 0)
    kept = ill.state("another rate")
    assert int(kept.step) == 4
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(kept.adapter))


def test_going_on_from_a_state_is_never_having_stopped(whole):
    whole, states = whole
    again = Together(FORWARD, PARAMS)
    again.add({n: dataclasses.replace(member(n), state=state) for n, state in states.items()})
    assert [again.done(name) for name in again.names] == [2, 2]
    train(again, again.names, 2)
    for name in again.names:
        assert_identical(again.state(name).adapter, whole.state(name).adapter)
        assert_identical(again.state(name).opt_state, whole.state(name).opt_state)
    assert again.unfinished == ("plain",)
    with pytest.raises(ValueError, match="the state has 2 steps, more than steps=1"):
        dataclasses.replace(member("plain"), state=states["plain"], steps=1)
    other = dataclasses.replace(member("optimiser"), state=states["plain"])
    with pytest.raises(ValueError, match="belongs to another adapter or optimizer"):
        Together(FORWARD, PARAMS).add({"other": other})


@pytest.mark.slow
def test_free_slots_are_dropped(whole):
    fewer = Together(FORWARD, PARAMS)
    fewer.add({name: member(name) for name in ("another rate", "plain", "head")})
    train(fewer, ["another rate", "plain"], 2)
    fewer.remove("another rate")
    fewer.remove("head")
    fewer.shrink(5)  # no adapter has as many steps to take
    assert [len(stack.names) for stack in fewer._stacks.values()] == [2]
    fewer.shrink(4)
    assert [stack.names for stack in fewer._stacks.values()] == [["plain"]]
    train(fewer, ["plain"], 2)
    assert_close(fewer.state("plain").adapter, whole[0].state("plain").adapter, 1e-5)
    fewer.add({"another rate": member("another rate")})
    assert [stack.names for stack in fewer._stacks.values()] == [["plain", "another rate"]]


def test_samplers_read_the_arrays_that_train():
    """No copies: the factors of a choice are the very arrays of the step's state."""
    together = Together(FORWARD, PARAMS)
    names = ["plain", "another rate"]
    together.add({name: member(name) for name in names})
    forward, one, x = jax.jit(mixed(run)), jax.jit(FORWARD), np.asarray(draw(9, (3, 5)))
    plain = np.asarray(jax.jit(run)(PARAMS, x))
    for _ in range(2):
        train(together, names, 1)
        choice = together.choose(["another rate", "base", "plain"])
        found = np.asarray(forward(choice, x))
        other, mine = (np.asarray(one(together.tree(n), x)) for n in ("another rate", "plain"))
        assert_close(found, np.stack([other[0], plain[1], mine[2]]), 1e-5)
    assert forward._cache_size() == 1
    stack = next(iter(together._stacks.values()))
    assert (
        choice.tree["layers"]["up"]["kernel"].arrays["a"]
        is stack.state.adapter["layers/up/kernel"]["a"]
    )
    # The control: an adapter of another kind has arrays of its own.
    together.add({"rank": member("rank")})
    with pytest.raises(BankError, match="'plain', 'rank' are of different kinds"):
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

    @functools.cache
    def of_rank(rank):
        return lj.lorafy(params, one_rule(rank=rank, targets=names))

    def needed(ranks):
        together, rules = Together(lj.adapt(chain), params), {}
        for seed, rank in enumerate(ranks):
            rules[f"{seed}"] = of_rank(rank)
        like = member("plain")
        together.add({k: dataclasses.replace(like, params=tree) for k, tree in rules.items()})
        batch = {"x": np.zeros((1, 1, 16), np.float32), "y": np.zeros((1, 1, 16), np.float32)}
        total = 0
        for stack in together._stacks.values():
            (program,) = stack.compile(params, [dict.fromkeys(stack.names, batch)])
            total += sum(x.nbytes for x in jax.tree.leaves(stack.state))
            total += program.memory_analysis().temp_size_in_bytes
        return total

    ranks = [16] * 24 + [48] * 24
    wanted = 4 * 4 * sum(rank * 12 * (16 + 256) for rank in ranks)
    assert wanted <= needed(ranks) <= 1.1 * wanted
    assert needed([48] * 48) > 1.4 * wanted  # the control: all filled up to the largest rank


@pytest.mark.slow
def test_a_step_is_compiled_ahead_and_once():
    """Also with another function of the model, which the next step then takes."""
    programs = []

    def note(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(duration_secs)

    def compiled_by(work):
        programs.clear()
        return work(), len(programs)

    batch = {"plain": batches("plain", 0)}
    together, ahead = (Together(FORWARD, PARAMS) for _ in range(2))
    for adapters in (together, ahead):
        adapters.add({"plain": member("plain")})
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        metrics, n_programs = compiled_by(lambda: together.step(batch))
        assert n_programs > 0
        size, n_programs = compiled_by(lambda: ahead.compile(batch))
        assert n_programs == 1
        (stack,) = ahead._stacks.values()
        state = sum(x.nbytes for x in jax.tree.leaves(stack.state))
        base = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
        assert state + base < size < 100 * (state + base)
        assert compiled_by(lambda: ahead.step(batch)) == (metrics, 0)

        doubled = lj.adapt(lambda params, x: 2 * run(params, x))
        ahead.use(doubled)
        ahead.compile(batch)
        tree, data = ahead.tree("plain"), batch["plain"]
        parts = [{name: array[n] for name, array in data.items()} for n in range(2)]
        loss = sum(float(squares(doubled, tree, part, None)[0]) for part in parts)
        after, n_programs = compiled_by(lambda: ahead.step(batch))
        assert n_programs == 0
        np.testing.assert_allclose(after["plain"]["loss"], loss / 8, rtol=1e-5)
        ahead.use(FORWARD)
        assert compiled_by(lambda: ahead.compile(batch))[1] == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_what_is_refused(whole):
    together, _ = whole
    fresh = Together(FORWARD, PARAMS)
    fresh.add({name: member(name) for name in together.names})
    with pytest.raises(BankError, match="'plain' is taken"):
        together.add({"plain": member("rank")})
    with pytest.raises(
        BankError, match="no adapter 'rank'. The adapters are 'plain', 'another rate'"
    ):
        together.step({"rank": batches("rank", 0)})
    with pytest.raises(BankError, match='train in one stack, but their batches .* no "weights"'):
        fresh.step({"plain": batches("plain", 0), "another rate": batches("x", 0, rows=5)})
    with pytest.raises(BankError, match="has already taken its 4 steps"):
        together.step({"another rate": batches("x", 0)})
    other = {"out": {"kernel": jnp.ones((5, 9)), "bias": jnp.ones(9)}}
    tree = lj.lorafy(other, [lj.LoraRule(targets=["out"], rank=2)])
    with pytest.raises(
        BankError, match=re.escape("of shape (5, 9), but the base has the shape (5, 7)")
    ):
        together.add({"other": dataclasses.replace(member("plain"), params=tree)})
    with pytest.raises(ValueError, match="is a plain tree"):
        dataclasses.replace(member("plain"), params=PARAMS)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        dataclasses.replace(member("plain"), steps=0)
