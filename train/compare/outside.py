"""Forgetting: a language model's loss on text outside the task, before and after training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Forward, Tokenizer, Tree
from lora_jax.training.losses import summed_loss
from train.console.errors import UserError, read_user_file

OFF = "off"
_ROWS = 32  # of text: some four thousand tokens
_ROW_TOKENS = 128
_BATCH_ROWS = 8
_CHUNK = 256
_PROBED_CHARACTERS = 10_000  # to see whether a tokenizer knows them


def read_text(source: str | None) -> tuple[str, str] | None:
    """Returns the text for measuring forgetting, and its description; None for --outside off.

    Args:
      source: a file, "off", or None for Python's own documentation.

    Raises:
      UserError: the file cannot be read.
    """
    if source == OFF:
        return None
    if source is None:
        return _python_documentation(), "Python's documentation of its language"
    text = read_user_file(source, f"--outside {source}: the file cannot be read as text: ")
    return text, source


def knows(tokenizer: Tokenizer, text: str) -> bool:
    """Returns True if a tokenizer has tokens for most letters of a text."""
    sample = text[:_PROBED_CHARACTERS]
    ids: Any = tokenizer(sample, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    return len(decoded) > len(sample) / 2


def unknown(name: str) -> str:
    """Returns the message for a text whose letters the tokenizer does not know."""
    return f"the tokenizer does not know the letters of {name}; name a text with --outside"


def make_token_rows(text: str, tokenizer: Tokenizer, name: str) -> np.ndarray:
    """Returns rows of tokens from all over a text, int32 [rows, length].

    Args:
      text: the text.
      tokenizer: the model's.
      name: the text's name, for messages.

    Raises:
      UserError: the text is shorter than one row.
    """
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    n_rows = len(ids) // _ROW_TOKENS
    if n_rows == 0:
        raise UserError(
            f"{name} has only {len(ids)} tokens, but the measurement of forgetting needs at least "
            f"{_ROW_TOKENS}. Pass a longer text with --outside, or use --outside off."
        )
    rows = ids[: n_rows * _ROW_TOKENS].reshape(n_rows, _ROW_TOKENS)
    row_indices = np.linspace(0, n_rows - 1, min(n_rows, _ROWS)).astype(int)
    return rows[np.unique(row_indices)]


def mean_loss(rows: np.ndarray, params: Tree, forward: Forward) -> float:
    """Returns the mean loss of a model on rows of text, in nats per token.

    Args:
      rows: int32 [rows, length].
      params: the parameters, adapted or plain, as `forward` takes them.
      forward: the model's ``apply``, adapted or not.
    """
    total_loss = 0.0
    n_tokens = 0.0
    for start in range(0, len(rows), _BATCH_ROWS):
        batch_loss, batch_tokens = _sum_loss(forward, params, rows[start : start + _BATCH_ROWS])
        total_loss += float(batch_loss)
        n_tokens += float(batch_tokens)
    return total_loss / n_tokens


@jax.jit(static_argnums=0)
def _sum_loss(forward: Forward, params: Tree, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the loss over the tokens of some rows, and their number."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    batch = {
        "ids": ids,
        "positions": positions,
        "segment_ids": jnp.ones_like(ids),
        "predict_at": positions[:, :-1],
        "targets": ids[:, 1:],
        "weights": jnp.ones(ids[:, 1:].shape),
    }
    return summed_loss(forward, params, batch, chunk=_CHUNK)[:2]


def _python_documentation() -> str:
    """Returns the reference of the language that comes with Python, as `help` shows it."""
    try:
        from pydoc_data.topics import topics  # not in every distribution of Python
    except ImportError:
        raise UserError(
            "forgetting is measured on Python's documentation (pydoc_data), which this Python does "
            "not have. Pass a text with --outside, or use --outside off."
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))
