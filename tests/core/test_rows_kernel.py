"""The TPU's kernel for few rows of x and a layer of a stack of codes, run by Python on a CPU."""

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
from lora_jax.core.base import as_array, member
from lora_jax.quantized import FORMATS, Coded, encode
from lora_jax.quantized.rows import find_kernel
from tests.adapted_trees import with_random_factors
from tests.support import assert_close, draw, equations, lorafied

LAYERS, ROWS, SIZE = 3, 5, 96


def stack_of(name, n_in=SIZE, n_out=SIZE, block=32):
    """Codes of a stack of kernels; Q4_1's have a minimum for each block."""
    format = dataclasses.replace(FORMATS["int4" if name == "q4_1" else name], block=block)
    coded = encode(draw(1, (LAYERS, n_in, n_out)), format)
    if name != "q4_1":
        return coded
    mins = draw(3, coded.arrays["scales"].shape)
    return Coded(coded.arrays | {"mins": mins}, FORMATS[name], jnp.float32)


# One tile; then parts of a tile and several of them, and columns that a tile has too many of.
SHAPES = [(name, 96, 96, 32) for name in ("nf4", "q4_1")]
MORE = [(name, 96, 96, 32) for name in ("int8", "int4", "q6_k")]
MORE += [("nf4", 2048, 384, 64), ("q4_1", 1024, 1100, 32)]
SHAPES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("name", "n_in", "n_out", "block"), SHAPES)
def test_the_kernel_is_the_product(name, n_in, n_out, block):
    """Compares with the product in NumPy; the layer before is another one."""
    stack, x = stack_of(name, n_in, n_out, block), draw(2, (ROWS, n_in))
    kernel = dataclasses.replace(find_kernel(stack, x, (), {}), interpret=True)
    out = jax.jit(kernel)(stack, jnp.int32(2), x)
    by_layer = [np.asarray(as_array(stack)[n], np.float64) for n in (2, 1)]
    assert_close(out, (np.asarray(x, np.float64) @ by_layer[0]).astype(np.float32), 1e-6)
    assert np.abs(out - np.asarray(x) @ by_layer[1]).max() > 0.1


def test_casts_and_params_are_those_of_the_product():
    """W is rounded to its dtype, then cast; the result has the dtype that is preferred."""
    stack = dataclasses.replace(stack_of("int8"), dtype=jnp.float32)
    x = draw(2, (ROWS, SIZE), jnp.bfloat16)
    kernel = find_kernel(stack, x, (jnp.bfloat16,), {"preferred_element_type": jnp.float32})
    out = jax.jit(dataclasses.replace(kernel, interpret=True))(stack, jnp.int32(1), x)
    w = np.asarray(as_array(stack)[1].astype(jnp.bfloat16), np.float64)
    assert out.dtype == jnp.float32
    assert_close(out, (np.asarray(x, np.float64) @ w).astype(np.float32), 1e-6)


def test_others_have_none():
    x, stack = draw(2, (ROWS, SIZE)), stack_of("int8")
    halves = {"scales": stack.arrays["scales"].astype(jnp.float16)}
    others = {
        "rows": (stack, draw(2, (33, SIZE))),
        "one dtype": (stack, x.astype(jnp.bfloat16)),
        "a stack": (member(stack, 0, 0), x),
        "blocks": (stack_of("int8", block=SIZE), x),
        "double": (stack_of("nf4-double"), x),
        "float16": (dataclasses.replace(stack, arrays=stack.arrays | halves), x),
    }
    assert find_kernel(stack, x, (), {}) is not None
    for case, (other, rows) in others.items():
        assert find_kernel(other, rows, (), {}) is None, case


def test_products_that_the_compiler_refuses_in_kernels_have_none():
    """TPUs' kernels know no products of three passes, and bf16 has no more digits to multiply."""
    x, stack = draw(2, (ROWS, SIZE)), stack_of("int8")
    narrow, halves = x.astype(jnp.bfloat16), dataclasses.replace(stack, dtype=jnp.bfloat16)
    high, highest = ((precision,) * 2 for precision in (Precision.HIGH, Precision.HIGHEST))
    assert find_kernel(stack, x, (), {"precision": highest}) is not None
    assert find_kernel(halves, narrow, (), {"preferred_element_type": jnp.float32}) is not None
    assert find_kernel(stack, x, (), {"precision": high}) is None
    assert find_kernel(stack, x, (), {"precision": lax.DotAlgorithmPreset.F32_F32_F32}) is None
    assert find_kernel(halves, narrow, (), {"precision": highest}) is None
    assert find_kernel(stack, x, (), {"preferred_element_type": jnp.float16}) is None


def layers(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


@pytest.fixture(scope="module")
def adapted():
    rule = lj.LoraRule(targets=["w"], rank=3, alpha=5, in_axes=(1,), out_axes=(2,))
    return with_random_factors(lorafied({"w": stack_of("nf4")}, [rule]))


def kernels_in(fn, *args, on="tpu"):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(on,)).as_text().count("coded_rows")


def calls_in(fn, *args):
    names = (eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr))
    return list(names).count("few_rows")


def test_a_scan_over_layers_has_it_on_one_tpu(adapted):
    """Not with many rows, on a CPU, or on several TPUs."""
    forward, x = lj.adapt(layers), draw(2, (ROWS, 1, SIZE))
    assert kernels_in(forward, adapted, x) and not kernels_in(forward, adapted, x, on="cpu")
    assert calls_in(forward, adapted, x) == 1
    assert calls_in(forward, adapted, draw(2, (33, 1, SIZE))) == 0
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (adapted, x)
    )
    assert not kernels_in(forward, *shapes)


def test_its_values_are_the_product_s(adapted):
    """Runs the plain form."""
    forward, x = lj.adapt(layers), draw(2, (ROWS, 1, SIZE))
    merged = lj.quantized.dequantize(lj.merge(adapted))
    assert_close(forward(adapted, x), layers(merged, x), 1e-5)
    assert_close(jax.jit(forward)(adapted, x), layers(merged, x), 1e-5)


@pytest.mark.slow
def test_its_derivatives_are_the_product_s(adapted):
    """Differentiates both ways, and maps over rows alone, and over bases."""
    forward, x = lj.adapt(layers), draw(2, (ROWS, 1, SIZE))
    merged = lj.quantized.dequantize(lj.merge(adapted))
    adapter, base = lj.split(adapted)

    def loss(adapter, x):
        return jnp.sum(forward(lj.join(adapter, base), x) ** 2)

    def plain(adapter, x):
        tree = lj.join(adapter, base)
        return jnp.sum(layers(lj.quantized.dequantize(lj.merge(tree)), x) ** 2)

    grads, expected = (jax.grad(f, (0, 1))(adapter, x) for f in (loss, plain))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), grads, expected)
    tangents = (jax.tree.map(jnp.ones_like, adapter), jnp.ones_like(x))
    forwards, known = (jax.jvp(f, (adapter, x), tangents)[1] for f in (loss, plain))
    assert_close(forwards, known, 1e-5)
    several = draw(4, (2, ROWS, 1, SIZE))
    mapped = jax.vmap(forward, (None, 0))
    assert calls_in(mapped, adapted, several) == 1
    assert_close(mapped(adapted, several)[1], layers(merged, several[1]), 1e-5)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), adapted)
    assert_close(jax.vmap(forward)(twice, several)[1], layers(merged, several[1]), 1e-5)
