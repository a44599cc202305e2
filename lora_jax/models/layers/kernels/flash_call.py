"""Calls the programs of flash attention, which `jax_triton` compiles.

A call is a primitive of its own. The first choice of an attention for a GPU lowers a program on
trial; where `jax_triton` is missing, or does not lower it, attention runs in plain JAX.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.extend import Primitive, batching, mlir

COMPILER = "jax_triton"  # the package that compiles the programs
_NOT_INSTALLED = (
    "jax-triton, which compiles the kernel, is not installed. "
    "Install lora_jax[gpu-kernels] with Python 3.12 or later"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptions:
    """The static options of a call: mask, scores, and block sizes."""

    causal: bool
    branched: bool = False
    scale: float
    cap: float | None
    queries: int
    keys: int


class FlashTokens(NamedTuple):
    """The mask's arrays: slots [queries], segments [batch, n], and the window, [1] int32."""

    slots: jax.Array
    queries: jax.Array
    keys: jax.Array
    window: jax.Array


def run_program(
    name: str,
    options: FlashOptions,
    bounds: tuple[jax.Array, jax.Array],
    tokens: FlashTokens,
    arrays: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """Runs a program on every block of queries or keys.

    Args:
      name: the program:

        - "flash_fwd" takes q, k, v; it returns the attention, and the logarithm to base 2 of the
          sum of weights of each query, [batch, heads, queries] in fp32.
        - "flash_dq" takes q, k, v, the cotangent of the attention, the logarithms, and the means of
          the cotangents of weights; it returns the gradient of q.
        - "flash_dkv" takes the same; it returns the gradients of k and v.
      options: the static facts of the call.
      bounds: the first block to visit and the one behind the last, [batch, blocks] int32.
      tokens: the mask's tokens.
      arrays: the program's arrays.
    """
    return tuple(_KERNEL.bind(*bounds, *tokens, *arrays, name=name, options=options))


@functools.cache
def missing_compiler() -> str | None:
    """Returns the reason why programs cannot be compiled for GPUs; None if they can.

    The reason is logged, once in a process.
    """
    reason = _NOT_INSTALLED
    if find_spec(COMPILER) is not None:
        # In a thread of its own, the trial is outside the caller's mesh and traces.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            problem = pool.submit(_try_lowering).result()
        if problem is None:
            return None
        reason = f"JAX {jax.__version__} does not compile the kernel ({COMPILER}: {problem})"
    logging.getLogger("lora_jax").warning(
        "Attention runs as 'blockwise', in plain JAX, in place of the faster 'flash'. %s.", reason
    )
    return reason


def _try_lowering() -> str | None:
    """Lowers a minimal call for a GPU, which need not exist; returns the error, or None."""
    q = jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.bfloat16)
    bounds = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    segments = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    slots = jax.ShapeDtypeStruct((16,), jnp.int32)
    window = jax.ShapeDtypeStruct((1,), jnp.int32)
    options = FlashOptions(causal=True, scale=1.0, cap=None, queries=16, keys=16)
    call = jax.jit(functools.partial(_KERNEL.bind, name="flash_fwd", options=options))
    try:
        device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = call.trace(bounds, bounds, slots, segments, segments, window, q, q, q)
            traced.lower(lowering_platforms=("cuda",))
    except Exception as error:  # another version of it fails in ways that nobody knows yet
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _run_triton(*operands: jax.Array, name: str, options: FlashOptions) -> Any:
    """Runs a Triton program."""
    # It imports `triton`, which is optional, and takes a second.
    flash_triton = importlib.import_module(f"{__package__}.flash_triton")
    results = _result_shapes(name, *operands[_N_MASK_OPERANDS : _N_MASK_OPERANDS + 2])
    return flash_triton.run_triton(*operands, name=name, options=options, results=results)


def _result_shapes(name: str, q: Any, k: Any) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a program's results; see `run_program`."""
    q_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    k_shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    if name == "flash_dq":
        return [q_shape]
    if name == "flash_dkv":
        return [k_shape, k_shape]
    batch, n_queries, n_heads, _ = q.shape
    return [q_shape, jax.ShapeDtypeStruct((batch, n_heads, n_queries), jnp.float32)]


_N_MASK_OPERANDS = 2 + len(FlashTokens._fields)  # operands before a program's arrays
_SLOTS, _WINDOW = 2, 5  # of those, the ones without a batch

_KERNEL = Primitive("flash_kernel")
_KERNEL.multiple_results = True


def _run_eagerly(*operands: jax.Array, **options: Any) -> Any:
    return jax.jit(functools.partial(_KERNEL.bind, **options))(*operands)


def _abstract_results(*operands: Any, name: str, options: FlashOptions) -> list[Any]:
    q, k, *_ = operands[_N_MASK_OPERANDS:]
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in _result_shapes(name, q, k)]


def _lower(ctx: Any, *operands: Any, **options: Any) -> Any:
    return mlir.lower_fun(_run_triton, multiple_results=True)(ctx, *operands, **options)


def _batch_calls(
    operands: Sequence[Any], axes: Sequence[int | None], **options: Any
) -> tuple[Any, Any]:
    """Runs a call under vmap, by merging the mapped axis into the batch."""
    n_calls = 0
    for operand, axis in zip(operands, axes, strict=True):
        if axis is not None:
            n_calls = operand.shape[axis]
    mapped = []  # operands with the calls on axis 0
    for operand, axis in zip(operands, axes, strict=True):
        if axis is None:
            mapped.append(jnp.broadcast_to(operand, (n_calls, *operand.shape)))
        else:
            mapped.append(jnp.moveaxis(operand, axis, 0))
    have_one_mask = axes[_SLOTS] is None and axes[_WINDOW] is None
    if not have_one_mask:  # the kernel takes one mask for all rows: one call after the other
        outs = lax.map(lambda call: _KERNEL.bind(*call, **options), mapped)
        return outs, [0] * len(outs)
    # The calls' rows become rows of one call.
    folded = [operand.reshape(-1, *operand.shape[2:]) for operand in mapped]
    folded[_SLOTS] = operands[_SLOTS]
    folded[_WINDOW] = operands[_WINDOW]
    folded_outs = _KERNEL.bind(*folded, **options)
    outs = [out.reshape(n_calls, -1, *out.shape[1:]) for out in folded_outs]
    return outs, [0] * len(outs)


_KERNEL.def_impl(_run_eagerly)
_KERNEL.def_abstract_eval(_abstract_results)
mlir.register_lowering(_KERNEL, _lower)
batching.primitive_batchers[_KERNEL] = _batch_calls
