"""Laws of random subspaces: norm, gradients, a dense judge, stacks, memory, meshes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import subspace
from lora_jax.core.paths import fold_in_path
from lora_jax.core.weight import leaves_of
from lora_jax.subspace.fastfood import draw_random_parts as draws_for
from lora_jax.subspace.fastfood import hadamard_transform, project, project_with_draws
from tests.support import assert_close, assert_identical, draw


def params_of(space, theta, params):
    """The moved tree, compiled: seeds share the program."""
    return _params_of(dataclasses.replace(space, seed=0), theta, params, keys=space.keys())


_params_of = jax.jit(subspace.Subspace.params_of, static_argnums=0)


def small(dtype=np.float32):
    """Tensors larger and smaller than θ_d, and stacks, of two sizes: each is compiled anew."""
    params = {
        "embed": {"embedding": draw(1, (7, 5), dtype)},
        "layers": {
            "up": {"kernel": draw(2, (3, 5, 7), dtype), "bias": draw(3, (3, 7), dtype)},
            "down": {"kernel": draw(4, (3, 7, 5), dtype)},
        },
        "head": {"kernel": draw(5, (5, 7), dtype), "bias": draw(6, (7,), dtype)},
    }
    return jax.tree.map(np.asarray, params)


def moving(space, seed=8, dtype=np.float32):
    """θ_d and λ away from their start."""
    rng = np.random.default_rng(seed)
    shapes = {name: x.shape for name, x in jax.eval_shape(space.zeros).items()}
    start = {"theta": 0.0, "scale": 1.0}
    return {
        name: np.asarray(start[name] + rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


def sylvester(n):
    """The Hadamard matrix: the Kronecker power of [[1, 1], [1, −1]]."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


def dense(draws, d, size):
    """The projection as a matrix [size, d], from H, G, Π and B, block by block."""
    signs, permutation, normals = (np.asarray(x, np.float64) for x in draws)
    blocks, n = normals.shape
    h, columns = sylvester(n), []
    for k in range(blocks):
        b = np.zeros(n)
        b[: signs.shape[1]] = signs[k]
        pi, g = np.eye(n)[permutation[k].astype(int)], np.diag(normals[k])
        scale = np.sqrt(n * (normals[k] ** 2).sum()) * np.sqrt(size / n)
        columns.append((h @ g @ pi @ h @ np.diag(b) / scale)[:size])
    return np.concatenate(columns, axis=1)[:, :d]


def test_the_transform_is_hadamards():
    for bits in (0, 1, 3, 6, 11):
        x = draw(bits, (2, 3, 2**bits))
        assert_close(hadamard_transform(x), np.asarray(x) @ sylvester(2**bits), 1e-5 * 2**bits)
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(jnp.ones(6))


@pytest.mark.slow
def test_permutations_permute():
    for d, size in ((3, 1), (3, 2), (70, 30), (5, 3000)):
        drawn = jax.jit(lambda key, d=d, size=size: draws_for(key, d, size).permutation)
        permutation = np.asarray(drawn(jax.random.key(size)))
        assert (np.sort(permutation) == np.arange(permutation.shape[1])).all()
    assert len(permutation[0]) == 4096 and (permutation[0] == np.arange(4096)).sum() < 10


@pytest.mark.parametrize("d, size", [pytest.param(207, 3000, marks=pytest.mark.slow), (1000, 300)])
def test_projections_keep_the_norm(d, size):
    def ratio(key):
        x = jax.random.normal(key, (d,))
        return jnp.linalg.norm(project(x, jax.random.fold_in(key, 1), size)) / jnp.linalg.norm(x)

    ratios = jax.jit(jax.vmap(ratio))(jax.random.split(jax.random.key(3), 100))
    assert abs(float(ratios.mean()) - 1) < 0.01


@pytest.mark.parametrize(
    "d, size", [(7, 1), (19, 13), pytest.param(19, 100, marks=pytest.mark.slow)]
)
def test_a_projection_equals_the_dense_one(d, size, float64):
    @jax.jit
    def drawn(key):
        draws = draws_for(key, d, size)
        zeros = jnp.zeros(d, jnp.float64)
        return draws, jax.jacobian(lambda x: project_with_draws(x, draws, size))(zeros)

    draws, matrix = drawn(jax.random.key(d))
    assert_close(matrix, dense(draws, d, size), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "largest"), [("did", 2**18), ("said", 30)])
