"""Draws a run's completions of several turns, with its tools."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training.data.pairs import tokenize_prompts
from lora_jax.training.data.rows import Row, name_of, replace_values
from lora_jax.training.layout import Layout
from lora_jax.training.run.stop import Stop
from train.console.errors import UserError
from train.live.turns.episodes import Listener
from train.live.turns.joints import TurnJoints
from train.live.turns.programs import TurnPrograms
from train.live.turns.rows import ReadTurn, TurnCompletion, TurnLimits, TurnRequest
from train.live.turns.sampler import Drawing, TurnSampler
from train.run.pretrained import ModelInfo, end_tokens
from train.tools.contract import EpisodeHost


class ToolUse(NamedTuple):
    """The tools of a run's completions.

    Attributes:
      host: opens episodes.
      joints: renders answers between turns.
      read: reads the calls of a turn.
      opens: whether an environment may add a text to the prompt of each completion.
    """

    host: EpisodeHost
    joints: TurnJoints
    read: ReadTurn
    opens: bool


def rows_with_tools(rows: Sequence[Row], tools: Sequence[Any], source: str) -> list[Row]:
    """Returns rows with a field `tools`, which the chat template shows.

    Raises:
      UserError: a row already has `tools`.
    """
    for number, row in enumerate(rows, start=1):
        if row.get("tools"):
            raise UserError(
                f"{name_of(row, source, number)} has a field `tools`, but calls of these tools "
                "could not be answered. Remove the field, and pass functions with --tools."
            )
    return [replace_values(row, {**row, "tools": [*tools]}) for row in rows]


def tokenize_with_tools(
    rows: Sequence[Row], tools: Sequence[Any], outline: ModelInfo, source: str
) -> list[list[int]]:
    """Returns the tokens of prompts that show tools; see `tokenize_prompts`."""
    if tools:
        rows = rows_with_tools(rows, tools, source)
    return tokenize_prompts(rows, outline.tokenizer, source)


class TurnDrawer:
    """Draws completions of several turns for a run, by one model."""

    def __init__(
        self,
        config: Any,
        outline: ModelInfo,
        use: ToolUse,
        stop: Stop,
        temperature: float,
        *,
        with_routing: bool = False,
    ) -> None:
        """Creates a drawer for any model with this tokenizer.

        Args:
          config: the options of the run.
          outline: the model without its weights, with its tokenizer.
          use: the tools.
          stop: reports a signal.
          temperature: divisor of the logits; 0 takes the most likely tokens.
          with_routing: whether to keep the experts of each token of a mixture of experts.
        """
        data = config.data
        is_greedy = temperature == 0
        self._outline = outline
        self._use = use
        self._stop = stop
        self._drawing = Drawing(
            temperature=temperature,
            top_p=1.0 if is_greedy else data.top_p,
            top_k=None if is_greedy else data.top_k,
            ends=end_tokens(outline),
        )
        self._limits = TurnLimits(data.max_new_tokens, data.seq_len, data.max_turns)
        self._stops = StopTexts(outline.tokenizer, data.stop)
        self._with_routing = with_routing
        self._samplers: dict[Any, TurnSampler] = {}

    def draw(
        self,
        model: tuple[Model, Forward, Layout],
        params: Tree,
        requests: Sequence[TurnRequest],
        key: jax.Array,
        n_rows: int,
        max_prompt_tokens: int,
    ) -> list[TurnCompletion]:
        """Draws completions.

        Args:
          model: the model, its ``apply`` or an adapted one, and the mesh. Pass the same function
            again, because each new function is compiled.
          params: the parameters of the model.
          requests: the prompts.
          key: the draw's key.
          n_rows: the number of rows side by side.
          max_prompt_tokens: the maximum number of tokens of a prompt. Each new value is compiled.

        Raises:
          Dropped: a signal came during the draw; raised in all processes.
        """
        # Environments add texts of unknown lengths to prompts.
        if self._use.opens:
            max_prompt_tokens = self._limits.total
        listener = Listener(self._use.host, self._use.joints, self._tokenize_opened, self._stop)
        return self._sampler_of(*model).draw(
            params,
            requests,
            key,
            listener,
            n_rows=n_rows,
            max_prompt_tokens=max_prompt_tokens,
        )

    def _sampler_of(self, model: Model, apply: Forward, layout: Layout) -> TurnSampler:
        """Returns the sampler of a model, which is created once for each function."""
        if apply not in self._samplers:
            self._samplers[apply] = TurnSampler(
                programs=TurnPrograms(model, apply, layout, with_routing=self._with_routing),
                drawing=self._drawing,
                limits=self._limits,
                stops=self._stops,
                read=self._use.read,
                vocab_size=model.config.vocab_size,
            )
        return self._samplers[apply]

    def _tokenize_opened(self, request: TurnRequest, row: Mapping[str, Any]) -> list[int]:
        """Returns the tokens of a row whose prompt the environment has extended."""
        tools = self._use.host.tools
        (ids,) = tokenize_with_tools([row], tools, self._outline, request.name)
        return ids
