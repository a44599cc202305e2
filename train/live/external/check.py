"""Checks that a server draws from the adapter that it was given, as a run begins and at each batch.

A run whose sampler holds the base, or another adapter, learns from somebody else's completions, and
its losses look well. An adapter that begins at B = 0 is the base: what tells them apart is a probe,
the adapter with noise, which the server has to load before the first step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.losses import importance_weights
from train.console.errors import UserError
from train.console.output import tell
from train.live.external.sampler import ExternalSampler
from train.live.prompts import GroupedCompletions, PromptFeed
from train.options.scripts.sampler import ImportanceWeighting, importance_of
from train.run.task import ModelContext

_PROMPTS = 4  # of a rehearsal, at most
_APART = 4.0  # times --max-mismatch that the probe is from the adapter, at least
_STRENGTHS = [0.05 * 2**k for k in range(10)]  # of the probe's noise
_PROBE = 3  # a stream of the run's key; see `train.live.rollouts`

# Returns the log-probabilities of a batch's completions by an adapted tree, [accumulate, batch, n].
Score = Callable[[Tree, HostBatch], np.ndarray]


class SamplerCheck:
    """Compares the sampler's log-probabilities with those of the adapter that it was given."""

    def __init__(
        self, of: ModelContext, feed: PromptFeed, sampler: ExternalSampler, score: Score
    ) -> None:
        """Takes the run, its prompts, its sampler, and the trainer's log-probabilities."""
        self._of, self._feed, self._sampler, self._score = of, feed, sampler, score
        self._bound = of.config.data.max_mismatch
        self._importance = importance_of(of.config)
        self._begun = False

    def rehearse(self, params: Tree) -> None:
        """Has the server draw by the adapter as training begins, and by a probe.

        Raises:
          UserError: it does not draw by one of them; says how far it is, and what to do.
        """
        rows = self._feed.rows(int(self._of.ready.state.step))
        rows = rows[: min(_PROMPTS, self._feed.order.batch_size)]
        drawn, batch = self._drawn(params, "begin", rows)
        first = _mean_apart(drawn, batch, self._score(params, batch))
        if not first <= self._bound:
            raise self._refused(first, "as training begins", "")
        probe, strength, apart = self._make_probe(params, batch)
        drawn, batch = self._drawn(probe, "probe", rows)
        second = _mean_apart(drawn, batch, self._score(probe, batch))
        if not second <= self._bound:
            before = _mean_apart(drawn, batch, self._score(params, batch))
            same = "It goes on with what it had before: it has not taken up the adapter. "
            why = same if before <= self._bound else ""
            raise self._refused(second, f"with noise of {strength:g} added to it, as a probe", why)
        tell(
            self._of.console,
            f"{self._sampler.server.url} draws from the adapter: it is {first:.2g} from it in the "
            f"mean over tokens, and {second:.2g} from a probe that differs by {apart:.2g}",
        )

    def weigh(
        self, batch: HostBatch, drawn: GroupedCompletions, base: Tree, number: int
    ) -> tuple[dict[str, float | None], str | None]:
        """Checks a batch, and adds the weights of importance sampling to it.

        Args:
          batch: the batch, with `old`.
          drawn: its completions.
          base: the frozen half of the tree.
          number: the number of its step.

        Returns:
          Metrics, and the reason why nothing can be learned from the batch; None where it can.

        Raises:
          UserError: the first batch is not of the adapter.
        """
        theirs = drawn.logps.reshape(batch["old"].shape)
        counted, version = batch["weights"] > 0, self._sampler.version
        metrics: dict[str, float | None] = {}
        own, of = batch["old"], slice(None)
        if (age := number - version.step) > 0:
            assert version.adapter is not None
            of = slice(0, 1)  # one part of a batch tells
            part = {name: array[of] for name, array in batch.items()}
            own = self._score(lj.join(version.adapter, base), part)
        far = np.abs(theirs[of] - own)[counted[of]]
        mismatch = float(far.mean()) if far.size else None
        if self._of.config.data.staleness:
            metrics = {"staleness": float(age), "sampler_mismatch": mismatch}
        if self._importance is not None:
            batch["importance"], known = _weigh(self._importance, batch["old"], theirs, counted)
            metrics |= known
        if mismatch is None:  # no token counts
            return metrics, None
        begun, self._begun = self._begun, True
        if mismatch <= self._bound:
            return metrics, None
        if not begun:
            raise self._refused(mismatch, f"before step {number + 1}", "")
        return metrics, self._told(mismatch, f"before step {number + 1}")

    def _drawn(
        self, params: Tree, what: str, rows: np.ndarray
    ) -> tuple[GroupedCompletions, HostBatch]:
        """Returns completions by an adapter, and the part of a batch that holds them."""
        drawn = self._sampler.draw_by(params, what, rows)
        drawn = drawn._replace(ended=np.ones_like(drawn.ended))  # each counts, cut off or not
        batch = self._feed.batch_from_completions(rows, drawn)
        return drawn, {name: array[:1] for name, array in batch.items()}

    def _make_probe(self, params: Tree, batch: HostBatch) -> tuple[Tree, float, float]:
        """Returns an adapter unlike the one given, its noise, and how far it is from it."""
        adapter, base = lj.split(params)
        key = jax.random.fold_in(jax.random.key(self._of.config.optim.seed), _PROBE)
        noisy: Any = jax.jit(_add_noise, out_shardings=jax.tree.map(lambda x: x.sharding, adapter))
        counted, before, apart = batch["weights"] > 0, self._score(params, batch), 0.0
        for strength in _STRENGTHS:
            with jax.set_mesh(self._of.layout.mesh):
                probe = lj.join(noisy(adapter, strength, key), base)
            apart = float(np.abs(self._score(probe, batch) - before)[counted].mean())
            if apart >= _APART * self._bound:
                return probe, strength, apart
        raise UserError(
            f"--max-mismatch {self._bound:g}: no probe is so far from the adapter ({apart:.2g}, "
            f"{_APART:g} times that is needed) that a server that holds another one could be told "
            "from the right one; give a smaller number"
        )

    def _told(self, mismatch: float, when: str) -> str:
        return (
            f"{self._sampler.server.url} does not draw from the adapter that trains: its "
            f"log-probabilities are {mismatch:.3g} from the adapter's, in the mean over tokens, "
            f"{when}, and --max-mismatch allows {self._bound:g}"
        )

    def _refused(self, mismatch: float, when: str, why: str) -> UserError:
        data = self._of.config.data
        limits = data.top_p < 1 or data.top_k is not None
        all_tokens = ", of all tokens (leave out --top-p and --top-k)" if limits else ""
        return UserError(
            f"--sampler: {self._told(mismatch, when)}. {why}The server needs the same base, "
            f"{self._of.outline.name}, and the adapter of each request's `model`; its "
            "log-probabilities have to be those at the temperature (vLLM: --logprobs-mode "
            f"processed_logprobs){all_tokens}. Where it computes in fewer bits than training "
            "does, change that, or give a larger --max-mismatch"
        )


