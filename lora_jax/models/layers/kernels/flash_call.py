"""Calls of the programs of flash attention: their grids and blocks, and how JAX compiles them.

Up to JAX 0.10, Pallas compiles them by its backend for Triton, which is deprecated since. From 0.11
on a call is a primitive of its own, and a program is lowered once on trial: in Triton's language by
`jax_triton`, where that is installed; or else by Pallas, whose warning is left out; and where that
is gone, attention runs in plain JAX.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lora_jax.core.extend import Primitive, batching, mlir
from lora_jax.models.layers.kernels import flash_programs as programs
from lora_jax.models.layers.kernels.flash_programs import FlashOptions

_DEPRECATION = "The Pallas Triton backend is deprecated"  # the beginning of JAX's warning
_BEFORE_IT = jax.__version_info__ < (0, 11)


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
    operands = (*bounds, *tokens, *arrays)
    if how.interpret or _BEFORE_IT:
        return tuple(_run_pallas(*operands, name=name, how=how))
    return tuple(_KERNEL.bind(*operands, name=name, how=how, way=_backend().run))


def missing_backend() -> str | None:
    """Returns the reason why JAX compiles no program for a GPU; None if it does.

    The reason is logged, once in a process.
    """
    return None if _BEFORE_IT else _backend().missing


def backend_name() -> str | None:
    """Returns the name of what compiles programs for GPUs, "jax_triton" or "Pallas"; else None."""
    return "Pallas" if _BEFORE_IT else _backend().name


class _Backend(NamedTuple):
    """A function that runs a program in a way that JAX compiles for GPUs, or why there is none."""

    run: Callable[..., Any]
    name: str | None = None
    missing: str | None = None


@functools.cache
def _backend() -> _Backend:
    """Returns the first backend whose trial succeeds."""
    reasons: list[str] = []
    ways: dict[str, Callable[..., Any]] = {"jax_triton": _run_triton, "Pallas": _run_pallas}
    for name, way in ways.items():
        problem = _try_apart(way)
        if problem is None:
            return _Backend(way, name)
        reasons.append(f"{name}: {problem}")
    reason = f"JAX {jax.__version__} does not compile the kernel ({'; '.join(reasons)})"
    logging.getLogger("lora_jax").warning(
        "attention 'flash' is replaced by 'blockwise', in plain JAX: %s", reason
    )
    return _Backend(_run_pallas, None, reason)


def _try_apart(way: Callable[..., Any]) -> str | None:
    """Tries a backend in a thread of its own, outside the caller's mesh and traces."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_try_lowering, way).result()


def _try_lowering(way: Callable[..., Any]) -> str | None:
    """Lowers the smallest call for a GPU, which need not be there; returns the error, or None."""
    q = jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.bfloat16)
    row, one = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (16, 1))
    slots, window = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (16, 1))
    how = FlashOptions(causal=True, scale=1.0, cap=None, queries=16, keys=16, interpret=False)
    call = jax.jit(functools.partial(_KERNEL.bind, name="flash_fwd", how=how, way=way))
    try:
        device = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = call.trace(one, one, slots, row, row, window, q, q, q)
            traced.lower(lowering_platforms=("cuda",))
    except Exception as error:  # a backend that is gone fails in ways that nobody knows yet
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def _run_triton(*operands: jax.Array, name: str, how: FlashOptions) -> Any:
    """Runs a program in Triton's language."""
    # It imports `triton`, which is optional, and takes a second.
    flash_triton = importlib.import_module(f"{__package__}.flash_triton")
    results = _results(name, *operands[_TOKENS : _TOKENS + 2])
    return flash_triton.run_triton(*operands, name=name, how=how, results=results)


def _run_pallas(*operands: jax.Array, name: str, how: FlashOptions) -> Any:
    """Runs a program by Pallas."""
    q, k, *_ = operands[_TOKENS:]
    program, layout_of = _PROGRAMS[name]
    call = _Blocks(how, q, k)
    grid, ins, outs = layout_of(call)
    bound = pl.BlockSpec((None, None), lambda i, h, b: (b, i))
    whole = [
        pl.BlockSpec((call.queries,), lambda i, h, b: (0,)),
        pl.BlockSpec((None, call.queries), lambda i, h, b: (b, 0)),
        pl.BlockSpec((None, call.keys), lambda i, h, b: (b, 0)),
        pl.BlockSpec((1,), lambda i, h, b: (0,)),
    ]
    return pl.pallas_call(
        functools.partial(program, how, call.head_dim),
        grid=grid,
        in_specs=[bound, bound, *whole, *ins],
        out_specs=outs,
        out_shape=_results(name, q, k),
        compiler_params=programs.triton.CompilerParams(
            num_warps=4 if call.width <= 64 else 8, num_stages=2
        ),
        interpret=how.interpret,
        name=name,
    )(*operands)


