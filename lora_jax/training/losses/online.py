"""Losses of rollouts by log-probabilities: GRPO and variants, RLOO, distillation.

One function with options gives grpo, bnpo, dapo, dr_grpo, gspo and cispo (`ONLINE`). Write ρ for
π / π_old of a token or of a sequence, and A for a sequence's advantage.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from lora_jax.training.losses.contract import Sums

Level = Literal["token", "sequence"]
Divergence = Literal["k3", "corrected"]
Normaliser = Literal["tokens", "sequences", "length"]
STD_FLOOR = 1e-4  # added to a standard deviation before it divides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online:
    """The options of a rollout loss.

    Attributes:
      level: whether ρ is a token's, or e to the mean log-ratio of its sequence (GSPO).
      low, high: ρ is clipped to [1 - low, 1 + high]; high is low by default. With `weighted`, high
        bounds ρ itself.
      weighted: -min(ρ, high) A log π, the weight a constant (CISPO), rather than the clipped -ρ A.
      bound: δ, a bound of ρ where A < 0 and ρ grows; None for none.
      beta: strength of the divergence from the reference.
      divergence: "k3", e^x - x - 1 of x = log π_ref / π; "corrected" multiplies it by ρ, so that
        its gradient is that of the reverse KL.
      over: what the sum is divided by: all tokens; sequences, each sum divided by its tokens; or
        sequences times a length.
      length: the length, of "length".
    """

    level: Level = "token"
    low: float = 0.2
    high: float | None = None
    weighted: bool = False
    bound: float | None = None
    beta: float = 0.0
    divergence: Divergence = "corrected"
    over: Normaliser = "tokens"
    length: int | None = None

    def __post_init__(self) -> None:
        if (self.over == "length") != (self.length is not None):
            raise ValueError("length and over='length' belong together. Pass both or none of them.")
        if self.weighted and self.high is None:
            raise ValueError("weighted needs high, the bound of ρ. Pass high=5.0, as in ScaleRL.")


ONLINE = {
    "dapo": Online(),
    "bnpo": Online(),  # dapo's, whose tokens are those of one part of a batch
    "grpo": Online(over="sequences"),
    "gspo": Online(over="sequences", level="sequence", low=3e-4, high=4e-4),
    "cispo": Online(weighted=True, high=5.0),
}


def dr_grpo(length: int) -> Online:
    """Returns Dr. GRPO's options: sums over sequences with a fixed length (arXiv 2503.20783)."""
    return Online(over="length", length=length)


Limit = jax.Array | float | None


def clipped_loss(
    ratio: jax.Array, advantages: jax.Array, low: Limit, high: Limit, bound: Limit = None
) -> jax.Array:
    """Returns PPO's -min(ρ A, clip(ρ, low, high) A), [...]; `bound` limits the first ρ."""
    clipped_ratio = jnp.clip(ratio, low, high)
    if bound is not None:
        ratio = jnp.minimum(ratio, bound)
    return -jnp.minimum(ratio * advantages, clipped_ratio * advantages)


def weighted_loss(
    ratio: jax.Array, logps: jax.Array, advantages: jax.Array, low: Limit, high: Limit
) -> jax.Array:
    """Returns CISPO's -clip(ρ, low, high) A log π, with a constant clipped ρ, [...]."""
    return -jax.lax.stop_gradient(jnp.clip(ratio, low, high)) * advantages * logps


