"""Products of few rows with codes, as decoding has them: a form of their own on TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.core.base import as_array
from lora_jax.core.few_rows import MAX_FEW_ROWS, BaseDot, base_dot, flat_dot
from lora_jax.quantized import FORMATS, Coded, encode
from lora_jax.quantized.gguf import from_gguf
from tests.support import array, assert_close, draw

N_IN, N_OUT = 96, 10
ENCODED = ("int8", "int4", "nf4", "nf4-double", "q8_0", "q4_0")
ONE = BaseDot(((2,), (0,)))


def kernel(name):
    """A kernel in codes; with minima, of a GGUF file's bytes."""
    if name in ENCODED:
        format = dataclasses.replace(FORMATS[name], block=32)
        return encode(draw(1, (N_IN, N_OUT), jnp.float32), format)
    if name == "mxfp4":
        values = np.random.default_rng(0).integers(-8, 8, (N_IN, N_OUT), dtype=np.int8)
        exponents = np.arange(3 * N_OUT, dtype=np.uint8).reshape(3, N_OUT) // 4 + 120
        arrays = {"codes": array(values, jnp.int4), "scales": array(exponents)}
        return Coded(arrays, FORMATS[name], jnp.float32)
    raw = np.random.default_rng(0).integers(0, 256, (N_OUT * N_IN // 32, 20), dtype=np.uint8)
    raw[:, :4] = np.array([0.01, -0.07], np.float16).view(np.uint8)  # a scale and a minimum
    return jax.tree.map(lambda x: array(x.T), from_gguf(raw, name, (N_OUT, N_IN)))


FORMATS_READ = [*ENCODED, "mxfp4", "Q4_1"]


@pytest.mark.parametrize("name", FORMATS_READ)
def test_the_form_for_tpus_is_the_product(name):
    """Compares one row and nine, and the derivative, with the product in NumPy."""
    coded = kernel(name)
    assert isinstance(coded, Coded)
    whole = np.asarray(as_array(coded), np.float64)

    @jax.jit
    def value_and_derivative(coded, x, up):
        out, pull = jax.vjp(functools.partial(flat_dot, ONE, coded), x)
        return out, pull(up)[0]

    for rows in (1, 9):
        x, up = draw(2, (rows, 1, N_IN)), draw(3, (rows, 1, N_OUT))
        out, derivative = value_and_derivative(coded, x, up)
        assert_close(out, (np.asarray(x, np.float64) @ whole).astype(np.float32), 1e-6)
        assert_close(derivative, (np.asarray(up) @ whole.T).astype(np.float32), 1e-6)


def test_several_axes_are_contracted():
    coded = encode(draw(1, (3, 32, 5, 7), jnp.float32), "int8", None)
    x = draw(2, (2, 1, 3, 32), jnp.float32)
    how = BaseDot(((2, 3), (0, 1)))
    dims = (how.contract, how.batch)

    @jax.jit
    def both(coded, x):
        return flat_dot(how, coded, x), lax.dot_general(x, as_array(coded), dims)

    assert_close(*both(coded, x), 1e-6)


def texts(rows, how=ONE, base=None):
    """Returns the programs that are lowered for a CPU and for a TPU."""
    coded = kernel("int8") if base is None else base
    x = jax.ShapeDtypeStruct((rows, 1, N_IN), jnp.float32)
    traced = jax.jit(functools.partial(base_dot, spec=how)).trace(x, coded)
    return [traced.lower(lowering_platforms=(on,)).as_text() for on in ("cpu", "tpu")]


def test_few_rows_have_it_on_tpus_alone():
    """Many rows, an array, and a product with W in front are as before."""
    (_, formed), (cpu, tpu) = texts(MAX_FEW_ROWS + 1), texts(MAX_FEW_ROWS)
    barriers = formed.count("optimization_barrier")
    assert barriers == 1  # before the product reads the scales
    assert "optimization_barrier" not in cpu
    assert tpu.count("optimization_barrier") > barriers
    array, first = as_array(kernel("int8")), BaseDot(((2,), (0,)), weight_first=True)
    assert "optimization_barrier" not in texts(MAX_FEW_ROWS, base=array)[1]
    assert texts(MAX_FEW_ROWS, first)[1].count("optimization_barrier") == barriers
