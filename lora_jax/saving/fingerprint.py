"""Computes checksums of arrays and trees; an adapter stores the checksums of its base.

They are computed on the arrays' devices, in integers modulo 2³² only. So the result is exact and
does not depend on the mesh.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax.core.base import is_base
from lora_jax.core.types import Tree
from lora_jax.core.weight import Trained, is_node, leaves_of

_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)


def mix_bits(x: jax.Array) -> jax.Array:
    """Applies a bijection of uint32 in which each input bit affects all output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.partial(jax.jit, static_argnames="dtype")
def _hash_sums(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """Returns two sums over all elements, each hashed with its position: uint32 [2].

    Args:
      x: the array. One of NumPy is passed as it is: `jnp.asarray` would compile one more program.
      dtype: dtype that the elements are rounded to first; None keeps the array's own.
    """
    if dtype is not None:
        x = x.astype(dtype)
    if x.dtype == jnp.bool_ or "int4" in x.dtype.name:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    # A dtype of 8 bytes gets a last axis of 2.
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Hash the index of each element, so that exchanged elements change the sums.
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        step = jnp.uint32(_MULTIPLIERS[axis % len(_MULTIPLIERS)])
        position = mix_bits(position + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step)
    hashes = mix_bits(bits + position)
    second_hashes = mix_bits(hashes ^ jnp.uint32(0xA5A5A5A5))
    return jnp.stack([jnp.sum(hashes), jnp.sum(second_hashes)])


def checksum(array: jax.Array, dtype: DTypeLike | None = None) -> str:
    """Returns an array's dtype and shape with 16 hex digits that change with any bit of it.

    For example ``float32[3x5]:0123456789abcdef``. Where `dtype` is given, the checksum is that of
    the array in this dtype.
    """
    low, high = np.asarray(_hash_sums(array, dtype)).tolist()
    dtype_name = np.dtype(dtype or array.dtype).name
    shape = "x".join(map(str, array.shape))
    return f"{dtype_name}[{shape}]:{high:08x}{low:08x}"


def base_fingerprint(params: Tree) -> dict[str, str]:
    """Returns the checksum of each frozen leaf of a tree, adapted or plain, by path.

    Floating-point values are rounded to bfloat16 first, so that a base has one fingerprint whether
    it was loaded in fp32 or bf16. Of a leaf that is no array (`lora_jax.core.base.Base`), each
    array is summed as it is. Leaves that train in full belong to the adapter and are left out.
    """
    fingerprint = {}
    for path, leaf in leaves_of(params)[0]:
        base = leaf.base if is_node(leaf) else leaf
        is_frozen = hasattr(base, "dtype") and not isinstance(leaf, Trained)
        if not is_frozen or jnp.issubdtype(base.dtype, jax.dtypes.prng_key):
            continue
        is_rounded = jnp.issubdtype(base.dtype, jnp.floating) and not is_base(base)
        dtype = jnp.bfloat16 if is_rounded else None
        checksums = [checksum(array, dtype) for array in jax.tree.leaves(base)]
        fingerprint[path] = " ".join(checksums)
    return fingerprint


def keys_that_differ(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Returns the sorted keys whose checksums differ, or that one mapping lacks."""
    paths = {*saved, *current}
    return sorted(path for path in paths if saved.get(path) != current.get(path))
