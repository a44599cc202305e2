"""Prompts of a run, and the batches that completions of them make."""

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
_MAX_WIDTHS = 4  # sampler, scorer and step are compiled for each
_MAX_TOKEN_RATIO = 1.1  # fewer widths are taken if they cost at most 1.1 times the tokens
_SURVEYED_STEPS = (100, 1000)  # bounds of the number of steps whose batches choose the widths


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """Rows that ask something.

    Attributes:
      rows: with a `prompt` or `messages`, and what rewards read.
      tokens: the tokens of each prompt, up to where the completion begins.
    """

    rows: Sequence[Row]
    tokens: Sequence[list[int]]

    @functools.cached_property
    def columns(self) -> list[str]:
        """Returns the fields that rewards get: of all rows, as each may lack some."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in _PROMPT_FIELDS]

    @property
    def longest(self) -> int:
        """Returns the number of tokens that all prompts fit into."""
        return _rounded(max(map(len, self.tokens)))

    def share(self, completion_tokens: int) -> float:
        """Returns the share of prompts in all tokens, if each completion has so many tokens."""
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
        """Returns a row's prompt in words: a text, or the last turn."""
        prompt = self.prompt_of(row)
        return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


class Widths(NamedTuple):
    """Holds the few widths that batches of prompts have, ascending.

    Attributes:
      prompts: tokens that the prompts of a batch are padded to, to draw completions.
      rows: tokens that these are padded to together with their completions.
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
        """Returns widths with little padding for batches of the prompts that share a step.

        One long prompt thus costs the batches that it is in, and no others.

        Args:
          prompts: the prompts.
          order: says which ones share a batch.
          completion_tokens: the maximum number of tokens of a completion.
          sequence_parts: the number of parts that each width but the widest must divide into.
        """
        prompt_widths = np.array([_rounded(len(ids)) for ids in prompts.tokens])
        n_steps = int(np.clip(order.steps(1), *_SURVEYED_STEPS))
        # Scorer and step pad all batches of a step to its longest prompt.
        step_widths = [prompt_widths[order.rows(step)].max() for step in range(n_steps)]
        step_widths.append(prompt_widths.max())
        row_widths = np.array([_rounded(int(width) + completion_tokens) for width in step_widths])
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
        """Returns widths of rows that hold a prompt and all its completions.

        Args:
          completion_tokens: the maximum number of tokens of all completions of a prompt together.
        """
        rows = tuple(_rounded(width + completion_tokens) for width in self.prompts)
        return Widths(self.prompts, rows)


def _rounded(n_tokens: int) -> int:
    """Returns a width that holds so many tokens."""
    return int(round_up(np.array(n_tokens), 2**31))


class GroupedCompletions(NamedTuple):
    """Completions of prompts, those of one prompt in a group.

    Attributes:
      tokens: [prompts, group, n] int32.
      logps: fp32, as tokens: log-probabilities of these when they were drawn.
      lengths: [prompts, group], the tokens of each.
      ended: [prompts, group] bool: whether it came to an end within n tokens.
      texts: the texts, group after group; of several turns, what the model said last.
      turns: [prompts, group], a `TurnCompletion` each, whose tokens are not all the model's own;
        None for completions of one turn.
      routing: [prompts, group, slots, layers, k], the experts of each token: the last n - 1 slots
        are the completion's, and the prompt ends before them. -1 for tokens whose experts nobody
        knows; None where nobody asks.
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
        # Between turns, the environment's tokens stand among the model's.
        for index in np.ndindex(self.lengths.shape):
            is_own[index][: self.lengths[index]] = self.turns[index].is_own
        return is_own


