"""Tests that an object at several places of an NNX module stays one; NNX itself is the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.bank import Bank, mixed
from tests.support import assert_close, draw, numpy_init, over, with_random_factors

RULES = [lj.LoraRule(targets=["up", "table"], rank=2, alpha=3.0, init=numpy_init)]
X = draw(9, (13, 5))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(5, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        return x + self.norm(self.up(x))


class Drop(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return jnp.where(jax.random.bernoulli(self.rngs.dropout(), 0.7, x.shape), x, 0)


class Table(nnx.Module):
    def __init__(self, kernel):
        self.kernel = kernel


class Net(nnx.Module):
    """A block at four places, a stream at two, a Variable at two."""

    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        block = Block(rngs)
        self.last = block
        self.blocks = nnx.List([block, block])
        self.pair = nnx.data((block, {"scale": nnx.Param(jnp.ones(5))}))
        self.drops = nnx.List([Drop(rngs), Drop(rngs)])
        self.table = Table(nnx.Param(draw(3, (5, 7))))
        self.tied = Table(self.table.kernel)

    def __call__(self, x):
        for block in (*self.blocks, self.pair[0], self.last):
            x = block(x)
        for drop in self.drops:
            x = drop(x)
        return (x * self.pair[1]["scale"]) @ self.table.kernel @ self.tied.kernel.T


def call(module, x):
    return module(x)


def eager(fn):
    return fn


def state_of(module):
    """The state beside the weights, keys as their data."""
    state = nnx.to_pure_dict(nnx.state(module, (nnx.BatchStat, nnx.RngCount)))
    return jax.tree.map(jnp.asarray, state)


@over(
    "wraps",
    [(nnx.jit, nnx.jit), (eager, nnx.jit, eager)],
    often=["compiled"],
    called=lambda wraps: "eager" if eager in wraps else "compiled",
)
def test_a_call_is_that_of_the_module(wraps):
    """The masks, the counters and the statistics of a plain call; B is 0."""
    module = Net()
    tree, ours = lj.lorafy(module, RULES), lj.adapt(call, strict=True)
    for wrap in wraps:
        y = wrap(call)(module, X)
        assert_close(wrap(ours)(tree, X), y, 1e-5)
        assert_close(state_of(tree), state_of(module), 1e-5)
    assert int(tree.drops[0].rngs.dropout.count[...]) == 2 * len(wraps)


@pytest.mark.slow
def test_a_module_that_is_returned_shares_as_before():
    tree = lj.lorafy(Net(), RULES)
    same, y = lj.adapt(lambda module, x: (module, module(x)))(tree, X)
    assert same.last is same.blocks[0] and y.shape == (13, 5)


def test_the_adapter_is_that_of_the_state():
    """`nnx.split` first: the same paths, draws, values and gradients; each loads the other's."""
    graph, state = nnx.split(Net())
    trees = {
        "module": (lj.lorafy(Net(), RULES), lj.adapt(call, strict=True)),
        "state": (
            lj.lorafy(state, RULES),
            lj.adapt(lambda state, x: nnx.merge(graph, state, copy=True)(x), strict=True),
        ),
    }
    found = {}
    for name, (tree, forward) in trees.items():
        tree = with_random_factors(tree)
        adapter, base = lj.split(tree)

        @jax.jit
        def gradient(adapter, base, x, forward=forward):
            loss = lambda adapter: jnp.mean(forward(lj.join(adapter, base), x) ** 2)  # noqa: E731
            return jax.value_and_grad(loss)(adapter)

        found[name] = lj.count_params(tree), adapter, gradient(adapter, base, X)
    assert sorted(found["module"][1]) == ["blocks/0/up/kernel", "table/kernel"]
    assert found["module"][0] == found["state"][0]
    for ours, theirs in zip(found["module"][1:], found["state"][1:], strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert_close(ours, theirs, 1e-5)


@pytest.mark.slow
def test_an_adapter_of_the_module_loads_onto_the_state(tmp_path):
    module = Net()
    graph, state = nnx.split(module)
    tree = with_random_factors(lj.lorafy(module, RULES))
    lj.save_adapter(tmp_path / "adapter", tree)
    loaded = lj.load_adapter(tmp_path / "adapter", state)
    again = lj.load_adapter(tmp_path / "adapter", module)
    run = lambda state, x: nnx.merge(graph, state, copy=True)(x)  # noqa: E731
    y = lj.adapt(run)(loaded, X)
    assert_close(lj.adapt(call)(again, X), y, 1e-5)
    assert_close(lj.adapt(call)(tree, X), y, 1e-5)


@pytest.mark.slow
def test_what_is_merged_or_stripped_shares_again():
    tree = with_random_factors(lj.lorafy(Net(), RULES))
    for plain in (lj.merge(tree), lj.strip(tree), lj.quantized.dequantize(lj.strip(tree))):
        assert plain.last is plain.blocks[0] is plain.blocks[1] is plain.pair[0]
        assert plain.drops[0].rngs is plain.drops[1].rngs
        assert plain.tied.kernel is plain.table.kernel
    merged = lj.merge(tree)
    assert_close(lj.adapt(call)(tree, X), merged(X), 5e-5)
    assert_close(state_of(tree), state_of(merged), 1e-5)


def test_jax_own_transforms_keep_it_shared():
    """Under `jax.jit` and `jax.tree.map`, which copy each place of a plain module."""
    tree = with_random_factors(lj.lorafy(Net(), RULES))
    copied = jax.tree.map(jnp.copy, tree)
    assert_close(jax.jit(lj.adapt(call))(copied, X), lj.merge(tree)(X), 5e-5)
    assert len(lj.split(copied)[0]) == 2


class Twice(nnx.Module):
    def __init__(self):
        linear = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
        self.layers = nnx.List([linear, linear])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.slow
def test_axis_roles_are_read_and_a_bank_mixes():
    module, rules = Twice(), [lj.LoraRule(targets="all-linear", rank=2)]
    tree = with_random_factors(lj.lorafy(module, rules, trace=(call, module, X)))
    assert sorted(lj.split(tree)[0]) == ["layers/0/kernel"]
    bank = Bank(module, rules, slots=1)
    bank.add("mine", tree)
    y = mixed(call)(bank.choose(["mine", "base"]), X[:2])
    assert_close(y, jnp.concatenate([lj.merge(tree)(X[:1]), module(X[1:2])]), 1e-5)
    merged = lj.merge(bank.get("mine"))
    assert merged.layers[0] is merged.layers[1]


def test_mistakes_name_the_path():
    tree = lj.lorafy(Net(), RULES)
    with pytest.raises(TypeError, match=r"the Block at 'blocks/0'.*lora_jax\.adapt.*nnx\.split"):
        tree.last(X)
    with pytest.raises(AttributeError, match="the Block at 'blocks/0'"):
        tree.last.up  # noqa: B018
    with pytest.raises(
        ValueError, match="last' is a reference to the Block at 'blocks/0'.*Pass the whole"
    ):
        lj.adapt(lambda parts, x: parts["last"](x))({"last": tree.last, "table": tree.table}, X)
    with pytest.raises(ValueError, match="'tied/kernel' is the same object as 'table/kernel'"):
        lj.lorafy(Net(), [lj.LoraRule(targets=["tied"], rank=2)])
    circle = Net()
    circle.me = circle
    with pytest.raises(ValueError, match="A Net contains itself, at 'me'.*nnx.split"):
        lj.lorafy(circle, RULES)


def test_a_module_that_shares_nothing_has_no_references():
    tree = lj.lorafy(Block(nnx.Rngs(0)), [lj.LoraRule(targets=["up"], rank=2)])
    assert np.shape(tree.up.bias[...]) == (5,)
    assert not any("Alias" in type(value).__name__ for value in vars(tree).values())
