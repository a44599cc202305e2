"""The task of fine-tuning on chats of any size, which are read while training."""

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

ROOM = 2**23  # bytes of the blocks that are in memory, and shuffled, together
_SAMPLE = 2**20  # bytes of blocks that lengths are taken from


def check(config: Config) -> None:
    """Raises a UserError for options that --stream cannot satisfy."""
    chats.check(config)
    data, run = config.data, config.run
    if config.optim.steps is None:
        raise UserError("--stream counts no rows: say how long to train with --steps")
    if not data.truncate:
        raise UserError(
            "--stream looks at no row before its turn: give --truncate, which cuts off what is "
            f"longer than --seq-len {data.seq_len}"
        )
    datasets = parse_datasets(data.dataset)
    for dataset in datasets:
        if dataset.name in NAMED["train.sft"]:
            raise UserError(
                f"--stream reads rows of your own, and {dataset.name} makes its own: leave it out"
            )
    if datasets[0].weight is not None:
        raise UserError(
            f"--stream draws bytes of all data sets alike: leave out the weights of --dataset "
            f"{' '.join(data.dataset)}, or --stream"
        )
    if data.fields and len(datasets) > 1:
        raise UserError("--stream takes --fields of a single --dataset")
    if run.eval_every and data.eval_dataset is None:
        raise UserError("--stream holds no rows out: name some with --eval-dataset")


def read_rows(config: Config) -> TaskRows:
    """Finds the blocks of the data; reads the rows of --eval-dataset."""
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    blocks = find_blocks(names, split=data.split, subset=data.subset)
    return TaskRows([blocks], chats.read_eval_dataset(config))


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns a sample of the rows, which fixes the lengths of batches, and the stream of all."""
    data = config.data
    (blocks,) = rows.train
    chunks = Chunks(config.optim.seed, blocks.sizes, ROOM)
    read = functools.partial(_sequences, config, blocks, outline.tokenizer, _Once())
    sample = _sample(read, chunks, data.seq_len, packing=data.packing)
    n_bytes = int(blocks.sizes.sum())
    n_chunks = len(chunks.blocks_of_epoch(0))

    def feed(steps: int) -> Stream:
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
        feed=feed,
        row=blocks.named,
        facts={"sequence_length": sample.lengths[-1], "lengths": sample.lengths},
        lines=(
            f"{n_bytes / 1e6:,.1f} MB are read while training, {ROOM / 1e6:,.1f} MB at a time: "
            f"{len(blocks.sizes):,} blocks in a drawn order, {n_chunks:,} chunks an epoch, whose "
            "rows are shuffled",
            f"of a sample, {chats.filling_line(sample, packing=data.packing)}",
            *(format_held_out_line(len(tokens), "rows", source) for tokens in held_out),
        ),
    )


def _sample(read: Any, chunks: Chunks, seq_len: int, *, packing: bool) -> Packs:
    """Returns the first rows of the first chunk, with all lengths that rows may have."""
    blocks = chunks.blocks_of_epoch(0)[0]
    sequences: Sequences | None = None
    for n_blocks in range(1, len(blocks) + 1):
        is_large = n_blocks == len(blocks) or chunks.sizes[blocks[:n_blocks]].sum() >= _SAMPLE
        if is_large:
            sequences = read(blocks[:n_blocks])
            if len(sequences):
                break
    if not sequences:
        raise UserError(
            f"within --seq-len {seq_len} no row of the first chunk has a token of a completion"
        )
    sample = pack(sequences, seq_len, packing=packing)
    if sample.lengths[-1] == seq_len:
        return sample
    if packing:
        return dataclasses.replace(sample, lengths=(seq_len,))
    return dataclasses.replace(
        sample, lengths=(*sample.lengths, seq_len), predicted=(*sample.predicted, seq_len)
    )


class _Once:
    """Prints the lines of its first call; later ones are about further rows."""

    told = False

    def __call__(self, lines: Sequence[str]) -> None:
        if not self.told:
            tell(hosts.console(), *(f"among the first rows of {line}" for line in lines))
        self.told = True


def _sequences(
    config: Config,
    blocks: DatasetBlocks,
    tokenizer: Any,
    say: Callable[[Sequence[str]], None],
    chunk: np.ndarray,
) -> Sequences:
    """Returns the rows of some blocks as sequences, cut off at --seq-len; each process does a part.

    Raises:
      UserError: a row cannot be used; names it.
    """
    data = config.data
    pairs = parse_fields(data.fields)

    def tokenized(block: int) -> dict[str, Any]:
        if not threading.main_thread().is_alive():
            raise UserError("the run has ended")  # nothing waits for these rows any more
        file_index, numbered_rows = blocks.read(block)
        source = blocks.parts[file_index].name
        rows = rename_fields([row for _, row in numbered_rows], pairs, source)
        numbers = [number for number, _ in numbered_rows]
        sequences = tokenising.tokenize(
            rows, tokenizer, source, numbers=numbers, train_on=data.train_on, say=say
        )
        cut_sequences = sequences.cut(data.seq_len)
        with_predictions = np.flatnonzero(cut_sequences.predicted)
        return tokenising.as_json(cut_sequences.select(with_predictions), origin=file_index)

    block_sequences = hosts.map_over_processes(tokenized, chunk.tolist())
    return Sequences.concatenate(map(tokenising.from_json, block_sequences))


# Rows that are not all there have no images.
TASK = dataclasses.replace(
    chats.TASK, check=check, rows=read_rows, outline=chats.outline, examples=examples
)
