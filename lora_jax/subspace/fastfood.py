"""Fastfood (Le et al., arXiv 1408.3060): a random projection that is redrawn at each use.

P = HGΠHB takes d numbers to D. With n the power of two from D on:

- pad x with zeros to n; multiply by B, signs; transform by H (Walsh–Hadamard);
- permute by Π; multiply by G, normal; transform by H;
- keep the first D entries, divided by √(n·ΣG²)·√(D/n) = √(D·ΣG²), so that ‖Px‖ ≈ ‖x‖.

It takes O(D log D) time and O(D) memory, and nothing is stored but a key. If d > n, x is cut into
blocks of n, the last one padded; each has its own B, Π and G, and their projections are added.
Different draws are uncorrelated, so ‖Px‖² ≈ Σ‖xₖ‖² = ‖x‖² still. No entry of x is left out.

Π is a keyed bijection of 0 … n−1 (xor, an odd factor, an xor-shift, four times over) rather than
an argsort of random numbers: at n = 2²³ on two cores, it takes 20 ms in place of 4 s
(tests/benchmarks/subspace.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Other values would draw other projections from the same seed, so saved subspaces would be lost.
_PERMUTATION_ROUNDS = 4
_NUMBERS_PER_CHUNK = 2**18  # normal numbers that are drawn at once
_CHUNKS_AT_ONCE = 4  # for the cores of a CPU
MAX_ENTRIES = 2**31  # entries of a tensor, and of θ_d: indices are 32-bit
_CACHED_ENTRIES = 2**15  # entries that a CPU core's cache holds
# H of size n = 2^k is the Kronecker product of k matrices [[1, 1], [1, −1]], so of k/5 matrices of
# size 32. Multiplying by those costs more additions than a butterfly of k passes and fewer passes
# over memory: at n = 2²³ on two cores it takes 92 ms, the butterfly 139 ms
# (tests/benchmarks/subspace.py).
_MAX_MATRIX_BITS = 5  # of the size of a small matrix: 32 x 32


class FastfoodDraws(NamedTuple):
    """The random parts of one projection, in K blocks.

    Attributes:
      signs: B, [K, p], of the entries of x that are not padding; p ≤ n.
      permutation: Π, [K, n] uint32: entry j of the permuted vector is entry permutation[j].
      normals: G, [K, n] fp32.
    """

    signs: jax.Array
    permutation: jax.Array
    normals: jax.Array


def draw_random_parts(key: jax.Array, d: int, size: int) -> FastfoodDraws:
    """Returns the random parts of the projection from d dimensions to `size`.

    Args:
      key: the projection's own PRNG key.
      d, size: at least 1.
    """
    n = _power_of_two(size)
    n_blocks = -(-d // n)
    block_size = min(n, _power_of_two(d))
    sign_key, permutation_key, normal_key = jax.random.split(key, 3)
    signs = jax.random.rademacher(sign_key, (n_blocks, block_size), jnp.int8)
    permutation = _draw_permutations(permutation_key, n_blocks, n)
    return FastfoodDraws(signs, permutation, _draw_normals(normal_key, n_blocks, n))


def project(theta: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """Returns Px, linear in x; its transpose (by AD) costs the same.

    Args:
      theta: x, [d], fp32 or fp64.
      key: the projection's own PRNG key.
      size: D.

    Returns:
      [D], of the dtype of `theta`.
    """
    return project_with_draws(theta, draw_random_parts(key, theta.size, size), size)


def project_with_draws(theta: jax.Array, draws: FastfoodDraws, size: int) -> jax.Array:
    """Returns Px, given the random parts of the projection; see `project`."""
    dtype = theta.dtype
    signs, permutation, normals = draws
    n_blocks, block_size = signs.shape
    normals = normals.astype(dtype)
    norms = jnp.sqrt(size * jnp.sum(normals**2, axis=-1, keepdims=True))  # [K, 1]
    x = jnp.pad(theta, (0, signs.size - theta.size)).reshape(n_blocks, block_size)
    x = x * signs.astype(dtype) / norms
    # All entries from p on are zero, so HBx repeats that of the first p. Then permute by Π.
    x = jax.lax.platform_dependent(
        hadamard_transform(x), permutation, cpu=_permute_on_cpu, default=_permute
    )
    return hadamard_transform(jnp.sum(x * normals, axis=0))[:size]


def _permute(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """Repeats vectors to the length n, and permutes them: [K, n].

    Args:
      x: [K, p].
      permutation: permutation of 0 … n−1, [K, n].
    """
    n_blocks, block_size = x.shape
    n = permutation.shape[-1]
    x = jnp.broadcast_to(x[:, None], (n_blocks, n // block_size, block_size)).reshape(-1)
    indices = permutation.astype(jnp.int32)
    block_starts = jnp.arange(n_blocks, dtype=jnp.int32)[:, None] * n
    indices = indices + block_starts
    return x.at[indices].get(unique_indices=True, mode="promise_in_bounds")


def _permute_on_cpu(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """Returns the result of `_permute`, from few copies of x that fit in a CPU cache.

    A CPU reads the copies faster than [K, n] at random (tests/benchmarks/subspace.py). The backward
    pass adds up the entries that were read from one place; several copies keep those sums short.
    """
    n_blocks, block_size = x.shape
    n = permutation.shape[-1]
    n_copies = max(1, min(n, _CACHED_ENTRIES) // block_size)
    x = jnp.broadcast_to(x[:, None], (n_blocks, n_copies, block_size)).reshape(-1)
    indices = (permutation & jnp.uint32(block_size - 1)).astype(jnp.int32)
    indices = indices.reshape(n_blocks, n_copies, -1)
    copy_starts = jnp.arange(n_blocks * n_copies, dtype=jnp.int32)
    copy_starts = copy_starts.reshape(n_blocks, n_copies, 1) * block_size
    return x.at[indices + copy_starts].get(mode="promise_in_bounds").reshape(n_blocks, n)


def _power_of_two(size: int) -> int:
    """Returns the smallest power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


