"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.hf.vision.readers import reads_images
from lora_jax.training.data.batches import Further, Packs, pack, pack_mixture
from lora_jax.training.data.chats import add_pictures, check_lengths, read_images_of_rows
from lora_jax.training.data.image_parts import has_images
from lora_jax.training.data.rows import Row
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.vision.pictures import Pictures, PixelValues
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, token_loss
from train.adapters.source import find_adapter
from train.console.errors import UserError, flag
from train.console.output import tell
from train.data.chats import tokenize
from train.data.dataset import Dataset, find_dataset, parse_fields
from train.data.files import parse_datasets
from train.data.lines import format_held_out_line, format_padding_line
from train.options.defaults import Defaults
from train.options.rope import parse_rope_scaling
from train.options.scripts.rollouts import RolloutDataConfig
from train.options.scripts.sft import Config, LanguageOptions
from train.processes import hosts
from train.run.output import saved_options
from train.run.pretrained import ModelInfo, read_model_info
from train.run.task import Data, Task, TaskRows

_MIN_BYTES_TO_STREAM = 2**30  # larger files should be streamed
_HELD_OUT_STREAM = 2**32 + 1  # random stream of held-out rows; differs from all epoch numbers


def check(config: Config) -> None:
    """Raises a UserError for options of another task."""
    if config.data.shuffle_schemas:
        raise UserError(
            "--shuffle-schemas only applies to --dataset sql. Remove --shuffle-schemas."
        )
    check_measured(config)
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    if data.eval_dataset in names and data.eval_split == data.split:
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is also the training data. Pass other data, or "
            "another split with --eval-split."
        )


def check_measured(config: Any) -> None:
    """Raises a UserError for held-out data that would not be measured."""
    data = config.data
    if data.eval_dataset and not config.run.eval_every:
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is only measured every --eval-every steps. Pass "
            "--eval-every, too."
        )


def read_rows(config: Config) -> TaskRows:
    """Finds the data sets, and reads and checks rows whose tokens are not cached."""
    data = config.data
    names = [dataset.name for dataset in parse_datasets(data.dataset)]
    # With several data sets, each field of --fields must be in at least one of them.
    fields_in_use: set[str] | None = set() if data.fields and len(names) > 1 else None
    find = _dataset_finder(config, fields_in_use)
    train = [find(name, split=data.split, rows=data.rows) for name in names]
    n_bytes = sum(dataset.n_bytes for dataset in train)
    if n_bytes > _MIN_BYTES_TO_STREAM:
        tell(
            hosts.console(),
            f"{n_bytes / 1e9:,.1f} GB of data are read into memory, where they need several times "
            "as much. Use --stream to read them while training",
        )
    for dataset in train:
        dataset.check(again=fields_in_use is not None)
    if fields_in_use is not None:
        for _, field in parse_fields(data.fields):
            if field not in fields_in_use:
                raise UserError(
                    f"{flag('fields', *data.fields)}: none of {', '.join(names)} has the field "
                    f"`{field}` in its first row. Check the names in --fields."
                )
    return TaskRows(train, read_eval_dataset(config, fields_in_use))


def read_eval_dataset(config: Config, fields_in_use: set[str] | None = None) -> list[Dataset]:
    """Returns the checked data set of --eval-dataset in a list; [] without the option."""
    data = config.data
    if data.eval_dataset is None:
        return []
    find = _dataset_finder(config, fields_in_use)
    held_out = find(data.eval_dataset, split=data.eval_split)
    held_out.check()
    return [held_out]


def _dataset_finder(config: Config, fields_in_use: set[str] | None) -> Callable[..., Dataset]:
    """Returns `find_dataset` with the arguments that the options set."""
    data = config.data
    return functools.partial(
        find_dataset,
        subset=data.subset,
        fields=data.fields,
        used=fields_in_use,
        kept_in=data.token_cache,
    )


