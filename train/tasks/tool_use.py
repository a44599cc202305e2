"""Finds the tools of a run, and checks them against the model's chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import train.environments
from lora_jax.training.data.rows import Row
from train.console.errors import UserError
from train.console.output import tell
from train.live.turns.joints import TurnJoints
from train.live.turns.rows import ReadTurn
from train.live.turns.use import ToolUse
from train.options.scripts.grpo import Config
from train.processes import hosts
from train.run.pretrained import ModelInfo, end_tokens
from train.tools.calls import call_format as find_call_format
from train.tools.calls import opens_thinking, read_turn, turn_text
from train.tools.contract import EpisodeHost, ToolCall
from train.tools.formats import CallFormat
from train.tools.host import ProcessHost

OPENS_EACH = "the environment may add a different text to each prompt"
_PROMPT_END_TOKENS = 16  # these tokens show whether a prompt opens a thought
_DEFAULT_OUTPUT_TOKENS = 256  # of a tool's answer
_FOLDER = Path(train.environments.__file__).parent
# The built-in environments by name: the file, and the class in it.
OURS = {"sql": f"{_FOLDER}/sql/session.py:SqlSession", "guess": f"{_FOLDER}/guess.py:GuessingGame"}


class ToolOptions(Protocol):
    """The options that name tools.

    Attributes:
      tools: ``file.py:function``, and further functions of that file by their names alone.
      environment: ``file.py:Class``, or the name of a built-in environment; None for none.
      tool_timeout: maximum number of seconds for a call.
    """

    @property
    def tools(self) -> Sequence[str]: ...

    @property
    def environment(self) -> str | None: ...

    @property
    def tool_timeout(self) -> float: ...


def find_tools(options: ToolOptions) -> ProcessHost:
    """Finds tools and an environment, and describes them to the model.

    Raises:
      UserError: a tool does not exist, cannot be imported, or lacks a docstring or types.
    """
    environment = options.environment
    if environment in OURS:
        environment = OURS[environment]
    elif environment is not None:
        environment = _check_spec("environment", environment, "Class", *OURS)
    host = ProcessHost(environment, list_tools(options.tools), options.tool_timeout)
    if host.generators:
        names = ", ".join(host.generators)
        tell(hosts.console(), f"each episode seeds these random generators from its row: {names}")
    return host


def list_tools(given: Sequence[str]) -> list[str]:
    """Returns each tool as ``file.py:function``.

    >>> from train.tasks.tool_use import list_tools
    >>> list_tools(["/no/mine.py:f", "g"])
    Traceback (most recent call last):
        ...
    train.console.errors.UserError: --tools /no/mine.py:f: there is no file /no/mine.py. Check the \
