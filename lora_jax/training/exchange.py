"""Mixtures of experts on a mesh: tokens are sent to the devices that hold their experts.

A device has its part of the experts, by the axis ``expert``, and their kernels stay where they are
along it. The tokens of the devices along the axis are gathered; each device computes those that its
experts are chosen for, and the sums go back to the tokens' devices. That sends what a layer's
tokens weigh, not what its experts do. A long batch goes by chunks, so that gathered tokens fit
in `CHUNK_BYTES`; a quantized expert is formed again for each chunk.

A mixture's arguments are tokens, their experts' weights and numbers, kernels and biases; see
`lora_jax.models.layers.placement.Mixture`. The number of expert shards is the number of devices
that divide the experts among them.

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

from lora_jax.core.extend import varying_mesh_axes
from lora_jax.core.names import SUMMED_OVER
from lora_jax.models.layers.placement import Mixture
from lora_jax.models.specs import AXES, BATCH
from lora_jax.sharding import sharding_for

CHUNK_BYTES = 2**30  # of a chunk's tokens, of all devices that share experts
_TOKENS_SPEC = P(BATCH, "sequence")


class _MixtureSpecs(NamedTuple):
    """The shardings of a mixture's arguments on a mesh.

    Attributes:
      expert_shards: the number of devices that divide the experts; 1 where each has them all.
      arguments: the specs of the arguments, in their order.
    """

    expert_shards: int
    arguments: tuple[Any, ...]


def shard_experts(mixed: Mixture, mesh: Mesh) -> Mixture:
    """Returns a mixture that runs sharded on a mesh, with ``mixed`` on each device.

    Where an axis of the mesh does not divide the tokens or the inner features, the compiler places
    what ``mixed`` computes. Where ``expert`` does not divide the experts, kernels are gathered over
    it, too.
    """

    def mix_on_mesh(*args: Any) -> jax.Array:
        """Computes the mixture on the mesh."""
        specs = _mixture_specs(args, mesh)
        arrays = jax.tree.leaves(args)
        array_specs = jax.tree.leaves(specs.arguments)
        is_divisible = all(
            _divides_evenly(array.shape, spec, mesh)
            for array, spec in zip(arrays, array_specs, strict=True)
        )
        if not is_divisible:
            return mixed(*args)

        def mix_on_device(*device_args: Any) -> jax.Array:
            device_sums = _mix_shards(mixed, specs.expert_shards, *device_args)
            sums: jax.Array = lax.psum(device_sums, "tensor")
            return sums

        run = jax.shard_map(
            mix_on_device, mesh=mesh, in_specs=specs.arguments, out_specs=_TOKENS_SPEC
        )
        out: jax.Array = run(*args)
        return out

    return mix_on_mesh


def _mixture_specs(args: tuple[Any, ...], mesh: Mesh) -> _MixtureSpecs:
    """Returns the PartitionSpecs of a mixture's arguments."""
    *_, kernels, biases = args
    n_experts = kernels[0].shape[0]
    expert_shards = mesh.shape["expert"]
    expert_axis: str | None = "expert"
    if n_experts % expert_shards != 0:
        expert_axis = None
        expert_shards = 1
    # The last kernel is the down projection. The inner features are its input, and the others'
    # output.
    n_up_kernels = len(kernels) - 1
    kernel_specs = (P(expert_axis, None, "tensor"),) * n_up_kernels + (P(expert_axis, "tensor"),)
    bias_specs: tuple[P, ...] = ()
    if biases:
        bias_specs = (P(expert_axis, "tensor"),) * n_up_kernels + (P(expert_axis),)
    return _MixtureSpecs(
        expert_shards, (_TOKENS_SPEC, _TOKENS_SPEC, _TOKENS_SPEC, kernel_specs, bias_specs)
    )