def _draw_normals(key: jax.Array, n_blocks: int, n: int) -> jax.Array:
    """Returns G, [n_blocks, n], drawn in chunks to limit the generator's memory."""
    if n <= _NUMBERS_PER_CHUNK:
        return jax.random.normal(key, (n_blocks, n), jnp.float32)
    chunks: jax.Array = jax.lax.map(
        lambda key: jax.random.normal(key, (n_blocks, _NUMBERS_PER_CHUNK), jnp.float32),
        jax.random.split(key, n // _NUMBERS_PER_CHUNK),
        batch_size=_CHUNKS_AT_ONCE,
    )
    return chunks.swapaxes(0, 1).reshape(n_blocks, n)


def _draw_permutations(key: jax.Array, n_blocks: int, n: int) -> jax.Array:
    """Returns a permutation of 0 … n−1 for each block: [n_blocks, n] uint32."""
    constants = jax.random.bits(key, (_PERMUTATION_ROUNDS, 2, n_blocks, 1), jnp.uint32)
    n_bits = n.bit_length() - 1
    mask = jnp.uint32(n - 1)
    shift = jnp.uint32(max(1, n_bits // 2))
    index = jnp.arange(n, dtype=jnp.uint32)[None]
    for xor_constant, factor in constants:
        # Each step is a bijection of integers of `n_bits` bits.
        index = ((index ^ xor_constant) * (factor | 1)) & mask
        index = index ^ (index >> shift)
    return index


def hadamard_transform(x: jax.Array) -> jax.Array:
    """Returns Hx, the fast Walsh–Hadamard transform, along the last axis, not normalised.

    HHx = n·x. Linear, and its own transpose. It takes O(n log n) time.

    Args:
      x: [batch…, n], n a power of two.

    Returns:
      [batch…, n], of the dtype of `x`.

    Raises:
      ValueError: n is no power of two.

    >>> from lora_jax.subspace import hadamard_transform
    >>> hadamard_transform(jnp.array([1.0, 2.0, 3.0, 4.0])).tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    *batch, n = x.shape
    bits = n.bit_length() - 1
    if n != 2**bits:
        raise ValueError(
            f"hadamard_transform needs a last axis whose size is a power of two, not {n}. Pad x "
            "with zeros."
        )
    n_factors = -(-bits // _MAX_MATRIX_BITS)  # of the Kronecker product
    for i in range(n_factors):
        # The bits are divided among the factors as evenly as possible.
        factor_bits = bits // n_factors
        if i < bits % n_factors:
            factor_bits += 1
        size = 2**factor_bits
        rows = x.reshape(*batch, n // size, size)
        matrix = _hadamard_matrix(size, x.dtype)
        product = jnp.matmul(rows, matrix, precision=jax.lax.Precision.HIGHEST)
        # The transformed axis goes first, so that after all factors the axes are in order again.
        x = product.mT.reshape(*batch, n)
    return x


def _hadamard_matrix(size: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the Hadamard matrix [size, size]."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return jnp.asarray(matrix, dtype)
