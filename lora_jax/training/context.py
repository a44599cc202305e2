"""Shards attention on a mesh: by batch, by heads and, for long rows, by queries.

A row is cut into equal chunks along the axis ``sequence``. Keys and values are gathered over it, a
layer at a time: with grouped heads they are a fraction of the queries, and linear in the length.
Under a causal mask the last queries see the most keys. To balance the work, each device exchanges
half of its queries first, and its results afterwards: of 2n chunks, device i of n works on chunks
i and 2n - 1 - i, which together see 2n + 1 chunks, whatever i is. A split is paired where queries
are exchanged like this.
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

SEQUENCE_AXIS = "sequence"


def split_queries(seq: int, parts: int, *, causal: bool) -> Split | None:
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
    return Split(SEQUENCE_AXIS, parts, paired=causal and seq % (2 * parts) == 0)


def shard_attention(local: Attention, mesh: Mesh) -> Attention:
    """Returns attention that runs sharded on a mesh, with ``local`` on each device.

    Heads are sharded over the axis ``tensor``. If there are too few heads of keys and values, each
    is repeated for the devices that share it. An axis of the mesh that does not divide an axis of
    the arrays is not used there, and its devices repeat each other's work. Queries that look into a
    cache are not split.
    """

    def attend_mesh(*arguments: Any) -> jax.Array:
        """Computes attention on the mesh."""
        inputs = AttentionInputs(*arguments)
        n_queries, n_heads = inputs.q.shape[1:3]
        split = None
        # Queries that look into a cache are not split.
        if inputs.mask.aligned and n_queries == inputs.k.shape[1]:
            split = split_queries(n_queries, mesh.shape[SEQUENCE_AXIS], causal=inputs.mask.causal)
        head_devices = mesh.shape["tensor"]
        inputs = inputs._replace(
            k=_repeat_heads(inputs.k, n_heads, head_devices),
            v=_repeat_heads(inputs.v, n_heads, head_devices),
        )
        # A number stays a number, for kernels that need one: only an array goes to the devices.
        array_scale = inputs.scale if isinstance(inputs.scale, jax.Array) else None
        arrays = inputs._replace(scale=array_scale, cap=None)

        def attend_on_device(device_arrays: AttentionInputs) -> jax.Array:
            """Computes one device's part."""
            device_inputs = device_arrays._replace(cap=inputs.cap)
            if array_scale is None:
                device_inputs = device_inputs._replace(scale=inputs.scale)
            if split is None:
                return local(*device_inputs.arguments)
            return _attend_split(local, device_inputs, split)

        specs = _input_specs(arrays, split, mesh)
        # Kernels do not say over which axes of a mesh their results differ.
        run = jax.shard_map(
            attend_on_device, mesh=mesh, in_specs=(specs,), out_specs=specs.q, check_vma=False
        )
        return run(arrays)

    return attend_mesh


def _input_specs(arrays: AttentionInputs, split: Split | None, mesh: Mesh) -> AttentionInputs:
    """Returns the PartitionSpecs of attention's input arrays; None for missing arrays."""
    has_divisible_heads = arrays.k.shape[2] % mesh.shape["tensor"] == 0
    head_axis = "tensor" if has_divisible_heads else None
    query_axis = None if split is None else SEQUENCE_AXIS
    qkv_spec = sharding_for((BATCH, query_axis, head_axis, None), arrays.q.shape, mesh).spec

    def mask_spec(array: Any) -> P:
        """Returns the spec of a mask array, which is not split over queries."""
        if array.ndim != 2:
            return P()
        return sharding_for((BATCH, None), array.shape, mesh).spec

    specs: dict[str, Any] = {
        "q": qkv_spec,
        "k": qkv_spec,
        "v": qkv_spec,
        "mask": jax.tree.map(mask_spec, arrays.mask),
        "scale": None if arrays.scale is None else P(),
        "cap": None,
        "sinks": None if arrays.sinks is None else P(qkv_spec[2]),
    }
    return AttentionInputs(**specs)


def _attend_split(local: Attention, inputs: AttentionInputs, split: Split) -> jax.Array:
    """Returns the attention of this device's queries over all devices' keys."""
    # The mask's integers of all queries are on each device, which takes its own.
    queries = split.take(inputs.mask.queries)
    inputs = inputs._replace(
        k=lax.all_gather(inputs.k, SEQUENCE_AXIS, axis=1, tiled=True),
        v=lax.all_gather(inputs.v, SEQUENCE_AXIS, axis=1, tiled=True),
        mask=dataclasses.replace(inputs.mask, queries=queries, aligned=False, split=split),
    )
    if not split.paired:
        return local(*inputs.arguments)
    inputs = inputs._replace(q=_pair_chunks(inputs.q, split))
    return _unpair_chunks(local(*inputs.arguments), split)


def _repeat_heads(x: jax.Array, n_heads: int, head_devices: int) -> jax.Array:
    """Repeats key or value heads so that they divide among devices, if possible.

    Args:
      x: [batch, keys, kv_heads, head_dim].
      n_heads: the number of heads of queries.
      head_devices: the number of devices that share the heads.
    """
    kv_heads = x.shape[2]
    n_repeated_heads = math.lcm(kv_heads, head_devices)
    if n_heads % n_repeated_heads != 0:
        return x
    return jnp.repeat(x, n_repeated_heads // kv_heads, axis=2)


def _pair_chunks(x: jax.Array, split: Split) -> jax.Array:
    """Exchanges chunks so that device i has chunks i and 2n - 1 - i instead of 2i and 2i + 1.

    All even chunks go to different devices, and so do all odd ones.

    Args:
      x: [batch, queries, …], on a device.
    """
    even_chunk, odd_chunk = jnp.split(x, 2, axis=1)
    even_chunk = lax.ppermute(even_chunk, split.axis, _chunk_moves(split.parts, parity=0))
    odd_chunk = lax.ppermute(odd_chunk, split.axis, _chunk_moves(split.parts, parity=1))
    return _join_swapped(even_chunk, odd_chunk, split)


def _unpair_chunks(x: jax.Array, split: Split) -> jax.Array:
    """Reverses the exchange of ``_pair_chunks``."""
    lower_chunk, upper_chunk = jnp.split(x, 2, axis=1)
    chunks_by_parity = jnp.split(_join_swapped(lower_chunk, upper_chunk, split), 2, axis=1)
    own_chunks = []
    for parity, chunk in enumerate(chunks_by_parity):
        moves_back = [(end, start) for start, end in _chunk_moves(split.parts, parity)]
        own_chunks.append(lax.ppermute(chunk, split.axis, moves_back))
    return jnp.concatenate(own_chunks, axis=1)


def _join_swapped(left: jax.Array, right: jax.Array, split: Split) -> jax.Array:
    """Concatenates two chunks, in swapped order on odd devices."""
    is_odd_device = lax.axis_index(split.axis) % 2 == 1
    swapped = jnp.concatenate([right, left], axis=1)
    return jnp.where(is_odd_device, swapped, jnp.concatenate([left, right], axis=1))


def _chunk_moves(n_devices: int, parity: int) -> list[tuple[int, int]]:
    """Returns (owning device, working device) of all chunks of parity 0 (even) or 1 (odd)."""
    n_chunks = 2 * n_devices
    moves = []
    for device in range(n_devices):
        chunk = 2 * device + parity
        working_device = min(chunk, n_chunks - 1 - chunk)
        moves.append((device, working_device))
    return moves
