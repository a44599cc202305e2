"""Rules for kernels that are changed before they are used, against W + s·AB formed in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.transform import RULES
from lora_jax.core.factored import Factored
from lora_jax.core.magnitude import column_norms
from tests.support import array, assert_close, draw, numpy_init, with_random_factors

pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.RoleWarning")
SHAPES = {"v": (5, 7), "w": (5, 7), "mirror": (7, 5), "stack": (3, 5, 7), "tables": (3, 11, 7)}
GAIN, ROWS = np.linspace(0.5, 2, 7, dtype="f4"), np.linspace(-1, 2.5, 5, dtype="f4")
ADDED = np.asarray(draw(31, (5, 7)))
SIZES = np.array([4, 0, 9], np.int32)
IDS = np.array([[3, 0, 10, 2], [9, 9, 1, 5], [0, 4, 7, 10]], np.int32)


def rule(name, **fields):
    wide = {"rank": 100} if name == "stack" else {"rank": 2}
    how = {"targets": [name], "alpha": 3.0, "init": numpy_init} | wide
    return lj.LoraRule(**how | fields)


@functools.cache
def tree():
    """Returns adapted kernels; three groups of rank 100 do not fit into one matrix unit."""
    params = {name: {"kernel": draw(seed, SHAPES[name])} for seed, name in enumerate(SHAPES)}
    return with_random_factors(lj.lorafy(params, [rule(name) for name in SHAPES]))


def merged(node):
    """W + s·AᵀB in NumPy, with the axes of W."""
    base, a, b, scale = (np.asarray(x, np.float64) for x in (node.base, node.a, node.b, node.scale))
    return base + scale[..., None, None] * np.swapaxes(a, -1, -2) @ b


def grouped(x, w):
    """Rows by their group's kernel."""
    ends = np.cumsum(SIZES)
    return np.concatenate(
        [x[end - n : end] @ of for end, n, of in zip(ends, SIZES, w, strict=True)]
    )


# Each runs in the adapted program, and in NumPy on kernels that are merged.
SAME = {
    "minus W": lambda k, x: x @ -k["w"],
    "W over a number": lambda k, x: x @ (k["w"] / 2.5),
    "W over its columns": lambda k, x: x @ (k["w"] / GAIN),
    "W over its rows": lambda k, x: x @ (k["w"] / ROWS[:, None]),
    "W times its columns": lambda k, x: x @ (GAIN * k["w"]),
    "C minus W": lambda k, x: x @ (ADDED - k["w"]),
    "W minus C": lambda k, x: x @ (k["w"] - ADDED),
    "V minus W": lambda k, x: x @ (k["v"] - k["w"]),
    "W minus V": lambda k, x: x @ (k["w"] - k["v"]),
    "minus a sum": lambda k, x: x @ -(k["w"] + k["v"]),
    "W minus another's transposed": lambda k, x: x @ (k["w"] - k["mirror"].T),
    "minus W from behind": lambda k, x: (-k["mirror"]) @ x.T,
}


@functools.cache
def outputs():
    """Returns the outputs of all programs, by one program: factors alone, for it is strict."""

    def run(params, x):
        kernels = {name: node["kernel"] for name, node in params.items()}
        results = {name: use(kernels, x) for name, use in SAME.items()}
        results["grouped"] = lax.ragged_dot(x, kernels["stack"], SIZES)
        look_up = jax.vmap(lambda table, ids: table[ids])
        results["look-ups"] = look_up(kernels["tables"], IDS)
        last = jax.vmap(lambda table, ids: table[ids], out_axes=1)
        results["look-ups, stacked later"] = last(kernels["tables"], IDS)
        return results

    x = draw(40, (13, 5))
    return jax.device_get(jax.jit(lj.adapt(run))(tree(), x)), np.asarray(x, np.float64)


@pytest.mark.parametrize("name", SAME)
def test_a_changed_kernel_has_a_changed_adapter(name):
    found, x = outputs()
    kernels = {name: merged(node["kernel"]) for name, node in tree().items()}
    assert_close(found[name], SAME[name](kernels, x), 2e-5)


def test_groups_too_wide_for_one_product():
    """Three groups of rank 100: each row has its own group's A, s and B."""
    found, x = outputs()
    assert_close(found["grouped"], grouped(x, merged(tree()["stack"]["kernel"])), 2e-5)


def test_each_table_is_looked_up_at_indices_of_its_own():
    found, _ = outputs()
    tables = merged(tree()["tables"]["kernel"])
    rows = np.stack([table[ids] for table, ids in zip(tables, IDS, strict=True)])
    assert_close(found["look-ups"], rows, 2e-5)
    assert_close(found["look-ups, stacked later"], np.moveaxis(rows, 0, 1), 2e-5)


def test_joined_kernels_have_their_parts_in_one_order():
    """A set of names would have another order, and so another program, in another process."""
    base = draw(0, (5, 7))
    parts = {"shift": draw(1, (7,)), "gain": draw(2, (7,)), "scale": jnp.ones(())}
    parts |= {"key": jax.random.key(0), "b": draw(3, (2, 7)), "a": draw(4, (2, 5))}
    weight = Factored(base, parts, ("in", "out"))
    jaxpr = jax.make_jaxpr(lambda v, w: jnp.concatenate([v, w], axis=1))(base, base)
    (joined,) = Interpreter(RULES).evaluate(jaxpr, [weight, weight])
    assert list(joined.parts) == list(parts)