def outline(
    config: LanguageOptions, rows: TaskRows, *, needs_images: Callable[[], bool] = lambda: False
) -> ModelInfo:
    """Reads the model's outline, and checks that the model allows sequences of --seq-len.

    Args:
      config: the options.
      rows: the rows.
      needs_images: returns whether images are needed; called for a model with an image encoder.
    """
    data = config.data
    assert data.model is not None, "the options have no defaults yet"
    outline = read_model_info(data.model, data.tokenizer, model_code=data.model_code)
    if outline.can_have_images and needs_images():
        outline = outline.with_images()
    # Completions are drawn with cached keys and values.
    torch_config: Any = outline.config if outline.is_torch else None
    draws_completions = isinstance(data, RolloutDataConfig)
    if torch_config and draws_completions and not torch_config.caches:
        raise UserError(
            f"--model {data.model} runs as a torch module that does not cache keys and values "
            f"({torch_config.cache_line()}), so drawing completions would take too long. Use "
            "another model."
        )
    if getattr(data, "packing", False):
        check_keeps_apart(outline, "--packing: ", "Remove --packing.")
    outline = outline.scaled(parse_rope_scaling(data.rope_scaling))
    outline = outline.with_template(data.chat_template).dated(data.template_date)
    remedy = ". Pass a smaller --seq-len."
    if not data.rope_scaling:
        remedy = ". Pass a smaller --seq-len, or --rope-scaling (yarn:2 allows twice as many)."
    outline.check_length(data.seq_len, f"--seq-len {data.seq_len}", remedy)
    return outline


def check_keeps_apart(outline: ModelInfo, reason: str, remedy: str) -> None:
    """Checks that the model separates several sequences in one row.

    Args:
      outline: the model's outline.
      reason: the beginning of the message: the reason why a row has several sequences.
      remedy: the end of the message: an instruction.

    Raises:
      UserError: the model runs as a torch module that cannot separate sequences.
    """
    torch_config: Any = outline.config if outline.is_torch else None
    if torch_config and not torch_config.packs:
        raise UserError(
            f"{reason}{outline.name}, a {torch_config.model_type}, runs as a torch module that "
            "cannot separate the sequences of one row, so they would attend to each other. "
            f"{remedy}"
        )


