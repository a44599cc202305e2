"""Rollouts: completions that the adapter draws while it trains, as batches of a run.

A batch is a function of the state, the number of its step and the seed, so that a resumed run draws
what an uninterrupted one does. Sampler and step read the same arrays.
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
from lora_jax.models import sample
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.prompts import pad_left
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training import make_scorer
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.layout import Layout
from lora_jax.training.step import State
from train.live.prompts import GroupedCompletions, PromptFeed
from train.live.reference import running
from train.run.pretrained import end_tokens
from train.run.task import ModelContext

_STREAM = 2  # of the run's key: 0 and 1 are the adapter's start and dropout


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
      stops: the texts that end one.
      group: the completions of a prompt.
    """
    texts = []
    for at, ids in enumerate(tokens):
        text, cut = stops.cut(ids[: lengths[at]].tolist())
        if cut is not None:
            lengths[at], ended[at] = cut, True
        texts.append(text)
    arrays = (tokens, logps, lengths, ended, np.array(texts, object))
    return GroupedCompletions(*(x.reshape(-1, group, *x.shape[1:]) for x in arrays))


class Rollouts(abc.ABC):
    """Draws the completions of each step, and judges them; see `StateBatches`."""

    def __init__(self, of: ModelContext) -> None:
        """Takes the prompts of a run, and the model that draws and trains."""
        assert isinstance(of.ready.feed, PromptFeed)
        self.of, self.config = dataclasses.replace(of, plain=None), of.config
        self.feed, layout = of.ready.feed, of.layout
        self.model: Any = layout.constrained(of.model)
        self.apply, self._score = lj.adapt(self.model.apply), self.scorer(of.model, layout)
        self._everywhere = jax.jit(lambda drawn: drawn, out_shardings=layout.whole)

    def scorer(self, model: Any, layout: Layout) -> Any:
        """Returns a function of the log-probabilities of completions, as the loss computes them."""
        return make_scorer(
            running(layout.constrained(model)),
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
          drawn: their completions.
          number: the number of the step.

        Returns:
          The completions, drawn again where they have to be; the batch, each array [accumulate,
          batch, …]; and metrics, None for one that is not known.
        """

    def metrics(self, number: int) -> Mapping[str, float | None]:
        """Returns the metrics of the newest completions."""
        return self.feed.metrics

    def lost(self, number: int) -> str | None:
        """Returns the reason that nothing can be learned from the newest completions, or None."""
        return self.feed.lost

    def batch(self, number: int, state: State) -> HostBatch:
        """Returns the batch of a step: completions drawn now, or those that have steps to come."""
        begun = number - number % self.config.optim.updates
        if self.feed.held[0] != begun:
            self.feed.held = (begun, self._new_batch(begun, state))
        self.feed.done = number + 1
        return self.feed.held[1]

    def _new_batch(self, number: int, state: State) -> HostBatch:
        """Returns completions by a state as a batch; notes their metrics."""
        params = lj.join(state.adapter, self.of.ready.base)
        rows = self.feed.rows(number)
        drawn = self.draw(params, rows, number)
        drawn, batch, metrics = self.score(params, rows, drawn, number)
        if self.config.optim.updates > 1:
            del metrics["entropy"]  # the loss logs the entropy before each update
        counted = batch["weights"] > 0
        apart = np.abs(drawn.logps.reshape(batch["old"].shape) - batch["old"])[counted]
        self.feed.metrics = metrics | {
            "length": float(drawn.is_own.sum(-1).mean()),
            "truncated": float(1 - drawn.ended.mean()),
            "mismatch_mean": float(apart.mean()) if apart.size else None,
            "mismatch_max": float(apart.max()) if apart.size else None,
        }
        return batch

    def log_probabilities(
        self, params: Tree, batch: HostBatch, score: Any = None, *, replays: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns log-probabilities and entropies of completions, [accumulate, batch, n] each.

        Args:
          params: the adapted tree.
          batch: the completions.
          score: another model's scorer; None for that of the model that trains.
          replays: whether the sampler's choice of experts is that of these parameters.
        """
        if not replays:
            batch = {name: array for name, array in batch.items() if name != "routing"}
        chunks = []
        for part in range(len(batch["ids"])):
            arrays = {name: array[part] for name, array in batch.items()}
            placed = self.of.layout.batch(arrays, parts=False)
            chunks.append(jax.tree.map(np.asarray, (score or self._score)(params, placed)))
        logps, entropy = (np.stack(parts) for parts in zip(*chunks, strict=True))
        return logps, entropy

    def draw(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int = 0
    ) -> GroupedCompletions:
        """Draws completions of prompts.

        Args:
          params: the adapted tree.
          rows: [n], the prompts.
          number: the number of the step.
          attempt: how often they were drawn for it before.
        """
        group, at_once = self.config.data.group, self.feed.order.batch_size
        key = self.key(number, attempt)
        parts = []
        for first in range(0, len(rows), at_once):
            some = np.resize(rows[first : first + at_once], at_once)  # all parts have as many rows
            parts.append(self._sample_part(params, some, key, first * group))
        *drawn, routing = (
            None if arrays[0] is None else np.concatenate(arrays)[: len(rows) * group]
            for arrays in zip(*parts, strict=True)
        )
        grouped = group_completions(
            *(np.array(array) for array in drawn),
            stops=StopTexts(self.of.outline.tokenizer, self.config.data.stop),
            group=group,
        )
        if routing is None:
            return grouped
        return grouped._replace(routing=routing.reshape(-1, group, *routing.shape[1:]))

    def key(self, number: int, attempt: int) -> jax.Array:
        """Returns the key of a draw; see `draw`."""
        key = jax.random.fold_in(jax.random.key(self.config.optim.seed), _STREAM)
        return jax.random.fold_in(jax.random.fold_in(key, number), attempt)

    def _sample_part(self, params: Tree, rows: np.ndarray, key: jax.Array, first: int) -> Any:
        """Returns the `Samples` of a part's completions, on the host.

        Their `routing` is as wide in all parts: prompts end before the same slot.
        """
        data, layout, ends = self.config.data, self.of.layout, end_tokens(self.of.outline)
        prompts = [self.feed.prompts.tokens[row] for row in rows.tolist()]
        width = self.feed.widths.prompt(self.feed.prompts.longest_of(rows))
        ids, mask = pad_left(prompts, width, ends[0] if ends else 0)
        asked = layout.batch({"ids": ids, "mask": mask}, parts=False)
        numbers = jnp.arange(first, first + len(rows) * data.group)
        with jax.set_mesh(layout.mesh):
            drawn = sample(
                self.model,
                params,
                asked["ids"],
                asked["mask"],
                n=data.group,
                max_new_tokens=data.max_new_tokens,
                temperature=data.sampling_temperature,
                top_p=data.top_p,
                top_k=data.top_k,
                key=row_keys(key, numbers),
                eos_token_id=ends or None,
                apply=self.apply,
                with_routing=self.feed.routing is not None,
            )
            drawn = jax.tree.map(np.asarray, self._everywhere(drawn))
        if drawn.routing is None:
            return tuple(drawn)
        wider = [(0, 0), (self.feed.widths.prompts[-1] - width, 0), (0, 0), (0, 0)]
        return tuple(drawn._replace(routing=np.pad(drawn.routing, wider, constant_values=-1)))
