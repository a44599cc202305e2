"""Initialisers of A and B: functions of a key, a kernel's sizes and its base.

An initialiser is called once for each adapted weight and draws the factors of its whole stack.
Batch axes (layers, experts) get independent draws and never count as fan-in.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FactorShape:
    """The sizes of a weight's factors, with its in axes flattened to one, and its out axes too."""

    batch: tuple[int, ...]
    fan_in: int  # the product of the in axes
    fan_out: int  # the product of the out axes
    rank: int

    @property
    def a(self) -> tuple[int, ...]:
        """The shape of A, [batch…, in, r]."""
        return (*self.batch, self.fan_in, self.rank)

    @property
    def b(self) -> tuple[int, ...]:
        """The shape of B, [batch…, r, out]."""
        return (*self.batch, self.rank, self.fan_out)


class Initialiser(Protocol):
    """Draws (A, B) of shapes `shape.a` and `shape.b` in `dtype`."""

    def __call__(
        self, key: jax.Array, shape: FactorShape, dtype: Any
    ) -> tuple[jax.Array, jax.Array]: ...


def kaiming(key: jax.Array, shape: FactorShape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A ~ U(±1/√d_in), B = 0: PEFT's default and that of *LoRA Without Regret*.

    (`flax.linen.initializers.he_uniform` is √6 times wider.)
    """
    bound = 1 / math.sqrt(shape.fan_in)
    a = jax.random.uniform(key, shape.a, dtype, -bound, bound)
    return a, jnp.zeros(shape.b, dtype)


def gaussian(key: jax.Array, shape: FactorShape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A ~ N(0, 1/r²), B = 0: PEFT's ``init_lora_weights="gaussian"``."""
    return jax.random.normal(key, shape.a, dtype) / shape.rank, jnp.zeros(shape.b, dtype)


def orthogonal(key: jax.Array, shape: FactorShape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A and B from the odd and the even rows of one random orthogonal matrix, so that AB = 0.

    PEFT's ``init_lora_weights="orthogonal"``: neither factor starts at zero. Raises ValueError
    for an odd rank.
    """
    if shape.rank % 2:
        raise ValueError(f"orthogonal initialisation needs an even rank, not {shape.rank}")
    half = shape.rank // 2
    key_q, key_a, key_b = jax.random.split(key, 3)
    square = jax.random.normal(key_q, (*shape.batch, shape.rank, shape.rank), dtype)
    q, _ = jnp.linalg.qr(square)
    a = jax.random.normal(key_a, (*shape.batch, shape.fan_in, half), dtype)
    b = jax.random.normal(key_b, (*shape.batch, shape.fan_out, half), dtype)
    a = a @ q[..., 0::2, :] / 10
    b = b @ q[..., 1::2, :] / 10
    return a, jnp.swapaxes(b, -1, -2)
