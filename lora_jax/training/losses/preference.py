"""Losses of preferences by log-probabilities: DPO and variants, KTO, ORPO, CPO, SimPO.

They differ in one function of a pair; `PREFERENCES` is the table. These functions take the chosen
completions w (winner), the rejected ones r, and the options o. The ratio of a completion is its
log-probability minus the reference's; a and d are the ratios of w and r times β. Values and
defaults are those of TRL, whose trainers the tests run beside these functions.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.training.losses.completions import (
    Completions,
    sum_counted,
    summed_nll,
    without_padding,
)
from lora_jax.training.losses.contract import Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Options of the preference losses.

    Attributes:
      beta: strength of the reference; of ipo τ.
      smoothing: ε, the share of labels that are wrong; 0 for none. Losses without it refuse it.
      margin: SimPO's γ.
      temperature: DiscoPOP's τ.
    """

    beta: float = 0.1
    smoothing: float = 0.0
    margin: float = 0.5
    temperature: float = 0.05


class Preference(NamedTuple):
    """A named loss of pairs.

    Attributes:
      each: ``(chosen, rejected, options) -> the loss of each pair``, [pairs].
      about: describes the loss in a list of losses.
      smooths: whether it takes label smoothing.
      coupled: whether a pair's loss depends on the others of its batch, so that a batch cannot be
        accumulated in parts.
      nll: weight that its paper gives to the cross-entropy of the chosen completions beside it;
        None for losses with a reference.
      predict_prompts: whether that covers the prompts, too.
    """

    each: Callable[[Completions, Completions, PreferenceOptions], jax.Array]
    about: str
    smooths: bool = False
    coupled: bool = False
    nll: float | None = None
    predict_prompts: bool = False


def _log_sigmoid(x: jax.Array) -> jax.Array:
    log_sigmoid: jax.Array = jax.nn.log_sigmoid(x)
    return log_sigmoid


def _smooth_log_sigmoid(logits: jax.Array, smoothing: float) -> jax.Array:
    """Returns -(1 - ε) log σ(x) - ε log σ(-x)."""
    return -(1 - smoothing) * _log_sigmoid(logits) - smoothing * _log_sigmoid(-logits)


def _log_ratio_margin(chosen: Completions, rejected: Completions) -> jax.Array:
    """Returns DPO's chosen log-ratio minus the rejected one, [pairs]."""
    return chosen.ratio - rejected.ratio


