"""Fastfood (Le et al., arXiv 1408.3060): a random projection that is drawn anew at each use.

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

# Another value of these makes other projections of the same seed: saved subspaces would be lost.
_ROUNDS = 4
_PIECE = 2**18
_PIECES = 4  # at once, for the cores of a CPU
MOST = 2**31  # entries of a tensor, and of θ_d: indices are 32-bit
_CACHED = 2**15  # entries that a CPU core's cache holds
# H of size n = 2^k is the Kronecker product of k matrices [[1, 1], [1, −1]], so of k/5 matrices of
# size 32. Multiplying by those costs more additions than a butterfly of k passes and fewer passes
# over memory: at n = 2²³ on two cores it takes 92 ms, the butterfly 139 ms
# (tests/benchmarks/subspace.py).
_MOST_BITS = 5  # of a small matrix: 32 x 32


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


def draw(key: jax.Array, d: int, size: int) -> FastfoodDraws:
    """Returns the random parts of the projection from d numbers to `size`.

    Args:
      key: the projection's own PRNG key.
      d, size: at least 1.
    """
    n = _power_of_two(size)
    blocks, block = -(-d // n), min(n, _power_of_two(d))
    key_b, key_p, key_g = jax.random.split(key, 3)
    signs = jax.random.rademacher(key_b, (blocks, block), jnp.int8)
    return FastfoodDraws(signs, _permutation(key_p, blocks, n), _normals(key_g, blocks, n))


def project(theta: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """Returns Px, linear in x; its transpose (by AD) costs the same.

    Args:
      theta: x, [d], fp32 or fp64.
      key: the projection's own PRNG key.
      size: D.

    Returns:
      [D], of the dtype of `theta`.
    """
    return projected(theta, draw(key, theta.size, size), size)


def projected(theta: jax.Array, draws: FastfoodDraws, size: int) -> jax.Array:
    """Returns Px for a projection's random parts; see `project`."""
    (d,), dtype = theta.shape, theta.dtype
    signs, permutation, normals = draws
    blocks, p = signs.shape
    normals = normals.astype(dtype)
    norms = jnp.sqrt(size * jnp.sum(normals**2, axis=-1, keepdims=True))  # [K, 1]
    x = jnp.pad(theta, (0, blocks * p - d)).reshape(blocks, p) * signs.astype(dtype) / norms
    # All entries from p on are zero, so Hx repeats the transform of the first p.
    x = jax.lax.platform_dependent(
        hadamard_transform(x), permutation, cpu=_permuted_on_cpu, default=_permuted
    )
    return hadamard_transform(jnp.sum(x * normals, axis=0))[:size]


def _permuted(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """Returns the permutation of vectors that repeat the given ones, [K, n].

    Args:
      x: [K, p].
      permutation: permutation of 0 … n−1, [K, n].
    """
    (blocks, p), n = x.shape, permutation.shape[-1]
    x = jnp.broadcast_to(x[:, None], (blocks, n // p, p)).reshape(-1)
    places = permutation.astype(jnp.int32) + jnp.arange(blocks, dtype=jnp.int32)[:, None] * n
    return x.at[places].get(unique_indices=True, mode="promise_in_bounds")


def _permuted_on_cpu(x: jax.Array, permutation: jax.Array) -> jax.Array:
    """Like `_permuted`, reading few enough repetitions to fit in a core's cache.

    A CPU reads them faster than [K, n] at random (tests/benchmarks/subspace.py). Backwards, entries
    are added up where they were read; several repetitions keep those sums short.
    """
    (blocks, p), n = x.shape, permutation.shape[-1]
    copies = max(1, min(n, _CACHED) // p)
    x = jnp.broadcast_to(x[:, None], (blocks, copies, p)).reshape(-1)
    places = (permutation & jnp.uint32(p - 1)).astype(jnp.int32).reshape(blocks, copies, -1)
    first = jnp.arange(blocks * copies, dtype=jnp.int32).reshape(blocks, copies, 1) * p
    return x.at[places + first].get(mode="promise_in_bounds").reshape(blocks, n)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _normals(key: jax.Array, blocks: int, n: int) -> jax.Array:
    """Returns G, [blocks, n], drawn a piece at a time: the generator needs three times the room."""
    if n <= _PIECE:
        return jax.random.normal(key, (blocks, n), jnp.float32)
    piece = _PIECE
    pieces: jax.Array = jax.lax.map(
        lambda key: jax.random.normal(key, (blocks, piece), jnp.float32),
        jax.random.split(key, n // piece),
        batch_size=_PIECES,
    )
    return pieces.swapaxes(0, 1).reshape(blocks, n)


def _permutation(key: jax.Array, blocks: int, n: int) -> jax.Array:
    """Returns a permutation of 0 … n−1 for each block: [blocks, n] uint32."""
    constants = jax.random.bits(key, (_ROUNDS, 2, blocks, 1), jnp.uint32)
    mask, shift = jnp.uint32(n - 1), jnp.uint32(max(1, (n.bit_length() - 1) // 2))
    i = jnp.arange(n, dtype=jnp.uint32)[None]
    for added, factor in constants:
        i = ((i ^ added) * (factor | 1)) & mask  # each step is a bijection of k-bit integers
        i = i ^ (i >> shift)
    return i


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
        raise ValueError(f"hadamard_transform needs a power of two, and the last axis has {n}")
    rounds = -(-bits // _MOST_BITS)
    for i in range(rounds):
        size = 2 ** (bits // rounds + (i < bits % rounds))
        rows = x.reshape(*batch, n // size, size)
        done = jnp.matmul(rows, _small(size, x.dtype), precision=jax.lax.Precision.HIGHEST)
        # The axis that was done goes first: at the end, all are back.
        x = done.mT.reshape(*batch, n)
    return x


def _small(size: int, dtype: jnp.dtype) -> jax.Array:
    """Returns the Hadamard matrix [size, size]."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return jnp.asarray(matrix, dtype)
