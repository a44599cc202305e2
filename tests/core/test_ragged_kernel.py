"""The TPU's kernel for ragged products with quantized experts, run by Python on a CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.lax import Precision
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.core import ragged_call
from lora_jax.core.base import StackMember, as_array, member
from lora_jax.models.decoder.experts import apply_ragged
from lora_jax.quantized import FORMATS, Coded, encode, ragged
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, draw, equations, lorafied

LAYERS, EXPERTS, IN, OUT = 2, 5, 192, 384
# Each with 300 rows, the last of which belong to no expert in one case.
SIZES = {
    "as they come": [20, 0, 200, 3, 77],
    "one expert": [0, 0, 0, 300, 0],
    "rows of no expert": [0, 130, 5, 0, 9],
    "no rows": [0, 0, 0, 0, 0],
}
# bf16 products of 192 or 384 terms, summed in fp32 and rounded once.
BOUND = 2**-8


def stack_of(name, shape=(LAYERS, EXPERTS, IN, OUT)):
    """A stack of experts; MXFP4 is read from files, so its codes and scales are drawn."""
    format = FORMATS[name]
    if name != "mxfp4":
        return dataclasses.replace(encode(draw(1, shape), format), dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-8, 8, shape), jnp.int4)
    scales = rng.integers(118, 123, (*shape[:-2], shape[-2] // format.block, shape[-1]))
    arrays = {"codes": codes, "scales": jnp.asarray(scales, jnp.uint8)}
    return Coded(arrays, format, jnp.bfloat16)


def kernel_of(layer, x, **params):
    kernel = ragged.find_ragged_kernel(layer, x, (), params)
    assert kernel is not None
    return dataclasses.replace(kernel, interpret=True)


def by_hand(x, kernels, sizes):
    """Each row times its expert's kernel, in fp64; zeros for rows of no expert."""
    out = np.zeros((len(x), kernels.shape[2]))
    start = 0
    for kernel, size in zip(kernels, sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ kernel
        start += size
    return out


@pytest.mark.parametrize("choice", SIZES)
@pytest.mark.parametrize("name", ["mxfp4", "int4", "int8", "nf4"])
def test_the_kernel_is_the_product_with_each_expert(name, choice, monkeypatch):
    """Tiles of 128, of which the last ones are partial; the layer before is another one."""
    n_out = OUT if name == "nf4" else 320
    monkeypatch.setattr(ragged, "_MAX_TILE_ELEMENTS", 128 * OUT)
    stack = stack_of(name, (LAYERS, EXPERTS, IN, n_out))
    kernels = np.asarray(as_array(stack)[1], np.float64)
    layer = member(stack, 0, 1)
    place = StackMember(layer, stack, jnp.int32(1))
    sizes = jnp.asarray(SIZES[choice], jnp.int32)
    for transposed, width in ((False, IN), (True, n_out)):
        x = draw(2, (300, width), jnp.bfloat16)
        run = functools.partial(kernel_of(layer, x), transposed=transposed)
        want = by_hand(
            np.asarray(x, np.float64),
            kernels.swapaxes(1, 2) if transposed else kernels,
            SIZES[choice],
        )
        for stacked in (place, None):
            got = np.asarray(jax.jit(run)(layer, stacked, x, sizes), np.float64)
            assert np.abs(got - want).max() <= BOUND * max(np.abs(want).max(), 1)
            assert not np.any(got[sum(SIZES[choice]) :])


def test_w_is_that_of_as_array():
    """Rows of a unit matrix read W's elements, bit by bit."""
    layer = member(stack_of("mxfp4"), 0, 0)
    x = jnp.tile(jnp.eye(IN, dtype=jnp.bfloat16), (EXPERTS, 1))
    sizes = jnp.full(EXPERTS, IN, jnp.int32)
    got = jax.jit(functools.partial(kernel_of(layer, x), transposed=False))(layer, None, x, sizes)
    want = as_array(layer)
    assert np.array_equal(np.asarray(got).reshape(want.shape), np.asarray(want))
    assert len(np.unique(np.asarray(want, np.float32))) > 20


def test_others_have_none():
    layer, x = member(stack_of("mxfp4"), 0, 0), draw(2, (300, IN), jnp.bfloat16)
    others = {
        "few rows": (layer, x[:64]),
        "fp32": (layer, x.astype(jnp.float32)),
        "a kernel": (member(layer, 0, 0), x),
        "nf4 in part of a register": (stack_of("nf4", (EXPERTS, IN, 320)), x),
        "double": (member(stack_of("nf4-double"), 0, 0), x),
        "a partial piece": (stack_of("mxfp4", (EXPERTS, 96, OUT)), x),
    }
    assert ragged.find_ragged_kernel(layer, x, (), {}) is not None
    for case, (other, rows) in others.items():
        assert ragged.find_ragged_kernel(other, rows, (), {}) is None, case
    assert ragged.find_ragged_kernel(layer, x, (), {"precision": Precision.HIGHEST}) is None


def layers(params, x, chosen):
    """Two layers of experts, rematerialized as in `lora_jax.models`."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, kernels):
        return x + apply_ragged(jax.nn.silu, x, chosen, kernels["up"], kernels["down"])

    return lax.scan(lambda x, kernels: (layer(x, kernels), None), x, params)[0]


@pytest.fixture(scope="module")
def arguments():
    """An adapter, a base, rows and their experts."""
    params = {"up": stack_of("mxfp4"), "down": stack_of("mxfp4", (LAYERS, EXPERTS, OUT, IN))}
    rule = lj.LoraRule(targets=["up"], rank=2, alpha=4, in_axes=(2,), out_axes=(3,))
    tree = with_random_factors(lorafied(params, [rule]))
    chosen = jnp.asarray(np.random.default_rng(1).integers(0, EXPERTS, 300), jnp.int32)
    return *lj.split(tree), draw(2, (300, IN), jnp.bfloat16), chosen


def loss(adapter, x, base, chosen):
    out = lj.adapt(layers, strict=True)(lj.join(adapter, base), x, chosen)
    return jnp.mean(out.astype(jnp.float32) ** 2)


def test_gradients_are_those_of_formed_kernels(arguments, monkeypatch):
    adapter, base, x, chosen = arguments
    gradients = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(gradients)(adapter, x, base, chosen)

    def interpret(call, *operands):
        kernel = dataclasses.replace(call.kernel, interpret=True)
        return dataclasses.replace(call, kernel=kernel).run_kernel(*operands)

    monkeypatch.setattr(ragged_call._RaggedCall, "form_and_multiply", interpret)
    jax.clear_caches()
    traced = jax.jit(gradients).trace(adapter, x, base, chosen)
    names = [eqn.primitive.name for eqn in equations(traced.jaxpr)]
    assert "pallas_call" in names and "ragged_dot_general" not in names
    got = jax.jit(gradients)(adapter, x, base, chosen)
    # Both round activations to bf16 in each layer.
    assert_close(got, want, 0.02)
    jax.clear_caches()


def kernels_in(fn, *args, on="tpu"):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=(on,)).as_text()
    return text.count(f'kernel_name = "{ragged.KERNEL_NAME}"')


def test_programs_for_one_tpu_have_it(arguments):
    """Not for a CPU, or for several TPUs."""
    adapter, base, x, chosen = arguments
    fn = jax.grad(loss)
    assert kernels_in(fn, adapter, x, base, chosen) >= 4
    assert kernels_in(fn, adapter, x, base, chosen, on="cpu") == 0
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments
    )
    adapter, base, x, chosen = shapes
    assert kernels_in(fn, adapter, x, base, chosen) == 0


def test_other_transformations():
    """Forward mode, second derivatives and gradients of scales are those of the plain product."""
    layer, x = member(stack_of("int4"), 0, 0), draw(2, (160, IN), jnp.bfloat16)
    sizes = jnp.asarray([60, 0, 100, 0, 0], jnp.int32)

    def product(params, x):
        return lax.ragged_dot(x, params["w"], sizes)

    def formed(params, x):
        return product({"w": as_array(params["w"])}, x)

    def derivatives(fn, scales, x):
        def total(scales, x):
            coded = dataclasses.replace(layer, arrays={**layer.arrays, "scales": scales})
            return jnp.sum(jnp.sin(fn({"w": coded}, x).astype(jnp.float32)))

        def sum_of_gradient(x):
            return jnp.sum(jax.grad(total, argnums=1)(scales, x).astype(jnp.float32))

        tangent = jax.jvp(functools.partial(total, scales), [x], [jnp.ones_like(x)])
        return tangent, jax.grad(total)(scales, x), jax.grad(sum_of_gradient)(x)

    calls = jax.make_jaxpr(lj.adapt(product))({"w": layer}, x)
    assert "coded_ragged_dot" in {eqn.primitive.name for eqn in equations(calls.jaxpr)}
    args = layer.arrays["scales"], x
    got = jax.jit(functools.partial(derivatives, lj.adapt(product)))(*args)
    want = jax.jit(functools.partial(derivatives, formed))(*args)
    assert_close(got, want, 0.02)
