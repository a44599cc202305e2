"""The prompts of a run, and batches of their completions."""

import base64
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.batches import Arrays, HostBatch, round_up
from lora_jax.training.data.order import Order, list_rows
from lora_jax.training.data.rows import Row, name_of
from lora_jax.training.data.sequences import few_lengths
from train.live.sampler_server import SamplerServer
from train.live.turns.use import ToolUse
from train.reporters.contract import Sample
from train.rewards.find import Rewards
from train.run.pretrained import ModelInfo

_PROMPT_FIELDS = ("prompt", "messages")
_MAX_WIDTHS = 4  # sampler, scorer and step are compiled for each width
_MAX_TOKEN_RATIO = 1.1  # fewer widths are chosen if they need at most 1.1 times the tokens
_SURVEYED_STEPS = (100, 1000)  # limits of the number of steps whose batches choose the widths


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """Rows with prompts, and the tokens of the prompts.

    Attributes:
      rows: rows with a `prompt` or `messages`, and the fields that rewards read.
      tokens: the tokens of each prompt, up to the start of the completion.
    """

    rows: Sequence[Row]
    tokens: Sequence[list[int]]

    @functools.cached_property
    def columns(self) -> list[str]:
        """Returns the fields that rewards receive. A field may be missing in some rows."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in _PROMPT_FIELDS]

    @property
    def longest(self) -> int:
        """Returns a padded number of tokens into which all prompts fit."""
        return _round_up_width(max(map(len, self.tokens)))

    def share(self, completion_tokens: int) -> float:
        """Returns the share of prompts in all tokens, for completions of a number of tokens."""
        prompt_tokens = sum(map(len, self.tokens))
        return prompt_tokens / (prompt_tokens + completion_tokens * len(self.tokens))

    def longest_of(self, rows: np.ndarray) -> int:
        """Returns the number of tokens of the longest prompt of these rows."""
        return max(len(self.tokens[row]) for row in rows.ravel().tolist())

    def prompt_of(self, row: int) -> Any:
        """Returns a row's prompt: a text or turns."""
        fields = self.rows[row]
        return fields.get("prompt") or fields["messages"]

    def prompt_text(self, row: int) -> str:
        """Returns a row's prompt as text, which is the last turn of several turns."""
        prompt = self.prompt_of(row)
        return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])

    def context_of(self, row: int) -> list[dict[str, str]] | None:
        """Returns the turns of a row's prompt before its last turn; None for none."""
        prompt = self.prompt_of(row)
        if isinstance(prompt, str) or len(prompt) < 2:
            return None
        return [{"role": turn["role"], "text": str(turn.get("content"))} for turn in prompt[:-1]]


class Widths(NamedTuple):
    """The few widths to which batches are padded, in ascending order.

    Attributes:
      prompts: the widths of prompts, for drawing completions.
      rows: the widths of prompts with their completions.
    """

    prompts: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def choose(
        cls,
        prompts: TokenizedPrompts,
        order: Order,
        completion_tokens: int,
        sequence_parts: int = 1,
    ) -> "Widths":
        """Chooses widths with little padding for the batches of a run.

        A long prompt then only slows down the batches that contain it.

        Args:
          prompts: the prompts.
          order: the order of the prompts, which tells the prompts of a step.
          completion_tokens: the maximum number of tokens of a completion.
          sequence_parts: all widths except the largest must be multiples of this number.
        """
        # The longest prompt of each step, to which scorer and step pad all its batches.
        prompt_widths = np.array([_round_up_width(len(ids)) for ids in prompts.tokens])
        n_steps = int(np.clip(order.steps(1), *_SURVEYED_STEPS))
        step_widths = [prompt_widths[order.rows(step)].max() for step in range(n_steps)]
        step_widths.append(prompt_widths.max())
        # The widths of rows with completions, of which a few are chosen.
        row_widths = np.array(
            [_round_up_width(int(width) + completion_tokens) for width in step_widths]
        )
        widest = row_widths.max()
        row_widths = np.where(row_widths % sequence_parts == 0, row_widths, widest)
        rows = few_lengths(row_widths, _MAX_WIDTHS, least=1, worth=_MAX_TOKEN_RATIO)
        widths = np.array(step_widths)
        return cls(tuple(int(widths[row_widths == row].max()) for row in rows), rows)

    def prompt(self, n_tokens: int) -> int:
        """Returns the width for prompts of up to n_tokens tokens."""
        return self.prompts[int(np.searchsorted(self.prompts, n_tokens))]

    def row(self, n_tokens: int) -> int:
        """Returns the width for rows of up to n_tokens tokens."""
        return self.rows[int(np.searchsorted(self.rows, n_tokens))]

    def sharing(self, completion_tokens: int) -> "Widths":
        """Returns the widths of rows that contain a prompt with all its completions.

        Args:
          completion_tokens: the maximum number of tokens of all completions of a prompt together.
        """
        rows = tuple(_round_up_width(width + completion_tokens) for width in self.prompts)
        return Widths(self.prompts, rows)


