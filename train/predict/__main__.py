"""Classify texts: `python -m train.predict --adapter runs/classify "a delight" "a bore"`.

Texts are arguments, the rows or lines of a file (--input), or the lines of standard input; images
are paths in these places, or a folder. The classifier is one that `train.classify` trained, an
adapter of PEFT's, or a model with its own head.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Literal, TextIO

import numpy as np
import tyro

from lora_jax.models import VisionConfig
from lora_jax.training.data.vision.images import Images
from train.console.errors import UserError, flag, reported
from train.console.help import HelpPage
from train.console.output import check_other, opened
from train.console.progress import progress_of
from train.options.command import parse_options
from train.options.field import given_options
from train.options.paths import Place, Words
from train.options.tokenizer import TokenizerOption
from train.predict.batches import probabilities
from train.predict.classifier import find_classifier
from train.predict.texts import (
    Texts,
    TokenizedTexts,
    is_row_file,
    read_arguments,
    read_images,
    read_standard_input,
    read_text_file,
    tokenize,
)
from train.processes.cache import keep_compiled
from train.run.pretrained import ModelInfo

Format = Literal["jsonl", "csv"]
_PROBABILITY_DECIMALS = 7  # of a probability: fp32 has no more


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(TokenizerOption):
    """Classify texts or images with a trained classifier."""

    HELP = HelpPage(
        "texts adapter model input field out format labels batch_size seq_len",
        "'I would buy it again' --adapter runs/classify",
    )

    texts: tyro.conf.Positional[tuple[Words, ...]] = ()
    """Texts, or paths of images, to classify. Without any, they come from --input, or from standard
    input, one per line."""
    adapter: Place | None = None
    """The adapter of a classifier: the folder of a run, of this library or of PEFT, or the hub name
    of a PEFT adapter."""
    model: Place | None = None
    """The base model: a hub name or a folder. By default the base that the adapter names. Without
    --adapter, a model that has its own head, such as one that `train.export --merged` writes."""
    input: str | None = None
    """A file of texts: rows with fields (JSONL, JSON, CSV, TSV, also gzipped, or Parquet) or, with
    any other ending, one text per line. For images also a folder of them."""
    field: str | None = None
    """The field of --input that holds the text or the image; by default "text" or "image"."""
    field_pair: str | None = None
    """The field of --input that holds a second text, for pairs (a premise and a hypothesis)."""
    out: str | None = None
    """The path of the output file, which appears when it is complete. By default standard
    output."""
    format: Format | None = None
    """The format of the output: JSON lines, or CSV. By default CSV if --out ends in .csv, else JSON
    lines."""
    overwrite: bool = False
    """Replace the file of --out."""
    labels: tuple[Words, ...] = ()
    """Names of the classes, in the order of their indices, if neither the adapter nor the model
    names them."""
    batch_size: int = 32
    """The number of texts or images that the model reads at the same time."""
    seq_len: int | None = None
    """The maximum number of tokens of a text. By default the model's."""
    truncate: bool = False
    """Truncate longer texts; without this option, they are an error."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported():
        options = parse_options(PredictOptions, args, "train.predict")
        check(options, given_options(sys.argv[1:] if args is None else args))
        run(options)


def run(options: PredictOptions) -> None:
    """Classifies the texts and writes the predictions.

    Raises:
      UserError: something that was asked for cannot be done; before weights are read.
    """
    problem = keep_compiled(options.compilation_cache)
    if problem:
        print(problem, file=sys.stderr)
    allow_base_mismatch = options.allow_base_mismatch
    classifier = find_classifier(
        options.adapter,
        options.model,
        options.labels,
        tokenizer=options.tokenizer,
        allow_base_mismatch=allow_base_mismatch,
    )
    texts, inputs, kind = read_inputs(options, classifier.outline)
    with opened(options.out, options.overwrite) as file:
        apply, params = classifier.load(allow_base_mismatch=allow_base_mismatch)
        with progress_of(len(texts), "classifying", "classified", f"{kind}s") as progress:
            class_probabilities = probabilities(
                apply, params, inputs, batch_size=options.batch_size, progress=progress
            )
        file_format = choose_output_format(options.format, options.out)
        write_predictions(file, file_format, texts, class_probabilities, classifier.labels, kind)


def check(options: PredictOptions, named_options: frozenset[str] = frozenset()) -> None:
    """Raises a UserError for invalid options, and for options that would have no effect.

    Args:
      options: the options.
      named_options: the names of those on the command line.
    """
    if options.texts and options.input is not None:
        raise UserError(
            "The command line names texts, and --input names a file of texts. Use only one of the "
            "two."
        )
    field_options = sorted({"field", "field_pair"} & named_options)
    if field_options and (options.input is None or not is_row_file(options.input)):
        raise UserError(
            f"{flag(field_options[0])} names a field of the rows of --input, but --input is not a "
            f"file of rows. Pass a file of rows, or remove {flag(field_options[0])}."
        )
    if options.overwrite and options.out is None:
        raise UserError(
            "--overwrite replaces the file of --out, but --out is not set. Pass --out, or remove "
            "--overwrite."
        )
    if options.allow_base_mismatch and options.adapter is None:
        raise UserError("--allow-base-mismatch has no effect without an adapter. Pass --adapter.")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} is too small. Pass at least 1.")
    if options.seq_len is not None and options.seq_len < 3:
        raise UserError(f"--seq-len {options.seq_len} is too small. Pass at least 3.")
    check_other(options.out, options.input, "--out", "--input")


def read_inputs(
    options: PredictOptions, outline: ModelInfo
) -> tuple[Texts, TokenizedTexts | Images, str]:
    """Returns texts with their tokens, or names of images with the images; and "text" or "image".

    Raises:
      UserError: they cannot be read, or do not fit the model.
    """
    if isinstance(outline.config, VisionConfig):
        for name in ("field_pair", "seq_len", "truncate"):
            if getattr(options, name):
                raise UserError(
                    f"{flag(name)} applies to texts, but {outline.name} reads images. Remove "
                    f"{flag(name)}."
                )
        names, images = read_images(options.texts, options.input, options.field, outline)
        return names, images, "image"
    texts = read_texts(options)
    return texts, tokenize(texts, outline, options.seq_len, options.truncate), "text"


def read_texts(options: PredictOptions) -> Texts:
    """Reads the texts of the command line, of --input, or of standard input."""
    if options.texts:
        return read_arguments(options.texts)
    if options.input is not None:
        return read_text_file(options.input, options.field or "text", options.field_pair)
    return read_standard_input()


def choose_output_format(format: Format | None, out: str | None) -> Format:
    """Returns the value of --format, or else the format of the file's ending, or JSON lines."""
    if format is not None:
        return format
    return "csv" if out is not None and out.lower().endswith(".csv") else "jsonl"


