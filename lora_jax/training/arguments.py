"""Checks the arguments of `finetune` before any work: examples, numbers, the loss, the folder."""

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core.types import Forward, Model
from lora_jax.models import Decoder
from lora_jax.training.batches import Arrays, Examples, Packs
from lora_jax.training.data.labelled import Labelled
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from lora_jax.training.losses import CLASSES, Loss, token_loss
from lora_jax.training.optimizers.named import OPTIMIZERS
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.run.best import BEST
from lora_jax.training.run.checkpoints import RECORD

ADAPTER, START, CHECKPOINTS = "adapter", "start", "checkpoints"
_OURS = (ADAPTER, START, CHECKPOINTS, RECORD, BEST)
_CHUNK = 256  # predictions whose logits exist at once, for each part of a batch on a mesh


def as_examples(given: Examples | Mapping[str, Any], name: str) -> Examples:
    """Returns examples; checks that a user's own arrays have one length."""
    if isinstance(given, Mapping):
        arrays = {key: np.asarray(array) for key, array in given.items()}
        lengths = {key: array.shape[0] if array.ndim else None for key, array in arrays.items()}
        if not lengths or None in lengths.values() or len({*lengths.values()}) > 1:
            shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
            raise TrainingError(
                f"{name} has {shapes}: arrays of one length are needed, [n, …] each"
            )
        given = Arrays(arrays)
    if not isinstance(given, Examples):
        raise TrainingError(
            f"{name} is a {type(given).__name__}: give training.chats(rows, tokenizer, …), "
            "training.texts(rows, tokenizer, …), or a dict of arrays"
        )
    if not len(given):
        raise TrainingError(f"{name} is empty")
    return given


def like(held_out: Examples, examples: Examples) -> Examples:
    """Returns the held-out examples; raises a TrainingError unless they have the same arrays."""
    one = np.zeros(1, int)
    names = {*held_out.take(one)}, {*examples.take(one)}
    if names[0] != names[1]:
        theirs, ours = (", ".join(sorted(of_one)) for of_one in names)
        raise TrainingError(f"held_out has the arrays {theirs}; examples has {ours}")
    return held_out


def check_length(steps: int | None, epochs: float | None) -> None:
    """Raises a TrainingError where the length of a run makes no sense."""
    if steps is not None and epochs is not None:
        raise TrainingError("steps and epochs both say how long to train: give one of them")
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise TrainingError(f"epochs={epochs}: a positive number of passes over the examples")


def check_counts(**counts: int | None) -> None:
    """Raises a TrainingError for a number below 1, by the name of its argument."""
    for name, value in counts.items():
        if value is not None and not value >= 1:
            raise TrainingError(f"{name}={value}: at least 1 is needed")


def check_best(keep_best: bool, patience: int | None, *, held_out: bool, folder: bool) -> None:
    """Raises a TrainingError where the best adapter cannot be measured or kept."""
    if patience is not None and not keep_best:
        raise TrainingError(
            f"patience={patience} ends a run that no longer improves, and leaves its best adapter: "
            "give keep_best=True, too"
        )
    if keep_best and not held_out:
        raise TrainingError("keep_best=True goes by the loss on held-out examples: give held_out")
    if keep_best and not folder:
        raise TrainingError("keep_best=True keeps adapters in the run's folder: name it by folder")


def loss_of(given: Any, examples: Examples, layout: Layout) -> Loss:
    """Returns the given loss, or the default one of chats and texts."""
    if isinstance(given, Loss):
        return given
    if given is not None:
        return Loss(given, unit=examples.unit)
    if isinstance(examples, Packs):
        layout.check_lengths(examples.lengths)
        chunk = _CHUNK * layout.token_parts
        return token_loss(chunk=chunk, parts=layout.sequence_parts)
    if isinstance(examples, Labelled):
        return CLASSES
    raise TrainingError(
        "loss is missing: for your own arrays, give a function (forward, params, batch, "
        "dropout_key) -> training.Sums(total, count, logs)"
    )


def check_folder(folder: str | Path | None, resume: bool, overwrite: bool) -> Path | None:
    """Returns the run's folder, created if it does not exist; changes nothing in it."""
    if resume and overwrite:
        raise TrainingError("resume goes on with a run and overwrite deletes it: give one of them")
    if folder is None:
        if resume or overwrite:
            name = "resume" if resume else "overwrite"
            raise TrainingError(f"{name}=True is about a run's folder: name it by folder")
        return None
    path = Path(folder).expanduser()
    if not (resume or overwrite) and any((path / name).exists() for name in _OURS):
        raise TrainingError(
            f"the folder {path} holds another run: go on with it by resume=True, delete it by "
            "overwrite=True, or name another"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"the folder {path} cannot be written: {error.strerror or error}; name another by "
            "folder"
        ) from error
    return path


def clear(path: Path) -> None:
    """Deletes the run that the folder holds, and nothing else."""
    if is_first():
        for name in _OURS:
            if (path / name).is_dir():
                shutil.rmtree(path / name)
            else:
                (path / name).unlink(missing_ok=True)
    wait_for_all("the folder is cleared")


def check_positions(model: Model | Forward, examples: Examples) -> None:
    """Raises a TrainingError for sequences that are longer than a decoder's positions."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if most is None or not isinstance(model, Decoder) or not isinstance(examples, Packs):
        return
    if (longest := int(np.diff(examples.starts).max())) > most:
        raise TrainingError(
            f"a sequence has {longest} tokens, and the model {most} positions: "
            "give a smaller seq_len, or load it with from_pretrained(…, rope_scaling="
            '{"rope_type": "yarn", "factor": 2.0})'
        )


def check_optimizer(optimizer: object, weight_decay: float) -> None:
    """Raises a TrainingError for an unknown optimiser, or a weight decay that it would not use."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise TrainingError(f"optimizer={optimizer!r}: give {', '.join(OPTIMIZERS)}, or your own")
    if not isinstance(optimizer, str) and weight_decay:
        raise TrainingError(
            f"weight_decay={weight_decay} is for optimizers by name: build it into your own"
        )


def settings_of(**settings: Any) -> dict[str, str]:
    """Returns the settings that a resumed run may not change, as text that never varies."""
    return {
        name: "a function" if callable(value) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        for name, value in settings.items()
    }