def _round_up_width(n_tokens: int) -> int:
    """Returns a padded width for a number of tokens."""
    return int(round_up(np.array(n_tokens), 2**31))


class GroupedCompletions(NamedTuple):
    """Completions of prompts, with one group of completions per prompt.

    Attributes:
      tokens: [prompts, group, n] int32.
      logps: [prompts, group, n] float32, log-probabilities of the tokens when they were drawn.
      lengths: [prompts, group], the number of tokens of each completion.
      ended: [prompts, group] bool, whether each completion ended within n tokens.
      texts: [prompts, group], the texts; for several turns, the model's last turn.
      turns: [prompts, group], a `TurnCompletion` each, some of whose tokens come from an
        environment; None for completions of one turn.
      routing: [prompts, group, slots, layers, k], the experts of each token. The last n - 1 slots
        belong to the completion, and the prompt ends before them. -1 stands for unknown experts.
        None if routing is not replayed.
    """

    tokens: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    texts: np.ndarray
    turns: Any = None
    routing: np.ndarray | None = None

    @property
    def is_own(self) -> np.ndarray:
        """Returns True for tokens that the model drew, False for others and padding."""
        is_own = np.arange(self.tokens.shape[-1]) < self.lengths[..., None]
        if self.turns is None:
            return is_own
        # Tokens of the environment come between the model's turns.
        for index in np.ndindex(self.lengths.shape):
            is_own[index][: self.lengths[index]] = self.turns[index].is_own
        return is_own


