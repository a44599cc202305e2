"""Cases of products with quantized weights of each kind, and of the TPU kernels that decode them.

The codes stand for numbers of the dtype of x, so that only a result is rounded; on accelerators,
half a rounding more comes from the order of sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.cases.case import Case, normal
from lora_jax.core.base import StackMember, member
from lora_jax.core.few_rows import BaseDot, base_dot
from lora_jax.quantized import FORMATS, Coded, encode
from lora_jax.quantized.coded import host_array
from lora_jax.quantized.ragged import RaggedKernel, find_ragged_kernel
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


def run_kernel(kernel: RowsKernel | RaggedKernel, *operands: Any) -> jax.Array:
    """Returns the product of rows with a layer of a stack, by the kernel."""
    product: Callable[..., jax.Array] = kernel
    return product(*operands)


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

    The kernel is a function like `run_kernel`.
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


def ragged_cases(
    dtype: DTypeLike, *, n_in: int = 512, n_out: int = 384, sizes: Sequence[int] = (200, 0, 3, 97)
) -> list[Case]:
    """Returns a case for each kind of codes that the kernel for experts decodes.

    A case is the product of sorted rows, and the gradient of the rows. The kernel is a function
    like `run_kernel`.

    Args:
      dtype: the dtype of the rows; for other than bf16, there is no kernel.
      n_in, n_out: the sizes of an expert.
      sizes: the rows of each expert.
    """
    n_rows = sum(sizes)
    x = normal(2, (n_rows, n_in), dtype)
    cotangent = normal(3, (n_rows, n_out), dtype)
    cases = []
    for kind in KINDS:
        stack = _draw_codes(kind, (_LAYERS, len(sizes), n_in, n_out), dtype)
        ragged_kernel = find_ragged_kernel(member(stack, 0, _LAYER), x, (), {})
        if ragged_kernel is None:
            continue

        def compute(
            kernel: Any,
            stack: Any,
            x: Any,
            cotangent: Any,
            sizes: Any,
            _: Any,
            ragged_kernel: RaggedKernel = ragged_kernel,
        ) -> tuple[jax.Array, jax.Array]:
            place = StackMember(member(stack, 0, _LAYER), stack, jnp.int32(_LAYER))

            def multiply(rows: jax.Array, transposed: bool) -> jax.Array:
                result: jax.Array = kernel(
                    ragged_kernel, place.member, place, rows, sizes, transposed
                )
                return result

            return multiply(x, False), multiply(cotangent, True)

        def compute_dense(
            _: Any, x: jax.Array, cotangent: jax.Array, sizes: jax.Array, dense: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            experts = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=n_rows)
            is_chosen = jax.nn.one_hot(experts, sizes.size)  # [rows, experts]
            x, cotangent = (array.astype(jnp.float32) for array in (x, cotangent))
            out = jnp.einsum("re,ri,eio->ro", is_chosen, x, dense[_LAYER])
            gradient = jnp.einsum("re,ro,eio->ri", is_chosen, cotangent, dense[_LAYER])
            return out, gradient

        cases.append(
            Case(
                name=f"quantized experts: {kind}, {jnp.dtype(dtype).name}",
                arrays=(stack, x, cotangent, np.asarray(sizes, np.int32), _decode_in_numpy(stack)),
                compute=compute,
                reference=compute_dense,
                dtype=dtype,
                roundings=_ROUNDINGS,
                terms=max(n_in, n_out),
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