def write_predictions(
    file: TextIO,
    format: Format,
    texts: Texts,
    probabilities: np.ndarray,
    labels: Sequence[str],
    kind: str = "text",
) -> None:
    """Writes a line for each text or image, in their order.

    Args:
      file: the open output.
      format: JSON lines, or CSV with a header.
      texts: the texts, or the names of images.
      probabilities: [n, classes].
      labels: the names of the classes.
      kind: "text" or "image": the name of the field that has the text or the image's name.
    """
    table = csv.writer(file, lineterminator="\n")
    if format == "csv":
        pair_column = [] if texts.second is None else ["text_pair"]
        label_columns = [f"p({label})" for label in labels]
        table.writerow([kind, *pair_column, "label", "probability", *label_columns])
    for i, text_probabilities in enumerate(probabilities):
        best = int(text_probabilities.argmax())
        rounded = [round(float(p), _PROBABILITY_DECIMALS) for p in text_probabilities]
        fields: dict[str, object] = {kind: texts.first[i]}
        if texts.second is not None:
            fields["text_pair"] = texts.second[i]
        fields |= {"label": labels[best], "probability": rounded[best]}
        if format == "csv":
            table.writerow([*fields.values(), *rounded])
        else:
            fields["probabilities"] = dict(zip(labels, rounded, strict=True))
            line = json.dumps(fields, ensure_ascii=False)
            file.write(f"{line}\n")
    file.flush()


if __name__ == "__main__":
    main()