def outline_of_chats(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the model's outline, with its image encoder if rows or --init-adapter need it.

    The rows are only read for this purpose if the model has an image encoder.
    """

    def needs_images() -> bool:
        if _starts_with_images(config):
            return True
        datasets = (*rows.train, *rows.held_out)
        return any(has_images(row) for dataset in datasets for row in dataset.peek())

    return outline(config, rows, needs_images=needs_images)


def _starts_with_images(config: Config) -> bool:
    """Returns True if the adapter of --init-adapter was trained with images."""
    path = config.adapter.init_adapter
    return path is not None and find_adapter(path, "--init-adapter").images


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as padded or packed sequences, of which --eval-every holds some out."""
    weights = [dataset.weight for dataset in parse_datasets(config.data.dataset)]
    train_tokens, train_pictures = _read_tokens(config, rows.train, outline)
    held_out_tokens, held_out_pictures = _read_tokens(config, rows.held_out, outline)
    names = [dataset.name for dataset in rows.train]
    tokens_of_dataset = dict(zip(names, train_tokens, strict=True))
    held_out_source = ", ".join(dataset.name for dataset in rows.held_out)
    # Held-out rows come from --eval-dataset, or are drawn from the training rows.
    lines: list[str] = []
    if held_out_tokens:
        if config.run.eval_every:
            n_held_out = sum(map(len, held_out_tokens))
            lines.append(format_held_out_line(n_held_out, "rows", held_out_source))
    else:
        row_counts = {name: int(tokens.rows[-1]) for name, tokens in tokens_of_dataset.items()}
        held_out_rows = hold_out(config, row_counts, weights)
        if held_out_rows:
            held_out_source = "the held-out rows"
            held_out_pictures = train_pictures
            for name, row_numbers in zip(names, held_out_rows, strict=True):
                train_part, held_out_part = tokens_of_dataset[name].split(row_numbers)
                tokens_of_dataset[name] = train_part
                held_out_tokens.append(held_out_part)
                lines.append(_held_out_line(config, name, row_counts[name], row_numbers))
    # Form the sequences of both parts.
    mixture_weights = [weight for weight in weights if weight is not None]
    packs = packed(config, tokens_of_dataset, mixture_weights, train_pictures)
    held_out_packs: Packs | None = None
    if held_out_tokens:
        joined_tokens = {held_out_source: Sequences.join(held_out_tokens)}
        held_out_packs = packed(config, joined_tokens, (), held_out_pictures)
    if packs.further is not None:
        lines.append(_images_line(train_pictures, packs.further))
    return Data(
        train=packs,
        held_out=held_out_packs,
        name=packs.name,
        source="" if packs.sources else names[0],
        facts={
            "sequence_length": packs.lengths[-1],
            "lengths": packs.lengths,
            "rows": len(packs.table),
        },
        lines=(filling_line(packs, packing=config.data.packing), *lines),
    )


def _read_tokens(
    config: Config, datasets: Sequence[Dataset], outline: ModelInfo
) -> tuple[list[Sequences], Sequence[Pictures]]:
    """Returns the sequences of each data set, and the images of each if there are images."""
    datasets, pictures = _read_images(datasets, outline)
    tokens: list[Sequences] = []
    for index, dataset in enumerate(datasets):
        options = {"pictures": pictures[index]} if pictures else {}
        tokens.append(tokens_of(config, dataset, outline.tokenizer, **options))
    return tokens, pictures


def _read_images(
    datasets: Sequence[Dataset], outline: ModelInfo
) -> tuple[list[Dataset], list[Pictures]]:
    """Returns data sets, and the images of each if the model reads images and a row has some."""
    if not reads_images(outline.config):
        return list(datasets), []
    # Each data set is read once, and its rows are kept for tokenisation.
    read_datasets: list[Dataset] = []
    has_any_image = False
    for dataset in datasets:
        rows = dataset.rows()
        has_any_image = has_any_image or any(map(has_images, rows))
        copy_rows: Callable[[], list[Row]] = functools.partial(list, rows)
        read_datasets.append(Dataset(dataset.name, copy_rows, dataset.key))
    reader = outline.images if has_any_image else None
    if reader is None:
        return read_datasets, []
    pictures = [
        read_images_of_rows(dataset.rows(), reader, dataset.name) for dataset in read_datasets
    ]
    return read_datasets, pictures


def tokens_of(config: Config, dataset: Dataset, tokenizer: Any, **options: Any) -> Sequences:
    """Returns a data set's rows as sequences. `options` go to `train.data.chats.tokenize`."""
    write = not config.run.dry_run
    return tokenize(dataset, tokenizer, train_on=config.data.train_on, write=write, **options)


def _images_line(pictures: Sequence[Pictures], values: Further) -> str:
    """Returns a line with the number of images and of their tiles."""
    n_images = sum(len(row_grids) for dataset in pictures for row_grids in dataset.grids)
    n_tiles = sum(len(dataset.pixels) for dataset in pictures)
    assert isinstance(values, PixelValues)
    return pictures[0].reader.describe(n_images, n_tiles, values.max_tiles)


def hold_out(
    config: LanguageOptions, counts: Mapping[str, int], weights: Sequence[float | None] = (None,)
) -> list[np.ndarray] | None:
    """Draws the rows to hold out with --eval-every, at most a tenth of all rows.

    A resumed run holds out the same rows again.

    Args:
      config: the options.
      counts: the number of rows of each data set, by its name.
      weights: weights of the data sets; None stands for the number of rows.

    Returns:
      For each data set, the numbers of its held-out rows, counted from 1; None without held-out
      rows.

    Raises:
      UserError: there are too few rows, or the run has already trained on all of them.
    """
    run = config.run
    saved = saved_options(config)
    if run.eval_every and not saved.get("eval_every", True):
        raise UserError(
            f"--eval-every {run.eval_every} is not possible, because the run has already trained "
            "on all rows. Remove --eval-every, or start a new run in another --output."
        )
    if not saved.get("eval_every", run.eval_every):
        return None
    n_questions: Any = saved.get("eval_questions", run.eval_questions)
    if run.eval_every and n_questions != run.eval_questions:
        raise UserError(
            f"--eval-questions was {n_questions} and is now {run.eval_questions}, but the held-out "
            "rows of a run cannot change. Pass the same number, or start a new run in another "
            "--output."
        )
    # Each data set holds out a number of rows in proportion to its weight or size.
    shares = np.array([weight or n for weight, n in zip(weights, counts.values(), strict=True)])
    n_held_out = np.rint(n_questions * shares / shares.sum()).astype(int).tolist()
    _, seed = _option_and_seed(config)
    held_out_rows: list[np.ndarray] = []
    for index, (name, n_rows) in enumerate(counts.items()):
        n_drawn = n_held_out[index]
        if len(counts) > 1 and n_questions > 0:  # at least one of each data set
            n_drawn = max(n_drawn, 1)
        n_drawn = min(n_drawn, n_rows // 10)
        if n_drawn <= 0:
            raise UserError(
                f"--eval-every {run.eval_every} needs held-out rows, but --eval-questions is "
                f"{n_questions}, and at most a tenth of the {n_rows} rows of {name} is held out. "
                "Increase --eval-questions, or pass --eval-dataset."
            )
        # The first data set's rows are drawn as those of a single data set.
        entropy = [seed, _HELD_OUT_STREAM, index] if index else [seed, _HELD_OUT_STREAM]
        order = np.random.Generator(np.random.PCG64(entropy)).permutation(n_rows)
        held_out_rows.append(np.sort(order[:n_drawn]) + 1)
    return held_out_rows


def filling_line(packs: Packs, *, packing: bool) -> str:
    """Returns a line with the number, lengths and filled share of padded or packed sequences."""
    if packing:
        return (
            f"{len(packs.table):,} rows are packed into {len(packs):,} sequences of "
            f"{packs.lengths[-1]} tokens, {100 * packs.filled:.1f}% filled"
        )
    return format_padding_line(len(packs), "rows", packs.lengths, packs.filled)


def _held_out_line(config: Config, name: str, n_rows: int, row_numbers: np.ndarray) -> str:
    """Returns a line with the number and the first of a data set's held-out rows."""
    first_numbers = ", ".join(map(str, row_numbers[:5].tolist()))
    if len(row_numbers) > 5:
        first_numbers += ", …"
    option, seed = _option_and_seed(config)
    return (
        f"{len(row_numbers)} of the {n_rows} rows of {name} are held out, drawn by "
        f"{flag(option, seed)}: row {first_numbers}"
    )


def _option_and_seed(config: LanguageOptions) -> tuple[str, int]:
    """Returns the option whose seed draws the rows to hold out, and the seed."""
    if config.data.held_out_seed is not None:
        return "held_out_seed", config.data.held_out_seed
    return "seed", config.optim.seed


def packed(
    config: Config,
    tokens_of_dataset: Mapping[str, Sequences],
    weights: Sequence[float] = (),
    pictures: Sequence[Pictures] = (),
) -> Packs:
    """Returns sequences of at most --seq-len tokens, packed or to be batched by length.

    Args:
      config: the options.
      tokens_of_dataset: the sequences of each data set, by its name for messages.
      weights: weights of the data sets, if they are mixed by weight.
      pictures: the images of each data set, if there are images.
    """
    data = config.data
    fitting_tokens: dict[str, Sequences] = {}
    has_pixels = any(len(dataset.pixels) for dataset in pictures)
    for source, sequences in tokens_of_dataset.items():
        fitting_tokens[source] = check_lengths(
            sequences, data.seq_len, truncate=data.truncate, images=has_pixels
        )
        n_left_out = len(sequences) - len(fitting_tokens[source])
        if n_left_out:
            print(
                f"{source}: {n_left_out} rows are not used, because --seq-len cuts them off before "
                "their completion"
            )
    if len(fitting_tokens) == 1:
        (sequences,) = fitting_tokens.values()
        packs = pack(sequences, data.seq_len, packing=data.packing)
    else:
        packs = pack_mixture(fitting_tokens, weights or None, data.seq_len, packing=data.packing)
    return add_pictures(packs, pictures, packing=data.packing)


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of --loss over the assistant's tokens."""
    return token_loss(config.optim.loss, **layout.chunks(config.optim.loss_chunk))


def seed_read(config: Config) -> tuple[str, ...]:
    """Returns ("seed",) if --seed draws held-out rows, else ()."""
    return ("seed",) if config.run.eval_every and config.data.held_out_seed is None else ()


def _further_options(config: Config) -> tuple[str, ...]:
    """Returns the further options on which rows and outline depend; see `Task.reads`."""
    options = seed_read(config)
    return (*options, "init_adapter") if _starts_with_images(config) else options


TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=2e-4, full_lr=2e-5),
    check=check,
    rows=read_rows,
    outline=outline_of_chats,
    examples=examples,
    loss=loss,
    reads=_further_options,
)
