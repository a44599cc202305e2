"""The comparison of each batch with the reference, and KTO's divergence from it."""

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
      ready: what training begins with.
      score: a `sequence_scorer`.
      params: the reference's parameters.
      cached: whether the examples hold the reference's log-probabilities.
      mixable: the examples, with room for any prompt with any completion; None where the loss is
        not KTO, and needs no divergence of mismatched completions.
    """

    ready: TrainingStart
    score: OnMesh
    params: Tree
    cached: bool
    mixable: Preferences | None

    def batch(self, number: int, state: State) -> HostBatch:
        """Returns the batch, with the reference's log-probabilities and KTO's divergence."""
        batch = self.ready.feed.batch(number)
        if not self.cached:
            batch = batch | {"reference": self._scores(self.params, batch)}
        if self.mixable is not None:
            kl = self._kl(self.mixable, number, state)
            batch = batch | {"kl": np.full(batch["ids"].shape[:2], kl, np.float32)}
        return batch

    def metrics(self, number: int) -> Mapping[str, float]:
        """Returns nothing: the loss logs all there is."""
        return {}

    def lost(self, number: int) -> None:
        """Returns None: a batch of pairs is never lost."""

    def _scores(self, params: Tree, batch: HostBatch) -> np.ndarray:
        """Returns the log-probabilities of a batch, [accumulate, batch, n]."""
        layout = self.ready.setup.layout
        parts = ({k: v[part] for k, v in batch.items()} for part in range(len(batch["ids"])))
        each = [self.score(params, layout.batch(part, parts=False)) for part in parts]
        return np.stack([np.asarray(score) for score in each])

    def _kl(self, examples: Preferences, number: int, state: State) -> float:
        """Returns KTO's divergence over a batch."""
        feed: Any = self.ready.feed
        rows = feed.order.rows(number)
        mixed = mismatched(examples, rows.ravel())
        batch = {name: x.reshape(*rows.shape, -1) for name, x in mixed.by_name().items()}
        policy = self._scores(lj.join(state.adapter, self.ready.base), batch)
        return divergence(policy, self._scores(self.params, batch), batch["counts"])


def divergence(policy: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> float:
    """Returns KTO's divergence from log-probabilities of `mismatched` rows, and their tokens."""
    arrays: Any = [x.ravel() for x in (policy, counts, reference, counts > 0)]
    return float(_kl_of(Completions(*arrays)))


_kl_of = jax.jit(mismatched_kl)


def mixable(examples: Preferences, seq_len: int) -> Preferences:
    """Returns rows of one sequence with room for any prompt with any completion, up to seq_len."""
    table = examples.table
    asked = np.array([int(np.argmax(sequence.counts)) for sequence in table])
    longest = int(round_up(asked.max() + (table.lengths - asked).max(), seq_len))
    if longest <= examples.lengths[-1]:
        return examples
    lengths, predicted = (*examples.lengths, longest), (*examples.predicted, examples.predicted[-1])
    return dataclasses.replace(examples, lengths=lengths, predicted=predicted)


def mismatched(examples: Preferences, rows: np.ndarray) -> Preferences:
    """Returns each row's prompt with the completion of the row before it, or of the last one.

    Rows are taken in their order in the data, so that the divergence is that of a set of rows.

    Args:
      examples: rows of one sequence each.
      rows: [n], the rows of a batch.
    """
    table: Sequences = examples.table.select(examples.firsts[np.sort(rows)])
    asked = [row.ids[: int(np.argmax(row.counts))] for row in table]
    answers = [row.ids[len(prompt) :] for row, prompt in zip(table, asked, strict=True)]
    most = examples.lengths[-1]
    made = []
    for at, prompt in enumerate(asked):
        ids = np.concatenate([prompt, answers[at - 1]])[:most]
        counts = np.arange(len(ids)) >= len(prompt)
        made.append(TokenSequence(ids, counts, int(table.rows[at])))
    firsts = np.arange(len(made) + 1)
    return dataclasses.replace(
        examples, table=Sequences.from_list(made), firsts=firsts, reference=None
    )


def prepare(of: ModelContext) -> tuple[TrainingStart, Data]:
    """Returns the start of training and its data, compared with the reference.

    Raises:
      UserError: the reference does not fit the base.
    """
    optim, examples = of.config.optim, of.data.train
    diverges = KTO in optim.loss
    cached = of.config.data.reference_logps == "cached"
    params = reference_params(of.config, of.outline, of.plain, of.takes_from_base)
    if params is None:
        return of.ready, of.data
    score = sequence_scorer(of.model, of.layout, optim.loss_chunk)
    assert isinstance(examples, Preferences)
    data, ready = of.data, of.ready
    if (held_out := data.held_out) is not None:
        assert isinstance(held_out, Preferences)
        data = dataclasses.replace(data, held_out=add_reference(of, score, params, held_out))
        if diverges:
            ready = dataclasses.replace(
                ready, measured=_divergence_of_rows(of, score, params, held_out)
            )
    if cached:
        examples = add_reference(of, score, params, examples)
        assert isinstance(ready.feed, Feed)
        ready = dataclasses.replace(ready, feed=dataclasses.replace(ready.feed, examples=examples))
    if is_live(of.config):
        mixed = mixable(examples, of.config.data.seq_len) if diverges else None
        live = ReferenceBatches(ready, score, params, cached=cached, mixable=mixed)
        ready = dataclasses.replace(ready, live=live)
    return ready, data


def _divergence_of_rows(
    of: ModelContext, score: OnMesh, params: Tree, held_out: Preferences
) -> BatchNumbers:
    """Returns the function of KTO's divergence over all held-out rows together."""
    rooms = mixable(held_out, of.config.data.seq_len)
    mixed = add_reference(of, score, params, mismatched(rooms, np.arange(len(rooms))))
    reference, layout, batch_size = mixed.reference, of.layout, of.config.optim.batch_size
    assert reference is not None

    def measured(tree: Tree, ended: Callable[[], bool]) -> Mapping[str, float] | None:
        policy = scores(layout, score, tree, mixed, batch_size, lambda done: ended())
        counts = mixed.table.predicted.reshape(reference.shape)
        return None if policy is None else {"kl": divergence(policy, reference, counts)}

    return measured
