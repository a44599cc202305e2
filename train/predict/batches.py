"""Computes the probabilities of many texts or images, in batches of few compiled shapes."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from lora_jax.core.types import Batch, Forward, Tree
from lora_jax.training.data.vision.images import Images
from lora_jax.training.losses import logits_of
from train.predict.texts import TokenizedTexts

_MIN_LENGTH = 16  # tokens


def padded_lengths_up_to(most: int) -> tuple[int, ...]:
    """Returns the padded lengths of texts, each twice the last, up to the maximum `most`."""
    lengths: list[int] = []
    length = _MIN_LENGTH
    while length < most:
        lengths.append(length)
        length *= 2
    return (*lengths, most)


def batches(
    lengths: np.ndarray, batch_size: int, most: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields the texts in batches, longest first.

    The shapes depend on `most` and `batch_size` alone; only with fewer texts than a batch holds
    are batches smaller.

    Args:
      lengths: tokens of each text, [n].
      batch_size: texts of a batch.
      most: the most tokens of a text.

    Yields:
      The indices of a batch's texts, its rows, and its length.
    """
    rows = min(batch_size, 1 << max(0, len(lengths) - 1).bit_length())
    padded_lengths = padded_lengths_up_to(most)
    group_of_text = np.searchsorted(padded_lengths, lengths)
    for group in reversed(range(len(padded_lengths))):
        texts = np.flatnonzero(group_of_text == group)
        for start in range(0, len(texts), rows):
            yield texts[start : start + rows], rows, padded_lengths[group]


def probabilities(
    apply: Forward,
    params: Tree,
    inputs: TokenizedTexts | Images,
    *,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    of: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
) -> np.ndarray:
    """Returns the probability of each class for each text or image: [n, classes], fp32.

    Args:
      apply: a classifier's, adapted or not.
      params: its parameters.
      inputs: the texts or images.
      batch_size: how many of them are in memory at once.
      progress: is called with the number of those that are done.
      of: the function of the logits to return, in the place of probabilities.
    """
    if isinstance(inputs, Images):
        input_batches = _image_batches(inputs, batch_size)
    else:
        input_batches = _text_batches(inputs, batch_size)
    n_done = 0
    out = None
    for indices, batch in input_batches:
        values = np.asarray(_run_classifier(apply, of, params, batch))
        if out is None:
            out = np.empty((len(inputs), values.shape[-1]), np.float32)
        out[indices] = values[: len(indices)]
        n_done += len(indices)
        progress(n_done)
    assert out is not None, "nothing to classify"
    return out


def _text_batches(
    tokens: TokenizedTexts, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields the indices of a batch's texts, and the batch."""
    for texts, rows, length in batches(tokens.lengths, batch_size, tokens.most):
        yield texts, _make_batch(tokens, texts, rows, length)


def _image_batches(
    images: Images, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields the indices of a batch's images, and the batch."""
    size = min(batch_size, len(images))
    for start in range(0, len(images), size):
        indices = np.arange(start, min(start + size, len(images)))
        yield indices, images.take(np.resize(indices, size))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_classifier(
    apply: Forward, of: Callable[[jax.Array], jax.Array], params: Tree, batch: Batch
) -> jax.Array:
    return of(logits_of(apply, params, batch))


def _make_batch(
    tokens: TokenizedTexts, texts: np.ndarray, rows: int, length: int
) -> dict[str, np.ndarray]:
    """Returns texts as arrays [rows, length], padded on the right; spare rows repeat the first."""
    ids = np.full((rows, length), tokens.pad, np.int32)
    types, mask = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        text = texts[row if row < len(texts) else 0]
        n = len(tokens.ids[text])
        ids[row, :n] = tokens.ids[text]
        types[row, :n] = tokens.types[text]
        mask[row, :n] = 1
    return {"ids": ids, "token_type_ids": types, "attention_mask": mask}
