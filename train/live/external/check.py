"""Checks that a server draws from the run's adapter, before training and at each batch.

If the sampler has the base or another adapter, the run learns from another policy's completions
although its losses look good. An adapter that starts with B = 0 equals the base. Before the first
step, the server therefore also loads a probe, which is the adapter with noise.
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

_MAX_REHEARSAL_PROMPTS = 4
_MIN_PROBE_DISTANCE = 4.0  # minimum distance of the probe from the adapter, in --max-mismatch
_NOISE_STRENGTHS = [0.05 * 2**k for k in range(10)]
_PROBE_STREAM = 3  # a random stream of the run; see `train.live.rollouts`

# Returns the log-probabilities of a batch's completions by an adapted tree, [accumulate, batch, n].
Score = Callable[[Tree, HostBatch], np.ndarray]


class SamplerCheck:
    """Compares the sampler's log-probabilities with those of the adapter that it loaded."""

    def __init__(
        self, context: ModelContext, feed: PromptFeed, sampler: ExternalSampler, score: Score
    ) -> None:
        """Keeps the run, its prompts, its sampler, and the trainer's scoring function."""
        self._context = context
        self._feed = feed
        self._sampler = sampler
        self._score = score
        self._bound = context.config.data.max_mismatch
        self._importance = importance_of(context.config)
        self._has_checked_batch = False

    def rehearse(self, params: Tree) -> None:
        """Checks that the server draws with the adapter at the start of training, and with a probe.

        Raises:
          UserError: the server draws with another adapter; tells the mismatch and a remedy.
        """
        rows = self._feed.rows(int(self._context.ready.state.step))
        rows = rows[: min(_MAX_REHEARSAL_PROMPTS, self._feed.order.batch_size)]
        drawn, batch = self._draw_batch(params, "begin", rows)
        mismatch = _mean_mismatch(drawn, batch, self._score(params, batch))
        if not mismatch <= self._bound:
            raise self._mismatch_error(mismatch, "at the start of training", "")
        # The probe differs from the base and from the adapter.
        probe, strength, probe_distance = self._make_probe(params, batch)
        drawn, batch = self._draw_batch(probe, "probe", rows)
        probe_mismatch = _mean_mismatch(drawn, batch, self._score(probe, batch))
        if not probe_mismatch <= self._bound:
            old_mismatch = _mean_mismatch(drawn, batch, self._score(params, batch))
            cause = ""
            if old_mismatch <= self._bound:
                cause = "It still draws with the earlier adapter and has not loaded the new one. "
            occasion = f"for a probe, the adapter with noise of {strength:g},"
            raise self._mismatch_error(probe_mismatch, occasion, cause)
        tell(
            self._context.console,
            f"{self._sampler.server.url} draws from the adapter: the mean mismatch is "
            f"{mismatch:.2g} for the adapter, and {probe_mismatch:.2g} for a probe that differs "
            f"from it by {probe_distance:.2g}",
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
          Metrics, and the reason why nothing can be learned from the batch, or None.

        Raises:
          UserError: the first batch was drawn with another adapter.
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
            raise self._mismatch_error(mismatch, occasion, "")
        return metrics, self._describe_mismatch(mismatch, occasion)

    def _mismatch(
        self, batch: HostBatch, sampler_logps: np.ndarray, base: Tree, number: int
    ) -> float | None:
        """Returns the mean mismatch between the sampler and the adapter that drew the batch.

        The mismatch is the absolute difference of log p, and None if no token counts.
        """
        version = self._sampler.version
        is_stale = number > version.step
        has_loss = batch["weights"] > 0
        adapter_logps = batch["old"]
        if is_stale:
            # The first part of the batch is enough for the check.
            assert version.adapter is not None
            part = {name: array[:1] for name, array in batch.items()}
            adapter_logps = self._score(lj.join(version.adapter, base), part)
            sampler_logps = sampler_logps[:1]
            has_loss = has_loss[:1]
        distances = np.abs(sampler_logps - adapter_logps)[has_loss]
        return float(distances.mean()) if distances.size else None

    def _draw_batch(
        self, params: Tree, label: str, rows: np.ndarray
    ) -> tuple[GroupedCompletions, HostBatch]:
        """Draws completions with an adapter, and returns them with their part of a batch."""
        drawn = self._sampler.draw_by(params, label, rows)
        # Completions that were cut off count, too.
        drawn = drawn._replace(ended=np.ones_like(drawn.ended))
        batch = self._feed.batch_from_completions(rows, drawn)
        return drawn, {name: array[:1] for name, array in batch.items()}

    def _make_probe(self, params: Tree, batch: HostBatch) -> tuple[Tree, float, float]:
        """Returns an adapter with noise, the strength of the noise, and the change of log p."""
        adapter, base = lj.split(params)
        key = jax.random.fold_in(jax.random.key(self._context.config.optim.seed), _PROBE_STREAM)
        shardings = jax.tree.map(lambda array: array.sharding, adapter)
        add_noise: Any = jax.jit(_add_noise, out_shardings=shardings)
        has_loss = batch["weights"] > 0
        adapter_logps = self._score(params, batch)
        # The weakest noise that a check could not overlook.
        distance = 0.0
        for strength in _NOISE_STRENGTHS:
            with jax.set_mesh(self._context.layout.mesh):
                probe = lj.join(add_noise(adapter, strength, key), base)
            probe_logps = self._score(probe, batch)
            distance = float(np.abs(probe_logps - adapter_logps)[has_loss].mean())
            if distance >= _MIN_PROBE_DISTANCE * self._bound:
                return probe, strength, distance
        raise UserError(
            f"--max-mismatch {self._bound:g} is too large to detect a server with a wrong adapter: "
            f"a probe differs from the adapter by {distance:.2g}, but {_MIN_PROBE_DISTANCE:g} "
            "times --max-mismatch is needed. Pass a smaller --max-mismatch."
        )

    def _describe_mismatch(self, mismatch: float, occasion: str) -> str:
        """Returns a sentence, without its period, about a sampler with another adapter."""
        return (
            f"{self._sampler.server.url} does not draw from the adapter that trains: {occasion} "
            "its log-probabilities differ from the adapter's by "
            f"{mismatch:.3g} on average, and --max-mismatch allows {self._bound:g}"
        )

    def _mismatch_error(self, mismatch: float, occasion: str, cause: str) -> UserError:
        """Returns the error for a sampler that does not draw from the adapter, with remedies."""
        data = self._context.config.data
        all_tokens = ""
        if data.top_p < 1 or data.top_k is not None:
            all_tokens = " Remove --top-p and --top-k, so that they cover all tokens."
        return UserError(
            f"--sampler: {self._describe_mismatch(mismatch, occasion)}. {cause}Start the server "
            f"with the same base, {self._context.outline.name}, and with log-probabilities at the "
            f"temperature (vLLM: --logprobs-mode processed_logprobs).{all_tokens} If the server "
            "computes with fewer bits than training, increase its precision, or pass a larger "
            "--max-mismatch."
        )


def _importance_of_tokens(
    weighting: ImportanceWeighting,
    old_logps: np.ndarray,
    sampler_logps: np.ndarray,
    has_loss: np.ndarray,
) -> tuple[np.ndarray, dict[str, float | None]]:
    """Returns the weights of importance sampling, float32, and metrics of the counted ones."""
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
    is_low = counted <= np.float32(weighting.floor)  # masked weights are 0
    return importance, {
        "importance_mean": float(counted.mean()),
        "importance_min": float(counted.min()),
        "importance_capped": float((is_high | is_low).mean()),
    }


def _mean_mismatch(drawn: GroupedCompletions, batch: HostBatch, logps: np.ndarray) -> float:
    """Returns the mean absolute difference of the sampler's log-probabilities and `logps`."""
    has_loss = batch["weights"] > 0
    max_new_tokens = logps.shape[-1]
    drawn_logps = drawn.logps.reshape(-1, max_new_tokens)
    # The rows of the batch behind the drawn ones are empty.
    sampler_logps = np.zeros(logps.shape, np.float32)
    rows = sampler_logps.reshape(-1, max_new_tokens)  # a view
    rows[: len(drawn_logps)] = drawn_logps
    distances = np.abs(sampler_logps - logps)[has_loss]
    return float(distances.mean()) if distances.size else float("nan")


def _add_noise(adapter: Tree, strength: jax.Array, key: jax.Array) -> Tree:
    """Adds noise with `strength` times each array's root mean square, or times 1 for zeros."""
    arrays, structure = jax.tree.flatten(adapter)
    noisy_arrays = []
    for index, array in enumerate(arrays):
        if jnp.issubdtype(array.dtype, jnp.floating):
            rms = jnp.sqrt(jnp.mean(jnp.square(array)))
            noise = jax.random.normal(jax.random.fold_in(key, index), array.shape, array.dtype)
            array = array + noise * strength * jnp.where(rms > 0, rms, 1.0).astype(array.dtype)
        noisy_arrays.append(array)
    return jax.tree.unflatten(structure, noisy_arrays)
