"""Holds an adapter's arrays in the server's common form, and the state of its training."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from train.serve.protocol.requests import AdapterSpec

Factors = dict[str, dict[str, jax.Array]]  # by path: a and b, in the form of all adapters


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The immutable arrays of an adapter. Two adapters are equal only if they are one object.

    Attributes:
      factors: A and B.
      scales: s of each weight, fp32 [batch…], by path.
      invocation: the tokens from which on an activated LoRA acts; None for one that always does.
    """

    spec: AdapterSpec
    factors: Factors
    scales: dict[str, jax.Array]
    invocation: tuple[int, ...] | None = None

    def find_active_start(self, prompt: Sequence[int]) -> int | None:
        """Returns the first token that the adapter acts on; None without its invocation."""
        if self.invocation is None:  # it acts on all tokens
            return 0
        invocation = [*self.invocation]
        last_start = len(prompt) - len(invocation)
        for start in range(last_start, -1, -1):
            if [*prompt[start : start + len(invocation)]] == invocation:
                return start
        return None

    @property
    def size(self) -> int:
        """The bytes of the adapter's arrays."""
        return sum(x.nbytes for x in jax.tree.leaves((self.factors, self.scales)))


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """The state of an adapter's training.

    Attributes:
      adapter: its arrays.
      first, second: Adam's first and second moments.
      steps: updates taken.
    """

    adapter: Adapter
    first: Factors
    second: Factors
    steps: int

    @classmethod
    def begin(cls, adapter: Adapter) -> "TrainingState":
        """Returns the state before the first update."""
        return cls(
            adapter=adapter,
            first=jax.tree.map(jnp.zeros_like, adapter.factors),
            second=jax.tree.map(jnp.zeros_like, adapter.factors),
            steps=0,
        )