def _divides_evenly(shape: tuple[int, ...], spec: P, mesh: Mesh) -> bool:
    """Returns True if a spec's mesh axes evenly divide a shape."""
    missing_axes = (None,) * (len(shape) - len(spec))
    possible_sharding = sharding_for((*spec, *missing_axes), shape, mesh)
    return NamedSharding(mesh, spec).is_equivalent_to(possible_sharding, len(shape))


def _mix_shards(
    mixed: Mixture,
    expert_shards: int,
    x: jax.Array,
    weights: jax.Array,
    expert_indices: jax.Array,
    kernels: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
) -> jax.Array:
    """Returns this device's contribution to its tokens' sums; see `shard_experts`."""
    args = (x, weights, expert_indices, kernels, biases)
    x, weights, expert_indices, kernels, biases = jax.tree.map(_vary_over_all_axes, args)
    if biases:
        # Devices along "tensor" are summed later: only the first one adds the last bias.
        is_first_device = lax.axis_index("tensor") == 0
        last_bias = jnp.where(is_first_device, biases[-1], 0)
        biases = (*biases[:-1], last_bias)
    down_kernel = checkpoint_name(kernels[-1], SUMMED_OVER + "tensor")
    kernels = (*kernels[:-1], down_kernel)
    if expert_shards == 1:
        return mixed(x, weights, expert_indices, kernels, biases)

    def mix_gathered(x: jax.Array, weights: jax.Array, expert_indices: jax.Array) -> jax.Array:
        """Gathers the tokens of all shards; returns the sums of this device's tokens."""
        all_x, all_weights, all_indices = (
            lax.all_gather(array, "expert", axis=0, tiled=True)
            for array in (x, weights, expert_indices)
        )
        device_experts = kernels[0].shape[0]
        local_indices = all_indices - lax.axis_index("expert") * device_experts
        sums = mixed(all_x, all_weights, local_indices, kernels, biases, shares=expert_shards)
        own_sums: jax.Array = lax.psum_scatter(sums, "expert", scatter_dimension=0, tiled=True)
        return own_sums

    n_chunks = _number_of_chunks(x, expert_shards)
    return _apply_chunks(mix_gathered, n_chunks, x, weights, expert_indices)


def _vary_over_all_axes(array: jax.Array) -> jax.Array:
    """Marks an array as varying over all devices, so that its gradient is summed once.

    Further inside, the devices would sum them for each chunk, in loops that some devices do not
    run. The other devices would wait forever.
    """
    unvaried_axes = tuple(sorted({*AXES} - varying_mesh_axes(array)))
    if not unvaried_axes:
        return array
    varying: jax.Array = lax.pcast(array, unvaried_axes, to="varying")
    return varying


def _number_of_chunks(x: jax.Array, expert_shards: int) -> int:
    """Returns the number of chunks for a device's tokens, [batch, seq, d_model]."""
    seq = x.shape[1]
    gathered_bytes = expert_shards * x.size * x.dtype.itemsize
    for n_chunks in range(1, seq):
        if seq % n_chunks == 0 and gathered_bytes <= n_chunks * CHUNK_BYTES:
            return n_chunks
    return seq


def _apply_chunks(fn: Callable[..., jax.Array], n_chunks: int, *arrays: jax.Array) -> jax.Array:
    """Applies a function to arrays, [batch, seq, …] each, in chunks of the sequence."""
    if n_chunks == 1:
        return fn(*arrays)

    def apply_chunk(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        return None, fn(*chunk)

    def split_chunks(array: jax.Array) -> jax.Array:
        batch, _, *features = array.shape
        chunks = array.reshape(batch, n_chunks, -1, *features)
        return jnp.moveaxis(chunks, 1, 0)  # [chunks, batch, chunk's seq, …]

    apply_chunk = jax.checkpoint(apply_chunk, prevent_cse=False)
    _, values = lax.scan(apply_chunk, None, tuple(map(split_chunks, arrays)))
    return jnp.moveaxis(values, 0, 1).reshape(arrays[0].shape)