def online_loss(
    options: Online,
    logps: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    old: jax.Array | None = None,
    reference: jax.Array | None = None,
    there: jax.Array | None = None,
    importance: jax.Array | None = None,
) -> Sums:
    """Sums a loss of rollouts.

    Sequences whose advantage is 0 count, and pay the divergence. A batch without tokens gives 0.

    Args:
      options: an `Online`, such as ``ONLINE["dapo"]``.
      logps: [n, seq], log-probabilities of the sampled tokens, of logits / temperature.
      mask: [n, seq], true at the tokens that count: up to and with the first EOS.
      advantages: [n], see `advantages_of`; or [n, seq], one for each token.
      old: log-probabilities when the tokens were sampled; by default `logps`, as a constant.
      reference: log-probabilities under the reference.
      there: [n] bool, false for rows that fill up a batch; by default all are there.
      importance: [n, seq], weights of the tokens' losses, but not of their divergence; see
        `importance_weights`.

    Returns:
      The sums; the count is what the total is to be divided by. `logs`, sums as well: the shares of
      clipped ratios ("clip_low", "clip_high") and, with a reference, the divergence ("kl"), means
      over the batch's tokens, each multiplied by count.

    Raises:
      ValueError: beta is given without a reference, or a reference without beta.
    """
    if (reference is not None) != (options.beta != 0):
        raise ValueError(
            "the divergence needs both beta and a reference. Pass both or none of them."
        )
    weights = mask.astype(jnp.float32)
    logps = logps.astype(jnp.float32)
    sequence_tokens = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    old_logps = jax.lax.stop_gradient(logps) if old is None else old.astype(jnp.float32)
    log_ratio = jnp.where(weights > 0, logps - old_logps, 0.0)
    if options.level == "sequence":
        mean_log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / sequence_tokens
        log_ratio = mean_log_ratio + jnp.zeros_like(log_ratio)
    ratio = jnp.exp(log_ratio)
    advantages = advantages.astype(jnp.float32)
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    high = options.low if options.high is None else options.high
    if options.weighted:
        losses = weighted_loss(ratio, logps, advantages, None, high)
        is_clipped_low = jnp.zeros_like(ratio)
        is_clipped_high = (ratio > high) & (advantages > 0)
    else:
        losses = clipped_loss(ratio, advantages, 1 - options.low, 1 + high, options.bound)
        is_clipped_low = (ratio < 1 - options.low) & (advantages < 0)
        is_clipped_high = (ratio > 1 + high) & (advantages > 0)
    token_logs = {"clip_low": is_clipped_low, "clip_high": is_clipped_high}
    if importance is not None:
        losses *= importance
    if reference is not None:
        reference_log_ratio = jnp.where(weights > 0, reference.astype(jnp.float32) - logps, 0.0)
        divergence = jnp.exp(reference_log_ratio) - reference_log_ratio - 1
        if options.divergence == "corrected":
            divergence *= ratio
        losses += options.beta * divergence
        token_logs["kl"] = divergence
    if options.over == "tokens":
        count = jnp.sum(weights)
    elif options.over == "sequences":
        count = _number_of_sequences(logps, there)
        weights = weights / sequence_tokens
    else:
        count = _number_of_sequences(logps, there) * (options.length or 0)
    n_tokens = jnp.sum(mask.astype(jnp.float32))
    count_per_token = count / jnp.maximum(n_tokens, 1.0)
    logs = {}
    for name, values in token_logs.items():
        logs[name] = jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0)) * count_per_token
    total = jnp.sum(jnp.where(mask, losses, 0.0) * weights)
    return Sums(total=total, count=count, logs=logs, tokens=n_tokens)


def rloo_loss(
    logps: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    old: jax.Array,
    clip: float = 0.2,
    there: jax.Array | None = None,
) -> Sums:
    """Sums RLOO with clipped ratios of sequences (Ahmadian et al., arXiv 2402.14740).

    Args:
      logps, mask, advantages, old, there: see `online_loss`.
      clip: the ratio is clipped to [1 - clip, 1 + clip].

    Returns:
      The sums; sequences are counted.
    """
    log_ratio = jnp.sum(jnp.where(mask, logps.astype(jnp.float32) - old, 0.0), axis=1)
    losses = clipped_loss(jnp.exp(log_ratio), advantages, 1 - clip, 1 + clip)
    return Sums(
        total=jnp.sum(losses),
        count=_number_of_sequences(logps, there),
        logs={},
        tokens=jnp.sum(mask.astype(jnp.float32)),
    )


def _number_of_sequences(logps: jax.Array, there: jax.Array | None) -> jax.Array:
    """Returns the number of rows that are not padding, fp32 []."""
    return jnp.float32(len(logps)) if there is None else jnp.sum(there).astype(jnp.float32)


def importance_weights(
    logps: jax.Array,
    sampled: jax.Array,
    mask: jax.Array,
    level: Level,
    cap: float,
    *,
    floor: float = 0.0,
    masked: bool = False,
) -> jax.Array:
    """Returns bounded ratios π / π_sampler for completions of another policy, [n, seq].

    Importance sampling as TRL's `vllm_importance_sampling_mode` has it: "token_truncate" and
    "sequence_truncate", or, with `masked`, "token_mask" and "sequence_mask". A token that does not
    count has the ratio 1 at the level of tokens.

    Args:
      logps: [n, seq], log-probabilities under the policy as a step begins.
      sampled: [n, seq], log-probabilities that the sampler reports of its draws.
      mask: [n, seq], true at the tokens that count.
      level: "token" for the ratio of each token, "sequence" for the product over its sequence.
      cap, floor: the largest and the smallest ratio that is a weight as it is.
      masked: whether a ratio beyond them has the weight 0, rather than the nearer bound.
    """
    log_ratio = jnp.where(mask, logps - sampled, 0.0)
    if level == "sequence":
        sequence_log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True)
        log_ratio = sequence_log_ratio + jnp.zeros_like(log_ratio)
    ratio = jnp.exp(log_ratio)
    if masked:
        return jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
    return jnp.clip(ratio, floor, cap)


