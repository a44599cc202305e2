"""The tools of a run: found, and checked against the model's chat template before long work."""

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

OPENS_EACH = "an environment may open each of them with a text of its own"
_PROMPT_END_TOKENS = 16  # which tell whether a prompt opens a thought
_OUTPUT = 256  # tokens of a tool's answer, by default
_FOLDER = Path(train.environments.__file__).parent
# The environments of ours by name: the file, and the class in it.
OURS = {"sql": f"{_FOLDER}/sql/session.py:SqlSession", "guess": f"{_FOLDER}/guess.py:GuessingGame"}


class ToolOptions(Protocol):
    """The options that name tools.

    Attributes:
      tools: ``file.py:function``, and further functions of that file by their names alone.
      environment: ``file.py:Class``, or the name of one of ours; None for none.
      tool_timeout: seconds that a tool may take.
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
      UserError: one is not there, cannot be imported, or lacks a docstring or types.
    """
    environment = options.environment
    if environment is not None:
        environment = OURS.get(environment) or _known_file(
            "environment", environment, "Class", *OURS
        )
    host = ProcessHost(environment, list_tools(options.tools), options.tool_timeout)
    if host.generators:
        names = ", ".join(host.generators)
        tell(hosts.console(), f"each episode seeds these random generators by its row: {names}")
    return host


def list_tools(given: Sequence[str]) -> list[str]:
    """Returns each tool with its file.

    >>> from train.tasks.tool_use import list_tools
    >>> list_tools(["/no/mine.py:f", "g"])
    Traceback (most recent call last):
        ...
    train.console.errors.UserError: --tools /no/mine.py:f: there is no file /no/mine.py
    """
    specs: list[str] = []
    path = ""
    for spec in given:
        if ":" not in spec and path and not spec.endswith(".py"):
            spec = f"{path}:{spec}"
        else:
            path = _known_file("tools", spec, "function").rpartition(":")[0]
        if spec in specs:
            raise UserError(f"--tools {spec} is named twice")
        specs.append(spec)
    return specs


def _known_file(option: str, spec: str, kind: str, *ours: str) -> str:
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        known = f", or one of ours: {', '.join(ours)}" if ours else ""
        raise UserError(f"--{option} {spec}: file.py:{kind} is needed{known}")
    if not Path(path).is_file():
        raise UserError(f"--{option} {spec}: there is no file {path}")
    return spec


def use_tools(config: Config, outline: ModelInfo) -> tuple[ToolUse | None, list[str]]:
    """Returns the tools of completions, and lines that tell them; None for completions of one turn.

    Raises:
      UserError: the model cannot call tools, or these cannot be used.
    """
    data = config.data
    if not data.tools and data.environment is None:
        return None, []
    call_format = _call_format(config, outline)
    host = find_tools(data)
    try:
        hosts.check_alike({}, tools=host.tools)  # prompts show them, in each process
        if not data.reward and not host.rewards:
            raise UserError(
                f"--environment {data.environment} has no `get_reward`, and there is no --reward: "
                "one of them has to say what a completion is worth"
            )
        output_tokens = _OUTPUT if data.max_tool_output is None else data.max_tool_output
        eos_ids = end_tokens(outline)
        joints = TurnJoints(outline.tokenizer, eos_ids, output_tokens)
    except BaseException:
        host.close()
        raise
    names = [tool["function"]["name"] for tool in host.tools]
    lines = [f"completions may call {', '.join(names)} (calls are written as {call_format.name}'s)"]
    if not joints.keeps_history:
        lines.append(
            "the model's chat template renders a turn that called tools differently once they have "
            "answered; here turns stay as they were drawn"
        )
    read = turn_reader(outline, call_format, host, eos_ids)
    return ToolUse(host, joints, read, opens=data.environment is not None), lines


def check_fields(config: Config, use: ToolUse, rows: Mapping[str, Sequence[Row]]) -> None:
    """Raises a UserError if rows lack a field without which no episode can begin.

    Args:
      config: the options.
      use: the tools.
      rows: the rows of each source, by its name in messages.
    """
    for source, source_rows in rows.items():
        names = dict.fromkeys(name for row in source_rows for name in row)
        for field in use.host.needs:
            if field not in names:
                raise UserError(
                    f"--environment {config.data.environment}: its `reset` needs the field "
                    f"{field!r}; the rows of {source} have {', '.join(names)}"
                )


def _call_format(config: Config, outline: ModelInfo) -> CallFormat:
    """Returns the format of a model's calls.

    Raises:
      UserError: it has none, or is no model of `lora_jax.models`.
    """
    template = outline.tokenizer.chat_template
    option = f"--tools {' '.join(config.data.tools)}" if config.data.tools else "--environment"
    if hasattr(outline.config, "empty_cache"):
        raise UserError(
            f"{option}: {outline.name} is no decoder of ours, whose memory of a row that waits is "
            "not kept yet; take a model of `lora_jax.models`"
        )
    if isinstance(template, dict):
        template = template.get("tool_use", template.get("default"))
    template_format = find_call_format(template)
    if template_format is None:
        raise UserError(
            f"{option}: the chat template of {outline.name} writes calls in none of the known "
            "formats, so that nobody could read them; take a model that was made for tools, or "
            "give a template by --chat-template"
        )
    return template_format


def turn_reader(
    outline: ModelInfo, call_format: CallFormat, host: EpisodeHost, eos_ids: Sequence[int]
) -> ReadTurn:
    """Returns a reader of a turn's tokens."""
    tokenizer = outline.tokenizer

    def read(ids: Sequence[int], prompt_ids: Sequence[int]) -> tuple[str, Sequence[ToolCall]]:
        prompt_end = tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:])
        turn = read_turn(
            turn_text(tokenizer, ids, eos_ids),
            call_format,
            host.tools,
            thinking=opens_thinking(prompt_end),
        )
        return turn.content, turn.calls

    return read


def earned_name(config: Config, use: ToolUse | None) -> str | None:
    """Returns the name of an environment that has a reward of its own; None for none."""
    environment = config.data.environment
    if use is None or environment is None or not use.host.rewards:
        return None
    return environment.rpartition(":")[2]
