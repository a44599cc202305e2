"""The task of fine-tuning on chats that are read while training, for data of any size."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.training.data import chats as tokenising
from lora_jax.training.data.batches import Packs, pack
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.stream import BlockSource, Chunks, StepSize, Stream
from train.console.errors import UserError
from train.console.output import tell
from train.data.blocks import DatasetBlocks, find_blocks
from train.data.dataset import parse_fields, rename_fields
from train.data.files import parse_datasets
from train.data.lines import format_held_out_line
from train.options.scripts.sft import Config
from train.processes import hosts
from train.run.pretrained import ModelInfo
from train.run.task import Data, TaskRows
from train.settings.tasks import NAMED
from train.tasks import chats

ROOM = 2**23  # bytes of the blocks that are shuffled together in memory
_MIN_SAMPLE_BYTES = 2**20  # bytes of the blocks whose rows fix the lengths of batches


def check(config: Config) -> None:
    """Raises a UserError for options that --stream cannot satisfy."""
    chats.check(config)
    data, run = config.data, config.run
    if config.optim.steps is None:
        raise UserError(
            "--stream does not count the rows, so it needs a number of steps. Pass --steps."
        )
    if not data.truncate:
        raise UserError(
            "--stream does not check rows before training. Pass --truncate, which cuts off rows "
            f"longer than --seq-len {data.seq_len}."
        )
    datasets = parse_datasets(data.dataset)
    for dataset in datasets:
        if dataset.name in NAMED["train.sft"]:
            raise UserError(
                f"--stream reads your own rows, but {dataset.name} is a task that generates its "
                f"rows. Remove --stream or {dataset.name}."
            )
    if datasets[0].weight is not None:
        raise UserError(
            "--stream draws from all data sets by their size and does not support weights. Remove "
            f"the weights of --dataset {' '.join(data.dataset)}, or remove --stream."
        )
    if data.fields and len(datasets) > 1:
        raise UserError(
            "--stream supports --fields only for a single --dataset. Remove --fields, or pass one "
            "data set."
        )
    if run.eval_every and data.eval_dataset is None:
        raise UserError(
            "--stream cannot hold rows out for --eval-every. Pass other rows with --eval-dataset."
        )


def read_rows(config: Config) -> TaskRows:
    """Finds the blocks of the data, and reads the rows of --eval-dataset."""
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    blocks = find_blocks(names, split=data.split, subset=data.subset)
    return TaskRows([blocks], chats.read_eval_dataset(config))


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the stream of all rows, and a sample of rows that fixes the lengths of batches."""
    data = config.data
    (blocks,) = rows.train
    chunks = Chunks(config.optim.seed, blocks.sizes, ROOM)
    read = functools.partial(
        _read_sequences, config, blocks, outline.tokenizer, _RemarksOfFirstRows()
    )
    sample = _read_sample(read, chunks, data.seq_len, packing=data.packing)
    n_bytes = int(blocks.sizes.sum())
    n_chunks = len(chunks.blocks_of_epoch(0))

    def make_stream(steps: int) -> Stream:
        """Returns a stream of all rows for a number of steps."""
        optim = config.optim
        return Stream(
            BlockSource(read, chunks, blocks.digest(), blocks.named),
            sample,
            StepSize(optim.batch_size, optim.grad_accum, steps),
            packing=data.packing,
            ahead=jax.process_count() == 1,  # many processes exchange tokens between steps
        )

    held_out = [chats.tokens_of(config, dataset, outline.tokenizer) for dataset in rows.held_out]
    source = ", ".join(dataset.name for dataset in rows.held_out)
    return Data(
        train=sample,
        held_out=chats.packed(config, {source: held_out[0]}) if held_out else None,
        name=sample.name,
        source="",
        feed=make_stream,
        row=blocks.named,
        facts={"sequence_length": sample.lengths[-1], "lengths": sample.lengths},
        lines=(
            f"{n_bytes / 1e6:,.1f} MB are read while training, {ROOM / 1e6:,.1f} MB at a time: "
            f"{len(blocks.sizes):,} blocks in random order form {n_chunks:,} chunks per epoch, "
            "within which rows are shuffled",
            f"in a sample, {chats.filling_line(sample, packing=data.packing)}",
            *(format_held_out_line(len(tokens), "rows", source) for tokens in held_out),
        ),
    )


def _read_sample(read: Any, chunks: Chunks, seq_len: int, *, packing: bool) -> Packs:
    """Returns the first rows of the first chunk, with all lengths that rows may have."""
    # Read enough blocks, and more until a row has something to learn.
    blocks = chunks.blocks_of_epoch(0)[0]
    sequences: Sequences | None = None
    for n_blocks in range(1, len(blocks) + 1):
        n_bytes = chunks.sizes[blocks[:n_blocks]].sum()
        if n_blocks == len(blocks) or n_bytes >= _MIN_SAMPLE_BYTES:
            sequences = read(blocks[:n_blocks])
            if len(sequences):
                break
    if not sequences:
        raise UserError(
            f"--seq-len {seq_len} cuts off every row of the first chunk before its completion, so "
            "there is nothing to train on. Increase --seq-len, or shorten the prompts."
        )
    # Later rows may have any length up to --seq-len.
    sample = pack(sequences, seq_len, packing=packing)
    if sample.lengths[-1] == seq_len:
        return sample
    if packing:
        return dataclasses.replace(sample, lengths=(seq_len,))
    return dataclasses.replace(
        sample, lengths=(*sample.lengths, seq_len), predicted=(*sample.predicted, seq_len)
    )


class _RemarksOfFirstRows:
    """Prints the lines of its first call only. Later calls are about further rows."""

    is_printed = False

    def __call__(self, lines: Sequence[str]) -> None:
        if not self.is_printed:
            tell(hosts.console(), *(f"among the first rows of {line}" for line in lines))
        self.is_printed = True


def _read_sequences(
    config: Config,
    blocks: DatasetBlocks,
    tokenizer: Any,
    say: Callable[[Sequence[str]], None],
    chunk: np.ndarray,
) -> Sequences:
    """Returns the rows of some blocks as sequences that are cut off at --seq-len.

    Each process tokenises a part of the blocks.

    Raises:
      UserError: a row cannot be used; names it.
    """
    data = config.data
    pairs = parse_fields(data.fields)

    def tokenize_block(block: int) -> dict[str, Any]:
        """Returns the sequences of a block as values for JSON."""
        if not threading.main_thread().is_alive():
            raise UserError("the run has ended")  # these rows are no longer needed
        file_index, numbered_rows = blocks.read(block)
        source = blocks.parts[file_index].name
        rows = rename_fields([row for _, row in numbered_rows], pairs, source)
        numbers = [number for number, _ in numbered_rows]
        sequences = tokenising.tokenize(
            rows, tokenizer, source, numbers=numbers, train_on=data.train_on, say=say
        )
        cut_sequences = sequences.cut(data.seq_len)
        with_predictions = np.flatnonzero(cut_sequences.predicted)
        return tokenising.sequences_to_json(
            cut_sequences.select(with_predictions), origin=file_index
        )

    block_sequences = hosts.map_over_processes(tokenize_block, chunk.tolist())
    return Sequences.concatenate(map(tokenising.sequences_from_json, block_sequences))


# Streamed rows have no images, so the outline needs no image encoder.
TASK = dataclasses.replace(
    chats.TASK, check=check, rows=read_rows, outline=chats.outline, examples=examples
)
