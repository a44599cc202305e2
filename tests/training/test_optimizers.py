"""Optimisers by name: what each does to matrices, stacks, padded ranks, meshes and checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.models.specs import AXES
from lora_jax.training import Loss, Sums, finetune, init_state, make_optimizer, make_step
from lora_jax.training.layout import Layout
from lora_jax.training.optimizer import averaged
from lora_jax.training.optimizers.muon import described
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.setup import Setup
from lora_jax.training.step import State
from tests.support import assert_close, draw, lorafied, over, with_random_factors

NAMES = tuple(OPTIMIZERS)
LAYERS, IN, OUT, RANK = 3, 10, 14, 4
RATE = optax.constant_schedule(0.1)


def tree(rules=None, layers=LAYERS, n_in=IN, n_out=OUT):
    params = {
        "layers": {"kernel": draw(0, (layers, n_in, n_out))},
        "more": {"kernel": draw(1, (n_in, n_out))},
        "embed": {"embedding": draw(2, (11, n_in))},
        "norm": {"scale": np.ones(n_in, np.float32)},
    }
    rules = rules or [
        lj.LoraRule(targets=["layers"], rank=RANK, alpha=3),
        lj.TrainRule(targets=["norm"]),
    ]
    return with_random_factors(lorafied(params, rules))


def gradients(adapter, step):
    def drawn(x):
        # Large, so that a factor that adapts to the gradient's size is seen.
        return 7 * np.random.default_rng([step, x.size]).standard_normal(x.shape, x.dtype)

    return jax.tree.map(drawn, adapter)


@functools.cache
def step_of(optimizer):
    @jax.jit
    def step(gradient, state, adapter):
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    return step


def trained(optimizer, adapter, steps=3, start=0, state=None, gradient=gradients):
    state = jax.jit(optimizer.init)(adapter) if state is None else state
    for step in range(start, start + steps):
        adapter, state = step_of(optimizer)(gradient(adapter, step), state, adapter)
    return adapter, state


@over("name", NAMES, often=["muon"])
def test_layers_of_a_stack_train_as_if_apart(name):
    """And LoRA+ and weight decay, which norms do without, are the same for each."""
    params = tree()
    adapter, _ = lj.split(params)
    options = {"weight_decay": 0.1, "grad_clip": 0.0, "lora_plus": 4.0}
    together, _ = trained(make_optimizer(name, RATE, params, **options), adapter)
    path = "layers/kernel"

    def of_layer(tree, layer):
        return {
            key: {
                n: np.asarray(x)[layer : layer + 1] if key == path else x for n, x in parts.items()
            }
            for key, parts in tree.items()
        }

    alone = make_optimizer(name, RATE, tree(layers=1), **options)
    for layer in range(LAYERS):
        one, _ = trained(
            alone,
            of_layer(adapter, layer),
            gradient=lambda _, step, layer=layer: of_layer(gradients(adapter, step), layer),
        )
        for part in ("a", "b"):
            both = (np.asarray(tree[path][part]) for tree in (together, one))
            assert_close(*(x[i] for x, i in zip(both, (layer, 0), strict=True)), 1e-5)
    assert np.abs(np.subtract(together[path]["b"], adapter[path]["b"])).max() > 1e-3


@over("name", NAMES, often=["muon"])
def test_what_pads_ranks_stays_zero(name):
    rules = [
        lj.LoraRule(targets=["layers"], layers=[0], rank=2, alpha=3),
        lj.LoraRule(targets=["layers"], rank=RANK, alpha=3),
    ]
    params = tree(rules)
    adapter, base = lj.split(params)

    def padded(adapter, step):
        whole = gradients(adapter, step)
        return jax.tree.map(lambda g, x: np.where(x == 0, np.float32(0), g), whole, adapter)

    optimizer = make_optimizer(name, RATE, params, weight_decay=0.1)
    after, state = trained(optimizer, adapter, gradient=padded)
    for kept in (after, jax.jit(averaged)(state, after)):
        for part in ("a", "b"):
            first = np.asarray(kept["layers/kernel"][part])[0]
            assert not np.any(first[2:]) and np.all(first[:2] != 0)


def test_muon_orthogonalises_each_matrix_and_leaves_the_others_to_adamw():
    """Judged by numpy's singular vectors; the root mean square is 0.2, as of AdamW's updates."""
    rules = [
        lj.LoraRule(targets=["layers"], rank=RANK, alpha=3, dora=True),
        lj.TrainRule(targets=["norm", "embed"]),
    ]
    params = tree(rules)
    adapter, _ = lj.split(params)
    gradient = gradients(adapter, 0)
    muon, adam = (make_optimizer(name, RATE, params, grad_clip=0.0) for name in ("muon", "adamw"))
    updates, by_adam = (
        jax.jit(lambda g, of: one.update(g, one.init(of), of)[0])(gradient, adapter)  # noqa: B023
        for one in (muon, adam)
    )
    for part in ("a", "b"):
        for g, update in zip(
            *(np.asarray(tree["layers/kernel"][part]) for tree in (gradient, updates)), strict=True
        ):
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            inside = -u.T @ update @ vt.T / (0.1 * 0.2 * np.sqrt(max(g.shape)))
            np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-4)
            assert np.all((0.6 < np.diag(inside)) & (np.diag(inside) < 1.3))
    for path, name in (
        ("layers/kernel", "magnitude"),
        ("norm/scale", "value"),
        ("embed/embedding", "value"),
    ):
        assert_close(updates[path][name], by_adam[path][name], 1e-6)
    assert described(params) == (
        "muon on 2 arrays, adamw on 3 that are no matrices "
        "(embed/embedding, layers/kernel, norm/scale)"
    )
    full = tree([lj.TrainRule(targets=".*")])
    assert described(full).startswith("muon on 2 arrays, adamw on 2")
    with pytest.raises(ValueError, match="muon needs the adapted tree"):
        make_optimizer("muon", RATE)


def test_schedule_free_is_its_recurrence():
    """x, y and z of Defazio et al., equations 1 to 3, over RMSProp steps with decoupled decay."""
    params = tree()
    adapter, _ = lj.split(params)
    rate, beta, beta2, eps, decay = 0.1, 0.8, 0.9, 1e-8, 0.05
    optimizer = make_optimizer(
        "schedule-free",
        optax.constant_schedule(rate),
        params,
        weight_decay=decay,
        grad_clip=0.0,
        lora_plus=4.0,
        options={"beta1": beta, "beta2": beta2},
    )
    y, state = trained(optimizer, adapter, steps=4)
    average = jax.jit(averaged)(state, y)
    for path, name in (("layers/kernel", "a"), ("layers/kernel", "b"), ("norm/scale", "value")):
        x = z = at = np.asarray(adapter[path][name], np.float64)
        nu = np.zeros_like(x)
        for step in range(4):
            g = np.asarray(gradients(adapter, step)[path][name], np.float64)
            nu = beta2 * nu + (1 - beta2) * g * g
            direction = g / (np.sqrt(nu / (1 - beta2 ** (step + 1))) + eps)
            z = z - rate * (4 if name == "b" else 1) * (direction + decay * at * (name != "value"))
            x = x + (z - x) / (step + 1)
            at = (1 - beta) * z + beta * x
        assert_close(y[path][name], at, 1e-5)
        assert_close(average[path][name], x, 1e-5)
        assert np.abs(x - at).max() > 1e-3, "the average differs from where gradients are taken"


def mesh_of(**sizes):
    shape = [sizes.get(name, 1) for name in AXES]
    n = int(np.prod(shape))
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:n]
    )


TABLE = ((r"(layers|more)/kernel", P("fsdp", "tensor")), (r"embed/embedding", P("tensor", "fsdp")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["adafactor", "muon", "adamw", "schedule-free"],
)
def test_a_mesh_takes_the_same_steps_and_shares_the_state_out(name):
    """Returns A, B and arrays that train in full, some of them large enough to be factored."""
    rules = [lj.LoraRule(targets=["layers"], rank=RANK, alpha=3), lj.TrainRule(targets=".*")]
    params = tree(rules, n_in=128, n_out=132)
    results = []
    for sizes in ({}, {"fsdp": 2, "tensor": 2}):
        layout = Layout(mesh_of(**sizes), TABLE)
        placed = layout.placed(params)
        optimizer = make_optimizer(name, RATE, placed, weight_decay=0.1)
        setup = Setup.make(layout, placed, optimizer, RATE)
        state = setup.state(lj.split(placed)[0], jax.random.key(0))

        @jax.jit
        def step(state, grads, setup=setup):
            updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.adapter)
            adapter = optax.apply_updates(state.adapter, updates)
            return adapter, averaged(opt_state, adapter)

        results.append((step(state, gradients(state.adapter, 0)), state.opt_state))
    (one, _), (many, began) = results
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert_close(b, a, 1e-5)
    # Of A and B, one axis lies on two devices, and of a kernel, both on four.
    large = [x for x in jax.tree.leaves(began) if x.size >= LAYERS * 128 * RANK]
    for array in large:
        parts = 4 if array.shape[-2:] == (128, 132) else 2
        assert array.addressable_shards[0].data.size * parts == array.size


def test_rows_and_columns_lie_as_the_axes_that_they_are_of():
    params = tree([lj.TrainRule(targets="layers.*")], n_in=128, n_out=132)
    layout = Layout(mesh_of(fsdp=2, tensor=2), TABLE)
    placed = layout.placed(params)
    setup = Setup.make(layout, placed, make_optimizer("adafactor", RATE, placed), RATE)
    shapes = {
        (leaf.shape, tuple(where.spec))
        for leaf, where in zip(
            jax.tree.leaves(setup.abstract_state(lj.split(placed)[0]).opt_state),
            jax.tree.leaves(setup.where.opt_state),
            strict=True,
        )
    }
    assert ((LAYERS, 128), (None, "fsdp")) in shapes
    assert ((LAYERS, 132), (None, "tensor")) in shapes
    assert not any(shape == (LAYERS, 128, 132) for shape, _ in shapes), "nothing is kept whole"


@over("name", ["adafactor", "lion", "muon", "schedule-free"], often=())
def test_a_checkpoint_goes_on_bitwise(name, tmp_path):
    params = tree()
    adapter, _ = lj.split(params)
    optimizer = make_optimizer(name, RATE, params, weight_decay=0.1)
    half, opt_state = trained(optimizer, adapter, steps=2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(State(half, opt_state, jnp.int32(2), jax.random.key(3)), {})
    checkpoints.close()
    like = State(adapter, optimizer.init(adapter), jnp.int32(0), jax.random.key(0))
    state, _ = Checkpoints(tmp_path / "checkpoints", keep=1).restore(like)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(opt_state)
    whole = trained(optimizer, half, steps=2, start=2, state=opt_state)
    again = trained(optimizer, state.adapter, steps=2, start=2, state=state.opt_state)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_option_that_an_optimiser_does_not_read_is_an_error():
    with pytest.raises(ValueError, match="sgd does not read beta2. .*options of sgd: momentum"):
        make_optimizer("sgd", RATE, options={"beta2": 0.9})
    with pytest.raises(ValueError, match="there is no optimizer 'adam'. Choose one of adamw, lion"):
        make_optimizer("adam", RATE)


@pytest.mark.slow
def test_finetune_evaluates_and_keeps_the_average():
    """Judged by the same run made by hand, whose last raw parameters have another loss."""
    x = np.random.default_rng(1).standard_normal((12, IN), np.float32)
    arrays = {"x": x, "y": x[:, :3] ** 2}

    def squares(forward, params, batch, dropout_key):
        error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
        return Sums(error, jnp.float32(batch["x"].shape[0]), {})

    def model(params, x):
        return x @ params["kernel"]

    params = lj.lorafy(
        {"kernel": jnp.zeros((IN, 3))}, [lj.LoraRule(targets=["kernel"], rank=2, alpha=3)]
    )
    options = {"loss": squares, "steps": 5, "batch_size": 12, "held_out": arrays, "log": None}
    kept, report = finetune(model, params, arrays, optimizer="schedule-free", lr=RATE, **options)
    optimizer = make_optimizer("schedule-free", RATE, params)
    step = make_step(lj.adapt(model), optimizer, RATE, dropout=False, loss=Loss(squares))
    adapter, base = lj.split(params)
    state, step = init_state(adapter, optimizer, jax.random.key(0)), jax.jit(step)
    for _ in range(5):
        state, _ = step(state, base, {k: v[None] for k, v in arrays.items()})
    average = averaged(state.opt_state, state.adapter)
    for part in ("a", "b"):
        assert_close(lj.split(kept)[0]["kernel"][part], average["kernel"][part], 1e-5)
    merged = (lj.merge(lj.join(one, base))["kernel"] for one in (average, state.adapter))
    losses = [np.sum((x @ np.asarray(kernel) - arrays["y"]) ** 2) / 12 for kernel in merged]
    assert report.held_out["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert abs(losses[1] / losses[0] - 1) > 1e-3
