"""Laws of random subspaces: norm, gradients, a dense judge, stacks, memory, meshes."""

import functools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax import subspace
from lora_jax.paths import fold_in_path
from lora_jax.subspace.fastfood import draw as draws_for
from lora_jax.subspace.fastfood import project, projected
from lora_jax.subspace.hadamard import hadamard_transform
from lora_jax.weight import leaves_of
from tests.support import assert_close, assert_identical, draw, over


def small(dtype=jnp.float32):
    """Tensors larger and smaller than θ_d, one of a single entry, and two stacks."""
    return {
        "embed": {"embedding": draw(1, (11, 5), dtype)},
        "layers": {
            "up": {"kernel": draw(2, (3, 5, 13), dtype), "bias": draw(3, (3, 13), dtype)},
            "down": {"kernel": draw(4, (3, 13, 5), dtype)},
        },
        "head": {"kernel": draw(5, (5, 7), dtype), "gain": draw(6, (), dtype)},
    }


def moving(space, seed=8, dtype=jnp.float32):
    """θ_d and λ away from their start."""
    rng = np.random.default_rng(seed)
    start = space.zeros(dtype)
    return {name: x + jnp.asarray(rng.standard_normal(x.shape), dtype) for name, x in start.items()}


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


def test_permutations_permute():
    for d, size in ((3, 1), (3, 2), (70, 30), (5, 3000)):
        permutation = np.asarray(draws_for(jax.random.key(size), d, size).permutation)
        assert (np.sort(permutation) == np.arange(permutation.shape[1])).all()
    assert len(permutation[0]) == 4096 and (permutation[0] == np.arange(4096)).sum() < 10


@pytest.mark.parametrize("d, size", [(207, 3000), (1000, 300)])
def test_projections_keep_the_norm(d, size):
    def ratio(key):
        x = jax.random.normal(key, (d,))
        return jnp.linalg.norm(project(x, jax.random.fold_in(key, 1), size)) / jnp.linalg.norm(x)

    ratios = jax.jit(jax.vmap(ratio))(jax.random.split(jax.random.key(3), 100))
    assert abs(float(ratios.mean()) - 1) < 0.01


@pytest.mark.parametrize("d, size", [(7, 1), (19, 13), (19, 100)])
def test_a_projection_equals_the_dense_one(d, size, float64):
    draws = draws_for(jax.random.key(d), d, size)
    matrix = jax.jacobian(lambda x: projected(x, draws, size))(jnp.zeros(d, jnp.float64))
    assert_close(matrix, dense(draws, d, size), 1e-9)


@over(
    ("kind", "largest"),
    [("did", 2**18), ("said", 0)],
    often=["said"],
    called=lambda case: case[0],
)
def test_a_tree_moves_as_by_dense_projections(kind, largest, float64, monkeypatch):
    """Some tensors have fewer entries than θ_d. (G is drawn in fp32, and rounded as compiled.)"""
    params, d = small(jnp.float64), 19
    monkeypatch.setattr("lora_jax.subspace.moving._SMALL", largest)
    space = subspace.make(params, dimension=d, kind=kind, seed=5)
    theta = moving(space, dtype=jnp.float64)
    n, key = theta["theta"].size, jax.random.key(5, impl="threefry2x32")
    assert n + (len(space.layers) if kind == "said" else 0) == d
    before, after = (dict(leaves_of(t)[0]) for t in (params, space.params_of(theta, params)))
    for tensor in space.tensors:
        change = np.asarray(after[tensor.path] - before[tensor.path])
        change = change.reshape(len(tensor.names), -1)
        for i, name in enumerate(tensor.names):
            size = change.shape[1]
            matrix = dense(draws_for(fold_in_path(key, name), n, size), n, size)
            scale = float(theta["scale"][tensor.layers[i]]) if kind == "said" else 1.0
            scale *= math.sqrt(size / space.size)  # of the tree's norm
            assert_close(change[i], scale * matrix @ np.asarray(theta["theta"]), 1e-6)