def _results(name: str, q: Any, k: Any) -> list[jax.ShapeDtypeStruct]:
    batch, queries, heads, _ = q.shape
    like_q, like_k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k))
    if name == "flash_fwd":
        return [like_q, jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)]
    return [like_q] if name == "flash_dq" else [like_k, like_k]


class _Blocks:
    """The grids and the blocks of a call: programs are (block, head, row of the batch).

    Attributes:
      of_queries, of_keys: the grids over blocks of queries of a head, and over blocks of keys.
      block: a block of queries of a head; block_statistics: their numbers in fp32.
      row: all keys of the head that a head of queries looks at.
      key_block: a block of keys of a head.
      group: all queries of the heads that look at a head of keys; group_statistics: their numbers.
    """

    def __init__(self, how: FlashOptions, q: jax.Array, k: jax.Array) -> None:
        batch, queries, heads, head_dim = q.shape
        keys, kv_heads = k.shape[1:3]
        group, width = heads // kv_heads, max(16, pl.next_power_of_2(head_dim))
        self.queries, self.keys = queries, keys
        self.head_dim, self.width = head_dim, width
        self.of_queries = (queries // how.queries, heads, batch)
        self.of_keys = (keys // how.keys, kv_heads, batch)
        self.block = pl.BlockSpec((None, how.queries, None, width), lambda i, h, b: (b, i, h, 0))
        self.row = pl.BlockSpec((None, keys, None, width), lambda i, h, b: (b, 0, h // group, 0))
        self.key_block = pl.BlockSpec((None, how.keys, None, width), lambda i, h, b: (b, i, h, 0))
        self.group = pl.BlockSpec((None, queries, group, width), lambda i, h, b: (b, 0, h, 0))
        self.block_statistics = pl.BlockSpec((None, None, how.queries), lambda i, h, b: (b, h, i))
        self.group_statistics = pl.BlockSpec((None, group, queries), lambda i, h, b: (b, h, 0))


def _forward(call: _Blocks) -> Any:
    ins = [call.block, call.row, call.row]
    return call.of_queries, ins, [call.block, call.block_statistics]


def _query_gradient(call: _Blocks) -> Any:
    ins = [call.block, call.row, call.row, call.block]
    return call.of_queries, [*ins, call.block_statistics, call.block_statistics], [call.block]


def _key_value_gradients(call: _Blocks) -> Any:
    ins = [call.group, call.key_block, call.key_block, call.group]
    outs = [call.key_block, call.key_block]
    return call.of_keys, [*ins, call.group_statistics, call.group_statistics], outs


# Name -> the program, and its grid with the blocks of its arrays and of its results.
_PROGRAMS: dict[str, tuple[Callable[..., None], Callable[[_Blocks], Any]]] = {
    "flash_fwd": (programs.forward, _forward),
    "flash_dq": (programs.query_gradient, _query_gradient),
    "flash_dkv": (programs.key_value_gradients, _key_value_gradients),
}
_TOKENS = 2 + len(FlashTokens._fields)  # operands before a program's arrays
_SLOTS, _WINDOW = 2, 5  # of those, the ones without a batch

_KERNEL = Primitive("flash_kernel")
_KERNEL.multiple_results = True


def _run_now(*operands: jax.Array, **how: Any) -> Any:
    return jax.jit(functools.partial(_KERNEL.bind, **how))(*operands)


def _abstract(*operands: Any, name: str, how: FlashOptions, way: Any) -> list[Any]:
    q, k, *_ = operands[_TOKENS:]
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in _results(name, q, k)]


def _lower(ctx: Any, *operands: Any, way: Callable[..., Any], **how: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _DEPRECATION, DeprecationWarning)
        return mlir.lower_fun(way, multiple_results=True)(ctx, *operands, **how)


def _batch(operands: Sequence[Any], axes: Sequence[int | None], **how: Any) -> tuple[Any, Any]:
    """Runs a mapped call: its rows are further rows of one batch."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    mapped = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    if axes[_SLOTS] is None and axes[_WINDOW] is None:
        folded = [x.reshape(-1, *x.shape[2:]) for x in mapped]
        folded[_SLOTS], folded[_WINDOW] = operands[_SLOTS], operands[_WINDOW]
        outs = [x.reshape(size, -1, *x.shape[1:]) for x in _KERNEL.bind(*folded, **how)]
    else:
        outs = lax.map(lambda rows: _KERNEL.bind(*rows, **how), mapped)
    return outs, [0] * len(outs)


_KERNEL.def_impl(_run_now)
_KERNEL.def_abstract_eval(_abstract)
mlir.register_lowering(_KERNEL, _lower)
batching.primitive_batchers[_KERNEL] = _batch