Scale = Literal["group", "batch", "none"]


def advantages_of(rewards: jax.Array, group: int, scale: Scale = "group") -> jax.Array:
    """Returns each reward minus its group's mean, [n], scaled as `scale` says.

    NaN stands for no reward: it has advantage 0, and the mean of its group is over the others.

    >>> import jax.numpy as jnp
    >>> from lora_jax.training.losses import advantages_of
    >>> [round(float(a), 6) for a in advantages_of(jnp.array([1.0, 0.0, 1.0, 0.0]), 4)]
    [0.865875, -0.865875, 0.865875, -0.865875]

    Args:
      rewards: [n], the groups one after another.
      group: rewards in a group; deviations take two at least.
      scale: divide by the group's standard deviation plus 1e-4, by the batch's, or not at all.
    """
    by_group = rewards.reshape(-1, group)
    advantages = by_group - jnp.nanmean(by_group, axis=1, keepdims=True)
    if scale == "group":
        group_std = jnp.nanstd(by_group, axis=1, ddof=1, keepdims=True)
        advantages = advantages / (group_std + STD_FLOOR)
    elif scale == "batch":
        batch_std = jnp.nanstd(rewards, ddof=1)
        advantages = advantages / (batch_std + STD_FLOOR)
    return jnp.nan_to_num(advantages.reshape(-1), nan=0.0)


def leave_one_out(rewards: jax.Array, group: int) -> jax.Array:
    """Returns each reward minus the mean of its group's other rewards, [n] (RLOO).

    NaN stands for no reward: it has advantage 0, and so has the only reward of a group.
    """
    by_group = rewards.reshape(-1, group)
    n_others = jnp.sum(~jnp.isnan(by_group), axis=1, keepdims=True) - 1
    sum_of_others = jnp.nansum(by_group, axis=1, keepdims=True) - by_group
    mean_of_others = sum_of_others / jnp.maximum(n_others, 1)
    advantages = jnp.where(n_others > 0, by_group - mean_of_others, 0.0)
    return jnp.nan_to_num(advantages, nan=0.0).reshape(-1)


def distillation_loss(
    student: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> Sums:
    """Sums the generalised Jensen-Shannon divergence of two models over tokens.

    Agarwal et al., "On-Policy Distillation of Language Models" (arXiv 2306.13649). With m = (1 - β)
    p_s + β p_t, it is β KL(p_t‖m) + (1 - β) KL(p_s‖m); by definition KL(p_t‖p_s) for β = 0, and
    KL(p_s‖p_t), the reverse KL of on-policy distillation, for β = 1.

    Args:
      student: [n, seq, vocab], logits; the gradient goes through these.
      teacher: [n, seq, vocab], logits, a constant.
      mask: [n, seq], true at the tokens that count.
      beta: β, from 0 to 1.
      temperature: divides both logits.

    Returns:
      The sums; tokens are counted.

    Raises:
      ValueError: beta is no share.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, but it must be from 0 to 1. Pass such a number.")
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    log_teacher = jax.lax.stop_gradient(log_teacher)
    if beta == 0:
        losses = _kl_divergence(log_teacher, log_student)
    elif beta == 1:
        losses = _kl_divergence(log_student, log_teacher)
    else:
        log_mixture = jnp.logaddexp(log_student + jnp.log1p(-beta), log_teacher + jnp.log(beta))
        teacher_kl = _kl_divergence(log_teacher, log_mixture)
        student_kl = _kl_divergence(log_student, log_mixture)
        losses = beta * teacher_kl + (1 - beta) * student_kl
    total = jnp.sum(jnp.where(mask, losses, 0.0))
    return Sums(total=total, count=jnp.sum(mask.astype(jnp.float32)), logs={})


def _kl_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Returns KL(p‖q) of log-probabilities, [...]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
