"""Log-probabilities of completions, and sums over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Completions(NamedTuple):
    """Log-probabilities of completions, each the sum over its tokens in fp32.

    Attributes:
      policy: [n], under the parameters that train.
      tokens: [n], the number of tokens of each; at least 1.
      reference: [n], under the reference, a constant; None for losses without one.
      counted: [n] bool, false for padding, which no loss counts; None where all count.
    """

    policy: jax.Array
    tokens: jax.Array
    reference: jax.Array | None = None
    counted: jax.Array | None = None

    @property
    def ratio(self) -> jax.Array:
        """Returns log π / π_ref of each completion, [n]."""
        if self.reference is None:
            raise ValueError("this loss compares with a reference: give its log-probabilities")
        return self.policy - jax.lax.stop_gradient(self.reference)

    @property
    def mean(self) -> jax.Array:
        """Returns the mean log-probability of a completion's tokens, [n]."""
        return self.policy / self.tokens


def completions(
    logps: jax.Array,
    mask: jax.Array,
    reference: jax.Array | None = None,
    segments: jax.Array | None = None,
    n: int = 0,
) -> Completions:
    """Sums log-probabilities of tokens over completions, in fp32.

    Args:
      logps: [batch, seq], log-probabilities of tokens.
      mask: [batch, seq], true at the tokens of completions.
      reference: log-probabilities of the same tokens under the reference.
      segments: [batch, seq] int32, the completion of each token in packed rows, from 0; by default
        a row is one.
      n: the number of segments a row at most.

    Returns:
      [batch] completions, or [batch * n] in packed rows; those without tokens do not count.

    >>> import jax.numpy as jnp
    >>> from lora_jax.training.losses import completions
    >>> logps = jnp.array([[-1.0, -2.0, -4.0]])
    >>> completions(logps, jnp.array([[0, 1, 1]])).policy.tolist()
    [-6.0]
    >>> completions(logps, logps < 0, segments=jnp.array([[0, 0, 1]]), n=2).policy.tolist()
    [-3.0, -4.0]
    """
    counted = mask.astype(bool)

    def sums(x: jax.Array) -> jax.Array:
        x = jnp.where(counted, x.astype(jnp.float32), 0.0)
        if segments is None:
            return jnp.sum(x, axis=1)
        of = segments[..., None] == jnp.arange(n)  # a scatter would add in any order on a GPU
        return jnp.sum(jnp.where(of, x[..., None], 0.0), axis=1).reshape(-1)

    tokens = sums(jnp.ones_like(logps, jnp.float32))
    before = None if reference is None else sums(reference)
    return Completions(sums(logps), jnp.maximum(tokens, 1.0), before, tokens > 0)


def summed_nll(of: Completions, tokens: jax.Array | float | None = None) -> jax.Array:
    """Returns the cross-entropy of completions, a mean over their tokens, times their number: [].

    Args:
      of: the completions.
      tokens: mean number of tokens; by default of these.
    """
    of = without_padding(of)
    assert of.counted is not None
    if tokens is None:
        tokens = sum_counted(of.tokens, of.counted) / jnp.maximum(jnp.sum(of.counted), 1)
    return -sum_counted(of.policy, of.counted) / jnp.maximum(jnp.asarray(tokens), 1.0)


def without_padding(of: Completions) -> Completions:
    """Returns completions that say which count; the others have values that no loss fails on."""
    counted = jnp.ones_like(of.policy, bool) if of.counted is None else of.counted
    return of._replace(policy=jnp.where(counted, of.policy, -1.0), counted=counted)


def sum_counted(x: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the sum of values, [n], over those that count, [n] bool."""
    return jnp.sum(jnp.where(counted, x, 0.0))
