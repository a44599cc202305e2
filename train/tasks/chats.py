"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.hf.vision.readers import reads_images
from lora_jax.training.data.batches import Further, Packs, pack, pack_mixture
from lora_jax.training.data.chats import add_pictures, check_lengths, pictures_of
from lora_jax.training.data.image_parts import has_images
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.vision.pictures import Pictures, PixelValues
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, token_loss
from train.adapters.source import find_adapter
from train.console.errors import UserError, flag
from train.console.output import tell
from train.data.chats import tokenize
from train.data.dataset import Dataset, find_dataset, pairs_of
from train.data.files import parse_datasets
from train.data.lines import measured_line, padding_line
from train.options.defaults import Defaults
from train.options.rope import parse_rope_scaling
from train.options.scripts.rollouts import RolloutDataConfig
from train.options.scripts.sft import Config, LanguageOptions
from train.processes import hosts
from train.run.output import saved_options
from train.run.pretrained import ModelInfo, read_model_info
from train.run.task import Data, Task, TaskRows

_LARGE = 2**30  # bytes of files that are better streamed
_HELD_OUT_STREAM = 2**32 + 1  # no epoch's number: the draw is none of the data's orders


def check(config: Config) -> None:
    """Raises a UserError for options of another task."""
    if config.data.shuffle_schemas:
        raise UserError("--shuffle-schemas is a control for --dataset sql only")
    check_measured(config)
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    if data.eval_dataset in names and data.eval_split == data.split:
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is what is trained on: name other data, or "
            "another split by --eval-split"
        )


def check_measured(config: Any) -> None:
    """Raises a UserError for held-out data that would not be measured."""
    data = config.data
    if data.eval_dataset and not config.run.eval_every:
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is measured every --eval-every steps: give them"
        )


def read_rows(config: Config) -> TaskRows:
    """Finds the data sets; reads and checks the rows of those whose tokens are not kept."""
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    used: set[str] | None = set() if data.fields and len(names) > 1 else None
    look = _finder(config, used)
    train = [look(name, split=data.split, rows=data.rows) for name in names]
    if (n_bytes := sum(dataset.n_bytes for dataset in train)) > _LARGE:
        tell(
            hosts.console(),
            f"{n_bytes / 1e9:,.1f} GB are read into memory, where they take several times as much; "
            "--stream reads them while training",
        )
    for dataset in train:
        dataset.check(again=used is not None)
    if used is not None and (unused := [o for _, o in pairs_of(data.fields) if o not in used]):
        raise UserError(
            f"{flag('fields', *data.fields)}: none of {', '.join(names)} has `{unused[0]}` in its "
            "first row"
        )
    return TaskRows(train, read_eval_dataset(config, used))


def read_eval_dataset(config: Config, used: set[str] | None = None) -> list[Dataset]:
    """Returns the data set of --eval-dataset, checked, if there is one; see `find_dataset`."""
    data = config.data
    if data.eval_dataset is None:
        return []
    held_out = _finder(config, used)(data.eval_dataset, split=data.eval_split)
    held_out.check()
    return [held_out]


def _finder(config: Config, used: set[str] | None) -> Callable[..., Dataset]:
    """Returns `find_dataset` as the options say."""
    data = config.data
    return functools.partial(
        find_dataset, subset=data.subset, fields=data.fields, used=used, kept_in=data.token_cache
    )


def outline(
    config: LanguageOptions, rows: TaskRows, *, shows: Callable[[], bool] = lambda: False
) -> ModelInfo:
    """Reads the model's outline; checks that the model allows sequences of --seq-len.

    Args:
      config: the options.
      rows: the rows.
      shows: says whether images are to be read, of a model that has an encoder for them.
    """
    data = config.data
    assert data.model is not None, "the options have no defaults yet"
    outline = read_model_info(data.model, data.tokenizer, model_code=data.model_code)
    if outline.can_have_images and shows():
        outline = outline.with_images()
    of_torch: Any = outline.config if outline.is_torch else None
    if of_torch and isinstance(data, RolloutDataConfig) and not of_torch.caches:
        raise UserError(
            f"--model {data.model} runs as a torch module that keeps no keys and values "
            f"({of_torch.cache_line()}): drawing completions by it would take too long; name "
            "another model"
        )
    if getattr(data, "packing", False):
        check_keeps_apart(outline, "--packing: ", "leave --packing out")
    outline = outline.scaled(parse_rope_scaling(data.rope_scaling))
    outline = outline.with_template(data.chat_template).dated(data.template_date)
    remedy = "" if data.rope_scaling else "; --rope-scaling makes it more, yarn:2 twice as many"
    outline.check_length(data.seq_len, f"--seq-len {data.seq_len}", remedy)
    return outline