def test_a_tree_moves_as_by_dense_projections(kind, largest, float64, monkeypatch):
    """Some tensors have fewer entries than θ_d. (G is drawn in fp32, and rounded as compiled.)

    Tensors of up to `largest` entries are projected together, others one by one.
    """
    params, d = small(np.float64), 19
    monkeypatch.setattr("lora_jax.subspace.moving._MAX_SMALL_ENTRIES", largest)
    space = subspace.make(params, dimension=d, kind=kind, seed=5)
    theta = moving(space, dtype=np.float64)
    n, key = theta["theta"].size, jax.random.key(5, impl="threefry2x32")
    assert n + (len(space.layers) if kind == "said" else 0) == d

    @jax.jit
    def run(theta, params):
        def drawn(tensor):
            keys = jnp.stack([fold_in_path(key, name) for name in tensor.names])
            return jax.vmap(lambda k: draws_for(k, n, tensor.size // len(tensor.names)))(keys)

        draws = {tensor.path: drawn(tensor) for tensor in space.tensors}
        return space.params_of(theta, params), draws

    moved, draws = jax.tree.map(np.asarray, run(theta, params))
    before, after = (dict(leaves_of(t)[0]) for t in (params, moved))
    for tensor in space.tensors:
        change = after[tensor.path] - before[tensor.path]
        change = change.reshape(len(tensor.names), -1)
        for i, own in enumerate(zip(*draws[tensor.path], strict=True)):
            size = change.shape[1]
            scale = float(theta["scale"][tensor.layers[i]]) if kind == "said" else 1.0
            scale *= math.sqrt(size / space.size)  # of the tree's norm
            assert_close(change[i], scale * dense(own, n, size) @ theta["theta"], 1e-6)


@pytest.mark.slow
def test_a_tree_moves_as_far_as_theta():
    params = {"wide": np.zeros((40, 50)), "gain": np.zeros(60), "layers": np.zeros((3, 10, 11))}
    params = jax.tree.map(np.float32, params)

    def squares(seed):
        space = subspace.make(params, dimension=70, seed=seed)
        theta = moving(space, seed=seed)
        changed = jax.tree.leaves(params_of(space, theta, params))
        return [np.mean(np.square(x)) / np.sum(theta["theta"] ** 2) for x in changed]

    found = np.mean([squares(seed) for seed in range(20)], 0)
    size = sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(found, 1 / size, rtol=0.1)  # an entry of any tensor


@pytest.mark.slow
def test_gradients_equal_finite_differences(float64, monkeypatch):
    """Some stacks and tensors are projected one by one, and others together."""
    monkeypatch.setattr("lora_jax.subspace.moving._MAX_SMALL_ENTRIES", 30)
    params = small(np.float64)
    del params["embed"], params["layers"]["down"]
    space = subspace.make(params, dimension=19, kind="said")
    aims = {path: draw(i, x.shape, jnp.float64) for i, (path, x) in enumerate(leaves_of(params)[0])}

    def loss(theta):
        moved = leaves_of(space.params_of(theta, params))[0]
        return sum(jnp.sum(jnp.sin(3 * x) * aims[path]) for path, x in moved)

    @jax.jit
    def run(theta, along, near):
        forward = jax.jvp(loss, (theta,), (along,))[1]
        return jax.grad(loss)(theta), forward, jax.vmap(loss)(near)

    theta, along = (moving(space, seed, np.float64) for seed in (8, 1))
    flat, shaped = ravel_pytree(theta)
    steps = 1e-5 * np.concatenate([np.eye(flat.size), -np.eye(flat.size)])
    gradient, forward, losses = run(theta, along, jax.vmap(shaped)(flat + steps))
    assert_close(forward, sum(np.vdot(gradient[name], along[name]) for name in along), 1e-6)
    up, down = np.split(np.asarray(losses), 2)
    error = np.abs((up - down) / 2e-5 - np.asarray(ravel_pytree(gradient)[0]))
    assert (error < 1e-6 * np.maximum(1, np.abs(up))).all()


def unrolled(params):
    """Returns the tree with a module for each layer of the stack."""
    stack = params["layers"]
    return params | {"layers": {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)}}


@pytest.mark.slow
def test_a_scanned_stack_moves_as_its_unrolled_twin():
    params = small()
    del params["embed"], params["layers"]["down"], params["head"]["kernel"]
    twin = unrolled(params)
    space, other = (subspace.make(t, dimension=23, kind="said", seed=3) for t in (params, twin))
    assert space.layers == other.layers
    assert set(space.layers) == {"layers/0", "layers/1", "layers/2", "head"}
    theta = moving(space)
    moved = jax.tree.map(np.asarray, params_of(space, theta, params))
    assert_close(unrolled(moved), params_of(other, theta, twin), 1e-6)
    flax = {f"layers_{i}": twin["layers"][str(i)] for i in range(3)}
    named = subspace.make({"m": flax}, dimension=9), subspace.make({"m": twin}, dimension=9)
    assert {n for t in named[0].tensors for n in t.names} < {
        n for t in named[1].tensors for n in t.names
    }


def test_layers_count_from_2_to_10():
    blocks = {"h": {str(i): {"w": np.ones(2)} for i in range(11)}}
    assert subspace.make(blocks, dimension=3).layers == tuple(f"h/{i}" for i in range(11))


def test_a_name_without_a_match_is_refused():
    with pytest.raises(ValueError, match="the target 'layer' selects no leaf. .*\n  layers/"):
        subspace.make(small(), dimension=23, targets=["head", "layer"])


def test_the_start_is_the_base_and_seeds_differ():
    params = small()
    space = subspace.make(params, dimension=23, targets=["layers"], exclude=["bias"])
    moved = space.params_of(space.zeros(), params)
    assert_identical(jax.tree.map(np.asarray, moved), params)
    assert moved["head"]["kernel"] is params["head"]["kernel"]
    assert moved["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    theta = moving(space)
    other = subspace.make(params, dimension=23, seed=1, targets=["layers"], exclude=["bias"])
    one, two = (
        np.asarray(params_of(s, theta, params)["layers"]["down"]["kernel"]) for s in (space, other)
    )
    assert np.abs(one - two).max() > 0.1


def numbers_in(hlo):
    """The number of elements of each array in optimised HLO."""
    return {math.prod(int(n) for n in s.split(",")) for s in re.findall(r"\w\[([\d,]+)\]", hlo)}


@pytest.mark.slow
def test_no_array_has_as_many_elements_as_the_dense_projection():
    params, d = {"kernel": draw(1, (53, 19))}, 211
    space = subspace.make(params, dimension=d)
    matrix = draw(2, (53 * 19, d))

    def fast(theta):
        return jnp.sum(jnp.sin(space.params_of({"theta": theta}, params)["kernel"]))

    def naive(theta):
        return jnp.sum(jnp.sin(params["kernel"] + (matrix @ theta).reshape(53, 19)))

    sizes, control = (
        numbers_in(jax.jit(jax.value_and_grad(f)).lower(jnp.ones(d)).compile().as_text())
        for f in (fast, naive)
    )
    assert max(sizes) < 8 * 1024 < 53 * 19 * d
    assert max(control) >= 53 * 19 * d


def back_of(space):
    """A function of (θ_d, tree, cotangent) that returns the moved tree and the gradient of θ_d."""

    def back(theta, params, cotangent):
        tree, vjp = jax.vjp(lambda theta: space.params_of(theta, params), theta)
        return tree, vjp(cotangent)

    return back


def temporaries(fn, *args):
    """Bytes of temporaries."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_temporaries_are_those_of_one_layer():
    def found(**options):
        kernel = jax.ShapeDtypeStruct((32, 512, 513), jnp.float32)
        params = {"layers": {"up": {"kernel": kernel}, "down": {"kernel": kernel}}}
        space = subspace.make(params, dimension=64, **options)
        return temporaries(back_of(space), jax.eval_shape(space.zeros), params, params)

    layer = 4 * 512 * 1024  # padded to a power of two
    assert found() < 10 * layer
    assert found(stacks=()) > 32 * layer, "the control: the stack as one tensor"


@pytest.mark.slow
def test_a_7b_model_needs_little_beside_its_parameters():
    """Compiled for shapes alone: P(θ_d) and its transpose, for 27 GB of parameters in fp32."""

    def stack(*shape):
        return {"kernel": jax.ShapeDtypeStruct((32, *shape), jnp.float32)}

    square, tall, wide = stack(4096, 4096), stack(11008, 4096), stack(4096, 11008)
    table = jax.ShapeDtypeStruct((32000, 4096), jnp.float32)
    params = {
        "embed_tokens": {"embedding": table},
        "layers": {"q": square, "k": square, "v": square, "o": square}
        | {"gate": wide, "up": wide, "down": tall},
        "lm_head": {"kernel": jax.ShapeDtypeStruct((4096, 32000), jnp.float32)},
    }
    space = subspace.make(params, dimension=10_000, kind="said")
    assert space.size > 6.7e9 and len(space.layers) == 34
    bytes_of_table = 4 * 32000 * 4096
    theta = jax.eval_shape(space.zeros)
    forward = temporaries(space.params_of, theta, params)
    backward = temporaries(lambda *args: back_of(space)(*args)[1], theta, params, params)
    assert forward < 6 * bytes_of_table < 10 * bytes_of_table
    assert backward < 10 * bytes_of_table < 4 * space.size / 5


@pytest.mark.slow
def test_on_a_mesh_it_is_as_on_one_device():
    """Tensors on a mesh keep their sharding, and values and gradients are those of one device."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "layers": {"kernel": draw(1, (3, 8, 12))},
        "head": {"kernel": draw(2, (12, 8))},
        "embed": {"embedding": draw(3, (24, 4))},  # not in the table: on all devices
    }
    table = [(".*/kernel", P("fsdp", "tensor"))]
    there = lj.sharding.place(params, table, mesh)
    where = lj.sharding.shardings(params, table, mesh)
    space = subspace.make(params, dimension=19, kind="said")

    def loss(theta, params, where=None):
        moved = space.params_of(theta, params, where)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(moved)), moved

    theta = moving(space)
    (gradient, tree), (expected, plain) = (
        jax.jit(jax.grad(functools.partial(loss, where=w), has_aux=True))(theta, p)
        for p, w in ((there, where), (params, None))
    )
    assert_close(gradient, expected, 1e-5)
    for moved in (tree, space.params_of(theta, there)):
        assert_close(moved, plain, 1e-6)
        for leaf, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


