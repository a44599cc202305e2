"""Rollouts: completions of the adapter that trains, with their rewards, as batches of a run.

A batch is a function of the state, the number of its step and the seed, so that a resumed run draws
what an uninterrupted one does. The sampler and the step read the same arrays.
"""

import base64
import bisect
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import training
from lora_jax.core.types import Tree
from lora_jax.models import sample
from lora_jax.training.batches import HostBatch, round_up
from lora_jax.training.data.order import Order, listed
from lora_jax.training.data.rows import Row
from lora_jax.training.losses import advantages_of, leave_one_out
from lora_jax.training.processes import from_first
from lora_jax.training.ready import Ready
from lora_jax.training.step import State
from train.console.output import tell
from train.live.reference import reference_params, running
from train.options.grpo import RLOO, Config
from train.processes import hosts
from train.reporters.contract import Sample
from train.rewards.find import Rewards
from train.run.complete import left_padded
from train.run.pretrained import Outline, end_tokens
from train.tasks.task import Preparing

_STREAM = 2  # of the run's key: 0 and 1 are the adapter's start and dropout
_OF_PROMPT = ("prompt", "messages")


class Prompts(NamedTuple):
    """Rows that ask something.

    Attributes:
      rows: with a `prompt` or `messages`, and what rewards read.
      tokens: the tokens of each prompt, up to where the completion begins.
    """

    rows: Sequence[Row]
    tokens: Sequence[list[int]]

    @property
    def columns(self) -> list[str]:
        """Returns the fields that rewards get."""
        return [name for name in self.rows[0] if name not in _OF_PROMPT]

    def asked(self, row: int) -> Any:
        """Returns a row's prompt: a text or turns."""
        return next(self.rows[row][name] for name in _OF_PROMPT if self.rows[row].get(name))


class _Drawn(NamedTuple):
    """Completions of prompts, in groups: each array [prompts, group, …]."""

    tokens: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray
    rewards: np.ndarray


