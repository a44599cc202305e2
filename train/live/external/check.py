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

_MAX_PROMPTS = 4  # of a rehearsal, at most
_MIN_PROBE_DISTANCE = 4.0  # times --max-mismatch that the probe is from the adapter, at least
_STRENGTHS = [0.05 * 2**k for k in range(10)]  # of the probe's noise
_PROBE_STREAM = 3  # a stream of the run's key; see `train.live.rollouts`

# Returns the log-probabilities of a batch's completions by an adapted tree, [accumulate, batch, n].
Score = Callable[[Tree, HostBatch], np.ndarray]


class SamplerCheck:
    """Compares the sampler's log-probabilities with those of the adapter that it was given."""

    def __init__(
        self, context: ModelContext, feed: PromptFeed, sampler: ExternalSampler, score: Score
    ) -> None:
        """Takes the run, its prompts, its sampler, and the trainer's log-probabilities."""
        self._context = context
        self._feed = feed
        self._sampler = sampler
        self._score = score
        self._bound = context.config.data.max_mismatch
        self._importance = importance_of(context.config)
        self._has_checked_batch = False

    def rehearse(self, params: Tree) -> None:
        """Has the server draw by the adapter as training begins, and by a probe.

        Raises:
          UserError: it does not draw by one of them; says how far it is, and what to do.
        """
        rows = self._feed.rows(int(self._context.ready.state.step))
        rows = rows[: min(_MAX_PROMPTS, self._feed.order.batch_size)]
        drawn, batch = self._drawn(params, "begin", rows)
        mismatch = _mean_mismatch(drawn, batch, self._score(params, batch))
        if not mismatch <= self._bound:
            raise self._refused(mismatch, "as training begins", "")
        probe, strength, probe_distance = self._make_probe(params, batch)
        drawn, batch = self._drawn(probe, "probe", rows)
        probe_mismatch = _mean_mismatch(drawn, batch, self._score(probe, batch))
        if not probe_mismatch <= self._bound:
            old_mismatch = _mean_mismatch(drawn, batch, self._score(params, batch))
            why = ""
            if old_mismatch <= self._bound:
                why = "It goes on with what it had before: it has not taken up the adapter. "
            occasion = f"with noise of {strength:g} added to it, as a probe"
            raise self._refused(probe_mismatch, occasion, why)
        tell(
            self._context.console,
            f"{self._sampler.server.url} draws from the adapter: it is {mismatch:.2g} from it in "
            f"the mean over tokens, and {probe_mismatch:.2g} from a probe that differs by "
            f"{probe_distance:.2g}",
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
        sampler_logps = drawn.logps.reshape(batch["old"].shape)
        mismatch = self._mismatch(batch, sampler_logps, base, number)
        metrics: dict[str, float | None] = {}
        if self._context.config.data.staleness:
            metrics["staleness"] = float(number - self._sampler.version.step)
            metrics["sampler_mismatch"] = mismatch
        if self._importance is not None:
            batch["importance"], importance_metrics = _importance_of_tokens(
                self._importance, batch["old"], sampler_logps, batch["weights"] > 0
            )
            metrics |= importance_metrics
        if mismatch is None:  # no token counts
            return metrics, None
        is_first_batch = not self._has_checked_batch
        self._has_checked_batch = True
        if mismatch <= self._bound:
            return metrics, None
        occasion = f"before step {number + 1}"
        if is_first_batch:
            raise self._refused(mismatch, occasion, "")
        return metrics, self._problem(mismatch, occasion)

    def _mismatch(
        self, batch: HostBatch, sampler_logps: np.ndarray, base: Tree, number: int
    ) -> float | None:
        """Returns the mean distance of the sampler's log p from that of the adapter that it had.

        None if no token counts.
        """
        version = self._sampler.version
        is_stale = number > version.step
        has_loss = batch["weights"] > 0
        adapter_logps = batch["old"]
        if is_stale:
            # The first part of a batch is enough to tell.
            assert version.adapter is not None
            part = {name: array[:1] for name, array in batch.items()}
            adapter_logps = self._score(lj.join(version.adapter, base), part)
            sampler_logps = sampler_logps[:1]
            has_loss = has_loss[:1]
        distances = np.abs(sampler_logps - adapter_logps)[has_loss]
        return float(distances.mean()) if distances.size else None

    def _drawn(
        self, params: Tree, label: str, rows: np.ndarray
    ) -> tuple[GroupedCompletions, HostBatch]:
        """Returns completions by an adapter, and the part of a batch that holds them."""
        drawn = self._sampler.draw_by(params, label, rows)
        drawn = drawn._replace(ended=np.ones_like(drawn.ended))  # each counts, cut off or not
        batch = self._feed.batch_from_completions(rows, drawn)
        return drawn, {name: array[:1] for name, array in batch.items()}

    def _make_probe(self, params: Tree, batch: HostBatch) -> tuple[Tree, float, float]:
        """Returns an adapter with noise, the noise's strength, and the distance of its log p."""
        adapter, base = lj.split(params)
        key = jax.random.fold_in(jax.random.key(self._context.config.optim.seed), _PROBE_STREAM)
        shardings = jax.tree.map(lambda array: array.sharding, adapter)
        add_noise: Any = jax.jit(_add_noise, out_shardings=shardings)
        has_loss = batch["weights"] > 0
        adapter_logps = self._score(params, batch)
        distance = 0.0
        for strength in _STRENGTHS:
            with jax.set_mesh(self._context.layout.mesh):
                probe = lj.join(add_noise(adapter, strength, key), base)
            probe_logps = self._score(probe, batch)
            distance = float(np.abs(probe_logps - adapter_logps)[has_loss].mean())
            if distance >= _MIN_PROBE_DISTANCE * self._bound:
                return probe, strength, distance
        raise UserError(
            f"--max-mismatch {self._bound:g}: no probe is so far from the adapter ({distance:.2g}, "
            f"{_MIN_PROBE_DISTANCE:g} times that is needed) that a server that holds another one "
            "could be told from the right one; give a smaller number"
        )

    def _problem(self, mismatch: float, occasion: str) -> str:
        """Returns the sentence that the sampler does not draw from the adapter that trains."""
        return (
            f"{self._sampler.server.url} does not draw from the adapter that trains: its "
            f"log-probabilities are {mismatch:.3g} from the adapter's, in the mean over tokens, "
            f"{occasion}, and --max-mismatch allows {self._bound:g}"
        )

    def _refused(self, mismatch: float, occasion: str, why: str) -> UserError:
        """Returns the error of a sampler that does not draw from the adapter, with remedies."""
        data = self._context.config.data
        all_tokens = ""
        if data.top_p < 1 or data.top_k is not None:
            all_tokens = ", of all tokens (leave out --top-p and --top-k)"
        return UserError(
            f"--sampler: {self._problem(mismatch, occasion)}. {why}The server needs the same base, "
            f"{self._context.outline.name}, and the adapter of each request's `model`; its "
            "log-probabilities have to be those at the temperature (vLLM: --logprobs-mode "
            f"processed_logprobs){all_tokens}. Where it computes in fewer bits than training "
            "does, change that, or give a larger --max-mismatch"
        )


def _importance_of_tokens(
    weighting: ImportanceWeighting,
    old_logps: np.ndarray,
    sampler_logps: np.ndarray,
    has_loss: np.ndarray,
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Returns the weights of importance sampling, fp32, and metrics of those that count."""
    weights = importance_weights(
        jnp.asarray(old_logps),
        jnp.asarray(sampler_logps),
        jnp.asarray(has_loss),
        weighting.level,
        cap=weighting.cap,
        floor=weighting.floor,
        masked=weighting.masked,
    )
    importance = np.asarray(weights, np.float32)
    counted = importance[has_loss]
    if not counted.size:
        return importance, {
            "importance_mean": None,
            "importance_min": None,
            "importance_capped": None,
        }
    is_high = counted >= np.float32(weighting.cap)
    is_low = counted <= np.float32(weighting.floor)  # 0, where masked
    return importance, {
        "importance_mean": float(counted.mean()),
        "importance_min": float(counted.min()),
        "importance_capped": float((is_high | is_low).mean()),
    }


def _mean_mismatch(drawn: GroupedCompletions, batch: HostBatch, logps: np.ndarray) -> float:
    """Returns the mean distance of the sampler's log-probabilities from an adapter's, `logps`."""
    has_loss = batch["weights"] > 0
    max_new_tokens = logps.shape[-1]
    drawn_logps = drawn.logps.reshape(-1, max_new_tokens)
    sampler_logps = np.zeros(logps.shape, np.float32)
    rows = sampler_logps.reshape(-1, max_new_tokens)  # a view
    rows[: len(drawn_logps)] = drawn_logps  # the other rows of the batch are empty
    distances = np.abs(sampler_logps - logps)[has_loss]
    return float(distances.mean()) if distances.size else float("nan")


def _add_noise(adapter: Tree, strength: jax.Array, key: jax.Array) -> Tree:
    """Returns arrays with noise of their own size times `strength`; of size 1 where all are 0."""
    arrays, structure = jax.tree.flatten(adapter)
    noisy_arrays = []
    for index, array in enumerate(arrays):
        if jnp.issubdtype(array.dtype, jnp.floating):
            rms = jnp.sqrt(jnp.mean(jnp.square(array)))
            noise = jax.random.normal(jax.random.fold_in(key, index), array.shape, array.dtype)
            array = array + noise * strength * jnp.where(rms > 0, rms, 1.0).astype(array.dtype)
        noisy_arrays.append(array)
    return jax.tree.unflatten(structure, noisy_arrays)