def test_signs_and_look_ups_form_no_kernel():
    """These have factored forms: W + s·AB is formed nowhere."""

    def run(params, x):
        w, v = params["w"]["kernel"], params["v"]["kernel"]
        tables = params["tables"]["kernel"]
        rows = jax.vmap(lambda table, ids: table[ids])(tables, IDS)
        grouped = lax.ragged_dot(x, params["stack"]["kernel"], SIZES)
        return x @ (ADDED - w), x @ (v - w), x @ (-w / 3), x @ (w / GAIN), rows, grouped

    jax.eval_shape(lj.adapt(run, strict=True), tree(), draw(40, (13, 5)))


@pytest.mark.parametrize("size", [85, 86])
def test_the_width_of_a_matrix_unit_is_256(size):
    """Three groups of rank 85 are two plain products; of rank 86, they are two ragged ones."""
    params = {"stack": {"kernel": draw(3, (3, 5, 7))}}
    adapted = with_random_factors(lj.lorafy(params, [rule("stack", rank=size)]))
    run = lj.adapt(lambda params, x: lax.ragged_dot(x, params["stack"]["kernel"], SIZES))
    x = draw(40, (13, 5))
    jaxpr = str(jax.make_jaxpr(run)(adapted, x))
    assert jaxpr.count("= ragged_dot_general[") == (1 if size == 85 else 3)


def test_a_mirrored_group_has_its_own_magnitudes():
    """DoRA over groups that are used transposed: x is scaled by its group's magnitude."""
    params = {"stack": {"kernel": draw(3, (3, 7, 5))}}
    rules = [rule("stack", rank=2, dora=True)]
    adapted = with_random_factors(lj.lorafy(params, rules))
    use = lj.adapt(lambda p, x: lax.ragged_dot(x, p["stack"]["kernel"].swapaxes(1, 2), SIZES))
    x = draw(40, (13, 5))
    found = jax.jit(use)(adapted, x)
    node = adapted["stack"]["kernel"]
    whole = merged(node)
    whole *= (np.asarray(node.magnitude) / np.linalg.norm(whole, axis=1))[:, None, :]
    assert_close(found, grouped(np.asarray(x, np.float64), whole.swapaxes(1, 2)), 2e-5)


def test_sums_over_inputs_drop_what_a_product_drops():
    """Σᵢ W[i] is 1·W: with a key, each i of the change is dropped or doubled, and W is whole."""
    params = {"w": {"kernel": draw(1, (5, 7))}}
    adapted = with_random_factors(lj.lorafy(params, [rule("w", dropout=0.5)]))
    node = adapted["w"]["kernel"]
    run = jax.jit(lj.adapt(lambda p: p["w"]["kernel"].sum(0)))
    base = np.asarray(node.base, np.float64)
    change = merged(node) - base
    assert_close(run(adapted), (base + change).sum(0), 1e-5)
    masks = [np.array(mask, float) for mask in itertools.product((0, 2), repeat=5)]
    seen = set()
    for seed in range(6):
        found = np.asarray(run(adapted, dropout_key=jax.random.key(seed)))
        errors = [np.abs(base.sum(0) + mask @ change - found).max() for mask in masks]
        assert min(errors) < 1e-5
        seen.add(int(np.argmin(errors)))
    assert len(seen) > 1


def test_what_a_compiled_part_returns_keeps_its_sharding():
    """jax.jit(out_shardings=…) inside: weights, numbers and results stay what they are."""
    mesh = jax.make_mesh((1,), ("m",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inner = jax.jit(lambda w, x: (w * 2, x + 1), out_shardings=(whole, whole))

    def run(params, x):
        w, x = inner(params["w"]["kernel"], x)
        return x @ w

    x = draw(40, (3, 5))
    adapted = {"w": tree()["w"]}
    found = jax.jit(lj.adapt(run))(adapted, x)
    assert_close(found, (np.asarray(x) + 1) @ (2 * merged(adapted["w"]["kernel"])), 1e-5)


def test_norms_of_a_narrow_kernel_keep_the_wide_factors():
    """W in bf16, A and B in fp32: ‖W + s·AB‖ is that of the numbers as they are."""
    base = array(np.asarray(draw(1, (5, 7))), jnp.bfloat16)
    a, b = draw(2, (3, 5)), draw(3, (3, 7))
    for labels, turned in ((("in", "out"), base), (("out", "in"), base.T)):
        norms = jax.jit(functools.partial(column_norms, labels=labels))(
            turned, a, b, np.float32(1.75)
        )
        whole = np.asarray(base, np.float64) + 1.75 * np.asarray(a, np.float64).T @ np.asarray(b)
        assert norms.dtype == jnp.float32
        assert_close(norms, np.linalg.norm(whole, axis=0), 1e-6)
