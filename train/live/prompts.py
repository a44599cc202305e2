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

_OF_PROMPT = ("prompt", "messages")
_MOST_WIDTHS = 4  # sampler, scorer and step are compiled for each
_WORTH = 1.1  # fewer widths are taken if they cost at most 1.1 times the tokens
_LOOKED_AT = (100, 1000)  # number of steps whose batches choose the widths, at least and at most


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
        return [name for name in names if name not in _OF_PROMPT]

    @property
    def longest(self) -> int:
        """Returns the number of tokens that all prompts fit into."""
        return _rounded(max(map(len, self.tokens)))

    def share(self, new: int) -> float:
        """Returns the share of the tokens that are prompts, with completions of `new` each."""
        asked = sum(map(len, self.tokens))
        return asked / (asked + new * len(self.tokens))

    def longest_of(self, rows: np.ndarray) -> int:
        """Returns the number of tokens of the longest prompt of these rows."""
        return max(len(self.tokens[row]) for row in rows.ravel().tolist())

    def asked(self, row: int) -> Any:
        """Returns a row's prompt: a text or turns."""
        return next(self.rows[row][name] for name in _OF_PROMPT if self.rows[row].get(name))

    def shown(self, row: int) -> str:
        """Returns a row's prompt in words: a text, or the last turn."""
        asked = self.asked(row)
        return asked if isinstance(asked, str) else str(asked[-1]["content"])


class Widths(NamedTuple):
    """Holds the few widths that batches of prompts have, ascending.

    Attributes:
      prompts: tokens that the prompts of a batch are padded to, to draw completions.
      rows: tokens that these are padded to together with their completions.
    """

    prompts: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def choose(cls, prompts: TokenizedPrompts, order: Order, new: int, parts: int = 1) -> "Widths":
        """Returns widths with little padding for batches of the prompts that share a step.

        One long prompt thus costs the batches that it is in, and no others.

        Args:
          prompts: the prompts.
          order: says which ones share a batch.
          new: the maximum number of tokens of a completion.
          parts: a width divides into so many parts, but for the widest.
        """
        sizes = np.array([_rounded(len(ids)) for ids in prompts.tokens])
        n_steps = int(np.clip(order.steps(1), *_LOOKED_AT))
        # Scorer and step pad all parts of a step to the longest of all.
        widest = np.array([*(sizes[order.rows(n)].max() for n in range(n_steps)), sizes.max()])
        rows = np.array([_rounded(size + new) for size in widest.tolist()])
        suits = (rows % parts == 0) | (rows == rows.max())
        rows = np.where(suits, rows, rows.max())
        lengths = few_lengths(rows, _MOST_WIDTHS, least=1, worth=_WORTH)
        return cls(tuple(int(widest[rows == length].max()) for length in lengths), lengths)

    def prompt(self, n: int) -> int:
        """Returns the width for prompts of up to n tokens."""
        return self.prompts[int(np.searchsorted(self.prompts, n))]

    def row(self, n: int) -> int:
        """Returns the width for rows of up to n tokens."""
        return self.rows[int(np.searchsorted(self.rows, n))]

    def sharing(self, new: int) -> "Widths":
        """Returns as many widths, of rows of a prompt with `new` tokens of all its completions."""
        return Widths(self.prompts, tuple(_rounded(width + new) for width in self.prompts))


def _rounded(n: int) -> int:
    return int(round_up(np.array(n), 2**31))


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
        for at in np.ndindex(self.lengths.shape) if self.turns is not None else ():
            is_own[at][: self.lengths[at]] = self.turns[at].is_own
        return is_own


