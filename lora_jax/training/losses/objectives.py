"""Losses of preferences and rollouts as functions of token batches."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.types import Batch, Tree
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.training.losses.chunks import ValueWithFacts
from lora_jax.training.losses.completions import Completions, completions, summed_nll
from lora_jax.training.losses.contract import Logits, Loss, Sums
from lora_jax.training.losses.online import Online, online_loss, rloo_loss
from lora_jax.training.losses.preference import PreferenceOptions, kto_loss, preference_loss
from lora_jax.training.losses.tokens import cross_entropy, entropy_of, token_values


class _Chunks(NamedTuple):
    """The arguments of `token_values` that control chunks of predictions."""

    chunk: int | None
    parts: int
    placement: Placement


NLL = "nll"  # the term of a prompt's and a chosen completion's cross-entropy


def sequence_logps(
    forward: Logits,
    params: Tree,
    batch: Batch,
    dropout_key: jax.Array | None = None,
    *,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Completions:
    """Returns the log-probabilities of a batch's sequences, by the model and the reference.

    Args:
      forward, params, dropout_key, chunk, parts, placement: see `token_values`.
      batch: see `Packs`; `counts`, int32 [batch, n], are the tokens that
        count of each sequence of a row, and `reference`, fp32 [batch, n], where there is one, are
        the reference's log-probabilities. `completion`, int32 [batch, m], where there is one, is 1
        where a token of a completion is predicted, and 0 where one of a prompt is. `sequences`,
        int32 [batch, m], is the sequence of each target, from 0, where it is not that of
        `segment_ids`: see `Preferences`.

    Returns:
      [batch * n] completions; those without tokens, which fill up a row, do not count.
    """
    chunks = _Chunks(chunk, parts, placement)
    sequences, _ = _sequences(forward, params, batch, dropout_key, chunks)
    return sequences


def _sequences(
    forward: Logits, params: Tree, batch: Batch, dropout_key: jax.Array | None, chunks: _Chunks
) -> tuple[Completions, Completions]:
    """Returns log-probabilities of completions, and of prompts with completions.

    The first are the result of `sequence_logps`, with the reference's.
    """
    logps = token_values(
        lambda logits, targets: -cross_entropy(logits, targets),
        forward,
        params,
        batch,
        dropout_key,
        **chunks._asdict(),
    )
    segments = batch.get("sequences")
    if segments is None:
        segments = jnp.take_along_axis(batch["segment_ids"], batch["predict_at"], axis=1) - 1
    n_sequences = batch["counts"].shape[1]
    is_counted = batch["weights"] > 0
    with_prompts = completions(logps, is_counted, segments=segments, n=n_sequences)
    sequences = with_prompts
    if "completion" in batch:
        is_counted &= batch["completion"] > 0
        sequences = completions(logps, is_counted, segments=segments, n=n_sequences)
    if "reference" in batch:
        sequences = sequences._replace(reference=batch["reference"].reshape(-1))
    return sequences, with_prompts


def pair_loss(
    terms: str | Mapping[str, float],
    options: PreferenceOptions = PreferenceOptions(),  # noqa: B008
    *,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Loss:
    """Returns a loss of pairs for batches of `training.pairs`, cached by its arguments.

    Args:
      terms: see `preference_loss`; "nll" is the cross-entropy of prompts and chosen completions
        together, for batches that predict both (`Preferences.completion`).
      options: β and the like.
      chunk, parts, placement: see `token_values`.
    """
    weights = ((terms, 1.0),) if isinstance(terms, str) else tuple(terms.items())
    return _pair_loss(weights, options, _Chunks(chunk, parts, placement))


@functools.cache
def _pair_loss(
    term_weights: tuple[tuple[str, float], ...], options: PreferenceOptions, chunks: _Chunks
) -> Loss:
    """Returns the loss of `pair_loss`, with hashable weights."""
    weights = dict(term_weights)
    nll_weight = weights.pop(NLL, 0.0)

    def sums(
        forward: Logits, params: Tree, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Sums the loss over the pairs of a batch."""
        sequences, with_prompts = _sequences(forward, params, batch, dropout_key, chunks)
        # Each pair is the chosen completion, then the rejected one.
        chosen = jax.tree.map(lambda x: x[::2], sequences)
        rejected = jax.tree.map(lambda x: x[1::2], sequences)
        mean_tokens = batch["mean_tokens"][0]
        loss = preference_loss(weights, chosen, rejected, options, sft_tokens=mean_tokens)
        if nll_weight:
            if "completion" not in batch:
                raise ValueError(
                    f'the term "{NLL}" needs predictions of prompts. Make the examples with '
                    "pairs(…, predict_prompts=True)."
                )
            chosen_with_prompts = jax.tree.map(lambda x: x[::2], with_prompts)
            nll = summed_nll(chosen_with_prompts, batch["mean_with_prompts"][0])
            loss = loss._replace(total=loss.total + nll_weight * nll)
        n_chosen_tokens, n_rejected_tokens = (
            batch["counts"].astype(jnp.float32).reshape(-1, 2).sum(0)
        )
        logs = {
            "logps_chosen": jnp.sum(jax.lax.stop_gradient(chosen.policy)),
            "logps_rejected": jnp.sum(jax.lax.stop_gradient(rejected.policy)),
            "length_chosen": n_chosen_tokens,
            "length_rejected": n_rejected_tokens,
        }
        return loss._replace(logs=loss.logs | logs)

    return Loss(sums, unit="pair")


