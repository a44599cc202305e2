"""Preferences as examples: pairs of completions, or completions with labels."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.training.data.batches import HostBatch, Packs, pack
from lora_jax.training.data.chats import check_lengths, warn_caller
from lora_jax.training.data.pairs import check_pairs, tokenize_pairs
from lora_jax.training.data.rows import Row
from lora_jax.training.data.sequences import Sequences, TokenSequence
from lora_jax.training.data.shared_prompts import CHOSEN, PROMPT, REJECTED, join_pairs
from lora_jax.training.errors import TrainingError


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences(Packs):
    """Completions with their prompts, to be batched; a row has one or several units.

    A unit is a pair, or one completion with a label. Segments 2j + 1 and 2j + 2 of a row are the
    chosen and the rejected completion of its pair j; segment j + 1 is its labelled completion j.
    Batches have the arrays of `Packs`, and arrays by segment, [batch, segments_a_row], that are 0
    where a row has fewer:

    - counts: int32, the tokens that the loss counts.
    - labels: int32, 1 for a good completion; only of labelled ones.
    - reference: fp32, where it is set.

    Labelled ones have `kl`, fp32 [batch], 0 in the place of KTO's estimate, which needs a model.
    Pairs have `mean_tokens`, fp32 [batch], too: the mean of `counts` over all chosen completions
    that are taken together.

    Where the prompts of chosen completions are predicted, too, there are `completion`, int32
    [batch, m], 1 for targets in completions, and `mean_with_prompts`, fp32 [batch], the mean number
    of tokens of prompt and chosen completion that are predicted.

    Where the prompt of a pair stands once, before both completions, the pair is one segment, and
    there are `branches`, int32 [batch, seq], 0 at a prompt, 1 and 2 at the completions, whose
    positions both go on from its end; and `sequences`, int32 [batch, m], the completion of the row
    that each target is of, from 0. The first token of either is predicted at the prompt's last.

    Attributes:
      a_unit: the sequences of a unit: 2 of pairs, 1 of labelled completions.
      branches: int32 [tokens of `table`], in a table of pairs as `join_pairs` returns them; None in
        one of a sequence for each completion.
      reference: fp32 [n, segments_a_row], log-probabilities of the completions under a reference.
      completion: bool [tokens of `table`], where completions are, in a table that counts the
        prompts of chosen ones, too; None where it counts completions alone.
      unshared: fingerprint of the same rows with a prompt for each completion; None where that is
        what they have, or where rows are packed, and would hold other pairs.
    """

    a_unit: int = 2
    branches: np.ndarray | None = None
    reference: np.ndarray | None = None
    completion: np.ndarray | None = None
    unshared: str | None = None

    @property
    def segments_a_row(self) -> int:
        """Returns the largest number of completions in a row."""
        return int(self._completions_a_row.max())

    @property
    def n_units(self) -> int:
        """Returns the number of pairs, or of labelled completions, in all rows."""
        return int(self._completions_a_row.sum()) // self.a_unit

    @property
    def _completions_a_row(self) -> np.ndarray:
        return np.diff(self.firsts) * (1 if self.branches is None else self.a_unit)

    def take(self, rows: np.ndarray) -> HostBatch:
        """Returns the rows with these indices, of any shape: arrays [*rows.shape, …]."""
        batch = super().take(rows) | {"counts": self._counts[rows]}
        if self.a_unit == 1:
            batch["labels"] = self._labels[rows]
            batch["kl"] = np.zeros(rows.shape, np.float32)
        if self.reference is not None:
            batch["reference"] = self.reference[rows]
        return batch | self._mean_counts(rows)

    def _mean_counts(self, rows: np.ndarray) -> HostBatch:
        """Returns mean token counts over `rows`, repeated for each row."""
        if self.a_unit == 1:
            return {}
        chosen_counts = self._counts[rows][..., ::2]
        has_tokens = chosen_counts > 0
        means = {"mean_tokens": chosen_counts[has_tokens].mean()}
        if self.completion is not None:
            chosen_predicted = self._predicted[rows][..., ::2]
            means["mean_with_prompts"] = chosen_predicted[has_tokens].mean()
        return {name: np.full(rows.shape, mean, np.float32) for name, mean in means.items()}

    def parts(self, batch_size: int) -> Iterator[HostBatch]:
        """Yields all rows by length, in batches padded with rows of weight 0.

        The means of each batch are those of all rows.
        """
        means = {name: mean[0] for name, mean in self._mean_counts(np.arange(len(self))).items()}
        for batch in super().parts(batch_size):
            batch["counts"] *= batch["weights"].any(axis=1, keepdims=True)
            yield batch | {name: np.full_like(batch[name], mean) for name, mean in means.items()}

    def blank(self, n: int, group: int = -1, counted: int = 0) -> HostBatch:
        """Returns `n` padding rows; see `Packs.blank`."""
        batch = super().blank(n, group, counted)
        if self.completion is not None:
            batch["completion"] = np.zeros_like(batch["weights"])
        if self.branches is not None:
            batch["branches"] = np.zeros_like(batch["ids"])
            batch["sequences"] = np.zeros_like(batch["weights"])
        return batch

    def _fill(self, arrays: HostBatch, row: int) -> None:
        """Writes a row into its slices of a batch's arrays, branches included."""
        super()._fill(arrays, row)
        bounds = self._bounds(row)
        row_tokens = slice(bounds[0], bounds[-1])
        _, is_counted = self._tokens_and_counts(row)
        if self.completion is not None:
            in_completion = self.completion[row_tokens][is_counted]
            arrays["completion"][: len(in_completion)] = in_completion
        if self.branches is not None:
            self._fill_branches(arrays, self.branches[row_tokens], is_counted)

    def _fill_branches(
        self, arrays: HostBatch, branches: np.ndarray, is_counted: np.ndarray
    ) -> None:
        """Makes each rejected completion of a row continue the shared prompt.

        In the row, the chosen completion of a pair stands between its prompt and the rejected one.

        Args:
          arrays: the arrays of the row, already filled as if each pair were one text.
          branches: [tokens], the branch of each token of the row.
          is_counted: [tokens] bool, whether the loss counts it.
        """
        n_tokens = len(branches)
        n_targets = int(is_counted.sum())
        pair_of_token = arrays["segment_ids"][:n_tokens] - 1
        n_pairs = pair_of_token[-1] + 1
        chosen_tokens = np.bincount(pair_of_token[branches == CHOSEN], minlength=n_pairs)
        shift = chosen_tokens[pair_of_token]  # from the prompt's end to the rejected completion
        is_rejected = branches == REJECTED
        is_first_rejected = is_rejected & (np.roll(branches, 1) != REJECTED)
        sequence_of_token = self.a_unit * pair_of_token + is_rejected
        arrays["branches"][:n_tokens] = branches
        arrays["positions"][:n_tokens] -= shift * is_rejected
        arrays["predict_at"][:n_targets] -= (shift * is_first_rejected)[is_counted]
        arrays["sequences"][:n_targets] = sequence_of_token[is_counted]

    def digest(self) -> str:
        """Returns a fingerprint of all rows and labels.

        Rows with shared prompts have that of rows without: a run may go on in the other form.
        """
        if self.unshared is not None:
            return self.unshared
        content = super().digest().encode() + self.table.labels.tobytes()
        for array in (self.completion, self.branches):
            if array is not None:
                content += array.tobytes()
        return hashlib.sha256(content).hexdigest()

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        if self.completion is None:
            return self._predicted
        return self._count_by_segment(self.completion)

    @functools.cached_property
    def _predicted(self) -> np.ndarray:
        return self._count_by_segment(self.table.counts)

    def _count_by_segment(self, counts: np.ndarray) -> np.ndarray:
        """Returns the number of counted tokens per completion: [n, segments_a_row]."""
        table = dataclasses.replace(self.table, counts=counts)
        if self.branches is None:
            return self._split_segments(table.predicted)
        counts = counts.copy()
        counts[table.starts[:-1]] = False
        pair_of_token = np.repeat(np.arange(len(table)), table.lengths)
        completion_of_token = self.a_unit * pair_of_token + (self.branches == REJECTED)
        n_completions = self.a_unit * len(table)
        return self._split_segments(
            np.bincount(completion_of_token[counts], minlength=n_completions)
        )

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return self._split_segments(self.table.labels)

    def _split_segments(self, values: np.ndarray) -> np.ndarray:
        """Returns values of completions by row: [n, segments_a_row] int32."""
        segments = np.zeros((len(self), self.segments_a_row), np.int32)
        segments[np.arange(self.segments_a_row) < self._completions_a_row[:, None]] = values
        return segments


