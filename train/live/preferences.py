"""Compares batches with the reference during training, and computes KTO's divergence."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.training.data.batches import HostBatch, round_up
from lora_jax.training.data.order import Feed
from lora_jax.training.data.preferences import Preferences
from lora_jax.training.data.sequences import Sequences, TokenSequence
from lora_jax.training.layout import OnMesh
from lora_jax.training.losses import Completions, mismatched_kl
from lora_jax.training.ready import BatchNumbers, TrainingStart
from lora_jax.training.step import State
from train.live.reference import add_reference, is_live, reference_params, scores, sequence_scorer
from train.options.scripts.dpo import KTO
from train.run.task import Data, ModelContext


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceBatches:
    """Compares each batch with the reference before its step; see `StateBatches`.

    Attributes:
      ready: the start of training.
      score: a `sequence_scorer`.
      params: the reference's parameters.
      cached: whether the examples contain the reference's log-probabilities.
      mismatch_examples: the examples with room for any prompt with any completion, for KTO's
        divergence of mismatched completions; None for other losses.
    """

    ready: TrainingStart
    score: OnMesh
    params: Tree
    cached: bool
    mismatch_examples: Preferences | None

    def batch(self, number: int, state: State) -> HostBatch:
        """Returns the batch, with the reference's log-probabilities and KTO's divergence."""
        batch = self.ready.feed.batch(number)
        if not self.cached:
            batch = batch | {"reference": self._batch_logps(self.params, batch)}
        if self.mismatch_examples is not None:
            kl = self._batch_divergence(self.mismatch_examples, number, state)
            batch = batch | {"kl": np.full(batch["ids"].shape[:2], kl, np.float32)}
        return batch

    def metrics(self, number: int) -> Mapping[str, float]:
        """Returns no metrics, because the loss logs all of them."""
        return {}

    def lost(self, number: int) -> None:
        """Returns None, because a batch of pairs is never lost."""

    def _batch_logps(self, params: Tree, batch: HostBatch) -> np.ndarray:
        """Returns the log-probabilities of a batch, [accumulate, batch, n]."""
        layout = self.ready.setup.layout
        logps = []
        for index in range(len(batch["ids"])):
            micro_batch = {name: array[index] for name, array in batch.items()}
            logps.append(self.score(params, layout.batch(micro_batch, parts=False)))
        return np.stack([np.asarray(array) for array in logps])

    def _batch_divergence(self, examples: Preferences, number: int, state: State) -> float:
        """Returns KTO's divergence over a batch."""
        # Each prompt of the batch with the completion of another row.
        feed: Any = self.ready.feed
        rows = feed.order.rows(number)
        mismatched_examples = mismatch_completions(examples, rows.ravel())
        batch = {
            name: array.reshape(*rows.shape, -1)
            for name, array in mismatched_examples.by_name().items()
        }
        policy = self._batch_logps(lj.join(state.adapter, self.ready.base), batch)
        reference = self._batch_logps(self.params, batch)
        return divergence(policy, reference, batch["counts"])


