"""Training: `finetune` in one call, or its parts.

    examples = training.chats(rows, tokenizer, seq_len=128)
    rules = [lora_jax.LoraRule(targets="all-linear", rank=8, alpha=16)]
    params, report = training.finetune(model, params, examples, rules, lr=1e-3, folder="runs/mine")

The parts, bottom up: `losses` (the contract of a loss), `step` (one optimiser step, pure), `setup`
and `layout` (the step on a mesh), `data.batches`, `run.checkpoints`, `loop`; `finetune` is all of
them.
"""

from lora_jax.training.data.batches import Arrays, Examples, Packs
from lora_jax.training.data.chats import chats
from lora_jax.training.data.comparisons import comparisons
from lora_jax.training.data.labelled import Fields, Labelled, label_names, predict, texts
from lora_jax.training.data.order import Feed, Order
from lora_jax.training.data.preferences import Preferences, pairs
from lora_jax.training.data.vision.images import Images, images
from lora_jax.training.errors import DamagedCheckpoint, Diverged, Interrupted, TrainingError
from lora_jax.training.finetune import Report, finetune
from lora_jax.training.held_out import Scores, make_scorer
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, Sums, number_of_units
from lora_jax.training.mesh import make_mesh
from lora_jax.training.optimizer import adamw, averaged, make_optimizer
from lora_jax.training.optimizers.schedules import warmed_up
from lora_jax.training.run.log import show
from lora_jax.training.step import State, init_state, make_evaluation, make_step

__all__ = [
    "Arrays",
    "DamagedCheckpoint",
    "Diverged",
    "Examples",
    "Feed",
    "Fields",
    "Images",
    "Interrupted",
    "Labelled",
    "Layout",
    "Loss",
    "Order",
    "Packs",
    "Preferences",
    "Report",
    "Scores",
    "State",
    "Sums",
    "TrainingError",
    "adamw",
    "averaged",
    "chats",
    "comparisons",
    "finetune",
    "images",
    "init_state",
    "label_names",
    "make_evaluation",
    "make_mesh",
    "make_optimizer",
    "make_scorer",
    "make_step",
    "number_of_units",
    "pairs",
    "predict",
    "show",
    "texts",
    "warmed_up",
]
