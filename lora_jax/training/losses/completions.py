"""Log-probabilities of completions, and sums over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Completions(NamedTuple):
    """Log-probabilities of completions, each summed over its tokens in fp32.

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
            raise ValueError(
                "this loss compares the model with a reference, but reference is None. Pass the "
                "reference's log-probabilities."
            )
        return self.policy - jax.lax.stop_gradient(self.reference)

    @property
    def mean(self) -> jax.Array:
        """Returns the mean log-probability per token of each completion, [n]."""
        return self.policy / self.tokens


def completions(
    logps: jax.Array,
    mask: jax.Array,
    reference: jax.Array | None = None,
    segments: jax.Array | None = None,
    n: int = 0,
) -> Completions:
    """Sums token log-probabilities by completion, in fp32.

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
    is_counted = mask.astype(bool)

    def sum_by_completion(values: jax.Array) -> jax.Array:
        """Sums token values by completion."""
        values = jnp.where(is_counted, values.astype(jnp.float32), 0.0)
        if segments is None:
            return jnp.sum(values, axis=1)
        # A mask, as a scatter would add in any order on a GPU: [batch, seq, n].
        is_in_segment = segments[..., None] == jnp.arange(n)
        return jnp.sum(jnp.where(is_in_segment, values[..., None], 0.0), axis=1).reshape(-1)

    tokens = sum_by_completion(jnp.ones_like(logps, jnp.float32))
    return Completions(
        policy=sum_by_completion(logps),
        tokens=jnp.maximum(tokens, 1.0),
        reference=None if reference is None else sum_by_completion(reference),
        counted=tokens > 0,
    )


def summed_nll(completions: Completions, tokens: jax.Array | float | None = None) -> jax.Array:
    """Returns the mean cross entropy per token times the number of completions: [].

    Args:
      completions: the completions.
      tokens: mean number of tokens; by default that of these completions.
    """
    completions = without_padding(completions)
    counted = completions.counted
    assert counted is not None
    if tokens is None:
        n_completions = jnp.maximum(jnp.sum(counted), 1)
        tokens = sum_counted(completions.tokens, counted) / n_completions
    return -sum_counted(completions.policy, counted) / jnp.maximum(jnp.asarray(tokens), 1.0)


def without_padding(completions: Completions) -> Completions:
    """Sets `counted`, and gives padding a log-probability that keeps all losses finite."""
    counted = completions.counted
    if counted is None:
        counted = jnp.ones_like(completions.policy, bool)
    policy = jnp.where(counted, completions.policy, -1.0)
    return completions._replace(policy=policy, counted=counted)


def sum_counted(values: jax.Array, counted: jax.Array) -> jax.Array:
    """Returns the sum of values, [n], over those that count, [n] bool."""
    return jnp.sum(jnp.where(counted, values, 0.0))
