"""The tools of a run: found, and checked against the model's chat template before long work."""

from collections.abc import Mapping, Sequence

from lora_jax.training.data.rows import Row
from train.console.errors import UserError
from train.live.turns.joints import TurnJoints
from train.live.turns.rows import ReadTurn
from train.live.turns.use import ToolUse
from train.options.scripts.grpo import Config
from train.processes import hosts
from train.run.pretrained import ModelInfo, end_tokens
from train.tools.calls import call_format, opens_thinking, read_turn, turn_text
from train.tools.contract import EpisodeHost, ToolCall
from train.tools.find import find_tools
from train.tools.formats import CallFormat

OPENS_EACH = "an environment may open each of them with a text of its own"
_LOOKED_AT = 16  # tokens at the end of a prompt, which tell whether it opens a thought
_OUTPUT = 256  # tokens of a tool's answer, by default


def use_tools(config: Config, outline: ModelInfo) -> tuple[ToolUse | None, list[str]]:
    """Returns the tools of completions, and lines that tell them; None for completions of one turn.

    Raises:
      UserError: the model cannot call tools, or these cannot be used.
    """
    data = config.data
    if not data.tools and data.environment is None:
        return None, []
    form = _check(config, outline)
    host = find_tools(data)
    try:
        hosts.check_alike({}, tools=host.tools)  # prompts show them, in each process
        if not data.reward and not host.rewards:
            raise UserError(
                f"--environment {data.environment} has no `get_reward`, and there is no --reward: "
                "one of them has to say what a completion is worth"
            )
        most = _OUTPUT if data.max_tool_output is None else data.max_tool_output
        ends = end_tokens(outline)
        joints = TurnJoints(outline.tokenizer, ends, most)
    except BaseException:
        host.close()
        raise
    names = [tool["function"]["name"] for tool in host.tools]
    lines = [f"completions may call {', '.join(names)} (calls are written as {form.name}'s)"]
    if not joints.keeps_history:
        lines.append(
            "the model's chat template renders a turn that called tools differently once they have "
            "answered; here turns stay as they were drawn"
        )
    read = turn_reader(outline, form, host, ends)
    return ToolUse(host, joints, read, opens=data.environment is not None), lines


def check_fields(config: Config, use: ToolUse, rows: Mapping[str, Sequence[Row]]) -> None:
    """Raises a UserError if rows lack a field without which no episode can begin.

    Args:
      config: the options.
      use: the tools.
      rows: the rows of each source, by its name in messages.
    """
    for source, some in rows.items():
        names = dict.fromkeys(name for row in some for name in row)
        if missing := [name for name in use.host.needs if name not in names]:
            raise UserError(
                f"--environment {config.data.environment}: its `reset` needs the field "
                f"{missing[0]!r}; the rows of {source} have {', '.join(names)}"
            )


def _check(config: Config, outline: ModelInfo) -> CallFormat:
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
    if (form := call_format(template)) is None:
        raise UserError(
            f"{option}: the chat template of {outline.name} writes calls in none of the known "
            "formats, so that nobody could read them; take a model that was made for tools, or "
            "give a template by --chat-template"
        )
    return form


def turn_reader(
    outline: ModelInfo, form: CallFormat, host: EpisodeHost, ends: Sequence[int]
) -> ReadTurn:
    """Returns a reader of a turn's tokens."""
    tokenizer = outline.tokenizer

    def read(ids: Sequence[int], before: Sequence[int]) -> tuple[str, Sequence[ToolCall]]:
        thinking = opens_thinking(tokenizer.decode(before[-_LOOKED_AT:]))
        turn = read_turn(turn_text(tokenizer, ids, ends), form, host.tools, thinking=thinking)
        return turn.content, turn.calls

    return read


def earned_name(config: Config, use: ToolUse | None) -> str | None:
    """Returns the name of an environment that has a reward of its own; None for none."""
    environment = config.data.environment
    if use is None or environment is None or not use.host.rewards:
        return None
    return environment.rpartition(":")[2]
