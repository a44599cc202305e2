"""Initialisers of A and B: functions of a PRNG key, a kernel's sizes, and its base.

An initialiser draws the factors of a weight's whole stack in one call; where the layers of a stack
differ in rank, it is called for each layer. Batch axes (layers, experts) get independent draws and
never count as fan-in.

`pissa` and `olora` take the factors that training starts from out of the base: the weight then
stands for W + s·(AB − A₀B₀). (A₀, B₀) are kept beside A and B, frozen, so that W itself stays what
it was: another adapter goes onto the same base, its fingerprint holds, nothing is decomposed again
on resume, and the adapter is a plain one of rank 2r on W, [A A₀] and [B; −B₀].
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class FactorShape:
    """The sizes of a weight's factors, with the in axes and the out axes flattened to one each.

    Attributes:
      batch: the batch axes (layers, experts).
      fan_in: the product of the in axes.
      fan_out: the product of the out axes.
      rank: r.
    """

    batch: tuple[int, ...]
    fan_in: int
    fan_out: int
    rank: int

    @property
    def a(self) -> tuple[int, ...]:
        """The shape of A, [batch…, in, r]."""
        return (*self.batch, self.fan_in, self.rank)

    @property
    def b(self) -> tuple[int, ...]:
        """The shape of B, [batch…, r, out]."""
        return (*self.batch, self.rank, self.fan_out)


Factors = tuple[jax.Array, jax.Array]


class Initialiser(Protocol):
    """Draws (A, B), of the shapes `shape.a` and `shape.b`.

    Args:
      key: a PRNG key.
      shape: the sizes of the factors.
      dtype: dtype of both.

    One that is marked with `from_base` gets two more arguments by name: `kernel`, W as
    [batch…, in, out] in fp32 (or wider), and `scale`, s as [batch…].
    """

    def __call__(self, key: jax.Array, shape: FactorShape, dtype: DTypeLike) -> Factors: ...


def from_base(init: Callable[..., Factors]) -> Callable[..., Factors]:
    """Marks an initialiser that computes factors from W; the weight is then W + s·(AB − A₀B₀).

    Args:
      init: see `Initialiser`; it gets `kernel` and `scale`.

    >>> @lj.init.from_base
    ... def first_rows(key, shape, dtype, *, kernel, scale):
    ...     eye = jnp.eye(shape.fan_in, shape.rank)
    ...     return eye, kernel[: shape.rank] / scale
    >>> rule = lj.LoraRule(targets="kernel", rank=2, init=first_rows)
    >>> lj.lorafy({"kernel": jnp.ones((4, 3))}, [rule])["kernel"].start[0].shape
    (2, 4)
    """
    init.takes_from_base = True  # type: ignore[attr-defined]
    return init


def takes_from_base(init: Initialiser) -> bool:
    """Returns True if the initialiser is marked with `from_base`.

    >>> lj.init.takes_from_base(lj.init.pissa), lj.init.takes_from_base(lj.init.kaiming)
    (True, False)
    """
    return getattr(init, "takes_from_base", False)


def kaiming(key: jax.Array, shape: FactorShape, dtype: DTypeLike) -> Factors:
    """Draws A ~ U(±1/√d_in), B = 0: the default of PEFT and of *LoRA Without Regret*.

    (`flax.linen.initializers.he_uniform` is √6 times wider.)

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets="kernel", rank=2, init=lj.init.kaiming)])
    >>> tree["kernel"].a.shape
    (2, 4)
    """
    bound = 1 / math.sqrt(shape.fan_in)
    a = jax.random.uniform(key, shape.a, dtype, -bound, bound)
    return a, jnp.zeros(shape.b, dtype)


def gaussian(key: jax.Array, shape: FactorShape, dtype: DTypeLike) -> Factors:
    """Draws A ~ N(0, 1/r²), B = 0: PEFT's ``init_lora_weights="gaussian"``.

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets="kernel", rank=2, init=lj.init.gaussian)])
    >>> tree["kernel"].a.shape
    (2, 4)
    """
    return jax.random.normal(key, shape.a, dtype) / shape.rank, jnp.zeros(shape.b, dtype)


def orthogonal(key: jax.Array, shape: FactorShape, dtype: DTypeLike) -> Factors:
    """Draws A from even rows of an orthogonal matrix and B from odd ones, so that AB = 0.

    PEFT's ``init_lora_weights="orthogonal"``: neither factor starts at zero.

    Raises:
      ValueError: the rank is odd.

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets="kernel", rank=2, init=lj.init.orthogonal)])
    >>> tree["kernel"].a.shape
    (2, 4)
    """
    if shape.rank % 2:
        raise ValueError(
            f"The orthogonal initialiser needs an even rank, not {shape.rank}. Choose an even rank."
        )
    half_rank = shape.rank // 2
    key_q, key_a, key_b = jax.random.split(key, 3)
    square = jax.random.normal(key_q, (*shape.batch, shape.rank, shape.rank), dtype)
    q, _ = jnp.linalg.qr(square)  # [batch…, r, r], orthogonal
    a = jax.random.normal(key_a, (*shape.batch, shape.fan_in, half_rank), dtype)
    b = jax.random.normal(key_b, (*shape.batch, shape.fan_out, half_rank), dtype)
    even_rows = q[..., 0::2, :]
    odd_rows = q[..., 1::2, :]
    return a @ even_rows / 10, (b @ odd_rows / 10).mT


@from_base
def pissa(
    key: jax.Array, shape: FactorShape, dtype: DTypeLike, *, kernel: jax.Array, scale: jax.Array
) -> Factors:
    """Returns A = U√(S/s), B = √(S/s)Vᵀ of the r largest singular values of W = USVᵀ.

    PiSSA (Meng et al., arXiv 2404.02948), PEFT's ``init_lora_weights="pissa"``. A full
    decomposition of each kernel: see `fast_pissa` for large ones.

    Raises:
      ValueError: the rank is larger than the number of W's singular values.

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets="kernel", rank=2, init=lj.init.pissa)])
    >>> tree["kernel"].a.shape
    (2, 4)
    """
    del key
    _check_rank(shape.rank, kernel)
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    return _balanced_singular_factors(u, s, vt, shape.rank, scale)


def fast_pissa(iterations: int = 4, oversampling: int = 8) -> Callable[..., Factors]:
    """Returns `pissa` by subspace iteration (Halko et al., arXiv 0909.4061).

    PEFT's ``"pissa_niter_4"``.

    Args:
      iterations: number of iterations of the power method; more of them separate close singular
        values better.
      oversampling: vectors beyond the rank.

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> rule = lj.LoraRule(targets="kernel", rank=2, init=lj.init.fast_pissa(iterations=2))
    >>> lj.lorafy(params, [rule])["kernel"].a.shape
    (2, 4)
    """

    @from_base
    def init(
        key: jax.Array, shape: FactorShape, dtype: DTypeLike, *, kernel: jax.Array, scale: jax.Array
    ) -> Factors:
        """Computes the factors by subspace iteration."""
        _check_rank(shape.rank, kernel)
        # Find a basis q of the largest left singular vectors, then decompose W in this basis.
        n_vectors = min(shape.rank + oversampling, shape.fan_in, shape.fan_out)
        probe = jax.random.normal(key, (*shape.batch, shape.fan_out, n_vectors), kernel.dtype)
        q, _ = jnp.linalg.qr(kernel @ probe)
        for _ in range(iterations):
            row_space, _ = jnp.linalg.qr(kernel.mT @ q)
            q, _ = jnp.linalg.qr(kernel @ row_space)
        u, s, vt = jnp.linalg.svd(q.mT @ kernel, full_matrices=False)
        return _balanced_singular_factors(q @ u[..., : shape.rank], s, vt, shape.rank, scale)

    return init


def truncated(kernel: jax.Array, rank: int) -> Factors:
    """Returns UΣ [batch…, in, r] and Vᵀ [batch…, r, out] of the r largest singular values.

    Ten subspace iterations start from ten vectors more than the rank (Halko et al., arXiv
    0909.4061), as LoRA-XS's authors do. A matrix with no more singular values than vectors is
    decomposed exactly. The first vectors are fixed, and the largest element of each row of Vᵀ is
    made positive, so that decomposing the same W again gives the same factors. The matrices of a
    batch are decomposed one after another.

    Args:
      kernel: W, [batch…, in, out] in fp32 (or wider).
      rank: r, at most in and out.

    Raises:
      ValueError: the rank is larger than W's.

    >>> a, b = lj.init.truncated(jnp.ones((4, 3)), 1)
    >>> bool(jnp.allclose(a @ b, 1, atol=1e-5)), bool((b > 0).all())
    (True, True)
    """
    _check_rank(rank, kernel)
    n_vectors = min(rank + 10, *kernel.shape[-2:])
    is_exact = n_vectors == min(kernel.shape[-2:])

    def decompose(w: jax.Array) -> Factors:
        """Decomposes one matrix, with the signs of Vᵀ normalised."""
        if is_exact:
            u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        else:
            u, s, vt = _subspace_svd(w, n_vectors)
        a = u[:, :rank] * s[:rank]
        b = vt[:rank]
        # Make the largest element of each row of Vᵀ positive.
        largest_indices = jnp.argmax(jnp.abs(b), axis=1, keepdims=True)
        largest_elements = jnp.take_along_axis(b, largest_indices, axis=1)
        sign = jnp.where(largest_elements < 0, -1, 1).astype(b.dtype)
        return a * sign.T, b * sign

    if kernel.ndim == 2:
        return decompose(kernel)
    batch = kernel.shape[:-2]
    a, b = jax.lax.map(decompose, kernel.reshape(-1, *kernel.shape[-2:]))
    return a.reshape(*batch, *a.shape[1:]), b.reshape(*batch, *b.shape[1:])


def _check_rank(rank: int, kernel: jax.Array) -> None:
    """Raises a ValueError if a kernel [batch…, in, out] has fewer singular values than the rank."""
    n_values = min(kernel.shape[-2:])
    if rank > n_values:
        raise ValueError(
            f"rank {rank} is too large: a kernel of {kernel.shape[-2]} by {kernel.shape[-1]} "
            f"has {n_values} singular values. Choose a rank of at most {n_values}, or a start "
            "that takes every rank, such as kaiming."
        )


def _subspace_svd(w: jax.Array, n_vectors: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest singular values with U and Vᵀ, by ten subspace iterations."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def iterate(_: object, q: jax.Array) -> jax.Array:
        row_space, _ = jnp.linalg.qr(dot(w.mT, q))
        return jnp.linalg.qr(dot(w, row_space))[0]

    probe = jax.random.normal(jax.random.key(0), (w.shape[1], n_vectors), w.dtype)
    q, _ = jnp.linalg.qr(dot(w, probe))
    q = jax.lax.fori_loop(0, 10, iterate, q)
    u, s, vt = jnp.linalg.svd(dot(q.mT, w), full_matrices=False)
    return dot(q, u), s, vt


def _balanced_singular_factors(
    u: jax.Array, s: jax.Array, vt: jax.Array, rank: int, scale: jax.Array
) -> Factors:
    """Returns A = U√(S/s) and B = √(S/s)Vᵀ of the r largest singular values."""
    root = jnp.sqrt(s[..., :rank] / jnp.asarray(scale, s.dtype)[..., None])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]


@from_base
def olora(
    key: jax.Array, shape: FactorShape, dtype: DTypeLike, *, kernel: jax.Array, scale: jax.Array
) -> Factors:
    """Returns A = (the first r rows of R)ᵀ, B = (the first r columns of Q)ᵀ of Wᵀ = QR.

    OLoRA (Büyükakyüz, arXiv 2406.01775), PEFT's ``init_lora_weights="olora"``: B is orthonormal.

    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (4, 3))}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets="kernel", rank=2, init=lj.init.olora)])
    >>> tree["kernel"].a.shape
    (2, 4)
    """
    del key, scale
    _check_rank(shape.rank, kernel)
    q, r = jnp.linalg.qr(kernel.mT)
    return r[..., : shape.rank, :].mT, q[..., : shape.rank].mT
