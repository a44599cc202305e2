"""The fast Walsh–Hadamard transform, as products with small Hadamard matrices.

H of size n = 2^k is the Kronecker product of k matrices [[1, 1], [1, −1]], so of k/5 matrices of
size 32. Multiplying by those costs more additions than a butterfly of k passes and fewer passes
over memory: at n = 2²³ on two cores it takes 92 ms, the butterfly 139 ms
(tests/benchmarks/subspace.py).
"""

import jax
import jax.numpy as jnp
import numpy as np

_MOST_BITS = 5  # of a small matrix: 32 x 32


def hadamard_transform(x: jax.Array) -> jax.Array:
    """Returns Hx along the last axis, not normalised: HHx = n·x.

    Linear, and its own transpose. It takes O(n log n) time.

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