@dataclasses.dataclass(eq=False)
class PromptFeed:
    """The prompts of each step; see `lora_jax.training.data.order.Batches`.

    By itself, a batch is zeros: `train.live.rollouts` draws completions.

    Attributes:
      config: the options of the run.
      prompts: what is asked.
      outline: the model's, with its tokenizer.
      per_token: the arrays of a batch that have a number for each token, in the order of `targets`.
      per_completion: the arrays that have a number for each completion.
      held: the first step of the newest batch, and the batch.
      rewards: what rewards completions; None where nothing does.
      tools: what completions call; None for completions of one turn.
      server: the server that draws completions; None where the run draws itself.
      closing: ends what else the batches of a run need, such as requests to the server.
      metrics: metrics of the newest batch.
      newest: its completions, in words, until `fresh` returns them.
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
    held: tuple[int, HostBatch] = (-1, {})
    rewards: Rewards | None = None
    tools: ToolUse | None = None
    server: SamplerServer | None = None
    closing: Callable[[], None] = lambda: None
    metrics: dict[str, float | None] = dataclasses.field(default_factory=dict)
    newest: list[Sample] = dataclasses.field(default_factory=list)
    lost: str | None = None
    steps: int = 0
    done: int = 0
    sequence_parts: int = 1
    share_prompt: bool = False
    routing: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        optim, group = self.config.optim, self.config.data.group
        n, parts = len(self.prompts.tokens), optim.grad_accum
        self.order = Order(optim.seed, n, optim.batch_size // group, parts)
        self.widths = self.widths_of(self.prompts)

    def widths_of(self, prompts: TokenizedPrompts) -> Widths:
        """Returns the widths of batches of prompts, one for each of what is asked."""
        new, group = self.config.data.max_new_tokens, self.config.data.group
        widths = Widths.choose(prompts, self.order, new, self.sequence_parts)
        if self.tools is not None and self.tools.opens:  # nobody knows how long they will be
            total = _rounded(self.config.data.seq_len)
            widths = Widths((total,), (total,))
        return widths.sharing(group * new) if self.share_prompt else widths

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
        group, new = self.config.data.group, self.config.data.max_new_tokens
        rows, of = (self.config.optim.grad_accum, self.batch_size), tuple[int, ...]()
        ints: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("ids", "segment_ids", "positions"), (length or self.length,)
        )
        if self.share_prompt:
            rows, of = (rows[0], self.batch_size // group), (group,)
            ints |= {"branches": ints["ids"], "completions": ()}
        ints |= dict.fromkeys(("predict_at", "targets", "weights"), (*of, new))
        if self.routing is not None:
            ints["routing"] = (*ints["ids"], *self.routing)
        numbers = dict.fromkeys(self.per_token, (*of, new)) | dict.fromkeys(self.per_completion, of)
        batch = {name: np.zeros((*rows, *shape), np.int32) for name, shape in ints.items()}
        return batch | {
            name: np.zeros((*rows, *shape), np.float32) for name, shape in numbers.items()
        }

    def progress(self, step: int) -> dict[str, Any]:
        """Returns the progress after `step` steps, by the names of TRL's trainer state."""
        taken, of_all = step // self.config.optim.updates, self.steps // self.config.optim.updates
        epochs = [n * self.order.rows_a_step / self.order.n_rows for n in (taken, of_all)]
        return {
            "global_step": step,
            "max_steps": self.steps,
            "epoch": epochs[0],
            "num_train_epochs": math.ceil(epochs[1]),
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
          prompts: what stands before the completions; by default what was asked.
          widths: the widths of batches of these; by default those of what was asked.
        """
        data, prompts = self.config.data, prompts or self.prompts
        n = data.group if self.share_prompt else 1  # completions of a row
        tokens, lengths, ended, is_own = (
            x.reshape(-1, n, *x.shape[2:])
            for x in (drawn.tokens, drawn.lengths, drawn.ended, drawn.is_own)
        )
        asked = [prompts.tokens[row] for row in np.repeat(rows, data.group // n).tolist()]
        if drawn.turns is not None:  # an environment may have opened them
            asked = [turns.prompt for turns in drawn.turns.reshape(-1, n)[:, 0]]
        routing = drawn.routing if prompts is self.prompts else None
        if routing is not None:
            routing = routing.reshape(-1, n, *routing.shape[2:])
        longest = max(len(ids) + int(of.sum()) for ids, of in zip(asked, lengths, strict=True))
        batch = self.batch(0, (widths or self.widths).row(longest))
        if self.routing is not None:
            batch["routing"][:] = -1
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
        counts = is_own & (ended | (not data.mask_truncated))[..., None]
        for at, prompt in enumerate(asked):
            row = {name: array[at] for name, array in flat.items()}
            completions = [ids[:size] for ids, size in zip(tokens[at], lengths[at], strict=True)]
            fill(row, prompt, completions, counts[at])
            if routing is not None:
                at_row = (row["routing"], len(prompt), lengths[at], routing[at])
                fill_routing(*at_row, data.max_new_tokens)
        if self.share_prompt:
            batch["completions"][:] = n
        return batch

    def fresh(self) -> list[Sample]:
        """Returns the completions that were drawn since it was last asked."""
        fresh, self.newest = self.newest, []
        return fresh

    def close(self) -> None:
        """Ends the processes of rewards and tools, and what else batches need."""
        if self.rewards is not None:
            self.rewards.close()
        if self.tools is not None:
            self.tools.host.close()
        self.closing()

    def named(self, number: int) -> str:
        """Returns the names of the prompts of a step."""
        rows, source = self.rows(number).tolist(), self.config.data.dataset
        return list_rows(rows, lambda row: name_of(self.prompts.rows[row], source, row + 1))

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
        where: dict[str, Any] = dict(self.order.cursor(-(-step // updates)))
        if step % updates:
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, **self.held[1])
            where["completions"] = base64.b64encode(file.getvalue()).decode()
            where["noted"] = self.metrics
        return where

    def seek(self, cursor: dict[str, Any], step: int) -> bool:
        """Takes up a batch that has steps to come; returns whether the cursor is of these data."""
        updates, kept, self.done = self.config.optim.updates, dict(cursor), step
        self.metrics = kept.pop("noted", {})
        if (completions := kept.pop("completions", None)) is not None:
            with np.load(io.BytesIO(base64.b64decode(completions))) as arrays:
                self.held = (step - step % updates, dict(arrays))
        return kept == self.order.cursor(-(-step // updates))


def fill(
    row: HostBatch, prompt: Sequence[int], completions: Sequence[np.ndarray], counts: np.ndarray
) -> None:
    """Fills in the arrays of a row: a prompt, then completions, each of which goes on from it.

    Args:
      row: the arrays of zeros; `branches` where there are several completions.
      prompt: its tokens.
      completions: the tokens of each.
      counts: [completions, n] bool, whether to learn from each token.
    """
    targets = {
        name: row[name].reshape(len(completions), -1)
        for name in ("predict_at", "targets", "weights")
    }
    before, end = len(prompt), len(prompt)
    row["ids"][:before], row["positions"][:before] = prompt, np.arange(before)
    for at, ids in enumerate(completions):
        n = len(ids)
        here, end = slice(end, end + n), end + n
        row["ids"][here], row["positions"][here] = ids, np.arange(before, before + n)
        if "branches" in row:
            row["branches"][here] = at + 1
        targets["predict_at"][at, :n] = np.arange(here.start - 1, end - 1)
        targets["predict_at"][at, : min(n, 1)] = before - 1  # the prompt's last token predicts
        targets["targets"][at, :n], targets["weights"][at, :n] = ids, counts[at, :n]
    row["segment_ids"][:end] = 1


def fill_routing(
    row: np.ndarray, before: int, lengths: np.ndarray, routing: np.ndarray, new: int
) -> None:
    """Fills in the experts of a row's tokens, as far as the sampler ran these.

    Args:
      row: [tokens, layers, k], -1 each.
      before: the tokens of the prompt.
      lengths: [completions], the tokens of each.
      routing: [completions, slots, layers, k]; see `train.live.prompts.GroupedCompletions`.
      new: the maximum number of tokens of a completion.
    """
    end, first = before, routing.shape[1] - (new - 1)
    row[:before] = routing[:, first - before : first].max(axis=0)  # -1 where one did not begin
    for n, experts in zip(lengths.tolist(), routing, strict=True):
        run = max(n - 1, 0)  # the last token of a completion was drawn, and not run
        row[end : end + run] = experts[first : first + run]
        end += n
