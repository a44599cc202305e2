"""Cases of products with quantized weights of each kind, and of the kernel for few rows.

The codes stand for numbers of the dtype of x, so that only a result is rounded; on accelerators,
half a rounding more comes from the order of sums.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.cases.case import Case, normal
from lora_jax.core.few_rows import BaseDot, base_dot
from lora_jax.quantized import FORMATS, Coded, encode
from lora_jax.quantized.coded import host_array
from lora_jax.quantized.rows import RowsKernel, find_kernel

_ROUNDINGS = 2
_LAYERS, _LAYER = 3, 1  # the layers of a stack, and the one that is multiplied
_FEW_ROWS = 5
# Kinds of codes that a run makes, or reads from files.
KINDS = ("nf4", "int8", "int4", "nf4-double", "q8_0", "q4_0", "q4_1", "q6_k", "fp8", "mxfp4")
# (product of x [rows, in] and codes of [in, out]) -> [rows, out]
Product = Callable[[jax.Array, Coded], jax.Array]


def multiply_coded(x: jax.Array, coded: Coded) -> jax.Array:
    """Returns x times the weights, as adapted models compute it."""
    return base_dot(x, coded, BaseDot(contract=((x.ndim - 1,), (0,))))


def run_rows_kernel(kernel: RowsKernel, stack: Coded, index: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x times a layer of a stack, by the kernel."""
    return kernel(stack, index, x)


def product_cases(
    dtype: DTypeLike, *, rows: int = 512, n_in: int = 1024, n_out: int = 384
) -> list[Case]:
    """Returns a case for each kind of codes; the kernel is a `Product`."""
    x = normal(2, (rows, n_in), dtype)
    cotangent = normal(3, (rows, n_out), jnp.bfloat16).astype(np.float32)

    def values_and_gradient(
        product: Callable[..., jax.Array], x: jax.Array, cotangent: jax.Array, weights: Any
    ) -> tuple[jax.Array, jax.Array]:
        def weighted_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = product(x, weights).astype(jnp.float32)
            return jnp.sum(out * cotangent), out

        (_, out), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(x)
        return out, gradient

    def compute(product: Product, x: Any, cotangent: Any, coded: Any, _: Any) -> Any:
        return values_and_gradient(product, x, cotangent, coded)

    def compute_dense(x: jax.Array, cotangent: Any, _: Any, dense: Any) -> Any:
        return values_and_gradient(jnp.matmul, x.astype(jnp.float32), cotangent, dense)

    cases = []
    for kind in KINDS:
        coded = _draw_codes(kind, (n_in, n_out), dtype)
        cases.append(
            Case(
                name=f"product: {kind}, {jnp.dtype(dtype).name}",
                arrays=(x, cotangent, coded, _decode_in_numpy(coded)),
                compute=compute,
                reference=compute_dense,
                dtype=dtype,
                roundings=_ROUNDINGS,
                terms=n_in,
            )
        )
    return cases


def few_rows_cases(dtype: DTypeLike, *, n_in: int = 1024, n_out: int = 384) -> list[Case]:
    """Returns a case for each kind of codes that the kernel for few rows decodes.

    The kernel is a function like `run_rows_kernel`.
    """
    x = normal(2, (_FEW_ROWS, n_in), dtype)
    cases = []
    for kind in KINDS:
        stack = _draw_codes(kind, (_LAYERS, n_in, n_out), dtype)
        rows_kernel = find_kernel(stack, x, (), {})
        if rows_kernel is None:
            continue

        def compute(
            kernel: Any, stack: Any, x: Any, _: Any, rows_kernel: RowsKernel = rows_kernel
        ) -> jax.Array:
            result: jax.Array = kernel(rows_kernel, stack, jnp.int32(_LAYER), x)
            return result

        def compute_dense(_: Any, x: jax.Array, dense: jax.Array) -> jax.Array:
            return x.astype(jnp.float32) @ dense[_LAYER]

        cases.append(
            Case(
                name=f"few rows: {kind}, {jnp.dtype(dtype).name}",
                arrays=(stack, x, _decode_in_numpy(stack)),
                compute=compute,
                reference=compute_dense,
                dtype=dtype,
                roundings=_ROUNDINGS,
                terms=n_in,
            )
        )
    return cases


def _draw_codes(kind: str, shape: tuple[int, ...], dtype: DTypeLike) -> Coded:
    """Returns codes that stand for random weights of a shape, [layers…, in, out]."""
    format = FORMATS[kind]
    weights = normal(1, shape) / np.float32(np.sqrt(shape[-2]))
    if kind == "fp8":
        blocks = (*shape[:-2], *(size // format.block for size in shape[-2:]))
        scales = np.abs(normal(4, blocks))
        codes = weights.astype(jnp.float8_e4m3fn).view(np.uint8)
        return Coded({"codes": jnp.asarray(codes), "scales": jnp.asarray(scales)}, format, dtype)
    if kind == "mxfp4":
        rng = np.random.default_rng(5)
        blocks = (*shape[:-2], shape[-2] // format.block, shape[-1])
        codes = rng.integers(-8, 8, shape, np.int8).astype(jnp.int4)
        scales = rng.integers(120, 124, blocks, np.uint8)
        return Coded({"codes": jnp.asarray(codes), "scales": jnp.asarray(scales)}, format, dtype)
    encoded = encode(jnp.asarray(weights, dtype), "q4_0" if kind == "q4_1" else kind)
    if kind != "q4_1":
        return encoded
    mins = normal(4, encoded.arrays["scales"].shape, encoded.arrays["scales"].dtype) / 100
    return Coded({**encoded.arrays, "mins": jnp.asarray(mins)}, format, dtype)


def _decode_in_numpy(coded: Coded) -> np.ndarray:
    """Returns the weights, rounded to their dtype, as fp32."""
    weights = host_array(jax.device_get(coded))
    return weights.astype(coded.dtype).astype(np.float32)