path.
    """
    specs: list[str] = []
    path = ""
    for spec in given:
        if ":" not in spec and path and not spec.endswith(".py"):
            spec = f"{path}:{spec}"
        else:
            path = _check_spec("tools", spec, "function").rpartition(":")[0]
        if spec in specs:
            raise UserError(f"--tools names {spec} twice. Remove one of the two.")
        specs.append(spec)
    return specs


def _check_spec(option: str, spec: str, kind: str, *built_in_names: str) -> str:
    """Returns a value such as ``file.py:function``; raises a UserError for other values.

    Args:
      option: the option.
      spec: its value.
      kind: the noun after the colon: "function" or "Class".
      *built_in_names: further values of the option, for the message.
    """
    path, _, name = spec.rpartition(":")
    is_name = all(word.isidentifier() for word in name.split("."))  # such as calculator.add
    if not path.endswith(".py") or not is_name:
        alternative = f", or one of {', '.join(built_in_names)}" if built_in_names else ""
        raise UserError(
            f"--{option} {spec} does not name a {kind} of a file. Pass file.py:{kind}{alternative}."
        )
    if not Path(path).is_file():
        raise UserError(f"--{option} {spec}: there is no file {path}. Check the path.")
    return spec


def use_tools(config: Config, outline: ModelInfo) -> tuple[ToolUse | None, list[str]]:
    """Returns the tools of completions, or None without tools, and lines of the log about them.

    Raises:
      UserError: the model cannot call tools, or these tools cannot be used.
    """
    data = config.data
    if not data.tools and data.environment is None:
        return None, []
    call_format = _call_format(config, outline)
    host = find_tools(data)
    try:
        # Prompts show the tools, so all processes must have the same tools.
        hosts.check_alike({}, tools=host.tools)
        if not data.reward and not host.rewards:
            raise UserError(
                f"--environment {data.environment} has no `get_reward`, and there is no --reward. "
                "Pass --reward, or add the method `get_reward`."
            )
        output_tokens = data.max_tool_output
        if output_tokens is None:
            output_tokens = _DEFAULT_OUTPUT_TOKENS
        eos_ids = end_tokens(outline)
        joints = TurnJoints(outline.tokenizer, eos_ids, output_tokens)
    except BaseException:
        host.close()
        raise
    names = [tool["function"]["name"] for tool in host.tools]
    lines = [f"completions may call {', '.join(names)} (in the format of {call_format.name})"]
    if not joints.keeps_history:
        lines.append(
            "the model's chat template changes a turn after its tools have answered; here turns "
            "stay as they were drawn"
        )
    read = turn_reader(outline, call_format, host, eos_ids)
    return ToolUse(host, joints, read, opens=data.environment is not None), lines


def check_fields(config: Config, use: ToolUse, rows: Mapping[str, Sequence[Row]]) -> None:
    """Raises a UserError if rows lack a field that starting an episode needs.

    Args:
      config: the options.
      use: the tools.
      rows: the rows of each source, by its name for messages.
    """
    for source, source_rows in rows.items():
        names = dict.fromkeys(name for row in source_rows for name in row)
        for field in use.host.needs:
            if field not in names:
                raise UserError(
                    f"--environment {config.data.environment}: `reset` needs the field {field!r}, "
                    f"but the rows of {source} only have {', '.join(names)}. Add this field to the "
                    "rows."
                )


def _call_format(config: Config, outline: ModelInfo) -> CallFormat:
    """Returns the format in which a model writes calls.

    Raises:
      UserError: the format is unknown, or the model runs as a torch module.
    """
    template = outline.tokenizer.chat_template
    option = f"--tools {' '.join(config.data.tools)}" if config.data.tools else "--environment"
    if hasattr(outline.config, "empty_cache"):
        raise UserError(
            f"{option} needs a model of `lora_jax.models`, but {outline.name} runs as a torch "
            "module, whose cache cannot wait for a tool. Use another model."
        )
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default"))
    template_format = find_call_format(template)
    if template_format is None:
        raise UserError(
            f"{option}: the chat template of {outline.name} writes calls in no known format, so "
            "they could not be read. Use a model that was trained to call tools, or pass a "
            "template with --chat-template."
        )
    return template_format


def turn_reader(
    outline: ModelInfo, call_format: CallFormat, host: EpisodeHost, eos_ids: Sequence[int]
) -> ReadTurn:
    """Returns a function that reads the text and the calls of a turn from its tokens."""
    tokenizer = outline.tokenizer

    def read_tokens(
        ids: Sequence[int], prompt_ids: Sequence[int]
    ) -> tuple[str, Sequence[ToolCall]]:
        """Returns the text and the calls of a turn's tokens."""
        prompt_end = tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:])
        turn = read_turn(
            turn_text(tokenizer, ids, eos_ids),
            call_format,
            host.tools,
            thinking=opens_thinking(prompt_end),
        )
        return turn.content, turn.calls

    return read_tokens


def earned_name(config: Config, use: ToolUse | None) -> str | None:
    """Returns the name of the environment if it has a `get_reward`; otherwise None."""
    environment = config.data.environment
    if use is None or environment is None or not use.host.rewards:
        return None
    return environment.rpartition(":")[2]
