"""Prepares the inputs of a run before its weights: rows, outline, examples and batches."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

import lora_jax as lj
from lora_jax.adapt.activate import invocations_of
from lora_jax.hf.coded import QUANTIZE_NONE
from lora_jax.hf.hub import stand_in
from lora_jax.models.layers.attend import AttentionChoice, choose_attention
from lora_jax.training.data.order import Batches, Feed, Order
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout
from train.adapters.source import find_adapter
from train.console.errors import UserError, as_user_errors, read_user_file
from train.data.lines import format_mixture_lines
from train.data.remarks import turn_remarks
from train.data.text_files import parse_json_object
from train.options.common import OptimConfig, Options, as_json, check_remat
from train.options.field import traits_of
from train.options.paths import check_local
from train.options.scripts.sft import SftRunConfig
from train.processes import hosts
from train.processes.mesh import choose_product_form
from train.run.complete import Chat, tokenize_chats
from train.run.intrinsic import moves_weights, space_of
from train.run.invocation import check_invoked, invoked_data
from train.run.output import saved_options
from train.run.pretrained import ModelInfo
from train.run.rules import check_names, rules
from train.run.shared_prompts import SHARED
from train.run.task import Data, Task, TaskRows
from train.settings.files import options_of_processes

_ATTENTION_LINE = "attention: "  # the beginning of the line about the implementation
_PROMPT_FILE_SUFFIXES = (".txt", ".jsonl")
_HELD_OUT_OPTIONS = ("eval_every", "eval_questions")  # a resumed run keeps its first held-out rows


class RunData(NamedTuple):
    """Rows, the model's outline, and the rows as examples for it."""

    rows: TaskRows
    outline: ModelInfo
    data: Data


