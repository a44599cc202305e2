"""Calls of the programs of flash attention, which `jax_triton` compiles.

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
_MISSING = (
    "jax-triton, which compiles the kernel, is not installed: "
    "Python 3.12 and the extra gpu-kernels have it"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashOptions:
    """The static facts of a call: the mask's, the scores', and the sizes of blocks."""

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


def run(
    name: str,
    how: FlashOptions,
    bounds: tuple[jax.Array, jax.Array],
    tokens: FlashTokens,
    arrays: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """Runs a program on every block.

    Args:
      name: the program:

        - "flash_fwd" takes q, k, v; it returns the attention, and the logarithm to base 2 of the
          sum of weights of each query, [batch, heads, queries] in fp32.
        - "flash_dq" takes q, k, v, the cotangent of the attention, the logarithms, and the means of
          the cotangents of weights; it returns the gradient of q.
        - "flash_dkv" takes the same; it returns the gradients of k and v.
      how: the static facts of the call.
      bounds: the first block to visit and the one behind the last, [batch, blocks] int32.
      tokens: the mask's tokens.
      arrays: the program's arrays.
    """
    return tuple(_KERNEL.bind(*bounds, *tokens, *arrays, name=name, how=how))


@functools.cache
def missing_compiler() -> str | None:
    """Returns the reason why no program is compiled for a GPU; None if they are.

    The reason is logged, once in a process.
    """
    reason = _MISSING
    if find_spec(COMPILER) is not None:
        # In a thread of its own, the trial is outside the caller's mesh and traces.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            problem = pool.submit(_try_lowering).result()
        if problem is None:
            return None
        reason = f"JAX {jax.__version__} does not compile the kernel ({COMPILER}: {problem})"
    logging.getLogger("lora_jax").warning(
        "attention 'flash' is replaced by 'blockwise', in plain JAX: %s", reason
    )
    return reason


def _try_lowering() -> str | None:
    """Lowers the smallest call for a GPU, which need not be there; returns the error, or None."""
    q = jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.bfloat16)
    bounds = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    segments = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    slots = jax.ShapeDtypeStruct((16,), jnp.int32)
    window = jax.ShapeDtypeStruct((1,), jnp.int32)
    how = FlashOptions(causal=True, scale=1.0, cap=None, queries=16, keys=16)
    call = jax.jit(functools.partial(_KERNEL.bind, name="flash_fwd", how=how))
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


def _run_triton(*operands: jax.Array, name: str, how: FlashOptions) -> Any:
    """Runs a program in Triton's language."""
    # It imports `triton`, which is optional, and takes a second.
    flash_triton = importlib.import_module(f"{__package__}.flash_triton")
    results = _results(name, *operands[_TOKENS : _TOKENS + 2])
    return flash_triton.run_triton(*operands, name=name, how=how, results=results)


def _results(name: str, q: Any, k: Any) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a program's results; see `run`."""
    q_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    k_shape = jax.ShapeDtypeStruct(k.shape, k.dtype)
    if name == "flash_dq":
        return [q_shape]
    if name == "flash_dkv":
        return [k_shape, k_shape]
    batch, n_queries, n_heads, _ = q.shape
    return [q_shape, jax.ShapeDtypeStruct((batch, n_heads, n_queries), jnp.float32)]


_TOKENS = 2 + len(FlashTokens._fields)  # operands before a program's arrays
_SLOTS, _WINDOW = 2, 5  # of those, the ones without a batch

_KERNEL = Primitive("flash_kernel")
_KERNEL.multiple_results = True


def _run_now(*operands: jax.Array, **how: Any) -> Any:
    return jax.jit(functools.partial(_KERNEL.bind, **how))(*operands)


def _abstract(*operands: Any, name: str, how: FlashOptions) -> list[Any]:
    q, k, *_ = operands[_TOKENS:]
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in _results(name, q, k)]


def _lower(ctx: Any, *operands: Any, **how: Any) -> Any:
    return mlir.lower_fun(_run_triton, multiple_results=True)(ctx, *operands, **how)


def _batch(operands: Sequence[Any], axes: Sequence[int | None], **how: Any) -> tuple[Any, Any]:
    """Runs a mapped call: its rows are further rows of one batch."""
    (n_calls, *_) = (
        operand.shape[axis]
        for operand, axis in zip(operands, axes, strict=True)
        if axis is not None
    )
    mapped = []  # operands with the calls on axis 0
    for operand, axis in zip(operands, axes, strict=True):
        if axis is None:
            mapped.append(jnp.broadcast_to(operand, (n_calls, *operand.shape)))
        else:
            mapped.append(jnp.moveaxis(operand, axis, 0))
    have_one_mask = axes[_SLOTS] is None and axes[_WINDOW] is None
    if not have_one_mask:
        outs = lax.map(lambda call: _KERNEL.bind(*call, **how), mapped)
        return outs, [0] * len(outs)
    folded = [operand.reshape(-1, *operand.shape[2:]) for operand in mapped]
    folded[_SLOTS] = operands[_SLOTS]
    folded[_WINDOW] = operands[_WINDOW]
    folded_outs = _KERNEL.bind(*folded, **how)
    outs = [out.reshape(n_calls, -1, *out.shape[1:]) for out in folded_outs]
    return outs, [0] * len(outs)


_KERNEL.def_impl(_run_now)
_KERNEL.def_abstract_eval(_abstract)
mlir.register_lowering(_KERNEL, _lower)
batching.primitive_batchers[_KERNEL] = _batch