@dataclasses.dataclass(eq=False)
class Rollouts:
    """Draws, rewards and scores the completions of each step.

    It is the run's `lora_jax.training.data.order.Batches` and, once it has a model, its `Live`.

    Attributes:
      config: the options of the run.
      prompts: what is asked.
      outline: the model's, with its tokenizer.
      rewards: what rewards the completions.
      newest: the completions of the newest batch, in words.
    """

    config: Config
    prompts: Prompts
    outline: Outline
    rewards: Rewards
    newest: list[Sample] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        data, optim = self.config.data, self.config.optim
        self.order = Order(
            optim.seed,
            len(self.prompts.tokens),
            optim.batch_size // data.group,
            optim.grad_accum,
        )
        self._length = int(round_up(np.array(max(map(len, self.prompts.tokens))), data.seq_len))
        self._held: tuple[int, HostBatch] = (-1, {})  # the first step of a batch, and the batch
        self._noted: dict[str, float] = {}
        self._of: Preparing | None = None

    # The batches of the data, which need no model.

    @property
    def batch_size(self) -> int:
        """Returns the completions in memory at once."""
        return self.config.optim.batch_size

    @property
    def n_examples(self) -> int:
        """Returns the number of prompts."""
        return len(self.prompts.tokens)

    @property
    def length(self) -> int:
        """Returns the tokens of a row: the longest prompt, and a completion."""
        most = self._length + self.config.data.max_new_tokens
        return int(round_up(np.array(most), max(most, self.config.data.seq_len)))

    def first(self) -> HostBatch:
        """Returns a batch of zeros, of the shape that all have."""
        of = (self.config.optim.grad_accum, self.batch_size)
        new = self.config.data.max_new_tokens
        row = dict.fromkeys(("ids", "segment_ids", "positions"), self.length)
        row |= dict.fromkeys(("predict_at", "targets", "weights"), new)
        batch: HostBatch = {name: np.zeros((*of, n), np.int32) for name, n in row.items()}
        scored = ("old", *(["reference"] if self.config.optim.beta and not self._in_reward else []))
        batch |= {name: np.zeros((*of, new), np.float32) for name in scored}
        return batch | {"advantages": np.zeros(of, np.float32)}

    @property
    def _in_reward(self) -> bool:
        """Returns whether the divergence is a part of the reward."""
        return self.config.optim.loss == RLOO

    def named(self, number: int) -> str:
        """Returns the names of the prompts of a step."""
        rows = self._rows(number).tolist()
        return listed(rows, lambda row: f"row {row + 1}") + f" of {self.config.data.dataset}"

    def tokens(self, batch: HostBatch) -> int:
        """Returns how many tokens are in a batch, without padding."""
        return int((batch["segment_ids"] > 0).sum())

    def digest(self) -> str:
        """Returns a fingerprint of the prompts."""
        known = [training.Arrays({"ids": np.array(ids, np.int32)}) for ids in self.prompts.tokens]
        return training.Arrays({"digests": np.array([one.digest() for one in known])}).digest()

    def cursor(self, step: int) -> dict[str, Any]:
        """Returns where the data stand after `step` steps, with a batch that has steps to come."""
        updates = self.config.optim.updates
        where: dict[str, Any] = dict(self.order.cursor(-(-step // updates)))
        if step % updates:
            file = io.BytesIO()
            np.savez(file, **self._held[1])
            where["rollouts"] = base64.b64encode(file.getvalue()).decode()
        return where

    def seek(self, cursor: dict[str, Any], step: int) -> bool:
        """Takes up a batch that has steps to come; returns whether the cursor is of these data."""
        updates = self.config.optim.updates
        kept = dict(cursor)
        if (rollouts := kept.pop("rollouts", None)) is not None:
            with np.load(io.BytesIO(base64.b64decode(rollouts))) as arrays:
                self._held = (step - step % updates, dict(arrays))
        return kept == self.order.cursor(-(-step // updates))

    def _rows(self, number: int) -> np.ndarray:
        return self.order.rows(number // self.config.optim.updates).ravel()

    # The batches of a model.

    def begin(self, of: Preparing) -> Ready:
        """Takes the model that draws and trains; returns what training begins with.

        Raises:
          UserError: the reference does not fit the base.
        """
        data, optim, layout = self.config.data, self.config.optim, of.layout
        self._of, self._apply = of, lj.adapt(of.model.apply)
        self._reference = reference_params(of, held=True) if optim.beta else None
        self._score = training.make_scorer(
            running(layout.constrained(of.model)),
            layout=layout,
            temperature=data.sampling_temperature,
            chunk=optim.loss_chunk * layout.token_parts,
            parts=layout.sequence_parts,
        )
        self._everywhere = jax.jit(lambda drawn: drawn, out_shardings=layout.whole)
        return dataclasses.replace(of.ready, live=self)

    def noted(self, number: int) -> Mapping[str, float]:
        """Returns the metrics of the newest completions."""
        return self._noted

    def batch(self, number: int, state: State | None = None) -> HostBatch:
        """Returns the batch of a step; draws completions, or takes those that have steps to come.

        Without a state, it is that of `first`.
        """
        if state is None:
            return self.first()
        begun = number - number % self.config.optim.updates
        if self._held[0] != begun:
            self._held = (begun, self._made(begun, state))
        return self._held[1]

    def _made(self, number: int, state: State) -> HostBatch:
        """Returns completions by a state as a batch; notes their metrics."""
        assert self._of is not None
        data, optim = self.config.data, self.config.optim
        params = lj.join(state.adapter, self._of.ready.base)
        rows = self._rows(number)
        drawn, noted = self._drawn(params, rows, number, 0)
        for attempt in range(data.redraw):
            (flat,) = np.nonzero(_without_spread(drawn.rewards))
            if not len(flat):
                break
            again, _ = self._drawn(params, rows[flat], number, attempt + 1)
            for old, new in zip(drawn, again, strict=True):
                old[flat] = new
        batch = self._rows_of(rows, drawn)
        scored = [self._scores(params, batch, part) for part in range(optim.grad_accum)]
        batch["old"] = np.stack([np.asarray(one.logps) for one in scored])
        entropy = np.stack([np.asarray(one.entropy) for one in scored])
        rewards = drawn.rewards.ravel()
        if self._reference is not None:
            parts = range(optim.grad_accum)
            found = [self._scores(self._reference, batch, part).logps for part in parts]
            reference = np.stack([np.asarray(one) for one in found])
            if self._in_reward:
                apart = np.where(batch["weights"] > 0, batch["old"] - reference, 0).sum(-1)
                rewards = rewards - optim.beta * apart.ravel()
            else:
                batch["reference"] = reference
        if self._in_reward:
            mean = np.repeat(np.nanmean(drawn.rewards, 1), data.group)
            advantages = leave_one_out(
                jnp.asarray(np.where(np.isnan(rewards), mean, rewards)), data.group
            )
        else:
            advantages = advantages_of(jnp.asarray(rewards), data.group, optim.scale)
        shape = batch["ids"].shape[:2]
        batch["advantages"] = np.nan_to_num(np.asarray(advantages)).reshape(shape)
        counted = batch["weights"] > 0
        apart = np.abs(drawn.logps.reshape(*shape, -1) - batch["old"])[counted]
        self._noted = noted | {
            "reward": float(np.nanmean(drawn.rewards)),
            "zero_spread": float(_without_spread(drawn.rewards).mean()),
            "length": float(drawn.lengths.mean()),
            "truncated": float(1 - drawn.ended.mean()),
            "entropy": float(entropy[counted].mean()) if counted.any() else 0.0,
            "mismatch_mean": float(apart.mean()) if apart.size else 0.0,
            "mismatch_max": float(apart.max(initial=0.0)),
        }
        return batch

    def _scores(self, params: Tree, batch: HostBatch, part: int) -> training.Scores:
        assert self._of is not None
        of_part = {name: array[part] for name, array in batch.items()}
        return self._score(params, self._of.layout.batch(of_part, parts=False))

    def _drawn(
        self, params: Tree, rows: np.ndarray, number: int, attempt: int
    ) -> tuple[_Drawn, dict[str, float]]:
        """Draws completions of prompts, and rewards them; returns metrics of the rewards, too."""
        group, at_once = self.config.data.group, self.order.batch_size
        key = jax.random.fold_in(jax.random.key(self.config.optim.seed), _STREAM)
        key = jax.random.fold_in(jax.random.fold_in(key, number), attempt)
        parts = []
        for first in range(0, len(rows), at_once):
            some = np.resize(rows[first : first + at_once], at_once)  # one shape
            parts.append(self._sampled(params, some, key, first * group))
        found = [np.concatenate(arrays)[: len(rows) * group] for arrays in zip(*parts, strict=True)]
        tokens, logps, lengths, ended = (np.array(one) for one in found)
        texts = []
        for at, ids in enumerate(tokens):
            text, cut = self._text(ids[: lengths[at]].tolist())
            if cut is not None:
                lengths[at], ended[at] = cut, True
            texts.append(text)
        rewards, noted = self._rewarded(np.repeat(rows, group), texts, tokens, lengths)
        grouped = (x.reshape(-1, group, *x.shape[1:]) for x in (tokens, logps, lengths, ended))
        return _Drawn(*grouped, rewards.reshape(-1, group)), noted

    def _sampled(self, params: Tree, rows: np.ndarray, key: jax.Array, first: int) -> Any:
        """Returns the tokens, log-probabilities, lengths and ends of a part's completions."""
        assert self._of is not None
        data, layout, ends = self.config.data, self._of.layout, end_tokens(self.outline)
        prompts = [self.prompts.tokens[row] for row in rows.tolist()]
        ids, mask = left_padded(prompts, self._length, ends[0] if ends else 0)
        asked = layout.batch({"ids": ids, "mask": mask}, parts=False)
        numbers = jnp.arange(first, first + len(rows) * data.group)
        with jax.set_mesh(layout.mesh):
            drawn = sample(
                self._of.model,
                params,
                asked["ids"],
                asked["mask"],
                n=data.group,
                max_new_tokens=data.max_new_tokens,
                temperature=data.sampling_temperature,
                top_p=data.top_p,
                top_k=data.top_k,
                key=jax.vmap(jax.random.fold_in, (None, 0))(key, numbers),
                eos_token_id=ends or None,
                apply=self._apply,
            )
            return jax.tree.map(np.asarray, tuple(self._everywhere(drawn)))

    def _text(self, ids: list[int]) -> tuple[str, int | None]:
        """Returns the text of a completion, and the number of its tokens if a stop text ends it."""
        stops = self.config.data.stop

        def text_of(n: int) -> str:
            text: str = self.outline.tokenizer.decode(ids[:n], skip_special_tokens=True)
            return text

        text = text_of(len(ids))
        places = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if not places:
            return text, None
        numbers = range(1, len(ids) + 1)
        held = bisect.bisect_left(
            numbers, True, key=lambda n: any(stop in text_of(n) for stop in stops)
        )
        return text[: min(places)], held + 1

    def _rewarded(
        self, rows: np.ndarray, texts: list[str], tokens: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Returns the rewards of completions, and metrics of each; the first process asks."""
        assert self._of is not None
        group, of = self.config.data.group, self.prompts
        noted: dict[str, float] = {}
        total = np.zeros(len(rows), np.float32)
        if jax.process_index() == 0:
            scored = self.rewards(
                [of.asked(row) for row in rows],
                texts,
                [ids[:n].tolist() for ids, n in zip(tokens, lengths, strict=True)],
                {name: [of.rows[row].get(name) for row in rows] for name in of.columns},
                group=group,
            )
            total = scored.total
            for line in scored.said:
                tell(self._of.console, f"warning: {line}")
            several = len(scored.by_name) > 1
            for name, values in scored.by_name.items() if several else ():
                noted[f"reward_{name}"] = float(np.nanmean(values))
            failed = sum(sum(kinds.values()) for kinds in scored.failures.values())
            noted["reward_failed"] = failed / len(rows)
            for kinds in scored.kinds.values():
                noted |= {f"reward_{kind}": n / len(rows) for kind, n in kinds.items()}
            self.newest = [
                Sample(_shown(of.asked(row)), text, None if math.isnan(x) else float(x))
                for row, text, x in zip(rows, texts, total, strict=True)
            ]
        if jax.process_count() > 1:
            total = np.array(hosts.gathered(total.tolist())[0], np.float32)
            noted = from_first(noted)
        return total, noted

    def _rows_of(self, rows: np.ndarray, drawn: _Drawn) -> HostBatch:
        """Returns prompts and completions as rows of one sequence each, [accumulate, batch, …]."""
        data = self.config.data
        batch = self.first()
        flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
        tokens = drawn.tokens.reshape(-1, data.max_new_tokens)
        lengths, ended = drawn.lengths.ravel(), drawn.ended.ravel()
        for at, row in enumerate(np.repeat(rows, data.group).tolist()):
            asked, n = self.prompts.tokens[row], int(lengths[at])
            ids = [*asked, *tokens[at, :n].tolist()]
            flat["ids"][at, : len(ids)] = ids
            flat["segment_ids"][at, : len(ids)] = 1
            flat["positions"][at, : len(ids)] = np.arange(len(ids))
            flat["predict_at"][at, :n] = np.arange(len(asked) - 1, len(ids) - 1)
            flat["targets"][at, :n] = tokens[at, :n]
            flat["weights"][at, :n] = ended[at] or not data.mask_truncated
        return batch


def _without_spread(rewards: np.ndarray) -> np.ndarray:
    """Returns which groups, [n, group], have rewards that are all equal, or none: [n] bool."""
    spread = np.nanmax(rewards, 1, initial=-np.inf) - np.nanmin(rewards, 1, initial=np.inf)
    return ~(spread > 0)


def _shown(asked: Any) -> str:
    """Returns a prompt in words: the last turn of a chat."""
    return asked if isinstance(asked, str) else str(asked[-1]["content"])