@dataclasses.dataclass(eq=False)
class PromptFeed:
    """The prompts of each step; see `lora_jax.training.data.order.Batches`.

    By itself, a batch is zeros: `train.live.rollouts` draws completions.

    Attributes:
      config: the options of the run.
      prompts: the prompts of the run.
      outline: the model without its weights, with its tokenizer.
      per_token: the arrays of a batch that have a number for each token, in the order of `targets`.
      per_completion: the arrays that have a number for each completion.
      held_batch: the first step of the newest batch, and the batch.
      rewards: what rewards completions; None where nothing does.
      tools: what completions call; None for completions of one turn.
      server: the server that draws completions; None where the run draws itself.
      closing: ends what else the batches of a run need, such as requests to the server.
      metrics: metrics of the newest batch.
      new_samples: its completions, in words, until `fresh` returns them.
      lost: why nothing can be learned from it; None where something can.
      steps: the number of steps of the run.
      done: the steps so far.
      sequence_parts: the parts that the mesh splits a row into.
      share_prompt: whether a row is a prompt and all its completions, which see the prompt and
        themselves.
      routing: layers with experts and experts of a token, where a step replays the sampler's choice
        of these; None where it does not.
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
        """Returns the widths of batches of prompts, one for each of what is asked."""
        data = self.config.data
        if self.tools is not None and self.tools.opens:
            # Environments lengthen prompts by texts of unknown lengths.
            max_tokens = _rounded(data.seq_len)
            widths = Widths((max_tokens,), (max_tokens,))
        else:
            widths = Widths.choose(prompts, self.order, data.max_new_tokens, self.sequence_parts)
        return widths.sharing(data.group * data.max_new_tokens) if self.share_prompt else widths

    @property
    def length(self) -> int:
        """Returns the tokens of a row of the widest batch."""
        return self.widths.rows[-1]

    @property
    def batch_size(self) -> int:
        """Returns the completions in memory at once."""
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
          number: the number of its step, which does not matter.
          length: the tokens of a row; by default those of the widest batch.
        """
        data = self.config.data
        batch_shape = (self.config.optim.grad_accum, self.batch_size)
        completion_shape: tuple[int, ...] = ()  # of the completions in a row
        if self.share_prompt:
            batch_shape = (self.config.optim.grad_accum, self.batch_size // data.group)
            completion_shape = (data.group,)
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
        """Returns the progress after `step` steps, by the names of TRL's trainer state."""
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
        """Returns prompts and completions, a completion a row, or all those of a prompt.

        Args:
          rows: [n], the prompts.
          drawn: their completions.
          prompts: the prompts that stand before the completions; by default those of the feed.
          widths: the widths of batches of these prompts; by default those of the feed.
        """
        data = self.config.data
        completions_per_row = data.group if self.share_prompt else 1
        tokens = _as_rows(drawn.tokens, completions_per_row)
        lengths = _as_rows(drawn.lengths, completions_per_row)
        is_own = _as_rows(drawn.is_own, completions_per_row)
        is_learned = is_own
        if data.mask_truncated:
            is_learned = is_own & _as_rows(drawn.ended, completions_per_row)[..., None]
        prompts = prompts or self.prompts
        routing = None
        if prompts is self.prompts and drawn.routing is not None:  # other prompts ran nowhere
            routing = _as_rows(drawn.routing, completions_per_row)
        row_prompts = self._prompts_of_rows(rows, drawn, prompts)

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
        if drawn.turns is not None:  # an environment may have added a text to the prompts
            firsts = drawn.turns[:, 0] if self.share_prompt else drawn.turns.ravel()
            return [completion.prompt for completion in firsts]
        prompt_rows = rows if self.share_prompt else np.repeat(rows, group)
        return [prompts.tokens[row] for row in prompt_rows.tolist()]

    def fresh(self) -> list[Sample]:
        """Returns the completions that were drawn since the last call."""
        samples = self.new_samples
        self.new_samples = []
        return samples

    def close(self) -> None:
        """Ends the processes of rewards and tools, and what else batches need."""
        if self.rewards is not None:
            self.rewards.close()
        if self.tools is not None:
            self.tools.host.close()
        self.closing()

    def named(self, number: int) -> str:
        """Returns the names of the prompts of a step."""
        source = self.config.data.dataset

        def row_name(row: int) -> str:
            return name_of(self.prompts.rows[row], source, row + 1)

        return list_rows(self.rows(number).tolist(), row_name)

    def tokens(self, batch: HostBatch) -> int:
        """Returns the number of tokens in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def digest(self) -> str:
        """Returns a fingerprint of the prompts."""
        ids = np.concatenate([np.array(tokens, np.int32) for tokens in self.prompts.tokens])
        lengths = np.array([len(tokens) for tokens in self.prompts.tokens])
        return Arrays({"ids": ids, "lengths": lengths}).digest()

    def cursor(self, step: int) -> dict[str, Any]:
        """Returns the position in the data after `step` steps, with a batch that goes on."""
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
        """Takes up a batch that has steps to come; returns whether the cursor is of these data."""
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
    """Returns an array of completions, [prompts, group, …], as [rows, n, …]."""
    return completions.reshape(-1, n, *completions.shape[2:])


def fill_tokens(
    row: HostBatch, prompt: Sequence[int], completions: Sequence[np.ndarray], is_learned: np.ndarray
) -> None:
    """Fills in the arrays of a row: a prompt, then completions, each of which goes on from it.

    Args:
      row: the arrays of zeros; `branches` where there are several completions.
      prompt: its tokens.
      completions: the tokens of each.
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
    """Fills in the experts of a row's tokens, as far as the sampler ran these.

    Args:
      row: [tokens, layers, k], -1 each.
      prompt_tokens: the tokens of the prompt.
      lengths: [completions], the tokens of each.
      routing: [completions, slots, layers, k]; see `train.live.prompts.GroupedCompletions`.
      max_new_tokens: the maximum number of tokens of a completion.
    """
    completion_slot = routing.shape[1] - (max_new_tokens - 1)  # the prompt ends before it
    prompt_slots = slice(completion_slot - prompt_tokens, completion_slot)
    # A completion that did not begin has -1 for its prompt; the others have the same experts.
    row[:prompt_tokens] = routing[:, prompt_slots].max(axis=0)
    start = prompt_tokens
    for n_tokens, experts in zip(lengths.tolist(), routing, strict=True):
        n_run = max(n_tokens - 1, 0)  # the last token of a completion was drawn, and not run
        row[start : start + n_run] = experts[completion_slot : completion_slot + n_run]
        start += n_tokens