def divergence(policy: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> float:
    """Returns KTO's divergence from log-probabilities of mismatched rows, and their tokens."""
    arrays: dict[str, Any] = {
        "policy": policy.ravel(),
        "tokens": counts.ravel(),
        "reference": reference.ravel(),
        "counted": counts.ravel() > 0,
    }
    return float(_kl_of(Completions(**arrays)))


_kl_of = jax.jit(mismatched_kl)


def with_room_for_mismatches(examples: Preferences, seq_len: int) -> Preferences:
    """Returns rows of one sequence, with room for any prompt with any completion up to seq_len."""
    table = examples.table
    prompt_tokens = np.array([int(np.argmax(sequence.counts)) for sequence in table])
    completion_tokens = table.lengths - prompt_tokens
    longest = int(round_up(prompt_tokens.max() + completion_tokens.max(), seq_len))
    if longest <= examples.lengths[-1]:
        return examples
    return dataclasses.replace(
        examples,
        lengths=(*examples.lengths, longest),
        predicted=(*examples.predicted, examples.predicted[-1]),
    )


def mismatch_completions(examples: Preferences, rows: np.ndarray) -> Preferences:
    """Returns each row's prompt with the completion of the previous row (for the first, the last).

    Rows are sorted by their order in the data, so that the result depends only on the set of rows.

    Args:
      examples: rows of one sequence each.
      rows: [n], the rows of a batch.
    """
    # Split each row into its prompt and its completion.
    table: Sequences = examples.table.select(examples.firsts[np.sort(rows)])
    prompts = []
    completions = []
    for sequence in table:
        prompt_tokens = int(np.argmax(sequence.counts))
        prompts.append(sequence.ids[:prompt_tokens])
        completions.append(sequence.ids[prompt_tokens:])
    max_tokens = examples.lengths[-1]
    sequences = []
    for index, prompt in enumerate(prompts):
        ids = np.concatenate([prompt, completions[index - 1]])[:max_tokens]
        is_completion = np.arange(len(ids)) >= len(prompt)
        sequences.append(TokenSequence(ids, is_completion, int(table.rows[index])))
    return dataclasses.replace(
        examples,
        table=Sequences.from_list(sequences),
        firsts=np.arange(len(sequences) + 1),
        reference=None,
    )


def prepare(context: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training and its data with the reference's log-probabilities.

    Raises:
      UserError: the reference does not fit the base.
    """
    config = context.config
    params = reference_params(config, context.outline, context.plain, context.takes_from_base)
    if params is None:  # the loss needs no reference
        return context.ready, context.data
    score = sequence_scorer(context.model, context.layout, config.optim.loss_chunk)
    needs_divergence = KTO in config.optim.loss
    is_cached = config.data.reference_logps == "cached"
    examples = context.data.train
    data = context.data
    ready = context.ready
    assert isinstance(examples, Preferences)

    if data.held_out is not None:
        assert isinstance(data.held_out, Preferences)
        held_out = add_reference(context, score, params, data.held_out)
        data = dataclasses.replace(data, held_out=held_out)
        if needs_divergence:
            measured = _held_out_divergence(context, score, params, held_out)
            ready = dataclasses.replace(ready, measured=measured)

    if is_cached:
        examples = add_reference(context, score, params, examples)
        assert isinstance(ready.feed, Feed)
        feed = dataclasses.replace(ready.feed, examples=examples)
        ready = dataclasses.replace(ready, feed=feed)

    if is_live(config):
        mismatch_examples = None
        if needs_divergence:
            mismatch_examples = with_room_for_mismatches(examples, config.data.seq_len)
        live = ReferenceBatches(
            ready=ready,
            score=score,
            params=params,
            cached=is_cached,
            mismatch_examples=mismatch_examples,
        )
        ready = dataclasses.replace(ready, live=live)
    return ready, data


def _held_out_divergence(
    context: ModelContext, score: OnMesh, params: Tree, held_out: Preferences
) -> BatchNumbers:
    """Returns a function that computes KTO's divergence over all held-out rows."""
    layout = context.layout
    batch_size = context.config.optim.batch_size
    examples = with_room_for_mismatches(held_out, context.config.data.seq_len)
    examples = mismatch_completions(examples, np.arange(len(examples)))
    examples = add_reference(context, score, params, examples)
    reference = examples.reference
    assert reference is not None
    counts = examples.table.predicted.reshape(reference.shape)

    def measure_divergence(tree: Tree, ended: Callable[[], bool]) -> Mapping[str, float] | None:
        policy = scores(layout, score, tree, examples, batch_size, lambda n_done: ended())
        if policy is None:  # a signal ended the scoring
            return None
        return {"kl": divergence(policy, reference, counts)}

    return measure_divergence
