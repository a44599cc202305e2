"""Preferences as examples: pairs of completions, or completions with labels."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.batches import HostBatch, Packs, pack
from lora_jax.training.data.chats import check_lengths, warn
from lora_jax.training.data.pairs import check_pairs, tokenize_pairs
from lora_jax.training.data.rows import Row
from lora_jax.training.data.sequences import Tokens
from lora_jax.training.errors import TrainingError


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences(Packs):
    """Holds completions with their prompts; a row is one unit or several.

    A unit is a pair, or one completion with a label. Segments 2j + 1 and 2j + 2 of a row are the
    chosen and the rejected completion of its pair j; segment j + 1 is its labelled completion j.
    Batches have the arrays of `Packs`, and arrays by segment, [batch, segments_a_row], that are 0
    where a row has fewer:

    - counts: int32, the tokens that the loss counts.
    - labels: int32, 1 for a good completion; only of labelled ones.
    - reference: fp32, where it is set.

    Labelled ones have, fp32 [batch], `good`, the share of good completions of all that are taken
    together, and `kl`, 0 in the place of KTO's estimate, which needs a model.
    Pairs have `mean_tokens`, fp32 [batch], too: the mean of `counts` over all chosen completions
    that are taken together.

    Attributes:
      a_unit: the sequences of a unit: 2 of pairs, 1 of labelled completions.
      reference: fp32 [n, segments_a_row], log-probabilities of the completions under a reference.
    """

    a_unit: int = 2
    reference: np.ndarray | None = None

    @property
    def segments_a_row(self) -> int:
        """Returns the number of segments in the row that has most."""
        return int(np.diff(self.firsts).max())

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the rows at the indices `rows`, of any shape: arrays [*rows.shape, …]."""
        counts = self._counts[rows]
        batch = super().take(rows) | {"counts": counts}
        if self.a_unit == 1:
            labels = batch["labels"] = self._labels[rows]
            batch["good"] = np.full(rows.shape, labels[counts > 0].mean(), np.float32)
            batch["kl"] = np.zeros(rows.shape, np.float32)
        else:
            chosen = counts[..., ::2]
            batch["mean_tokens"] = np.full(rows.shape, chosen[chosen > 0].mean(), np.float32)
        if self.reference is not None:
            batch["reference"] = self.reference[rows]
        return batch

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows, by length; what fills up the last part counts nothing."""
        for part in super().parts(batch_size):
            part["counts"] *= part["weights"].any(axis=1, keepdims=True)
            yield part

    def digest(self) -> str:
        """Returns a fingerprint of all rows and labels; the reference follows from these."""
        return hashlib.sha256(super().digest().encode() + self.table.labels.tobytes()).hexdigest()

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        return self._by_segment(self.table.predicted)

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return self._by_segment(self.table.labels)

    def _by_segment(self, values: np.ndarray) -> np.ndarray:
        """Returns values of the sequences, in their order, by row: [n, segments_a_row] int32."""
        found = np.zeros((len(self), self.segments_a_row), np.int32)
        found[np.arange(self.segments_a_row) < np.diff(self.firsts)[:, None]] = values
        return found


def pack_pairs(
    sequences: Sequence[Tokens], seq_len: int, *, packing: bool, labelled: bool = False
) -> Preferences:
    """Returns one unit a row or, with `packing`, as many as fit.

    Args:
      sequences: sequences that `tokenize_pairs` returned, none longer than `seq_len`.
      seq_len: tokens of a sequence, at most. A row of pairs has twice as many, at most.
      packing: puts several units into one row; see `lora_jax.training.batches.pack`.
      labelled: whether the sequences have labels, and are no pairs.
    """
    a_unit = 1 if labelled else 2
    packs = pack(sequences, seq_len, packing=packing, a_unit=a_unit)
    fields = {field.name: getattr(packs, field.name) for field in dataclasses.fields(packs)}
    return Preferences(**fields, a_unit=a_unit)


def pairs(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    packing: bool = False,
    truncate: bool = False,
    labelled: bool = False,
    source: str = "the rows",
) -> Preferences:
    """Returns pairs of completions as examples, from which a model learns to prefer the chosen.

    Args:
      rows: dicts with `prompt`, `chosen` and `rejected`, each a text or turns with `role` and
        `content`, and perhaps `tools` and `chat_template_kwargs`. A text is a turn of the user or
        the assistant, if the model has a chat template. Without `prompt`, it is what `chosen` and
        `rejected` begin with alike; such texts are taken as they are, without a template.
      tokenizer: the model's; its chat template renders the turns. Without one, texts are prompt,
        completion and the token of a text's end.
      seq_len: tokens of a prompt and its completion, at most.
      packing: puts several pairs into one row of at most 2 * `seq_len` tokens; no completion sees
        another.
      truncate: cuts longer completions off, which are an error otherwise; drops a pair of which one
        has no token left.
      labelled: rows have `prompt`, `completion` and `label`, true for a good completion, false for
        a bad one; a pair is one of each.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row cannot be used; names it.

    >>> from lora_jax import models, training
    >>> rows = [{"prompt": "One plus one?", "chosen": "Two.", "rejected": "Three."}]
    >>> tokenizer = models.load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> examples = training.pairs(rows, tokenizer, seq_len=64)  # doctest: +SKIP
    """
    if not rows:
        raise TrainingError(f"{source} is empty")
    check_pairs(rows, source, labelled=labelled)
    say = functools.partial(warn, above=2)
    tokens = tokenize_pairs(rows, tokenizer, source, labelled=labelled, say=say)
    kept = check_lengths(tokens, seq_len, truncate=truncate, a_unit=1 if labelled else 2)
    return pack_pairs(kept, seq_len, packing=packing, labelled=labelled)