def test_a_tree_moves_as_far_as_theta():
    params = {"wide": jnp.zeros((40, 50)), "gain": jnp.zeros(60), "layers": jnp.zeros((3, 10, 11))}

    def changes(seed):
        space = subspace.make(params, dimension=70, seed=seed)
        theta = moving(space, seed=seed)
        return [
            x / jnp.linalg.norm(theta["theta"])
            for x in jax.tree.leaves(space.params_of(theta, params))
        ]

    squares = np.mean([[float(jnp.mean(x**2)) for x in changes(seed)] for seed in range(20)], 0)
    size = sum(x.size for x in jax.tree.leaves(params))
    np.testing.assert_allclose(squares, 1 / size, rtol=0.1)  # an entry of any tensor


@pytest.mark.slow
@pytest.mark.parametrize("largest", [2**18, 30])
def test_gradients_equal_finite_differences(largest, float64, monkeypatch):
    monkeypatch.setattr("lora_jax.subspace.moving._SMALL", largest)
    params = small(jnp.float64)
    space = subspace.make(params, dimension=19, kind="said")
    aims = {path: draw(i, x.shape, jnp.float64) for i, (path, x) in enumerate(leaves_of(params)[0])}

    @jax.jit
    def loss(theta):
        moved = leaves_of(space.params_of(theta, params))[0]
        return sum(jnp.sum(jnp.sin(3 * x) * aims[path]) for path, x in moved)

    theta = moving(space, dtype=jnp.float64)
    gradient = jax.jit(jax.grad(loss))(theta)
    along = moving(space, seed=1, dtype=jnp.float64)
    forward = jax.jit(lambda theta: jax.jvp(loss, (theta,), (along,))[1])(theta)
    assert_close(forward, sum(jnp.vdot(gradient[name], along[name]) for name in along), 1e-6)
    for name, x in theta.items():
        for i in range(x.size):
            step = jnp.where(jnp.arange(x.size) == i, 1e-5, 0.0)
            up, down = (loss(theta | {name: x + moved}) for moved in (step, -step))
            assert abs((up - down) / 2e-5 - gradient[name][i]) < 1e-6 * max(1, abs(up))


def unrolled(params):
    """Returns the tree with a module for each layer of the stack."""
    stack = params["layers"]
    return params | {"layers": {str(i): jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)}}


def test_a_scanned_stack_moves_as_its_unrolled_twin():
    params = small()
    twin = unrolled(params)
    space, other = (subspace.make(t, dimension=23, kind="said", seed=3) for t in (params, twin))
    assert space.layers == other.layers
    assert set(space.layers) == {"layers/0", "layers/1", "layers/2", "embed", "head"}
    theta = moving(space)
    assert_close(unrolled(space.params_of(theta, params)), other.params_of(theta, twin), 1e-6)
    flax = {f"layers_{i}": twin["layers"][str(i)] for i in range(3)}
    named = subspace.make({"m": flax}, dimension=9), subspace.make({"m": twin}, dimension=9)
    assert {n for t in named[0].tensors for n in t.names} < {
        n for t in named[1].tensors for n in t.names
    }


def test_layers_count_from_2_to_10():
    blocks = {"h": {str(i): {"w": jnp.ones(2)} for i in range(11)}}
    assert subspace.make(blocks, dimension=3).layers == tuple(f"h/{i}" for i in range(11))


