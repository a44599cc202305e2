"""Mixtures of experts on a mesh: tokens go to the devices that have their experts.

A device has its part of the experts, by the axis ``expert``, and their kernels stay where they are
along it. The tokens of the devices along the axis are gathered; each device computes those that its
experts are chosen for, and the sums go back to the tokens' devices. That sends what a layer's
tokens weigh, not what its experts do. A long batch goes by chunks, so that gathered tokens fit
in `CHUNK_BYTES`; an expert in codes is formed again for each chunk.

Along the other axes kernels are gathered, a layer at a time, and no token moves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.core.extend import varies_over
from lora_jax.core.names import SUMMED_OVER
from lora_jax.models.layers.placement import Mixture
from lora_jax.models.specs import AXES, BATCH
from lora_jax.sharding import sharding_for

CHUNK_BYTES = 2**30  # of a chunk's tokens, of all devices that share experts
_TOKENS = P(BATCH, "sequence")


class _Parts(NamedTuple):
    """The parts that a mesh's devices have of a mixture's arguments."""

    experts: int  # the devices that share the experts; 1 where each has them all
    specs: tuple[Any, ...]


def shared_out(mixed: Mixture, mesh: Mesh) -> Mixture:
    """Returns a mixture that each device of a mesh computes a part of, by ``mixed``.

    Where an axis of the mesh does not divide the tokens or the inner features, the compiler places
    what ``mixed`` computes. Where ``expert`` does not divide the experts, kernels are gathered over
    it, too.
    """

    def called(*args: Any) -> jax.Array:
        parts = _parts_of(args, mesh)
        leaves = zip(*(jax.tree.leaves(each) for each in (args, parts.specs)), strict=True)
        if not all(_fits(array.shape, spec, mesh) for array, spec in leaves):
            return mixed(*args)

        def apart(*args: Any) -> jax.Array:
            total: jax.Array = lax.psum(_exchanged(mixed, parts.experts, *args), "tensor")
            return total

        run = jax.shard_map(apart, mesh=mesh, in_specs=parts.specs, out_specs=_TOKENS)
        out: jax.Array = run(*args)
        return out

    return called


def _parts_of(args: tuple[Any, ...], mesh: Mesh) -> _Parts:
    *_, kernels, biases = args
    shares = mesh.shape["expert"]
    whole = kernels[0].shape[0] % shares != 0
    axis, n = None if whole else "expert", len(kernels) - 1
    of_kernels = (*[P(axis, None, "tensor")] * n, P(axis, "tensor"))
    of_biases = (*[P(axis, "tensor")] * n, P(axis)) if biases else ()
    specs = (_TOKENS, _TOKENS, _TOKENS, of_kernels, of_biases)
    return _Parts(1 if whole else shares, specs)


def _fits(shape: tuple[int, ...], spec: P, mesh: Mesh) -> bool:
    axes = (*spec, *[None] * (len(shape) - len(spec)))
    fitting = sharding_for(axes, shape, mesh)
    return NamedSharding(mesh, spec).is_equivalent_to(fitting, len(shape))


def _exchanged(
    mixed: Mixture,
    shares: int,
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    kernels: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
) -> jax.Array:
    """Returns a device's part of the sums of its tokens; see `shared_out`."""
    args = (x, weights, chosen, kernels, biases)
    x, weights, chosen, kernels, biases = jax.tree.map(_varying, args)
    if biases:  # the last is added to the sum once
        here = lax.axis_index("tensor") == 0
        biases = (*biases[:-1], jnp.where(here, biases[-1], 0))
    summed = checkpoint_name(kernels[-1], SUMMED_OVER + "tensor")
    kernels = (*kernels[:-1], summed)
    if shares == 1:
        return mixed(x, weights, chosen, kernels, biases)

    def through(x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
        tokens = [lax.all_gather(t, "expert", axis=0, tiled=True) for t in (x, weights, chosen)]
        own = kernels[0].shape[0]
        tokens[2] = tokens[2] - lax.axis_index("expert") * own
        sums = mixed(*tokens, kernels, biases, shares=shares)
        own_sums: jax.Array = lax.psum_scatter(sums, "expert", scatter_dimension=0, tiled=True)
        return own_sums

    n = _chunks(x, shares)
    return _apply_chunks(through, n, x, weights, chosen)


def _varying(array: jax.Array) -> jax.Array:
    """Returns an array typed to differ over all axes: devices add up its derivatives here, once.

    Further inside, they would add them for each chunk, and in turns that not all devices take: the
    others would wait for ever.
    """
    missing = tuple(sorted({*AXES} - varies_over(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def _chunks(x: jax.Array, shares: int) -> int:
    """Returns the number of chunks for a device's tokens, [batch, seq, d_model]."""
    size, seq = shares * x.size * x.dtype.itemsize, x.shape[1]
    divisors = [n for n in range(1, seq + 1) if seq % n == 0]
    return next((n for n in divisors if size <= n * CHUNK_BYTES), seq)


def _apply_chunks(fn: Callable[..., jax.Array], n: int, *tokens: jax.Array) -> jax.Array:
    """Returns a function's values of tokens, [batch, seq, …] each, by n chunks of the sequence."""
    if n == 1:
        return fn(*tokens)

    def body(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        return None, fn(*chunk)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], n, -1, *x.shape[2:]), 1, 0)

    body = jax.checkpoint(body, prevent_cse=False)
    _, values = lax.scan(body, None, tuple(map(cut, tokens)))
    return jnp.moveaxis(values, 0, 1).reshape(tokens[0].shape)