def _weigh(
    by: ImportanceWeighting, old: np.ndarray, drawn: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Returns the weights of importance sampling, fp32, and metrics of those that count."""
    own, theirs, mask = map(jnp.asarray, (old, drawn, counted))
    bounds: Any = {"cap": by.cap, "floor": by.floor, "masked": by.masked}
    weights = np.asarray(importance_weights(own, theirs, mask, by.level, **bounds), np.float32)
    some = weights[counted]
    if not some.size:
        return weights, dict.fromkeys(
            ("importance_mean", "importance_min", "importance_capped"), None
        )
    beyond = (some >= np.float32(by.cap)) | (some <= np.float32(by.floor))  # 0, where masked
    return weights, {
        "importance_mean": float(some.mean()),
        "importance_min": float(some.min()),
        "importance_capped": float(beyond.mean()),
    }


def _mean_apart(drawn: GroupedCompletions, batch: HostBatch, own: np.ndarray) -> float:
    """Returns the mean distance of the sampler's log-probabilities from one's own."""
    counted = batch["weights"] > 0
    theirs = np.zeros(own.shape, np.float32)
    theirs.reshape(-1, own.shape[-1])[: drawn.lengths.size] = drawn.logps.reshape(-1, own.shape[-1])
    far = np.abs(theirs - own)[counted]
    return float(far.mean()) if far.size else float("nan")


def _add_noise(adapter: Tree, strength: jax.Array, key: jax.Array) -> Tree:
    """Returns arrays with noise of their own size times `strength`; of size 1 where all are 0."""
    leaves, form = jax.tree.flatten(adapter)
    noisy = []
    for at, x in enumerate(leaves):
        if jnp.issubdtype(x.dtype, jnp.floating):
            size = jnp.sqrt(jnp.mean(jnp.square(x)))
            noise = jax.random.normal(jax.random.fold_in(key, at), x.shape, x.dtype)
            x = x + noise * strength * jnp.where(size > 0, size, 1.0).astype(x.dtype)
        noisy.append(x)
    return jax.tree.unflatten(form, noisy)
