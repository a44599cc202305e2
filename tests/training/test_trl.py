"""Losses of preferences and rollouts, and their gradients, against TRL (extra `parity`)."""

import collections
import dataclasses
import inspect
import math
import textwrap
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import losses
from lora_jax.training.losses import Completions, Online, PreferenceOptions
from tests.support import assert_close

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(3)
PAIRS, SEQ = 4, 9
LENGTHS = np.array([[7, 3, 8, 5], [2, 6, 4, 8]])  # of chosen and of rejected completions
MASK = np.arange(SEQ)[None, None] >= SEQ - LENGTHS[..., None]
LOGPS, REFERENCE = -np.abs(RNG.normal(1.5, 1, (2, 2, PAIRS, SEQ))).astype(np.float32)
ACCELERATOR = SimpleNamespace(
    device="cpu",
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer

        return SimpleNamespace(
            dpo=dpo_trainer.DPOTrainer, grpo=grpo_trainer.GRPOTrainer, kto=kto_trainer.KTOTrainer
        )


def of_dpo(trl, names, weights, options):
    """TRL's loss and its gradient by the log-probabilities, [2, pairs, seq]."""
    import torch

    logps = torch.tensor(LOGPS, requires_grad=True)
    zeros = torch.zeros(2 * PAIRS, SEQ)
    masked = (logps * torch.tensor(MASK)).reshape(2 * PAIRS, SEQ)
    outputs = SimpleNamespace(
        log_probs=masked, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )
    settings = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=names,
        loss_weights=weights,
        beta=options.beta,
        label_smoothing=options.smoothing,
        args=SimpleNamespace(discopop_tau=options.temperature),
        use_weighting=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    chosen, rejected = torch.tensor((REFERENCE * MASK).sum(-1))
    with_prompt = torch.tensor(np.pad(MASK, [(0, 0), (0, 0), (1, 0)])).reshape(2 * PAIRS, -1).int()
    inputs = {
        "input_ids": torch.ones_like(with_prompt),
        "attention_mask": torch.ones_like(with_prompt),
        "completion_mask": with_prompt,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trl.dpo._compute_loss(settings, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), logps.grad.numpy(), settings._metrics["eval"]


SMOOTHED = {"robust": 0.1, "exo_pair": 0.01, "aot": 0.2, "aot_unpaired": 0.2}
WITH_REFERENCE = sorted(set(losses.PREFERENCES) - {"cpo", "simpo", "orpo"})


@pytest.mark.parametrize("name", [*WITH_REFERENCE, "sigmoid and sft"])
def test_losses_of_pairs(trl, name):
    terms = {"sigmoid": 0.7, "sft": 0.4} if " " in name else {name: 1.0}
    options = PreferenceOptions(beta=0.3, smoothing=SMOOTHED.get(name, 0.0))
    want, gradient, logged = of_dpo(trl, [*terms], [*terms.values()], options)

    def loss(logps):
        pairs = [losses.completions(logps[i], MASK[i], REFERENCE[i]) for i in (0, 1)]
        sums = losses.preference_loss(terms, *pairs, options)
        return sums.total / sums.count, sums

    (got, sums), ours = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(LOGPS))
    assert_close(np.append(ours.ravel(), got), np.append(gradient.ravel(), want), 1e-5)
    assert np.abs(gradient).max() > 1e-3
    shown = {name: name for name in ("chosen", "rejected")}
    shown |= {"margin": "margins", "accuracy": "accuracies"}
    for ours, theirs in shown.items():
        assert sums.logs[ours] / PAIRS == pytest.approx(logged[f"rewards/{theirs}"][0], abs=1e-5)


def in_torch(function, *arrays):
    """The value of a function of torch and its gradient by the first array."""
    import torch

    first, *others = (torch.tensor(np.asarray(x)) for x in arrays)
    first.requires_grad_(True)
    value = function(first, *others)
    value.backward()
    return value.item(), first.grad.numpy()


@pytest.mark.parametrize("name", ["sigmoid", "simpo"])
def test_losses_without_a_reference(trl, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

    settings = SimpleNamespace(
        beta=1.3, label_smoothing=0.1, loss_type=name, alpha=0.0, simpo_gamma=0.4, cpo_alpha=0.0,
        accelerator=ACCELERATOR,
    )  # fmt: skip
    sums = (LOGPS * MASK).sum(-1)
    given = sums / LENGTHS if name == "simpo" else sums
    given = given.astype(np.float32)
    want, gradient = in_torch(lambda x: CPOTrainer.cpo_loss(settings, x[0], x[1])[0].mean(), given)
    if name == "simpo":
        gradient = gradient / LENGTHS
    options = PreferenceOptions(beta=1.3, smoothing=0.1, margin=0.4)

    def loss(sums):
        pairs = [Completions(sums[i], jnp.float32(LENGTHS[i])) for i in (0, 1)]
        ours = "cpo" if name == "sigmoid" else name
        return losses.preference_loss(ours, *pairs, options).total / PAIRS

    assert_close(jax.value_and_grad(loss)(jnp.asarray(sums)), (jnp.float32(want), gradient), 1e-5)


def test_orpo(trl):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    settings = SimpleNamespace(beta=0.3, accelerator=ACCELERATOR)
    means = ((LOGPS * MASK).sum(-1) / LENGTHS).astype(np.float32)
    want, gradient = in_torch(
        lambda x: ORPOTrainer.odds_ratio_loss(settings, x[0], x[1])[0].mean(), means
    )

    def loss(means):
        pairs = [Completions(means[i] * LENGTHS[i], jnp.float32(LENGTHS[i])) for i in (0, 1)]
        sums = losses.preference_loss("orpo", *pairs, PreferenceOptions(beta=0.3))
        return -sums.total / PAIRS  # TRL subtracts it

    got, ours = jax.value_and_grad(loss)(jnp.asarray(means))
    assert_close(np.append(ours.ravel(), got), np.append(gradient.ravel(), want), 1e-5)


def test_kto(trl):
    """Compares eight rows, five of them good, with a divergence above 0."""
    import torch

    logps, reference, mask = (x.reshape(2 * PAIRS, SEQ) for x in (LOGPS, REFERENCE, MASK))
    good = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    of_others = [x.astype(np.float32) for x in (RNG.normal(-8, 1, (2, 2 * PAIRS)))]
    of_others[0] += 1.5
    theirs = torch.tensor(logps, requires_grad=True)
    zeros = torch.zeros(logps.shape)
    outputs = SimpleNamespace(
        log_probs=theirs * torch.tensor(mask),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    settings = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda *_: torch.tensor(of_others[0]),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    with_prompt = torch.tensor(np.pad(mask, [(0, 0), (1, 0)])).int()
    inputs = {
        "input_ids": torch.ones_like(with_prompt),
        "attention_mask": torch.ones_like(with_prompt),
        "completion_mask": with_prompt,
        "label": torch.tensor(good),
        "ref_logps": torch.tensor((reference * mask).sum(-1)),
        "ref_KL_logps": torch.tensor(of_others[1]),
    }
    want = trl.kto._compute_loss(settings, lambda **_: outputs, inputs, False)
    want.backward()
    ones = jnp.ones(2 * PAIRS)
    kl = losses.mismatched_kl(Completions(of_others[0], ones, of_others[1]))
    assert float(kl) == pytest.approx(settings._metrics["eval"]["kl"][0], rel=1e-5) and kl > 0.1

    def loss(logps):
        rows = losses.completions(logps, mask, reference)
        sums = losses.kto_loss(rows, good, kl, beta=0.3, weights=(1.2, 0.8))
        return sums.total / sums.count

    got, ours = jax.value_and_grad(loss)(jnp.asarray(logps))
    assert_close(
        np.append(ours.ravel(), got), np.append(theirs.grad.numpy().ravel(), want.item()), 1e-5
    )


ROLLOUTS = {
    "grpo": Online(over="sequences", low=0.1, high=0.15),
    "bnpo": Online(low=0.1),
    "dapo": Online(low=0.1, high=0.2, bound=1.3),
    "dr_grpo": losses.dr_grpo(12),
    "cispo": Online(weighted=True, high=1.2),
}


def weights_of_trl(trl, mode, bounds, logps, sampled, mask):
    """The weights that the trainer's own lines compute."""
    import torch

    source = inspect.getsource(trl.grpo._generate_and_score_completions)
    lines = source.partition("# Compute the importance sampling ratio when")[2]
    lines = lines[lines.index("\n") + 1 : lines.index("# Compute the per-token log prob")]
    least, most = bounds
    scope = {
        "self": SimpleNamespace(
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=least,
            vllm_importance_sampling_clip_max=most,
        ),
        "old_per_token_logps": torch.tensor(logps),
        "sampling_per_token_logps": torch.tensor(sampled),
        "completion_mask": torch.tensor(mask).int(),
        "tool_mask": None,
        "torch": torch,
        "math": math,
    }
    exec(textwrap.dedent(lines.rpartition("\n")[0]), scope)
    return scope["vllm_importance_sampling_ratio"]


BOUNDS = {  # least and largest ratio
    None: (None, None),
    "token_truncate": (None, 1.2),
    "token_mask": (0.8, 1.3),
    "sequence_truncate": (0.9, 1.6),
    "sequence_mask": (0.5, 2.0),
}


@pytest.mark.parametrize("weighed", BOUNDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_losses_of_rollouts(trl, name, beta, level, weighed):
    import torch

    corrected = name != "grpo"
    options = dataclasses.replace(
        ROLLOUTS[name], beta=beta, level=level, divergence="corrected" if corrected else "k3"
    )
    logps, mask, gains = LOGPS[0], MASK[0], np.array([1.2, -0.7, 0.0, 0.4], np.float32)
    old = logps + RNG.normal(0, 0.2, logps.shape).astype(np.float32)
    high = options.low if options.high is None else options.high
    settings = SimpleNamespace(
        _get_per_token_logps_and_entropies=None,
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=corrected, delta=options.bound),
        loss_type=name,
        epsilon_low=options.low,
        epsilon_high=high,
        use_vllm=weighed is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=options.length,
        _entropy_bonus_enabled=False,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    theirs = torch.tensor(logps, requires_grad=True)
    entropies = torch.zeros(logps.shape)
    settings._get_per_token_logps_and_entropies = lambda *_, **__: (theirs, entropies, None)
    of_mask = torch.tensor(mask).int()
    inputs = {
        "prompt_ids": of_mask,
        "prompt_mask": of_mask,
        "completion_ids": of_mask,
        "completion_mask": of_mask,
        "advantages": torch.tensor(gains),
        "old_per_token_logps": torch.tensor(old),
        "ref_per_token_logps": torch.tensor(REFERENCE[0]),
        "num_items_in_batch": of_mask.sum(),
    }
    importance = None
    if weighed is not None:
        noise = np.random.default_rng(5).normal(0, 0.3, old.shape)
        sampled, (floor, cap) = old + noise.astype(np.float32), BOUNDS[weighed]
        of_trl = weights_of_trl(trl, weighed, (floor, cap), old, sampled, mask)
        inputs["importance_sampling_ratio"] = of_trl
        granularity, beyond = weighed.split("_")
        importance = losses.importance_weights(
            old,
            jnp.asarray(sampled),
            mask,
            granularity,
            cap,
            floor=floor or 0.0,
            masked=beyond == "mask",
        )
        assert_close(importance, np.broadcast_to(of_trl, mask.shape), 1e-5)
        for bound in {"truncate": [cap, *[floor] * bool(floor)], "mask": [0]}[beyond]:
            assert 0 < (np.asarray(importance)[mask] == np.float32(bound)).mean() < 1
    want = trl.grpo._compute_loss(settings, None, inputs)
    want.backward()

    def loss(logps):
        reference = REFERENCE[0] if beta else None
        sums = losses.online_loss(
            options, logps, mask, gains, jnp.asarray(old), reference, importance=importance
        )
        return sums.total / sums.count, sums

    (got, sums), ours = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logps))
    assert_close(
        np.append(ours.ravel(), got), np.append(theirs.grad.numpy().ravel(), want.item()), 1e-5
    )
    assert np.abs(ours).max() > 1e-3
    if beta:
        kl = settings._metrics["eval"]["kl"][0]
        assert sums.logs["kl"] / sums.count == pytest.approx(kl, rel=1e-5)
