"""Attention on a mesh: each device has its own batch, heads and, of a long row, queries.

A row is cut into equal chunks along the axis ``sequence``. Keys and values are gathered over it, a
layer at a time: with grouped heads they are a fraction of the queries, and linear in the length.
Under a causal mask the last queries see the most keys. To balance the work, each device exchanges
half of its queries first, and its results afterwards: of 2n chunks, device i of n works on chunks
i and 2n - 1 - i, which together see 2n + 1 chunks, whatever i is.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.masks import Split
from lora_jax.models.layers.placement import Attention
from lora_jax.models.specs import BATCH
from lora_jax.sharding import sharding_for

AXIS = "sequence"


def split_of(seq: int, parts: int, *, causal: bool) -> Split | None:
    """Returns the split of queries over devices.

    Args:
      seq: the number of queries. Where it is no multiple of 2 ``parts``, none are exchanged; where
        it is no multiple of ``parts``, each device has them all.
      parts: the number of devices along the axis.
      causal: whether the mask is, so that later queries see more keys.

    Returns:
      None where the queries are not split.
    """
    if parts == 1 or seq % parts:
        return None
    return Split(AXIS, parts, paired=causal and seq % (2 * parts) == 0)


def shared_out(local: Attention, mesh: Mesh) -> Attention:
    """Returns attention that each device of a mesh computes a part of, by ``local``.

    Heads are sharded over the axis ``tensor``: where keys and values have too few, each is repeated
    for the devices that share it. An axis of the mesh that does not divide an axis of the arrays is
    left out there, and its devices repeat each other's work. Queries that look into a cache are
    not split.
    """

    def attend_mesh(*arguments: Any) -> jax.Array:
        q, k, v, mask, scale, cap, sinks = AttentionInputs(*arguments)
        split = None
        if mask.aligned and q.shape[1] == k.shape[1]:
            split = split_of(q.shape[1], mesh.shape[AXIS], causal=mask.causal)
        k, v = (_repeated(x, q.shape[2], mesh.shape["tensor"]) for x in (k, v))
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        axes = (BATCH, AXIS if split else None, heads, None)
        of_arrays = sharding_for(axes, q.shape, mesh).spec
        # A number stays a number, for kernels that need one.
        given = scale if isinstance(scale, jax.Array) else None

        def attend_part(inputs: AttentionInputs) -> jax.Array:
            inputs = inputs._replace(scale=scale if given is None else inputs.scale, cap=cap)
            if split is None:
                return local(*inputs.arguments)
            queries = split.take(inputs.mask.queries)
            mask = dataclasses.replace(inputs.mask, queries=queries, aligned=False, split=split)
            k, v = (lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (inputs.k, inputs.v))
            inputs = inputs._replace(k=k, v=v, mask=mask)
            if not split.paired:
                return local(*inputs.arguments)
            paired = inputs._replace(q=_pair_chunks(inputs.q, split))
            return _unpair_chunks(local(*paired.arguments), split)

        # A mask has a few integers per token: a device has those of all queries, and takes its own.
        of_mask = jax.tree.map(
            lambda x: sharding_for((BATCH, None), x.shape, mesh).spec if x.ndim == 2 else P(), mask
        )
        of_sinks = None if sinks is None else P(of_arrays[2])
        arrays = AttentionInputs(q, k, v, mask, given, None, sinks)
        of_scale = None if given is None else P()
        of_inputs = [of_arrays, of_arrays, of_arrays, of_mask, of_scale, None, of_sinks]
        specs = AttentionInputs._make(of_inputs)
        # Kernels do not say over which axes of a mesh their results differ.
        run = jax.shard_map(
            attend_part, mesh=mesh, in_specs=(specs,), out_specs=of_arrays, check_vma=False
        )
        return run(arrays)

    return attend_mesh


def _repeated(x: jax.Array, heads: int, devices: int) -> jax.Array:
    """Returns keys or values with as many heads as devices can share, if that is possible.

    Args:
      x: [batch, keys, kv_heads, head_dim].
      heads: the number of heads of queries.
      devices: the number of devices that share the heads.
    """
    needed = math.lcm(x.shape[2], devices)
    return x if heads % needed else jnp.repeat(x, needed // x.shape[2], axis=2)


def _pair_chunks(x: jax.Array, split: Split) -> jax.Array:
    """Exchanges chunks: device i has chunks 2i and 2i + 1 of 2n, and gets i and 2n - 1 - i.

    All even chunks go to different devices, and so do all odd ones.

    Args:
      x: [batch, queries, …], on a device.
    """
    even, odd = (
        lax.ppermute(half, split.axis, _homes(split.parts, parity))
        for parity, half in enumerate(jnp.split(x, 2, axis=1))
    )
    return _ordered(even, odd, split)


def _unpair_chunks(x: jax.Array, split: Split) -> jax.Array:
    """Exchanges chunks back; see ``_pair_chunks``."""
    first, last = jnp.split(x, 2, axis=1)
    halves = jnp.split(_ordered(first, last, split), 2, axis=1)  # the even chunk, the odd one
    back = [
        lax.ppermute(
            half, split.axis, [(there, here) for here, there in _homes(split.parts, parity)]
        )
        for parity, half in enumerate(halves)
    ]
    return jnp.concatenate(back, axis=1)


def _ordered(one: jax.Array, other: jax.Array, split: Split) -> jax.Array:
    """Joins two chunks; odd devices, whose first chunk is an odd one, put `other` first."""
    swapped = lax.axis_index(split.axis) % 2 == 1
    return jnp.where(
        swapped, jnp.concatenate([other, one], axis=1), jnp.concatenate([one, other], axis=1)
    )


def _homes(parts: int, parity: int) -> list[tuple[int, int]]:
    """Returns, for each device, the device that works on its even (0) or odd (1) chunk."""
    chunks = [(device, 2 * device + parity) for device in range(parts)]
    return [(device, min(chunk, 2 * parts - 1 - chunk)) for device, chunk in chunks]