class SamplePrompts:
    """The prompts of --sample-prompts, and their tokens.

    Attributes:
      texts: the texts of the prompts for the log.
      tokens: the tokens of each prompt for the model, up to the start of the answer.
    """

    def __init__(self, run: SftRunConfig, outline: ModelInfo) -> None:
        """Reads and tokenises the prompts.

        Raises:
          UserError: the file cannot be read, a prompt is empty, or a prompt is too long.
        """
        chats = _read_chats(run.sample_prompts)
        self.texts = [str(chat[-1]["content"]) for chat in chats]
        if outline.tokenizer.chat_template is not None:
            with as_user_errors(TrainingError, prefix="--sample-prompts: "):
                self.tokens = tokenize_chats(outline, chats)
        elif any(len(chat) > 1 for chat in chats):
            raise UserError(
                f"--sample-prompts has a prompt of several messages, but {outline.name} has no "
                "chat template. Pass texts, or a template with --chat-template."
            )
        else:
            self.tokens = outline.tokenizer(self.texts)["input_ids"]
        if not all(self.tokens):
            raise UserError("--sample-prompts has a prompt without tokens. Remove this prompt.")
        outline.check_length(
            max(map(len, self.tokens)) + run.sample_tokens, "--sample-prompts and --sample-tokens"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """All inputs of a run except its weights.

    Attributes:
      read: the rows, the model's outline and the examples.
      prompts: the prompts of --sample-prompts; None for none.
      feed: the batches.
      steps: the number of steps.
      rate: the highest learning rate.
      layout: the layout of the model on the mesh.
      lines: lines to print before training.
      attention: the name of the implementation of attention.
    """

    read: RunData
    prompts: SamplePrompts | None
    feed: Batches
    steps: int
    rate: float
    layout: Layout
    lines: tuple[str, ...]
    attention: str

    def with_attention(self, attention: str) -> "Inputs":
        """Returns the inputs with another implementation of attention."""
        lines = []
        for line in self.lines:
            is_attention = line.startswith(_ATTENTION_LINE)
            lines.append(f"{_ATTENTION_LINE}{attention}" if is_attention else line)
        return dataclasses.replace(self, attention=attention, lines=tuple(lines))


def read_inputs(config: Options, task: Task) -> RunData:
    """Reads the rows and the model's outline, and encodes the rows. All processes must call it.

    Raises:
      UserError: something is missing, or does not fit the model.
    """
    rows = task.rows(config)
    # Quantized weights cannot train.
    quantization = QUANTIZE_NONE if moves_weights(config.adapter) else config.optim.quantize
    outline = task.outline(config, rows).quantized(quantization)
    outline.check_experts(config.optim.experts)
    hosts.check_alike(
        options_of_processes(config),
        rows=rows.train,
        held_out=rows.held_out,
        model=outline.config,
    )
    # Remarks need the rows, which are dropped once they are tokens.
    remarks: list[str] = []
    if config.run.dry_run:
        template = str(getattr(outline.tokenizer, "chat_template", ""))
        remarks = turn_remarks([*rows.train, *rows.held_out], str(config.data.dataset), template)
    data = task.examples(config, rows, outline)
    return RunData(rows, outline, dataclasses.replace(data, lines=(*data.lines, *remarks)))


class InputReader:
    """Calls `read_inputs` once for all runs with the same data."""

    def __init__(self) -> None:
        self._data_by_options: dict[tuple[int, str], RunData] = {}

    def __call__(self, config: Options, task: Task) -> RunData:
        """Returns the data of a run. A run with --stream never shares its data."""
        if getattr(config.data, "stream", False):
            return read_inputs(config, task)
        # The options on which the data depend.
        data_options = {name for name, traits in traits_of(config).items() if traits.of_inputs}
        data_options |= set(task.reads(config))
        options = {name: value for name, value in as_json(config).items() if name in data_options}
        # A resumed run also depends on the options that held out its rows at first.
        saved = saved_options(config)
        first_options: dict[str, Any] | None = None
        if saved:
            first_options = {name: saved.get(name) for name in _HELD_OUT_OPTIONS}
            first_options["eval_every"] = bool(first_options["eval_every"])
        options["eval_every"] = bool(options.get("eval_every"))  # the interval does not matter
        options["began"] = first_options
        key = id(task), json.dumps(options, sort_keys=True)
        if key not in self._data_by_options:
            self._data_by_options[key] = read_inputs(config, task)
        return self._data_by_options[key]


def make_inputs(config: Options, mesh: Mesh, read: RunData) -> Inputs:
    """Returns the inputs of a run, checked against the model.

    Raises:
      TrainingError: options, examples and model do not fit.
    """
    outline = read.outline
    data = read.data
    optim = config.optim
    lines = list(data.lines)
    # An activated LoRA learns only from the tokens after its invocation.
    invocation = _check_adapter(config, outline)
    if invocation:
        data, invocation_lines = invoked_data(data, invocation)
        lines += invocation_lines
        read = read._replace(data=data)
    prompts: SamplePrompts | None = None
    if isinstance(config.run, SftRunConfig) and config.run.sample_prompts:
        prompts = SamplePrompts(config.run, outline)
    # The batches, and the number of steps.
    order = Order.of(data.train, optim.seed, optim.batch_size, optim.grad_accum)
    steps = optim.steps
    if steps is None:
        assert optim.epochs is not None, "the options have no defaults yet"
        steps_of_epochs = data.steps or order.steps
        steps = steps_of_epochs(optim.epochs)
    lines += format_mixture_lines(data.train, order, steps)
    feed: Batches = Feed(data.train, order, data.name, data.source)
    if data.feed is not None:
        feed = data.feed(steps)
    rate = _learning_rate(optim, outline, steps, full=config.adapter.full)
    # The layout on the mesh, and the implementations that fit it.
    layout = Layout.of(mesh, outline.config)
    layout = dataclasses.replace(layout, keeps_rows=invocation is not None)
    layout.check_lengths(data.facts.get("lengths", [data.facts["sequence_length"]]))
    outline.check_few_rows(optim.few_rows, layout.platform)
    check_remat(optim.remat, layout.platform, outline.config)
    attention = _choose_attention(optim, outline, layout, data.facts)
    lines.append(f"{_ATTENTION_LINE}{attention}")
    layout, product_form = choose_product_form(layout, config.run.collective_matmul)
    if product_form:
        lines.append(f"collective matmul: {product_form}")
    # A test may replace the files of a model.
    weights = stand_in(outline.name)
    if weights is not None:
        lines.append(f"weights: {weights}")
    if outline.is_torch:
        torch_config: Any = outline.config
        lines += torch_config.layer_lines()
    return Inputs(
        read=read,
        prompts=prompts,
        feed=feed,
        steps=steps,
        rate=rate,
        layout=layout,
        lines=tuple(lines),
        attention=attention.name,
    )


def _learning_rate(optim: OptimConfig, outline: ModelInfo, steps: int, *, full: bool) -> float:
    """Returns the highest learning rate, which is --lr or the result of --lr-rule."""
    if optim.lr_rule is None:
        assert optim.lr is not None, "the options have no defaults yet"
        return optim.lr
    return lj.optim.learning_rate(
        outline.config.hidden_size, family=optim.lr_rule, steps=steps, full=full
    )


def _check_adapter(config: Options, outline: ModelInfo) -> tuple[int, ...] | None:
    """Checks the adapter against the model, and returns the invocation of an activated LoRA.

    Reads no weights. Returns None for adapters of other kinds.

    Raises:
      UserError: the rules or the adapter do not fit the model.
    """
    adapter = config.adapter
    # A tree of shapes with the adapter of --init-adapter, or with a new one.
    if adapter.init_adapter is not None:
        source = find_adapter(adapter.init_adapter, "--init-adapter")
        source.check(outline, allow_base_mismatch=adapter.allow_base_mismatch)
        if source.is_subspace:
            return None
        tree = source.abstract_tree(outline)
    elif space_of(config, outline.params) is not None:
        return None  # --intrinsic trains a subspace without an adapter
    else:
        check_names(adapter, outline)
        with as_user_errors(ValueError):
            tree = lj.lorafy(outline.params, rules(adapter, outline), kinds=outline.kinds)
    invocations = invocations_of(tree)
    if not invocations:
        return None
    check_invoked(tree, outline)
    return next(iter(invocations))


def _choose_attention(
    optim: OptimConfig, outline: ModelInfo, layout: Layout, facts: Mapping[str, Any]
) -> AttentionChoice:
    """Returns the implementation of attention.

    Args:
      optim: the options of optimisation.
      outline, layout: the model, and its placement.
      facts: facts about its examples; see `Data`.

    Raises:
      UserError: --attention does not run on these devices.
    """
    length = facts["sequence_length"]
    with as_user_errors(ValueError):
        return choose_attention(
            outline.config,
            length,
            dtype=optim.dtype,
            attention=optim.attention,
            platform=layout.platform,
            split=layout.split(length),
            branched=facts.get(SHARED, False),
        )


def _read_chats(prompts: Sequence[str]) -> list[Chat]:
    """Returns the chats of --sample-prompts, which are texts or the rows of one file."""
    files = [text for text in prompts if text.lower().endswith(_PROMPT_FILE_SUFFIXES)]
    if files and len(prompts) > 1:
        raise UserError(
            f"--sample-prompts names the file {files[0]} together with other prompts. Remove the "
            "other prompts, or write all prompts to the file."
        )
    if not files:
        return [
            _chat_of_text(text, f"prompt {number}") for number, text in enumerate(prompts, start=1)
        ]
    check_local("sample_prompts", files)
    path = Path(files[0]).expanduser()
    lines = read_user_file(path, f"--sample-prompts: {path} cannot be read: ").splitlines()
    is_json = path.suffix.lower() == ".jsonl"
    chats: list[Chat] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        chat = _chat_of_row(path, number, line) if is_json else _chat_of_text(line, str(path))
        chats.append(chat)
    if not chats:
        raise UserError(f"--sample-prompts: {path} is empty. Write one prompt per line.")
    return chats


def _chat_of_text(text: str, where: str) -> Chat:
    """Returns a chat with one user's turn; raises a UserError for an empty text."""
    if not text.strip():
        raise UserError(f"--sample-prompts: {where} is empty. Remove it, or write a text.")
    return [{"role": "user", "content": text}]


def _chat_of_row(path: Path, number: int, line: str) -> Chat:
    """Returns the chat of a row of a JSONL file, from its `prompt` or its `messages`."""
    where = f"{path}, line {number}"
    row = parse_json_object(line, path, f"line {number}")
    if isinstance(row.get("prompt"), str):
        return _chat_of_text(row["prompt"], where)
    chat = row.get("messages")
    is_chat = isinstance(chat, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
        for turn in chat
    )
    if not is_chat or not chat or chat[-1]["role"] != "user":
        raise UserError(
            f"--sample-prompts: {where} has neither a `prompt` nor `messages` that end with a "
            "user's turn. Write one of the two."
        )
    return chat
