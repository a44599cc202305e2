"""The inputs of a run before its weights: rows, outline and examples, and their consequences."""

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
from train.options.common import OptimConfig, Options, as_json, check_offload
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

_SUFFIXES = (".txt", ".jsonl")
_HOLDING_OUT = ("eval_every", "eval_questions")  # of a resumed run, as it began


class RunData(NamedTuple):
    """Rows, the model's outline, and the rows as examples for it."""

    rows: TaskRows
    outline: ModelInfo
    data: Data


class SamplePrompts:
    """Holds the prompts of --sample-prompts, and their tokens.

    Attributes:
      texts: the prompts as a person reads them.
      tokens: tokens of each prompt for the model, up to the start of its answer.
    """

    def __init__(self, run: SftRunConfig, outline: ModelInfo) -> None:
        """Reads and tokenises the prompts.

        Raises:
          UserError: the file cannot be read, a prompt is empty, or the model does not take one.
        """
        chats = _read_chats(run.sample_prompts)
        self.texts = [str(chat[-1]["content"]) for chat in chats]
        if outline.tokenizer.chat_template is not None:
            with as_user_errors(TrainingError, prefix="--sample-prompts: "):
                self.tokens = tokenize_chats(outline, chats)
        elif any(len(chat) > 1 for chat in chats):
            raise UserError(
                f"--sample-prompts: {outline.name} has no chat template, and a prompt has several "
                "messages: give texts"
            )
        else:
            self.tokens = outline.tokenizer(self.texts)["input_ids"]
        if not all(self.tokens):
            raise UserError("--sample-prompts: a prompt has no tokens")
        outline.check_length(
            max(map(len, self.tokens)) + run.sample_tokens, "--sample-prompts and --sample-tokens"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that a run reads before its weights.

    Attributes:
      read: its rows, outline and examples.
      prompts: prompts of --sample-prompts; None for none.
      feed: its batches.
      steps: their number.
      rate: the highest learning rate.
      layout: layout of the model on the mesh.
      lines: to print before training.
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


def read_inputs(config: Options, task: Task) -> RunData:
    """Reads rows and the model's outline, and encodes the rows; all processes have to call this.

    Raises:
      UserError: something is missing, or does not fit the model.
    """
    rows = task.rows(config)
    # Codes do not train: where the weights do, they are arrays.
    codes = QUANTIZE_NONE if moves_weights(config.adapter) else config.optim.quantize
    outline = task.outline(config, rows).quantized(codes)
    outline.check_experts(config.optim.experts)
    hosts.check_alike(
        options_of_processes(config),
        rows=rows.train,
        held_out=rows.held_out,
        model=outline.config,
    )
    remarks: list[str] = []
    if config.run.dry_run:  # before the rows become tokens, and are dropped
        template = str(getattr(outline.tokenizer, "chat_template", ""))
        remarks = turn_remarks([*rows.train, *rows.held_out], str(config.data.dataset), template)
    data = task.examples(config, rows, outline)
    return RunData(rows, outline, dataclasses.replace(data, lines=(*data.lines, *remarks)))


class InputReader:
    """Reads as `read_inputs` does, but once for all runs of the same data."""

    def __init__(self) -> None:
        self._data_of_options: dict[tuple[int, str], RunData] = {}

    def __call__(self, config: Options, task: Task) -> RunData:
        """Returns the data of a run; one that reads them while it trains has its own."""
        if getattr(config.data, "stream", False):
            return read_inputs(config, task)
        read_by = {name for name, traits in traits_of(config).items() if traits.of_inputs}
        read_by |= {*task.reads(config)}
        saved = saved_options(config)
        options = {name: value for name, value in as_json(config).items() if name in read_by}
        first_options: dict[str, Any] | None = None
        if saved:
            first_options = {name: saved.get(name) for name in _HOLDING_OUT}
            first_options["eval_every"] = bool(first_options["eval_every"])
        options["eval_every"] = bool(options.get("eval_every"))  # how often does not matter
        options["began"] = first_options
        key = id(task), json.dumps(options, sort_keys=True)
        if key not in self._data_of_options:
            self._data_of_options[key] = read_inputs(config, task)
        return self._data_of_options[key]


def make_inputs(config: Options, mesh: Mesh, read: RunData) -> Inputs:
    """Returns the inputs of a run, checked against the model.

    Raises:
      TrainingError: options, examples and model do not fit.
    """
    outline = read.outline
    data = read.data
    optim = config.optim
    lines = [*data.lines]
    invocation = _check_rules(config, outline)
    if invocation:
        data, invocation_lines = invoked_data(data, invocation)
        lines += invocation_lines
        read = read._replace(data=data)
    prompts: SamplePrompts | None = None
    if isinstance(config.run, SftRunConfig) and config.run.sample_prompts:
        prompts = SamplePrompts(config.run, outline)
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
    layout = Layout.of(mesh, outline.config)
    layout = dataclasses.replace(layout, keeps_rows=invocation is not None)
    layout.check_lengths(data.facts.get("lengths", [data.facts["sequence_length"]]))
    attention = _chosen_attention(optim, outline, layout, data.facts)
    lines.append(f"attention: {attention}")
    layout, product_form = choose_product_form(layout, config.run.collective_matmul)
    if product_form:
        lines.append(f"collective matmul: {product_form}")
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
    """Returns the highest learning rate: --lr, or the one that --lr-rule gives for this run."""
    if optim.lr_rule is None:
        assert optim.lr is not None, "the options have no defaults yet"
        return optim.lr
    return lj.optim.learning_rate(
        outline.config.hidden_size, family=optim.lr_rule, steps=steps, full=full
    )


def _check_rules(config: Options, outline: ModelInfo) -> tuple[int, ...] | None:
    """Returns the invocation of an activated LoRA; None for adapters of other kinds.

    Raises:
      UserError: the rules or the adapter do not fit the model. No weights are read.
    """
    adapter = config.adapter
    if adapter.init_adapter is not None:
        source = find_adapter(adapter.init_adapter, "--init-adapter")
        source.check(outline, allow_base_mismatch=adapter.allow_base_mismatch)
        if source.is_subspace:
            return None
        tree = source.abstract_tree(outline)
    elif space_of(config, outline.params) is not None:
        return None
    else:
        check_names(adapter, outline)
        with as_user_errors(ValueError):
            tree = lj.lorafy(outline.params, rules(adapter, outline), kinds=outline.kinds)
    invocations = invocations_of(tree)
    if not invocations:
        return None
    check_invoked(tree, outline)
    return next(iter(invocations))


def _chosen_attention(
    optim: OptimConfig, outline: ModelInfo, layout: Layout, facts: Mapping[str, Any]
) -> AttentionChoice:
    """Returns the implementation of attention.

    Args:
      optim: the options of optimisation.
      outline, layout: the model, and its placement.
      facts: facts about its examples; see `Data`.

    Raises:
      UserError: what was asked for does not run on these devices, or does nothing there.
    """
    check_offload(optim.remat, layout.platform)
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
    """Returns the chats that --sample-prompts gives as texts, or as the rows of one file."""
    files = [text for text in prompts if text.lower().endswith(_SUFFIXES)]
    if files and len(prompts) > 1:
        raise UserError(
            f"--sample-prompts: {files[0]} is a file, and stands alone: leave the other prompts out"
        )
    if not files:
        return [_chat(text, f"prompt {number}") for number, text in enumerate(prompts, start=1)]
    check_local("sample_prompts", files)
    path = Path(files[0]).expanduser()
    lines = read_user_file(path, f"--sample-prompts: {path} cannot be read: ").splitlines()
    is_json = path.suffix.lower() == ".jsonl"
    chats: list[Chat] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            chats.append(_chat_of_row(path, number, line) if is_json else _chat(line, str(path)))
    if not chats:
        raise UserError(f"--sample-prompts: {path} is empty")
    return chats


def _chat(text: str, where: str) -> Chat:
    if not text.strip():
        raise UserError(f"--sample-prompts: {where} is empty")
    return [{"role": "user", "content": text}]


def _chat_of_row(path: Path, number: int, line: str) -> Chat:
    """Returns the chat of a row of a JSONL file: a prompt, or messages that end with a user's."""
    where = f"{path}, line {number}"
    row = parse_json_object(line, path, f"line {number}")
    if isinstance(row.get("prompt"), str):
        return _chat(row["prompt"], where)
    chat = row.get("messages")
    is_chat = isinstance(chat, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
        for turn in chat
    )
    if not is_chat or not chat or chat[-1]["role"] != "user":
        raise UserError(
            f"--sample-prompts: {where}: a `prompt` is needed, or `messages` that end with a user's"
        )
    return chat
