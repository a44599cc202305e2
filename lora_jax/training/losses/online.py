"""Losses of rollouts, as functions of log-probabilities: GRPO and its kin, RLOO, distillation.

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
    """Options of a loss of rollouts.

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
            raise ValueError("length is given with over='length', and only then")
        if self.weighted and self.high is None:
            raise ValueError("weighted needs high, the bound of ρ itself: ScaleRL's is 5")


ONLINE = {
    "dapo": Online(),
    "bnpo": Online(),  # dapo's, whose tokens are those of one part of a batch
    "grpo": Online(over="sequences"),
    "gspo": Online(over="sequences", level="sequence", low=3e-4, high=4e-4),
    "cispo": Online(weighted=True, high=5.0),
}


def dr_grpo(length: int) -> Online:
    """Returns Dr. GRPO's options: sums over sequences and a length (arXiv 2503.20783)."""
    return Online(over="length", length=length)


Limit = jax.Array | float | None


def clipped_loss(
    ratio: jax.Array, advantages: jax.Array, low: Limit, high: Limit, bound: Limit = None
) -> jax.Array:
    """Returns PPO's -min(ρ A, clip(ρ, low, high) A), the first ρ no more than `bound`, [...]."""
    free = ratio if bound is None else jnp.minimum(ratio, bound)
    return -jnp.minimum(free * advantages, jnp.clip(ratio, low, high) * advantages)


def weighted_loss(
    ratio: jax.Array, logps: jax.Array, advantages: jax.Array, low: Limit, high: Limit
) -> jax.Array:
    """Returns CISPO's -clip(ρ, low, high) A log π, the clipped ρ a constant, [...]."""
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
        raise ValueError("beta and a reference go together: the divergence needs both")
    counted, logps = mask.astype(jnp.float32), logps.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 1.0)
    before = jax.lax.stop_gradient(logps) if old is None else old.astype(jnp.float32)
    change = jnp.where(counted > 0, logps - before, 0.0)
    if options.level == "sequence":
        change = jnp.sum(change, axis=1, keepdims=True) / tokens + jnp.zeros_like(change)
    ratio, gain = jnp.exp(change), advantages.astype(jnp.float32)
    gain = gain if gain.ndim == 2 else gain[:, None]
    high = options.low if options.high is None else options.high
    if options.weighted:
        losses = weighted_loss(ratio, logps, gain, None, high)
        clipped_low, clipped_high = jnp.zeros_like(ratio), (ratio > high) & (gain > 0)
    else:
        losses = clipped_loss(ratio, gain, 1 - options.low, 1 + high, options.bound)
        clipped_low = (ratio < 1 - options.low) & (gain < 0)
        clipped_high = (ratio > 1 + high) & (gain > 0)
    if importance is not None:
        losses *= importance
    divergence = None
    if reference is not None:
        away = jnp.where(counted > 0, reference.astype(jnp.float32) - logps, 0.0)
        divergence = jnp.exp(away) - away - 1
        if options.divergence == "corrected":
            divergence *= ratio
        losses += options.beta * divergence
    shares = {"clip_low": clipped_low, "clip_high": clipped_high}
    if divergence is not None:
        shares["kl"] = divergence
    if options.over == "sequences":
        counted = counted / tokens
    count = {
        "tokens": jnp.sum(counted),
        "sequences": _sequences(logps, there),
        "length": _sequences(logps, there) * (options.length or 0),
    }[options.over]
    n_tokens = jnp.sum(mask.astype(jnp.float32))
    logs = {
        name: jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0))
        * (count / jnp.maximum(n_tokens, 1.0))
        for name, x in shares.items()
    }
    return Sums(jnp.sum(jnp.where(mask, losses, 0.0) * counted), count, logs, n_tokens)


def rloo_loss(
    logps: jax.Array,
    mask: jax.Array,
    advantages: jax.Array,
    old: jax.Array,
    clip: float = 0.2,
    there: jax.Array | None = None,
) -> Sums:
    """Sums RLOO with the clipped ratio of whole sequences (Ahmadian et al., arXiv 2402.14740).

    Args:
      logps, mask, advantages, old, there: see `online_loss`.
      clip: the ratio is clipped to [1 - clip, 1 + clip].

    Returns:
      The sums; sequences are counted.
    """
    change = jnp.sum(jnp.where(mask, logps.astype(jnp.float32) - old, 0.0), axis=1)
    losses = clipped_loss(jnp.exp(change), advantages, 1 - clip, 1 + clip)
    n_tokens = jnp.sum(mask.astype(jnp.float32))
    return Sums(jnp.sum(losses), _sequences(logps, there), {}, n_tokens)


def _sequences(logps: jax.Array, there: jax.Array | None) -> jax.Array:
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
    """Returns π / π_sampler within bounds, for completions that another policy drew, [n, seq].

    Importance sampling as TRL's `vllm_importance_sampling_mode` has it: "token_truncate" and
    "sequence_truncate", or, with `masked`, "token_mask" and "sequence_mask". What does not count
    has the ratio 1, at the level of tokens.

    Args:
      logps: [n, seq], log-probabilities under the policy as a step begins.
      sampled: [n, seq], those that the sampler tells of its draws.
      mask: [n, seq], true at the tokens that count.
      level: a token's own ratio, or that of its whole sequence, a product.
      cap, floor: the largest and the smallest ratio that weighs as it is.
      masked: whether a ratio beyond them has the weight 0, rather than the nearer bound.
    """
    apart = jnp.where(mask, logps - sampled, 0.0)
    if level == "sequence":
        apart = jnp.sum(apart, axis=-1, keepdims=True) + jnp.zeros_like(apart)
    ratio = jnp.exp(apart)
    if masked:
        return jnp.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
    return jnp.clip(ratio, floor, cap)


Scale = Literal["group", "batch", "none"]


def advantages_of(rewards: jax.Array, group: int, scale: Scale = "group") -> jax.Array:
    """Returns each reward less its group's mean, [n], by default over the group's deviation.

    NaN stands for no reward: it has advantage 0, and its group's mean is that of the others.

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
    less = by_group - jnp.nanmean(by_group, axis=1, keepdims=True)
    if scale == "group":
        less = less / (jnp.nanstd(by_group, axis=1, ddof=1, keepdims=True) + STD_FLOOR)
    elif scale == "batch":
        less = less / (jnp.nanstd(rewards, ddof=1) + STD_FLOOR)
    return jnp.nan_to_num(less.reshape(-1), nan=0.0)


def leave_one_out(rewards: jax.Array, group: int) -> jax.Array:
    """Returns each reward less the mean of the others of its group, [n]: RLOO's advantage.

    NaN stands for no reward: it has advantage 0, and so has a reward without others.
    """
    by_group = rewards.reshape(-1, group)
    others = jnp.sum(~jnp.isnan(by_group), axis=1, keepdims=True) - 1
    of_others = (jnp.nansum(by_group, axis=1, keepdims=True) - by_group) / jnp.maximum(others, 1)
    advantages = jnp.where(others > 0, by_group - of_others, 0.0)
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
        raise ValueError(f"beta is {beta}: a share from 0 to 1")
    ours = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    theirs = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature))
    if beta in (0, 1):
        first, second = (theirs, ours) if beta == 0 else (ours, theirs)
        losses = _divergence(first, second)
    else:
        mixed = jnp.logaddexp(ours + jnp.log1p(-beta), theirs + jnp.log(beta))
        losses = beta * _divergence(theirs, mixed) + (1 - beta) * _divergence(ours, mixed)
    return Sums(jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask.astype(jnp.float32)), {})


def _divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """Returns KL(p‖q) of log-probabilities, [...]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
