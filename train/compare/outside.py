"""Forgetting: a language model's loss on text outside the task, before and after training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Forward, Tokenizer, Tree
from lora_jax.training.losses import summed_loss
from train.console.errors import UserError, read_user_file

OFF = "off"
_ROWS, _LENGTH = 32, 128  # of text: some four thousand tokens
_AT_ONCE = 8  # rows
_CHUNK = 256
_PROBED = 10_000  # characters, to see whether a tokenizer knows them


def read_text(asked: str | None) -> tuple[str, str] | None:
    """Returns the text to measure on, and what it is, in words; None for none.

    Args:
      asked: a file, "off", or None for Python's own documentation.

    Raises:
      UserError: the file cannot be read.
    """
    if asked == OFF:
        return None
    if asked is None:
        return _documentation(), "Python's documentation of its language"
    return read_user_file(asked, f"--outside {asked}: the file cannot be read as text: "), asked


def knows(tokenizer: Tokenizer, text: str) -> bool:
    """Returns True if a tokenizer has tokens for most letters of a text."""
    part = text[:_PROBED]
    ids: Any = tokenizer(part, add_special_tokens=False)["input_ids"]
    return len(tokenizer.decode(ids, skip_special_tokens=True)) > len(part) / 2


def unknown(name: str) -> str:
    """Returns the reason why a model has no loss on a text, by its name, and what to do."""
    return f"the tokenizer does not know the letters of {name}; name a text with --outside"


def rows_of(text: str, tokenizer: Tokenizer, asked: str) -> np.ndarray:
    """Returns rows of tokens from all over a text, int32 [rows, length].

    Args:
      text: the text.
      tokenizer: the model's.
      asked: the text's name, for messages.

    Raises:
      UserError: the text is shorter than one row.
    """
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    n = len(ids) // _LENGTH
    if not n:
        raise UserError(
            f"{asked}: {len(ids)} tokens of text, and {_LENGTH} at least are needed to measure "
            "forgetting: name a longer text with --outside, or off"
        )
    chosen = np.unique(np.linspace(0, n - 1, min(n, _ROWS)).astype(int))
    return ids[: n * _LENGTH].reshape(n, _LENGTH)[chosen]


def loss_on(rows: np.ndarray, params: Tree, forward: Forward) -> float:
    """Returns the mean loss of a model on rows of text, in nats a token.

    Args:
      rows: int32 [rows, length].
      params: the parameters, adapted or plain, as `forward` takes them.
      forward: the model's ``apply``, adapted or not.
    """
    total = count = 0.0
    for at in range(0, len(rows), _AT_ONCE):
        sums = _summed(forward, params, rows[at : at + _AT_ONCE])
        total, count = total + float(sums[0]), count + float(sums[1])
    return total / count


@jax.jit(static_argnums=0)
def _summed(forward: Forward, params: Tree, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    batch = {
        "ids": ids,
        "positions": places,
        "segment_ids": jnp.ones_like(ids),
        "predict_at": places[:, :-1],
        "targets": ids[:, 1:],
        "weights": jnp.ones(ids[:, 1:].shape),
    }
    return summed_loss(forward, params, batch, chunk=_CHUNK)[:2]


def _documentation() -> str:
    """Returns the reference of the language that comes with Python, as `help` shows it."""
    try:
        from pydoc_data.topics import topics  # not in every distribution of Python
    except ImportError:
        raise UserError(
            "this Python comes without its documentation (pydoc_data), on which forgetting is "
            "measured: name a text with --outside, or off"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))
