"""A module of Equinox, whose leaves are functions and numbers, too, from training to a bank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.bank import Bank, Tenant, Together, mixed
from tests.support import array, assert_close, draw, with_random_factors

equinox = pytest.importorskip("equinox", reason="the extra 'foreign' has it")

X = draw(1, (8, 5))
ROWS = {"x": X, "y": array(np.sin(np.asarray(X)[:, :3]))}
RULES = [lj.LoraRule(targets="all-linear", rank=2, alpha=3.0)]


class Model(equinox.Module):
    """An MLP; a flag and a number that Python reads, as Equinox's dropout does."""

    mlp: equinox.nn.MLP
    drop: equinox.nn.Dropout
    gain: float

    def __init__(self):
        self.mlp = equinox.nn.MLP(5, 3, 11, 2, key=jax.random.key(0))
        self.drop = equinox.nn.Dropout(0.5, inference=True)
        self.gain = 2.0

    def __call__(self, x):
        y = self.drop(self.mlp(x))
        return y * self.gain if self.gain > 1 else y


def run(model, x):
    return jax.vmap(model)(x)


def adapted(seed=None):
    model = Model()
    tree = lj.lorafy(model, RULES, trace=(run, model, X))
    return tree if seed is None else with_random_factors(tree, seed=seed)


def squares(forward, params, batch, dropout_key):
    assert callable(params.mlp.activation) and params.gain == 2.0
    error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    return training.Sums(error, jnp.float32(len(batch["x"])), {})


def trained(steps=3):
    """Equinox's own loop over the factors, with the merged module: the judge."""
    adapter, base = lj.split(adapted())
    optimizer = optax.sgd(0.1)
    state = optimizer.init(adapter)

    @equinox.filter_jit
    def step(adapter, state, base):
        def loss(adapter):
            return jnp.mean(
                jnp.sum((run(lj.merge(lj.join(adapter, base)), X) - ROWS["y"]) ** 2, -1)
            )

        updates, state = optimizer.update(jax.grad(loss)(adapter), state)
        return optax.apply_updates(adapter, updates), state

    for _ in range(steps):
        adapter, state = step(adapter, state, base)
    return adapter


def test_finetune(tmp_path):
    tree, report = training.finetune(
        run, adapted(), ROWS, loss=squares, lr=optax.constant_schedule(0.1),
        optimizer=optax.sgd(0.1), steps=3, log=None, held_out=ROWS, folder=tmp_path / "run",
    )  # fmt: skip
    assert_close(lj.split(tree)[0], trained(), 1e-5)
    assert tree.mlp.activation is Model().mlp.activation and tree.drop.inference is True
    assert set(report.held_out) == {"loss"}
    loaded = lj.load_adapter(tmp_path / "run" / "adapter", Model())
    assert_close(run(lj.merge(loaded), X), lj.adapt(run)(tree, X), 1e-5)


def test_together():
    together = Together(lj.adapt(run), Model())
    tenant = Tenant(
        params=adapted(), schedule=optax.constant_schedule(0.1), steps=3,
        loss=training.Loss(squares), optimizer="sgd",
        options={"momentum": 0.0}, grad_clip=0.0,
    )  # fmt: skip
    together.add({"one": tenant, "other": tenant})
    batch = {name: array[None] for name, array in ROWS.items()}
    for _ in range(3):
        together.step({"one": batch, "other": batch})
    tree = together.tree("one")
    assert_close(lj.split(tree)[0], trained(), 1e-5)
    assert tree.gain == 2.0
    y = mixed(run)(together.choose(["one", "base"]), X[:2])
    assert_close(y, jnp.stack([lj.merge(tree)(X[0]), Model()(X[1])]), 1e-5)


def test_a_bank_reads_roles_from_a_trace(tmp_path):
    model, tree = Model(), adapted(seed=1)
    lj.save_adapter(tmp_path / "adapter", tree)
    bank = Bank(model, RULES, slots=2, trace=(run, model, X))
    bank.add("tree", tree)
    bank.add("folder", tmp_path / "adapter")
    expected = jnp.stack([lj.merge(tree)(X[0]), model(X[1]), lj.merge(tree)(X[2])])
    for forward in (mixed(run), jax.jit(mixed(run))):
        assert_close(forward(bank.choose(["tree", "base", "folder"]), X[:3]), expected, 1e-5)
    assert bank.get("tree").mlp.activation is model.mlp.activation
    with pytest.raises(ValueError, match="trace=\\(fn, params, x\\)"):
        Bank(model, RULES, slots=2)