def _sigmoid(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    return _smooth_log_sigmoid(o.beta * _log_ratio_margin(w, r), o.smoothing)


def _robust(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    logits = o.beta * _log_ratio_margin(w, r)
    chosen_term = (1 - o.smoothing) * _log_sigmoid(logits)
    rejected_term = o.smoothing * _log_sigmoid(-logits)
    return (-chosen_term + rejected_term) / (1 - 2 * o.smoothing)


def _exo_pair(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    """Returns EXO's pairwise loss, [pairs]."""
    logits = o.beta * _log_ratio_margin(w, r)
    # KL of the policy's two probabilities from the labels' 1 - ε and ε.
    chosen_log_ratio = _log_sigmoid(logits) - jnp.log1p(-o.smoothing)
    rejected_log_ratio = _log_sigmoid(-logits) - jnp.log(o.smoothing)
    chosen_term = jax.nn.sigmoid(logits) * chosen_log_ratio
    return chosen_term + jax.nn.sigmoid(-logits) * rejected_log_ratio


def _discopop(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    logits = o.beta * _log_ratio_margin(w, r)
    exponential_share = jax.nn.sigmoid(logits / o.temperature)
    logistic_term = -_log_sigmoid(logits) * (1 - exponential_share)
    return logistic_term + jnp.exp(-logits) * exponential_share


def _nca_pair(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    a = o.beta * w.ratio
    d = o.beta * r.ratio
    return -_log_sigmoid(a) - 0.5 * _log_sigmoid(-a) - 0.5 * _log_sigmoid(-d)


def _aot(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    """Returns AOT's loss of the sorted margins, [pairs]."""
    if w.reference is None or r.reference is None:
        raise ValueError(
            "aot compares the model with a reference, but reference is None. Pass the reference's "
            "log-probabilities."
        )
    policy_margins = _sort_counted(w.policy - r.policy, w)
    reference_margins = _sort_counted(w.reference - r.reference, w)
    return _smooth_log_sigmoid(o.beta * (policy_margins - reference_margins), o.smoothing)


def _aot_unpaired(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    margins = _sort_counted(w.ratio, w) - _sort_counted(r.ratio, w)
    return _smooth_log_sigmoid(o.beta * margins, o.smoothing)


def _sort_counted(values: jax.Array, completions: Completions) -> jax.Array:
    """Sorts values of completions, [n]; padding gets 0 in the last places."""
    counted = completions.counted
    if counted is None:
        return jnp.sort(values)
    ascending = jnp.sort(jnp.where(counted, values, jnp.inf))
    return jnp.where(jnp.arange(len(values)) < jnp.sum(counted), ascending, 0.0)


def _orpo(w: Completions, r: Completions, o: PreferenceOptions) -> jax.Array:
    log_odds_ratio = w.mean - r.mean - (_log1mexp(w.mean) - _log1mexp(r.mean))
    return -o.beta * _log_sigmoid(log_odds_ratio)


def _log1mexp(x: jax.Array) -> jax.Array:
    """Returns log(1 - e^x) of x < 0; both branches have finite gradients."""
    is_near_0 = x > -jnp.log(2.0)
    near_0 = jnp.log(-jnp.expm1(jnp.where(is_near_0, x, -1.0)))
    far_from_0 = jnp.log1p(-jnp.exp(jnp.where(is_near_0, -1.0, x)))
    return jnp.where(is_near_0, near_0, far_from_0)


# By the names of TRL's loss_type; each line is the loss of a pair.
PREFERENCES: dict[str, Preference] = {
    "sigmoid": Preference(_sigmoid, "DPO (arXiv 2305.18290); smoothed, cDPO", smooths=True),
    "robust": Preference(_robust, "DPO for labels of which ε are wrong (2403.00409)", smooths=True),
    "hinge": Preference(
        lambda w, r, o: jax.nn.relu(1 - o.beta * _log_ratio_margin(w, r)),
        "SLiC's hinge (2305.10425)",
    ),
    "ipo": Preference(
        lambda w, r, o: (w.ratio / w.tokens - r.ratio / r.tokens - 1 / (2 * o.beta)) ** 2,
        "IPO, on means over tokens (2310.12036)",
    ),
    "exo_pair": Preference(
        _exo_pair, "EXO for pairs; smoothing above 0 (2402.00856)", smooths=True
    ),
    "nca_pair": Preference(_nca_pair, "NCA for pairs (2402.05369)"),
    "bco_pair": Preference(
        lambda w, r, o: -_log_sigmoid(o.beta * w.ratio) - _log_sigmoid(-o.beta * r.ratio),
        "BCO for pairs, without a running mean (2404.04656)",
    ),
    "sppo_hard": Preference(
        lambda w, r, o: (w.ratio - 0.5 / o.beta) ** 2 + (r.ratio + 0.5 / o.beta) ** 2,
        "SPPO with hard labels (2405.00675)",
    ),
    "apo_zero": Preference(
        lambda w, r, o: 1 - jax.nn.sigmoid(o.beta * w.ratio) + jax.nn.sigmoid(o.beta * r.ratio),
        "APO where chosen answers are better than the model's (2408.06266)",
    ),
    "apo_down": Preference(
        lambda w, r, o: (
            jax.nn.sigmoid(o.beta * w.ratio) + 1 - jax.nn.sigmoid(o.beta * _log_ratio_margin(w, r))
        ),
        "APO where they are worse (2408.06266)",
    ),
    "discopop": Preference(_discopop, "DiscoPOP (2406.08414)"),
    "sigmoid_norm": Preference(
        lambda w, r, o: -_log_sigmoid(o.beta * (w.ratio / w.tokens - r.ratio / r.tokens)),
        "DPO on means over tokens",
    ),
    "aot": Preference(_aot, "AOT, of sorted pairs (2406.05882)", smooths=True, coupled=True),
    "aot_unpaired": Preference(
        _aot_unpaired, "AOT, of sorted completions", smooths=True, coupled=True
    ),
    "cpo": Preference(
        lambda w, r, o: _smooth_log_sigmoid(o.beta * (w.policy - r.policy), o.smoothing),
        "CPO without a reference; adds the chosen completions' cross-entropy (2401.08417)",
        smooths=True,
        nll=1.0,
    ),
    "simpo": Preference(
        lambda w, r, o: _smooth_log_sigmoid(o.beta * (w.mean - r.mean) - o.margin, o.smoothing),
        "SimPO without a reference, on means over tokens (2405.14734)",
        smooths=True,
        nll=0.0,
    ),
    "orpo": Preference(
        _orpo,
        "ORPO's odds ratio without a reference; adds the cross-entropy of prompts and chosen "
        "completions (2403.07691)",
        nll=1.0,
        predict_prompts=True,
    ),
}


def preference_loss(
    terms: str | Mapping[str, float],
    chosen: Completions,
    rejected: Completions,
    options: PreferenceOptions = PreferenceOptions(),  # noqa: B008
    *,
    sft: Completions | None = None,
    sft_tokens: jax.Array | float | None = None,
) -> Sums:
    """Sums a loss of preferences over pairs.

    >>> import jax.numpy as jnp
    >>> from lora_jax.training.losses import Completions, preference_loss
    >>> zero = jnp.zeros(3)
    >>> pair = Completions(zero, zero + 5, reference=zero)  # the policy is its reference
    >>> sums = preference_loss("sigmoid", pair, pair)
    >>> round(float(sums.total / sums.count), 6)  # ln 2
    0.693147

    A loss is that of a pair alone: cross-entropies that belong to it (`Preference.nll`) are terms.

    Args:
      terms: the name of a loss of `PREFERENCES`, or weights by name, in which "sft" stands for the
        cross-entropy of the chosen completions. ORPO, as TRL has it, is ``{"orpo": 1, "sft": 1}``
        with the prompts' tokens in `sft`; CPO is ``{"cpo": 1, "sft": 1}``.
      chosen, rejected: the completions of each pair, [pairs]; see `completions`.
      options: β and the like.
      sft: the completions whose cross-entropy "sft" is; by default the chosen ones. ORPO's are
        prompt and chosen answer together.
      sft_tokens: mean number of tokens of these; by default this batch's. Where a batch is
        accumulated in parts, give that of the whole batch.

    Returns:
      The sums; pairs are counted. `logs` has, with a reference, the rewards βa and βd ("chosen",
      "rejected"), their differences ("margin") and the pairs that are right ("accuracy").

    Raises:
      ValueError: for an unknown name, a reference that is missing, or smoothing that the loss does
        not know or that it needs.
    """
    weights = {terms: 1.0} if isinstance(terms, str) else dict(terms)
    if sft is None:
        sft = chosen
    chosen = without_padding(chosen)
    rejected = without_padding(rejected)
    counted = chosen.counted
    assert counted is not None
    count = jnp.sum(counted).astype(jnp.float32)
    total = jnp.float32(0)
    for name, weight in weights.items():
        if name == "sft":
            total += weight * summed_nll(sft, sft_tokens)
            continue
        preference = _preference(name, options)
        # The losses of coupled pairs are sorted: those of padding come last.
        is_loss = jnp.arange(len(counted)) < count if preference.coupled else counted
        total += weight * sum_counted(preference.each(chosen, rejected, options), is_loss)
    if chosen.reference is None or rejected.reference is None:
        return Sums(total, count, {})
    chosen_rewards = options.beta * jax.lax.stop_gradient(chosen.ratio)
    rejected_rewards = options.beta * jax.lax.stop_gradient(rejected.ratio)
    pair_logs = {
        "chosen": chosen_rewards,
        "rejected": rejected_rewards,
        "margin": chosen_rewards - rejected_rewards,
        "accuracy": (chosen_rewards > rejected_rewards).astype(jnp.float32),
    }
    logs = {name: sum_counted(values, counted) for name, values in pair_logs.items()}
    return Sums(total, count, logs)


def _preference(name: str, options: PreferenceOptions) -> Preference:
    """Returns a loss by its name; raises ValueError for unknown names or invalid `options`."""
    if name not in PREFERENCES:
        raise ValueError(
            f"the loss {name!r} is unknown. Choose from these: sft, {', '.join(PREFERENCES)}."
        )
    preference = PREFERENCES[name]
    if options.smoothing and not preference.smooths:
        raise ValueError(f"the loss {name!r} has no label smoothing. Pass smoothing=0.")
    if not 0 <= options.smoothing < 0.5 or (name == "exo_pair" and not options.smoothing):
        raise ValueError(
            f"smoothing is {options.smoothing}, but it must be at least 0 and below 0.5. For "
            "exo_pair it must be above 0. Pass such a number."
        )
    return preference


def kto_loss(
    rows: Completions,
    desirable: jax.Array,
    kl: jax.Array | float,
    *,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Sums:
    """Sums KTO over desirable and undesirable completions (Ethayarajh et al., arXiv 2402.01306).

    Args:
      rows: the completions, with a reference.
      desirable: [n] bool.
      kl: [], the policy's distance from the reference: `mismatched_kl` over the whole batch.
      beta: strength of the reference.
      weights: the weight of a desirable row, and that of an undesirable one.

    Returns:
      The sums; rows are counted. `logs` has the rewards of desirable rows ("chosen") and of other
      rows ("rejected"), each with a count of its own, and `kl`.
    """
    rows = without_padding(rows)
    counted = rows.counted
    assert counted is not None
    log_ratio_gain = jnp.where(desirable, rows.ratio - kl, kl - rows.ratio)
    losses = jnp.where(desirable, *weights) * (1 - jax.nn.sigmoid(beta * log_ratio_gain))
    count = jnp.sum(counted).astype(jnp.float32)
    rewards = beta * jax.lax.stop_gradient(rows.ratio)
    is_chosen = counted & desirable
    is_rejected = counted & ~desirable
    return Sums(
        total=sum_counted(losses, counted),
        count=count,
        logs={
            "chosen": sum_counted(rewards, is_chosen),
            "rejected": sum_counted(rewards, is_rejected),
            "kl": count * kl,
        },
        log_counts={"chosen": jnp.sum(is_chosen), "rejected": jnp.sum(is_rejected)},
    )


def mismatched_kl(mismatched: Completions) -> jax.Array:
    """Returns KTO's KL estimate, [], without a gradient.

    Args:
      mismatched: prompts with the completions of other rows of the batch.
    """
    mismatched = without_padding(mismatched)
    counted = mismatched.counted
    assert counted is not None
    mean_ratio = sum_counted(mismatched.ratio, counted) / jnp.maximum(jnp.sum(counted), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean_ratio, 0.0))