def pack_pairs(
    sequences: Sequence[TokenSequence],
    seq_len: int,
    *,
    packing: bool,
    labelled: bool = False,
    predict_prompts: bool = False,
    share_prompt: bool = False,
) -> Preferences:
    """Returns one unit per row or, with `packing`, as many as fit.

    Args:
      sequences: sequences that `tokenize_pairs` returned, none longer than `seq_len`.
      seq_len: tokens of a sequence, at most. A row of pairs has twice as many, at most.
      packing: puts several units into one row; see `lora_jax.training.data.batches.pack`.
      labelled: whether the sequences have labels, and are no pairs.
      predict_prompts: predicts chosen completions' prompts, too; see `Preferences.completion`.
      share_prompt: puts the prompt of a pair into a row once; see `Preferences.branches`.

    Raises:
      ValueError: labelled completions share no prompt.
    """
    if labelled and share_prompt:
        raise ValueError(
            "share_prompt is only for pairs, because each labelled completion has its own prompt. "
            "Remove share_prompt."
        )
    a_unit = 1 if labelled else 2
    completion = None
    branches = None
    unshared = None
    table = Sequences.from_list(sequences)
    pack_table = functools.partial(pack, seq_len=seq_len, packing=packing, a_unit=a_unit)
    is_chosen = np.repeat(np.arange(len(table)) % a_unit == 0, table.lengths)
    if share_prompt and not packing:
        unshared_rows = pack_pairs(table, seq_len, packing=False, predict_prompts=predict_prompts)
        unshared = unshared_rows.digest()
    if share_prompt:
        table, branch_of_token = join_pairs(table)
        pack_table = functools.partial(pack, seq_len=a_unit * seq_len, packing=packing)
        # Packs the branches as if they were tokens, to get them in the order of the rows.
        branches = pack_table(dataclasses.replace(table, ids=branch_of_token)).table.ids
        is_chosen = np.isin(branch_of_token, (PROMPT, CHOSEN))
    if predict_prompts:
        completion = pack_table(table).table.counts
        table = dataclasses.replace(table, counts=table.counts | is_chosen)
    packs = pack_table(table)
    fields = {field.name: getattr(packs, field.name) for field in dataclasses.fields(packs)}
    return Preferences(
        **fields, a_unit=a_unit, completion=completion, branches=branches, unshared=unshared
    )


