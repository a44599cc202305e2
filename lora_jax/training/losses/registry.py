"""Losses of tokens by the names of `train.sft --loss`."""

import functools

from lora_jax.training.losses import cross_entropy, dft
from lora_jax.training.losses.contract import Loss
from lora_jax.training.losses.tokens import TokenLoss, sum_over_tokens

DEFAULT = "cross-entropy"
TOKEN_LOSSES: dict[str, TokenLoss] = {
    DEFAULT: cross_entropy.LOSS,
    "dft": dft.LOSS,
}


def token_loss(name: str = DEFAULT, *, chunk: int = 0, parts: int = 1) -> Loss:
    """Returns a loss of tokens; equal arguments give the same object.

    Held-out examples are measured by the cross entropy, whatever the loss, so that runs compare.

    Args:
      name: name of `TOKEN_LOSSES`.
      chunk, parts: see `sum_over_tokens`.
    """
    return _made(name, chunk, parts)


@functools.cache
def _made(name: str, chunk: int, parts: int) -> Loss:
    sums = functools.partial(sum_over_tokens, TOKEN_LOSSES[name].each, chunk=chunk, parts=parts)
    return Loss(sums, measured=None if name == DEFAULT else _made(DEFAULT, chunk, parts))


CROSS_ENTROPY = token_loss()
