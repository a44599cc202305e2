"""Trains a model in full, for a finding to begin at, and measures it."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import Decoder, DecoderConfig, save_pretrained
from lora_jax.training.processes import write_json
from train import classify, sft
from train.export import __main__ as export
from train.export.options import ExportOptions
from train.findings.making.words import Labelled
from train.finetune import RunPart, finetune
from train.predict.batches import probabilities
from train.predict.classifier import find_classifier
from train.predict.texts import read_arguments, tokenize
from train.processes.session import Session
from train.reporters.files import read_json
from train.run.lifecycle import resume_hint
from train.run.output import ADAPTER, CONFIG

_SCRIPTS: dict[str, Any] = {"train.sft": sft, "train.classify": classify}
MODEL, _RUN, _RECIPE = "base", "base-run", "base.json"
_ROWS = 128  # texts in memory at once, to measure a classifier


def train_base(
    script: str, options: Sequence[str], inputs: Sequence[Path], folder: Path, session: Session
) -> Path:
    """Trains a model in full by a script, unless it is there already; returns its folder.

    A run that was interrupted goes on. A model of other options, or of other files, is replaced.

    Args:
      script: "train.sft" or "train.classify".
      options: its options, but for --full and --output.
      inputs: the files that it reads.
      folder: where the model goes, and the run that makes it.
      session: tells of signals.

    Raises:
      TrainingError: the model cannot be trained or written.
      Interrupted: after a signal, once the last step is saved.
    """
    model, run = folder / MODEL, folder / _RUN
    recipe = {"script": script, "options": [*options], "inputs": [*map(digest, inputs)]}
    if read_json(folder / _RECIPE) != recipe:
        for path in (model, run):
            shutil.rmtree(path, ignore_errors=True)
        write_json(folder / _RECIPE, recipe)
    if model.exists():  # it appears as a whole
        return model
    module = _SCRIPTS[script]
    line = ["--full", *options, "--output", str(run), *["--resume"] * (run / CONFIG).exists()]
    config = module.parse(line)
    module.check(config)
    hint = resume_hint("train.findings")
    session.stop.remedy = hint
    with session.part():
        finetune(script, config, module.task_of(config), session, RunPart(hint=hint))
    session.stop.check()
    export.run(ExportOptions(adapter=str(run / ADAPTER), merged=True, output=str(model)))
    shutil.rmtree(run)
    return model


def write_untrained(fields: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    """Writes a decoder with random weights, and its tokenizer; does so once.

    Args:
      fields: its config.json, but for the tokenizer's special tokens.
      tokenizer: its tokenizer, with an EOS and a padding token.
      folder: where it goes.
    """
    if folder.exists():  # it appears as a whole
        return
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Decoder(DecoderConfig.from_hf({**fields, **ids}))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_pretrained(folder, model, params, tokenizer=tokenizer)


def accuracy(model: Path, rows: Sequence[Labelled]) -> float:
    """Returns the share of rows to which a classifier with its own head gives their label.

    Args:
      model: the classifier's folder.
      rows: texts and labels.

    Raises:
      UserError: the folder holds no classifier.
    """
    classifier = find_classifier(None, str(model))
    texts = read_arguments([text for text, _ in rows])
    tokens = tokenize(texts, classifier.outline, None, False)
    found = probabilities(*classifier.load(), tokens, batch_size=_ROWS)
    said = [classifier.labels[i] for i in found.argmax(-1)]
    return sum(a == b for a, (_, b) in zip(said, rows, strict=True)) / len(rows)


def noted(path: Path, key: Any, measure: Callable[[], float]) -> float:
    """Returns a figure that a file keeps, or measures it and adds it to the file.

    Args:
      path: the file, JSON.
      key: what the figure depends on, as JSON has it.
      measure: measures it.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    found = read_json(path)
    if name not in found:
        write_json(path, found | {name: measure()})
    return read_json(path)[name]


def digest(path: Path) -> str:
    """Returns a hash of a file, or of all files in a folder, with their names."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = hashlib.sha256()
    for file in files:
        if file.is_file():
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()