def check_keeps_apart(outline: ModelInfo, reason: str, remedy: str) -> None:
    """Checks that the model keeps the sequences of one row apart.

    Args:
      outline: the model's.
      reason: what puts several sequences into one row, for the message.
      remedy: what to do, for the message.

    Raises:
      UserError: the model runs as a torch module that cannot.
    """
    of_torch: Any = outline.config if outline.is_torch else None
    if of_torch and not of_torch.packs:
        raise UserError(
            f"{reason}{outline.name}, a {of_torch.model_type}, runs as a torch module that cannot "
            f"keep the sequences of one row apart. They would see each other: {remedy}"
        )


def outline_of_chats(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the model's outline, with its encoder of images if rows or the first adapter need it.

    The rows are read for it, and only where the model has such an encoder.
    """

    def shows() -> bool:
        first = config.adapter.init_adapter
        if first is not None and find_adapter(first, "--init-adapter").images:
            return True
        every = (*rows.train, *rows.held_out)
        return any(has_images(row) for dataset in every for row in dataset.peek())

    return outline(config, rows, shows=shows)


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences, padded or packed; with --eval-every, some are held out."""
    data, lines = config.data, []
    weights = [dataset.weight for dataset in parse_datasets(data.dataset)]
    train, pictures = _read(config, rows.train, outline)
    held_out, measured_pictures = _read(config, rows.held_out, outline)
    parts = dict(zip((named.name for named in rows.train), train, strict=True))
    source = ", ".join(dataset.name for dataset in rows.held_out)
    counts = {name: int(tokens.rows[-1]) for name, tokens in parts.items()}
    if not held_out and (drawn := hold_out(config, counts, weights)):
        split = [tokens.split(taken) for tokens, taken in zip(parts.values(), drawn, strict=True)]
        held_out = [measured for _, measured in split]
        source = "the held-out rows"
        parts = {name: rest for name, (rest, _) in zip(parts, split, strict=True)}
        lines = [_drawn(config, n, rows) for n, rows in zip(counts.items(), drawn, strict=True)]
        measured_pictures = pictures
    elif held_out and config.run.eval_every:
        lines = [measured_line(sum(map(len, held_out)), "rows", source)]
    packs = packed(config, parts, [w for w in weights if w is not None], pictures)
    measured = Sequences.join(held_out) if held_out else None
    if packs.further is not None:
        lines.append(_images_line(pictures, packs.further))
    return Data(
        train=packs,
        held_out=None
        if measured is None
        else packed(config, {source: measured}, (), measured_pictures),
        name=packs.name,
        source="" if packs.sources else next(iter(parts)),
        facts={
            "sequence_length": packs.lengths[-1],
            "lengths": packs.lengths,
            "rows": len(packs.table),
        },
        lines=(filling_line(packs, packing=data.packing), *lines),
    )


def _read(
    config: Config, datasets: Sequence[Dataset], outline: ModelInfo
) -> tuple[list[Sequences], Sequence[Pictures]]:
    """Returns data sets as sequences, and the images of each, if there are some."""
    held, pictures = _read_images(datasets, outline)
    options = [{"pictures": dataset} for dataset in pictures] or [{} for _ in held]
    return [
        tokens_of(config, dataset, outline.tokenizer, **more)
        for dataset, more in zip(held, options, strict=True)
    ], pictures


def _read_images(
    datasets: Sequence[Dataset], outline: ModelInfo
) -> tuple[list[Dataset], list[Pictures]]:
    """Returns data sets, and the images of each if a row has some and the model reads them."""
    if not reads_images(outline.config):
        return [*datasets], []
    rows = [dataset.rows() for dataset in datasets]
    held = [
        Dataset(named.name, functools.partial(list, part), named.key)
        for named, part in zip(datasets, rows, strict=True)
    ]
    reader = outline.images if any(has_images(row) for part in rows for row in part) else None
    if reader is None:
        return held, []
    return held, [pictures_of(named.rows(), reader, named.name) for named in held]


def tokens_of(config: Config, dataset: Dataset, tokenizer: Any, **options: Any) -> Sequences:
    """Returns a data set's rows as sequences; `options` are further ones of `chats.tokenize`."""
    write = not config.run.dry_run
    return tokenize(dataset, tokenizer, train_on=config.data.train_on, write=write, **options)


def _images_line(pictures: Sequence[Pictures], values: Further) -> str:
    """Returns the number of images, and of their tiles, in words."""
    n = sum(len(row) for part in pictures for row in part.grids)
    tiles = sum(len(part.pixels) for part in pictures)
    assert isinstance(values, PixelValues)
    return pictures[0].reader.describe(n, tiles, values.most)


def hold_out(
    config: LanguageOptions, counts: Mapping[str, int], weights: Sequence[float | None] = (None,)
) -> list[np.ndarray] | None:
    """Draws the rows to hold out, if --eval-every is given: at most a tenth.

    A resumed run holds out the same rows as when it began.

    Args:
      config: the options.
      counts: the number of rows of each data set, by its name.
      weights: weights of the data sets; where there are none, the number of rows takes their place.

    Returns:
      For each data set, the numbers of its rows that are held out, counted from 1; None for none.

    Raises:
      UserError: there are too few rows, or the run has already trained on all of them.
    """
    run, saved = config.run, saved_options(config)
    if run.eval_every and not saved.get("eval_every", True):
        raise UserError(
            f"--eval-every {run.eval_every}: the run has trained on all rows, and none can be held "
            "out any more. Leave it out, or start another run in another --output"
        )
    if not saved.get("eval_every", run.eval_every):
        return None
    questions: Any = saved.get("eval_questions", run.eval_questions)
    if run.eval_every and questions != run.eval_questions:
        raise UserError(
            f"--eval-questions was {questions} and is now {run.eval_questions}: the held-out rows "
            "of a run stay the same. Give the same number, or start another run in another --output"
        )
    shares = np.array([weight or n for weight, n in zip(weights, counts.values(), strict=True)])
    wanted = np.rint(questions * shares / shares.sum()).astype(int)
    drawn = []
    for part, ((name, n), asked) in enumerate(zip(counts.items(), wanted.tolist(), strict=True)):
        taken = min(max(asked, len(counts) > 1 and questions > 0), n // 10)
        if taken == 0:
            raise UserError(
                f"--eval-every {run.eval_every} needs rows to hold out: --eval-questions is "
                f"{questions}, and at most a tenth of the {n} rows of {name} is held out"
            )
        seed = [_option_and_seed(config)[1], _HELD_OUT_STREAM, *([part] if part else [])]
        order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
        drawn.append(np.sort(order[:taken]) + 1)
    return drawn


def filling_line(packs: Packs, *, packing: bool) -> str:
    """Returns a line on the padded or packed sequences: their number, lengths and filled share."""
    if packing:
        return (
            f"{len(packs.table):,} rows are packed into {len(packs):,} sequences of "
            f"{packs.lengths[-1]} tokens, {100 * packs.filled:.1f}% filled"
        )
    return padding_line(len(packs), "rows", packs.lengths, packs.filled)


def _drawn(config: Config, of: tuple[str, int], held_out: np.ndarray) -> str:
    name, n = of
    some = ", ".join(map(str, held_out[:5].tolist())) + ", …" * (len(held_out) > 5)
    return (
        f"{len(held_out)} of the {n} rows of {name} are held out, drawn by "
        f"{flag(*_option_and_seed(config))}: row {some}"
    )


def _option_and_seed(config: LanguageOptions) -> tuple[str, int]:
    """Returns the option whose seed draws the rows to hold out, and the seed."""
    if config.data.held_out_seed is not None:
        return "held_out_seed", config.data.held_out_seed
    return "seed", config.optim.seed


def packed(
    config: Config,
    parts: Mapping[str, Sequences],
    weights: Sequence[float] = (),
    pictures: Sequence[Pictures] = (),
) -> Packs:
    """Packs sequences, or has them batched by length.

    Args:
      config: the options.
      parts: the sequences of each data set, by its name in messages.
      weights: weights of the data sets, if they are mixed by weight.
      pictures: the images of each data set, if there are some.
    """
    data = config.data
    kept = {}
    shown = any(len(part.pixels) for part in pictures)
    for source, sequences in parts.items():
        kept[source] = check_lengths(sequences, data.seq_len, truncate=data.truncate, images=shown)
        if left_out := len(sequences) - len(kept[source]):
            print(f"{source}: left out {left_out} rows, truncated before their completion began")
    how: Any = {"packing": data.packing}
    if len(kept) == 1:
        packs = pack(next(iter(kept.values())), data.seq_len, **how)
    else:
        packs = pack_mixture(kept, weights or None, data.seq_len, **how)
    return add_pictures(packs, pictures, **how)


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of the assistant's tokens that --loss names."""
    return token_loss(config.optim.loss, **layout.chunks(config.optim.loss_chunk))


def seed_read(config: Config) -> tuple[str, ...]:
    """Returns ("seed",) where held-out rows are drawn by --seed, else ()."""
    return ("seed",) if config.run.eval_every and config.data.held_out_seed is None else ()


def _read_by(config: Config) -> tuple[str, ...]:
    """Returns the further options that decide about rows and outline; see `Task.reads`."""
    first = config.adapter.init_adapter
    shows = first is not None and find_adapter(first, "--init-adapter").images
    return (*seed_read(config), *["init_adapter"] * shows)


TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=2e-4, full_lr=2e-5),
    check=check,
    rows=read_rows,
    outline=outline_of_chats,
    examples=examples,
    loss=loss,
    reads=_read_by,
)