def pairs(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    packing: bool = False,
    truncate: bool = False,
    labelled: bool = False,
    predict_prompts: bool = False,
    share_prompt: bool = False,
    source: str = "the rows",
) -> Preferences:
    """Returns preference pairs as examples, from which a model learns to prefer the chosen one.

    Args:
      rows: dicts with `prompt`, `chosen` and `rejected`, each a text or turns with `role` and
        `content`, and perhaps `system` (a text, the first turn), `tools` and
        `chat_template_kwargs`. A text is a turn of the user or the assistant, if the model has a
        chat template. Without `prompt`, it is what `chosen` and
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
      predict_prompts: predicts the prompts of chosen completions, too, for the term "nll" of
        `lora_jax.training.losses.pair_loss`.
      share_prompt: computes the prompt of a pair once, for both completions, by a model of
        `lora_jax.models` without linear layers; see `Preferences`.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row cannot be used; names it.
      ValueError: labelled completions share no prompt.

    >>> from lora_jax import models, training
    >>> rows = [{"prompt": "One plus one?", "chosen": "Two.", "rejected": "Three."}]
    >>> tokenizer = models.load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> examples = training.pairs(rows, tokenizer, seq_len=64)  # doctest: +SKIP
    """
    if not rows:
        raise TrainingError(f"{source} is empty. Give data with at least one row.")
    check_pairs(rows, source, labelled=labelled)
    say = functools.partial(warn_caller, above=2)
    tokens = tokenize_pairs(rows, tokenizer, source, labelled=labelled, say=say)
    sequences = check_lengths(tokens, seq_len, truncate=truncate, a_unit=1 if labelled else 2)
    return pack_pairs(
        sequences,
        seq_len,
        packing=packing,
        labelled=labelled,
        predict_prompts=predict_prompts,
        share_prompt=share_prompt,
    )
