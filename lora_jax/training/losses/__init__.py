"""Losses: their contract, token losses by name (`TOKEN_LOSSES`), and losses of classes and pairs.

Those of preferences (`PREFERENCES`) and of rollouts (`ONLINE`) take log-probabilities, for loops of
your own; `pair_loss`, `unpaired_loss` and `rollout_loss` take batches, for a step. `flow_loss`,
`noise_loss` and `velocity_loss` are those of models that make images.
"""

from lora_jax.training.losses.chunks import number_of_chunks, predictions_at_once
from lora_jax.training.losses.classes import (
    CLASSES,
    COMPARISONS,
    IMAGES,
    classification_loss,
    logits_of,
)
from lora_jax.training.losses.completions import Completions, completions
from lora_jax.training.losses.contract import (
    HELD_OUT,
    OWN_METRICS,
    SCORE,
    UNITS,
    Logits,
    Loss,
    Reduction,
    Sums,
    number_of_units,
)
from lora_jax.training.losses.denoising import (
    DiffusionSchedule,
    FlowSchedule,
    diffusion_schedule,
    flow_loss,
    noise_loss,
    pack_latents,
    resolution_shift,
    token_positions,
    unpack_latents,
    velocity_loss,
)
from lora_jax.training.losses.objectives import (
    NLL,
    pair_loss,
    rollout_loss,
    sequence_logps,
    unpaired_loss,
)
from lora_jax.training.losses.online import (
    ONLINE,
    Online,
    advantages_of,
    distillation_loss,
    dr_grpo,
    importance_weights,
    leave_one_out,
    online_loss,
    rloo_loss,
)
from lora_jax.training.losses.preference import (
    PREFERENCES,
    PreferenceOptions,
    kto_loss,
    mismatched_kl,
    preference_loss,
)
from lora_jax.training.losses.tokens import (
    CROSS_ENTROPY,
    DEFAULT,
    TOKEN_LOSSES,
    summed_loss,
    token_loss,
    token_values,
)

__all__ = [
    "CLASSES",
    "COMPARISONS",
    "CROSS_ENTROPY",
    "DEFAULT",
    "HELD_OUT",
    "IMAGES",
    "NLL",
    "ONLINE",
    "OWN_METRICS",
    "PREFERENCES",
    "SCORE",
    "TOKEN_LOSSES",
    "UNITS",
    "Completions",
    "DiffusionSchedule",
    "FlowSchedule",
    "Logits",
    "Loss",
    "Online",
    "PreferenceOptions",
    "Reduction",
    "Sums",
    "advantages_of",
    "classification_loss",
    "completions",
    "diffusion_schedule",
    "distillation_loss",
    "dr_grpo",
    "flow_loss",
    "importance_weights",
    "kto_loss",
    "leave_one_out",
    "logits_of",
    "mismatched_kl",
    "noise_loss",
    "number_of_chunks",
    "number_of_units",
    "online_loss",
    "pack_latents",
    "pair_loss",
    "predictions_at_once",
    "preference_loss",
    "resolution_shift",
    "rloo_loss",
    "rollout_loss",
    "sequence_logps",
    "summed_loss",
    "token_loss",
    "token_positions",
    "token_values",
    "unpack_latents",
    "unpaired_loss",
    "velocity_loss",
]