@dataclasses.dataclass(eq=False)
class PromptFeed:
    """The prompts of each step; see `lora_jax.training.data.order.Batches`.

    Its own batches are zeros, because `train.live.rollouts` draws the completions.

    Attributes:
      config: the options of the run.
      prompts: the prompts of the run.
      outline: the model without its weights, with its tokenizer.
      per_token: the names of arrays with a number for each token, like `targets`.
      per_completion: the names of arrays with a number for each completion.
      held_batch: the first step of the newest batch, and the batch.
      rewards: the rewards of completions; None without rewards.
      tools: the tools that completions may call; None for completions of one turn.
      server: the server that draws completions; None if the run draws them itself.
      closing: closes further resources of the batches, such as requests to the server.
      metrics: the metrics of the newest batch.
      new_samples: the texts of the newest completions, until `fresh` returns them.
      lost: the reason why nothing can be learned from the newest batch; None without one.
      steps: the number of steps of the run.
      done: the number of steps so far.
      sequence_parts: the number of parts into which the mesh splits a row.
      share_prompt: whether a row contains a prompt with all its completions, each of which attends
        to the prompt and itself.
      routing: the number of layers with experts and of experts per token, if steps replay the
        sampler's choice of experts; else None.
    """

    config: Any
    prompts: TokenizedPrompts
    outline: ModelInfo
    per_token: tuple[str, ...] = ("old",)
    per_completion: tuple[str, ...] = ("advantages",)
    held_batch: tuple[int, HostBatch] = (-1, {})
    rewards: Rewards | None = None
    tools: ToolUse | None = None
    server: SamplerServer | None = None
    closing: Callable[[], None] = lambda: None
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    new_samples: list[Sample] = dataclasses.field(default_factory=list)
    lost: str | None = None
    steps: int = 0
    done: int = 0
    sequence_parts: int = 1
    share_prompt: bool = False
    routing: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        optim = self.config.optim
        prompts_per_batch = optim.batch_size // self.config.data.group
        n_prompts = len(self.prompts.tokens)
        self.order = Order(optim.seed, n_prompts, prompts_per_batch, optim.grad_accum)
        self.widths = self.widths_of(self.prompts)

    def widths_of(self, prompts: TokenizedPrompts) -> Widths:
        """Returns the widths of the batches of these prompts."""
        data = self.config.data
        if self.tools is not None and self.tools.opens:
            # Environments add texts of unknown lengths to prompts.
            max_tokens = _round_up_width(data.seq_len)
            widths = Widths((max_tokens,), (max_tokens,))
        else:
            widths = Widths.choose(prompts, self.order, data.max_new_tokens, self.sequence_parts)
        return widths.sharing(data.group * data.max_new_tokens) if self.share_prompt else widths

    @property
    def length(self) -> int:
        """Returns the number of tokens of a row in the widest batch."""
        return self.widths.rows[-1]

    @property
    def batch_size(self) -> int:
        """Returns the number of completions in memory at once."""
        return self.config.optim.batch_size

    @property
    def n_examples(self) -> int:
        """Returns the number of prompts."""
        return len(self.prompts.tokens)

    def first(self) -> HostBatch:
        """Returns a batch of zeros, of the largest shape."""
        return self.batch(0)

    def batch(self, number: int, length: int | None = None) -> HostBatch:
        """Returns a batch of zeros.

        Args:
          number: the number of the step, which has no effect.
          length: the number of tokens of a row; by default that of the widest batch.
        """
        # The leading axes of all arrays, and the axis of a row's completions.
        data = self.config.data
        batch_shape = (self.config.optim.grad_accum, self.batch_size)
        completion_shape: tuple[int, ...] = ()
        if self.share_prompt:
            batch_shape = (self.config.optim.grad_accum, self.batch_size // data.group)
            completion_shape = (data.group,)
        # The other axes of each array.
        row_shape = (length or self.length,)
        token_shape = (*completion_shape, data.max_new_tokens)
        int_shapes: dict[str, tuple[int, ...]] = {}
        for name in ("ids", "segment_ids", "positions"):
            int_shapes[name] = row_shape
        if self.share_prompt:
            int_shapes["branches"] = row_shape
            int_shapes["completions"] = ()
        for name in ("predict_at", "targets", "weights"):
            int_shapes[name] = token_shape
        if self.routing is not None:
            int_shapes["routing"] = (*row_shape, *self.routing)
        batch = {
            name: np.zeros((*batch_shape, *shape), np.int32) for name, shape in int_shapes.items()
        }
        for name in self.per_token:
            batch[name] = np.zeros((*batch_shape, *token_shape), np.float32)
        for name in self.per_completion:
            batch[name] = np.zeros((*batch_shape, *completion_shape), np.float32)
        return batch

    def progress(self, step: int) -> dict[str, Any]:
        """Returns the progress after `step` steps, under the names of TRL's trainer state."""
        updates = self.config.optim.updates
        rows_seen = step // updates * self.order.rows_a_step
        rows_of_run = self.steps // updates * self.order.rows_a_step
        return {
            "global_step": step,
            "max_steps": self.steps,
            "epoch": rows_seen / self.order.n_rows,
            "num_train_epochs": math.ceil(rows_of_run / self.order.n_rows),
        }

    def rows(self, number: int) -> np.ndarray:
        """Returns the prompts of a step: [n]."""
        return self.order.rows(number // self.config.optim.updates).ravel()

    def batch_from_completions(
        self,
        rows: np.ndarray,
        drawn: GroupedCompletions,
        prompts: TokenizedPrompts | None = None,
        widths: Widths | None = None,
    ) -> HostBatch:
        """Returns a batch whose rows have a prompt with one or with all of its completions.

        Args:
          rows: [n], the prompts.
          drawn: the completions of the prompts.
          prompts: the prompts before the completions; by default those of the feed.
          widths: the widths of batches of these prompts; by default those of the feed.
        """
        # The completions of each row of the batch, [rows, completions_per_row, …].
        data = self.config.data
        completions_per_row = data.group if self.share_prompt else 1
        tokens = _as_rows(drawn.tokens, completions_per_row)
        lengths = _as_rows(drawn.lengths, completions_per_row)
        is_own = _as_rows(drawn.is_own, completions_per_row)
        is_learned = is_own
        if data.mask_truncated:
            is_learned = is_own & _as_rows(drawn.ended, completions_per_row)[..., None]
        if prompts is None:
            prompts = self.prompts
        routing = None
        # The sampler only ran the feed's own prompts.
        if prompts is self.prompts and drawn.routing is not None:
            routing = _as_rows(drawn.routing, completions_per_row)
        row_prompts = self._prompts_of_rows(rows, drawn, prompts)

        # A batch of the smallest width that fits.
        row_lengths = [
            len(prompt) + int(sizes.sum())
            for prompt, sizes in zip(row_prompts, lengths, strict=True)
        ]
        batch = self.batch(0, (widths or self.widths).row(max(row_lengths)))
        if self.routing is not None:
            batch["routing"][:] = -1
        arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
        for index, prompt in enumerate(row_prompts):
            row = {name: array[index] for name, array in arrays.items()}
            completions = [
                ids[:size] for ids, size in zip(tokens[index], lengths[index], strict=True)
            ]
            fill_tokens(row, prompt, completions, is_learned[index])
            if routing is not None:
                fill_routing(
                    row["routing"],
                    prompt_tokens=len(prompt),
                    lengths=lengths[index],
                    routing=routing[index],
                    max_new_tokens=data.max_new_tokens,
                )
        if self.share_prompt:
            batch["completions"][:] = completions_per_row
        return batch

    def _prompts_of_rows(
        self, rows: np.ndarray, drawn: GroupedCompletions, prompts: TokenizedPrompts
    ) -> list[Sequence[int]]:
        """Returns the tokens before the completions of each row of a batch."""
        group = self.config.data.group
        # An environment may have added a text to the prompts.
        if drawn.turns is not None:
            completions = drawn.turns[:, 0] if self.share_prompt else drawn.turns.ravel()
            return [completion.prompt for completion in completions]
        prompt_rows = rows if self.share_prompt else np.repeat(rows, group)
        return [prompts.tokens[row] for row in prompt_rows.tolist()]

    def fresh(self) -> list[Sample]:
        """Returns the completions that were drawn since the last call."""
        samples = self.new_samples
        self.new_samples = []
        return samples

    def close(self) -> None:
        """Ends the processes of rewards and tools, and closes further resources of batches."""
        if self.rewards is not None:
            self.rewards.close()
        if self.tools is not None:
            self.tools.host.close()
        self.closing()

    def named(self, number: int) -> str:
        """Returns the names of the prompts of a step."""
        return list_rows(self.rows(number).tolist(), self.row_name)

    def row_name(self, row: int) -> str:
        """Returns the name of a prompt's row: its file and line, or its number in the data."""
        return name_of(self.prompts.rows[row], self.config.data.dataset, row + 1)

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def digest(self) -> str:
        """Returns a fingerprint of the prompts."""
        ids = np.concatenate([np.array(tokens, np.int32) for tokens in self.prompts.tokens])
        lengths = np.array([len(tokens) for tokens in self.prompts.tokens])
        return Arrays({"ids": ids, "lengths": lengths}).digest()

    def cursor(self, step: int) -> dict[str, Any]:
        """Returns the position in the data after `step` steps, with an unfinished batch."""
        updates = self.config.optim.updates
        n_batches = -(-step // updates)
        cursor: dict[str, Any] = dict(self.order.cursor(n_batches))
        has_unfinished_batch = step % updates > 0
        if has_unfinished_batch:
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, **self.held_batch[1])
            cursor["completions"] = base64.b64encode(file.getvalue()).decode()
            cursor["noted"] = self.metrics
        return cursor

    def seek(self, cursor: dict[str, Any], step: int) -> bool:
        """Restores a position and its unfinished batch, and returns whether it fits these data."""
        updates = self.config.optim.updates
        n_batches = -(-step // updates)
        order_cursor = dict(cursor)
        completions = order_cursor.pop("completions", None)
        self.done = step
        self.metrics = order_cursor.pop("noted", {})
        if completions is not None:
            with np.load(io.BytesIO(base64.b64decode(completions))) as arrays:
                self.held_batch = (step - step % updates, dict(arrays))
        return order_cursor == self.order.cursor(n_batches)


def _as_rows(completions: np.ndarray, n: int) -> np.ndarray:
    """Reshapes an array of completions [prompts, group, …] to [rows, n, …]."""
    return completions.reshape(-1, n, *completions.shape[2:])


def fill_tokens(
    row: HostBatch, prompt: Sequence[int], completions: Sequence[np.ndarray], is_learned: np.ndarray
) -> None:
    """Fills in the arrays of a row: a prompt, and completions that each continue the prompt.

    Args:
      row: arrays of zeros, with `branches` for several completions.
      prompt: the tokens of the prompt.
      completions: the tokens of each completion.
      is_learned: [completions, n] bool, whether to learn from each token.
    """
    predict_at = row["predict_at"].reshape(len(completions), -1)
    targets = row["targets"].reshape(len(completions), -1)
    weights = row["weights"].reshape(len(completions), -1)
    prompt_tokens = len(prompt)
    row["ids"][:prompt_tokens] = prompt
    row["positions"][:prompt_tokens] = np.arange(prompt_tokens)
    start = prompt_tokens
    for index, ids in enumerate(completions):
        n_tokens = len(ids)
        end = start + n_tokens
        row["ids"][start:end] = ids
        row["positions"][start:end] = np.arange(prompt_tokens, prompt_tokens + n_tokens)
        if "branches" in row:
            row["branches"][start:end] = index + 1
        targets[index, :n_tokens] = ids
        weights[index, :n_tokens] = is_learned[index, :n_tokens]
        # Each token is predicted by the one before it; the first one by the prompt's last token.
        predict_at[index, :n_tokens] = np.arange(start - 1, end - 1)
        if n_tokens:
            predict_at[index, 0] = prompt_tokens - 1
        start = end
    row["segment_ids"][:start] = 1


def fill_routing(
    row: np.ndarray,
    prompt_tokens: int,
    lengths: np.ndarray,
    routing: np.ndarray,
    max_new_tokens: int,
) -> None:
    """Fills in the experts of those tokens of a row that the sampler ran.

    Args:
      row: [tokens, layers, k], filled with -1.
      prompt_tokens: the number of tokens of the prompt.
      lengths: [completions], the number of tokens of each completion.
      routing: [completions, slots, layers, k]; see `train.live.prompts.GroupedCompletions`.
      max_new_tokens: the maximum number of tokens of a completion.
    """
    completion_slot = routing.shape[1] - (max_new_tokens - 1)  # the first slot after the prompt
    prompt_slots = slice(completion_slot - prompt_tokens, completion_slot)
    # A lost completion has -1 for its prompt. All others have the same experts there.
    row[:prompt_tokens] = routing[:, prompt_slots].max(axis=0)
    start = prompt_tokens
    for n_tokens, experts in zip(lengths.tolist(), routing, strict=True):
        n_run = max(n_tokens - 1, 0)  # the last token of a completion was drawn but not run
        row[start : start + n_run] = experts[completion_slot : completion_slot + n_run]
        start += n_tokens