@pytest.mark.slow
def test_it_trains_by_optax():
    params = {"head": {"kernel": draw(5, (5, 7))}, "up": {"kernel": draw(6, (7, 5))}}
    x = np.asarray(draw(9, (17, 5)))
    aim = x @ np.asarray(draw(10, (5, 7)))
    space = subspace.make(params, dimension=40, kind="said")
    optimizer = optax.adam(1e-1)

    def loss(theta):
        moved = space.params_of(theta, params)
        return jnp.mean((x @ moved["head"]["kernel"] - aim) ** 2)

    @jax.jit
    def step(theta, state):
        value, gradient = jax.value_and_grad(loss)(theta)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(theta, updates), state, value

    theta, losses = space.zeros(), []
    state = optimizer.init(theta)
    with jax.numpy_dtype_promotion("standard"):  # optax's own
        for _ in range(100):
            theta, state, value = step(theta, state)
            losses.append(float(value))
    assert losses[-1] < losses[0] / 4
    assert np.abs(np.asarray(theta["scale"]) - 1).max() > 0


def test_what_cannot_be_is_refused():
    params = small()
    twice = {"h_0": {"w": np.ones(4)}, "h": {"0": {"w": np.ones(3)}}}
    kernel = {"kernel": draw(1, (64, 64))}
    coded = jax.eval_shape(lambda: lj.quantized.quantize(kernel, "int8"))
    adapted = jax.eval_shape(lambda: lj.lorafy(kernel, [lj.TrainRule(targets=".*")]))
    for said, tree, options in [
        ("is larger than the number of parameters", params, {"dimension": 10**4}),
        ("Choose a dimension larger than 5", params, {"dimension": 5, "kind": "said"}),
        ("at least 1", params, {"dimension": 0}),
        ("Choose 'did' or 'said'", params, {"dimension": 9, "kind": "sa"}),
        ("from 0 to", params, {"dimension": 9, "seed": -1}),
        ("selects no leaf", params, {"dimension": 9, "targets": ["none"]}),
        ("there is nothing to train", {"n": np.arange(3)}, {"dimension": 1}),
        ("there is nothing to train", {}, {"dimension": 1}),
        ("is a scalar", {"layers": {"w": np.float32(1)}}, {"dimension": 1}),
        ("begins with 4", {"layers": {"a": np.ones(4), "b": np.ones(3)}}, {"dimension": 1}),
        ("the same logical path", twice, {"dimension": 1}),
        ("already adapted", adapted, {"dimension": 1}),
        ("is quantized", coded, {"dimension": 1}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            subspace.make(tree, **options)
    space = subspace.make(params, dimension=9)
    with pytest.raises(ValueError, match="keep its structure"):
        space.params_of({"theta": np.zeros(8)}, params)
    with pytest.raises(ValueError, match="'head/bias' is missing"):
        space.params_of(space.zeros(), params | {"head": {"kernel": params["head"]["kernel"]}})
