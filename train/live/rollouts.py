"""Rollouts: completions that the adapter draws during training, as batches of a run.

A batch depends only on the state, the number of its step and the seed, so that a resumed run draws
the same completions as an uninterrupted run. Sampler and step use the same arrays.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.models import Samples, sample
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.prompts import pad_left
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training import make_scorer
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.layout import Layout
from lora_jax.training.step import State
from train.live.prompts import GroupedCompletions, PromptFeed
from train.live.reference import forward_of
from train.run.pretrained import end_tokens
from train.run.task import ModelContext

_STREAM = 2  # the run's random stream of draws; 0 and 1 are the adapter's start and dropout


def group_completions(
    tokens: np.ndarray,
    logps: np.ndarray,
    lengths: np.ndarray,
    ended: np.ndarray,
    *,
    stops: StopTexts,
    group: int,
) -> GroupedCompletions:
    """Returns completions in groups, each up to its first stop text.

    Args:
      tokens, logps, lengths, ended: see `GroupedCompletions`, but [prompts * group, …]; the last
        two are written to.
      stops: the texts that end a completion.
      group: the number of completions of a prompt.
    """
    texts = []
    for index, ids in enumerate(tokens):
        text, stop_index = stops.cut(ids[: lengths[index]].tolist())
        if stop_index is not None:
            lengths[index] = stop_index
            ended[index] = True
        texts.append(text)

    def group_rows(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, group, *array.shape[1:])

    return GroupedCompletions(
        tokens=group_rows(tokens),
        logps=group_rows(logps),
        lengths=group_rows(lengths),
        ended=group_rows(ended),
        texts=group_rows(np.array(texts, object)),
    )


class Rollouts(abc.ABC):
    """Draws the completions of each step, and rates them; see `StateBatches`."""

    def __init__(self, context: ModelContext) -> None:
        """Keeps the prompts of a run, and the model that draws and trains."""
        assert isinstance(context.ready.feed, PromptFeed)
        layout = context.layout
        self.context = dataclasses.replace(context, plain=None)
        self.config = context.config
        self.feed = context.ready.feed
        self.model: Any = layout.constrained(context.model)
        self.apply = lj.adapt(self.model.apply)
        self._score = self.scorer(context.model, layout)
        self._replicate = jax.jit(lambda drawn: drawn, out_shardings=layout.whole)

    def scorer(self, model: Any, layout: Layout) -> Any:
        """Returns a function that computes log-probabilities of completions as the loss does."""
        return make_scorer(
            forward_of(layout.constrained(model)),
            layout=layout,
            temperature=self.config.data.sampling_temperature,
            **layout.chunks(self.config.optim.loss_chunk),
        )

    @abc.abstractmethod
    def score(
        self, params: Tree, rows: np.ndarray, drawn: GroupedCompletions, number: int
    ) -> tuple[GroupedCompletions, HostBatch, dict[str, float | None]]:
        """Returns the batch that a step learns from.

        Args:
          params: the adapted tree.
          rows: [n], the prompts.
          drawn: the completions of the prompts.
          number: the number of the step.

        Returns:
          The completions, some of which may be redrawn; the batch, each array [accumulate, batch,
          …]; and metrics, whose values may be None.
        """

    def metrics(self, number: int) -> Mapping[str, float | None]:
        """Returns the metrics of the newest completions."""
        return self.feed.metrics

    def lost(self, number: int) -> str | None:
        """Returns the reason that nothing can be learned from the newest completions, or None."""
        return self.feed.lost

    def batch(self, number: int, state: State) -> HostBatch:
        """Returns the batch of a step, with new completions or those of an earlier update."""
        first_step = number - number % self.config.optim.updates
        held_step, _ = self.feed.held_batch
        if held_step != first_step:
            self.feed.held_batch = (first_step, self._draw_batch(first_step, state))
        self.feed.done = number + 1
        return self.feed.held_batch[1]

    def _draw_batch(self, number: int, state: State) -> HostBatch:
        """Draws completions with a state, keeps their metrics, and returns them as a batch."""
        params = lj.join(state.adapter, self.context.ready.base)
        rows = self.feed.rows(number)
        drawn = self.draw(params, rows, number)
        drawn, batch, metrics = self.score(params, rows, drawn, number)
        if self.config.optim.updates > 1:
            del metrics["entropy"]  # the loss logs the entropy before each update
        has_loss = batch["weights"] > 0
        sampler_logps = drawn.logps.reshape(batch["old"].shape)
        mismatch = np.abs(sampler_logps - batch["old"])[has_loss]
        self.feed.metrics = metrics | {
            "length": float(drawn.is_own.sum(-1).mean()),
            "truncated": float(1 - drawn.ended.mean()),
            "mismatch_mean": float(mismatch.mean()) if mismatch.size else None,
            "mismatch_max": float(mismatch.max()) if mismatch.size else None,
        }
        return batch

    def log_probabilities(
        self, params: Tree, batch: HostBatch, score: Any = None, *, replays: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns log-probabilities and entropies of completions, [accumulate, batch, n] each.

        Args:
          params: the adapted tree.
          batch: the completions.
          score: the scorer of another model; None for the model that trains.
          replays: whether to use the experts that the sampler chose.
        """
        if score is None:
            score = self._score
        if not replays:
            batch = {name: array for name, array in batch.items() if name != "routing"}
        logps = []
        entropies = []
        for index in range(len(batch["ids"])):
            micro_batch = {name: array[index] for name, array in batch.items()}
            on_mesh = self.context.layout.batch(micro_batch, parts=False)
            batch_logps, batch_entropies = score(params, on_mesh)
            logps.append(np.asarray(batch_logps))
            entropies.append(np.asarray(batch_entropies))
        return np.stack(logps), np.stack(entropies)

    def draw(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int = 0
    ) -> GroupedCompletions:
        """Draws completions of prompts.

        Args:
          params: the adapted tree.
          rows: [n], the prompts.
          number: the number of the step.
          attempt: the number of earlier draws of these prompts for the step.
        """
        group = self.config.data.group
        chunk_rows = self.feed.order.batch_size
        key = self.key(number, attempt)
        chunks: list[Samples] = []
        for start in range(0, len(rows), chunk_rows):
            # The last chunk is filled with copies, so that all chunks have the same number of rows.
            chunk = np.resize(rows[start : start + chunk_rows], chunk_rows)
            chunks.append(self._sample_chunk(params, chunk, key, start * group))

        def join_chunks(name: str) -> np.ndarray:
            arrays = [getattr(chunk, name) for chunk in chunks]
            return np.concatenate(arrays)[: len(rows) * group]

        drawn = group_completions(
            join_chunks("tokens"),
            join_chunks("logps"),
            join_chunks("lengths"),
            join_chunks("ended"),
            stops=StopTexts(self.context.outline.tokenizer, self.config.data.stop),
            group=group,
        )
        if self.feed.routing is None:
            return drawn
        routing = join_chunks("routing")
        return drawn._replace(routing=routing.reshape(-1, group, *routing.shape[1:]))

    def key(self, number: int, attempt: int) -> jax.Array:
        """Returns the key of a draw; see `draw`."""
        key = jax.random.fold_in(jax.random.key(self.config.optim.seed), _STREAM)
        return jax.random.fold_in(jax.random.fold_in(key, number), attempt)

    def _sample_chunk(self, params: Tree, rows: np.ndarray, key: jax.Array, start: int) -> Samples:
        """Draws completions of some prompts, and returns them on the host.

        Their `routing` has the same width in all chunks, and all prompts end before the same slot.

        Args:
          params: the adapted tree.
          rows: [n], the prompts.
          key: the draw's key.
          start: the number of completions in the chunks before.
        """
        data = self.config.data
        layout = self.context.layout
        eos_ids = end_tokens(self.context.outline)
        prompts = [self.feed.prompts.tokens[row] for row in rows.tolist()]
        width = self.feed.widths.prompt(self.feed.prompts.longest_of(rows))
        ids, mask = pad_left(prompts, width, eos_ids[0] if eos_ids else 0)
        on_mesh = layout.batch({"ids": ids, "mask": mask}, parts=False)
        completion_indices = jnp.arange(start, start + len(rows) * data.group)
        with jax.set_mesh(layout.mesh):
            sharded = sample(
                self.model,
                params,
                on_mesh["ids"],
                on_mesh["mask"],
                n=data.group,
                max_new_tokens=data.max_new_tokens,
                temperature=data.sampling_temperature,
                top_p=data.top_p,
                top_k=data.top_k,
                key=row_keys(key, completion_indices),
                eos_token_id=eos_ids or None,
                apply=self.apply,
                with_routing=self.feed.routing is not None,
            )
            samples = jax.tree.map(np.asarray, self._replicate(sharded))
        if samples.routing is None:
            return samples
        # [completions, slots, layers, k]
        pad_slots = self.feed.widths.prompts[-1] - width
        padding = [(0, 0), (pad_slots, 0), (0, 0), (0, 0)]
        return samples._replace(routing=np.pad(samples.routing, padding, constant_values=-1))