def test_the_start_is_the_base_and_seeds_differ():
    params = small()
    space = subspace.make(params, dimension=23, targets=["layers"], exclude=["bias"])
    moved = space.params_of(space.zeros(), params)
    assert_identical(moved, params)
    assert moved["head"]["kernel"] is params["head"]["kernel"]
    assert moved["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    theta = moving(space)
    other = subspace.make(params, dimension=23, seed=1, targets=["layers"], exclude=["bias"])
    one, two = (s.params_of(theta, params)["layers"]["down"]["kernel"] for s in (space, other))
    assert float(jnp.abs(one - two).max()) > 0.1


def numbers_in(hlo):
    """The number of elements of each array in optimised HLO."""
    return {math.prod(int(n) for n in s.split(",")) for s in re.findall(r"\w\[([\d,]+)\]", hlo)}


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


def temporaries_of(space, params):
    """Bytes of temporaries of (the moved tree, the gradient of θ_d from the tree's)."""
    theta = jax.eval_shape(space.zeros)

    def back(theta, params, cotangent):
        return jax.vjp(lambda theta: space.params_of(theta, params), theta)[1](cotangent)

    args = [(space.params_of, (theta, params)), (back, (theta, params, params))]
    lowered = [jax.jit(fn).lower(*each) for fn, each in args]
    return [one.compile().memory_analysis().temp_size_in_bytes for one in lowered]


def temporaries(layers, **options):
    kernel = jax.ShapeDtypeStruct((layers, 512, 513), jnp.float32)
    params = {"layers": {"up": {"kernel": kernel}, "down": {"kernel": kernel}}}
    return temporaries_of(subspace.make(params, dimension=64, **options), params)


def test_temporaries_are_those_of_one_layer():
    few, many = temporaries(4), temporaries(32)
    whole = temporaries(32, stacks=())
    layer = 4 * 512 * 1024  # padded to a power of two
    assert max(*few, *many) < 12 * layer
    assert max(many) < max(few) + layer
    assert min(whole) > 32 * layer  # the control: the stack as one tensor


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
    forward, backward = temporaries_of(space, params)
    assert forward < 6 * bytes_of_table < 10 * bytes_of_table
    assert backward < 10 * bytes_of_table < 4 * space.size / 5


def check_on_mesh(fsdp, tensor):
    """Tensors on a mesh keep their sharding, and values and gradients are those of one device."""
    mesh = jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = {
        "layers": {"kernel": draw(1, (3, 8, 12))},
        "head": {"kernel": draw(2, (12, 4)), "bias": draw(3, (4,))},
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


def test_on_a_mesh_it_is_as_on_one_device():
    check_on_mesh(2, 2)


@pytest.mark.slow
def test_on_a_mesh_of_eight():
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8);"
        "from tests.subspace.test_subspace import check_on_mesh; check_on_mesh(2, 4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_trains_by_optax():
    params, x = small(), draw(9, (17, 5))
    aim = x @ draw(10, (5, 7))
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
    assert float(jnp.abs(theta["scale"] - 1).max()) > 0


def test_what_cannot_be_is_refused():
    params = small()
    twice = {"h_0": {"w": jnp.ones(4)}, "h": {"0": {"w": jnp.ones(3)}}}
    coded = lj.quantized.quantize({"kernel": jnp.ones((64, 64))}, "int8")
    for said, tree, options in [
        ("at most as many dimensions", params, {"dimension": 10**4}),
        ("d has to be larger than 5", params, {"dimension": 5, "kind": "said"}),
        ("at least 1", params, {"dimension": 0}),
        ("choose 'did' or 'said'", params, {"dimension": 9, "kind": "sa"}),
        ("from 0 to", params, {"dimension": 9, "seed": -1}),
        ("selects nothing", params, {"dimension": 9, "targets": ["none"]}),
        ("nothing can train", {"n": jnp.arange(3)}, {"dimension": 1}),
        ("nothing can train", {}, {"dimension": 1}),
        ("no axes", {"layers": {"w": jnp.float32(1)}}, {"dimension": 1}),
        ("begins with 4", {"layers": {"a": jnp.ones(4), "b": jnp.ones(3)}}, {"dimension": 1}),
        ("one logical path", twice, {"dimension": 1}),
        ("adapted already", lj.lorafy(params, [lj.TrainRule(targets=".*")]), {"dimension": 1}),
        ("in codes", coded, {"dimension": 1}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            subspace.make(tree, **options)
    space = subspace.make(params, dimension=9)
    with pytest.raises(ValueError, match="keep to its structure"):
        space.params_of({"theta": jnp.zeros(8)}, params)
    with pytest.raises(ValueError, match="'head/gain' is missing"):
        space.params_of(space.zeros(), params | {"head": {"kernel": params["head"]["kernel"]}})