@functools.cache
def unpaired_loss(
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    *,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Loss:
    """Returns KTO's loss of labelled completions, cached by its arguments.

    A batch has `labels`, int32 [batch, n], 1 for a desirable completion, and `kl`, fp32 [batch],
    KTO's estimate (see `mismatched_kl`), the same number over the whole batch.

    Args:
      beta, weights: see `kto_loss`.
      chunk, parts, placement: see `token_values`.
    """

    chunks = _Chunks(chunk, parts, placement)

    def sums(
        forward: Logits, params: Tree, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Sums the loss over the completions of a batch."""
        rows, _ = _sequences(forward, params, batch, dropout_key, chunks)
        desirable = batch["labels"].reshape(-1) > 0
        return kto_loss(rows, desirable, batch["kl"][0], beta=beta, weights=weights)

    return Loss(sums, unit="row")


@functools.cache
def rollout_loss(
    options: Online | None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Loss:
    """Returns a loss of rollouts, cached by its arguments.

    A batch has `advantages`, fp32 [batch] or [batch, m], and `old`, fp32 [batch, m], the
    log-probabilities at `predict_at` before the first update; `reference`, of the same shape, where
    beta is not 0; and perhaps `importance`, of that shape, too: see `online_loss`. Where
    completions of a prompt share it, a row has all of them: `advantages` is [batch, n] or
    [batch, n, m], `predict_at`, `old` and the like are [batch, n, m], and `completions`, int32
    [batch], is the number of those that a row has.

    Args:
      options: the loss, such as ``ONLINE["dapo"]``; None for RLOO.
      temperature: divides the logits, as it did when the completions were drawn.
      entropy: whether `logs` has the entropy of the parameters over the vocabulary ("entropy"), the
        mean over the batch's tokens multiplied by count. It takes another pass over the logits.
      chunk, parts, placement: see `token_values`.
    """

    def logps_with_entropy(logits: jax.Array, targets: jax.Array) -> ValueWithFacts:
        logits = logits / temperature
        facts = {"entropy": jax.lax.stop_gradient(entropy_of(logits))} if entropy else {}
        return ValueWithFacts(-cross_entropy(logits, targets), facts)

    def sums(
        forward: Logits, params: Tree, batch: Batch, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Sums the loss over the rollouts of a batch."""
        logps, facts = token_values(
            logps_with_entropy,
            forward,
            params,
            batch,
            dropout_key,
            chunk=chunk,
            parts=parts,
            placement=placement,
        )
        is_counted = batch["weights"] > 0
        arrays = {
            "logps": logps,
            "mask": is_counted,
            "advantages": batch["advantages"],
            "old": batch["old"],
        }
        if options is not None:
            arrays |= {name: batch[name] for name in ("reference", "importance") if name in batch}
        is_row = jnp.any(batch["segment_ids"] > 0, axis=1)
        if logps.ndim == 3:  # [batch, n, …]: completions that share a prompt
            is_row = (jnp.arange(logps.shape[1]) < batch["completions"][:, None]).reshape(-1)
            for name, array in arrays.items():
                arrays[name] = array.reshape(-1, *array.shape[2:])
        if options is None:
            loss = rloo_loss(**arrays, there=is_row)
        else:
            loss = online_loss(options, **arrays, there=is_row)
        count_per_token = loss.count / jnp.maximum(jnp.sum(is_counted), 1)
        logs = {}
        for name, values in facts.items():
            logs[name] = jnp.sum(jnp.where(is_counted, values, 0)) * count_per_token
        return loss._replace(logs=loss.logs | logs)

    unit = "sequence" if options is None or options.over != "tokens" else "token"
    return Loss(sums, unit=unit)
