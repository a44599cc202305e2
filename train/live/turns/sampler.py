"""Draws completions of several turns: rows call tools, wait, and go on independently.

A place holds one completion after the other, always the same ones, so that neither the time at
which a tool answers nor what other rows do changes a bit of what a row draws.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.slots import DrawnTokens
from lora_jax.models.sampling.text import StopTexts
from lora_jax.models.sampling.turns import DrawingRows, turn_key
from train.live.turns.episodes import Heard, Listener
from train.live.turns.programs import BLOCK, TurnPrograms, TurnRows, make_sampling
from train.live.turns.rows import AskedRow, ReadTurn, TurnCompletion, TurnLimits

_GLANCE = 8  # tokens between two looks at what has been answered, while a row waits


class Drawing(NamedTuple):
    """Options of the sampler.

    Attributes:
      temperature, top_p, top_k: see `lora_jax.models.sample`; the likeliest token at 0.
      ends: the tokens that end a turn.
    """

    temperature: float
    top_p: float
    top_k: int | None
    ends: Sequence[int]


class TurnSampler:
    """Draws completions of several turns by one model."""

    def __init__(
        self,
        programs: TurnPrograms,
        drawing: Drawing,
        limits: TurnLimits,
        stops: StopTexts,
        read: ReadTurn,
        vocab: int,
    ) -> None:
        """Takes all that draws share.

        Args:
          programs: the compiled functions.
          drawing: how tokens are drawn.
          limits: bounds of a completion.
          stops: texts, each of which ends a completion.
          read: reads the calls of a turn.
          vocab: the size of the model's vocabulary.
        """
        self.programs, self.drawing, self.limits = programs, drawing, limits
        self.stops, self.read, self.vocab = stops, read, vocab

    def draw(
        self,
        params: Tree,
        asked: Sequence[AskedRow],
        key: jax.Array,
        listener: Listener,
        *,
        places: int,
        longest: int,
    ) -> list[TurnCompletion]:
        """Draws the completions.

        Args:
          params: the model's parameters.
          asked: what is completed; its numbers choose the keys.
          key: the draw's key.
          listener: the episodes.
          places: the number of rows side by side.
          longest: the most tokens of a prompt.

        Raises:
          Dropped: a signal came; see `Listener.hear`.
        """
        room = min(longest + self.limits.new_tokens, self.limits.total)
        keys = row_keys(key, np.array([each.number for each in asked]))
        rows = self.programs.empty(places, room)
        with jax.set_mesh(self.programs.mesh), listener:
            return _Draw(self, params, [*asked], keys, listener, rows).run()


class _Draw:
    """One draw: which completion has which place, and what each does next."""

    def __init__(
        self,
        sampler: TurnSampler,
        params: Tree,
        asked: list[AskedRow],
        keys: jax.Array,
        listener: Listener,
        rows: TurnRows,
    ) -> None:
        self._of, self._params, self._listener, self._rows = sampler, params, listener, rows
        how = sampler.drawing
        self._sampling = make_sampling(sampler.vocab, how.temperature, how.top_p, how.top_k, keys)
        self._keys, self._ends = [*keys], frozenset(how.ends)
        self._done = [TurnCompletion(each, each.prompt) for each in asked]
        self._index = {each.number: i for i, each in enumerate(asked)}
        self._queues = [deque(range(place, len(asked), rows.n)) for place in range(rows.n)]
        self._drawing: dict[int, int] = {}  # the completion that draws in a place
        self._firsts: list[tuple[int, DrawnTokens[jax.Array]]] = []  # tokens not yet fetched
        self._prefilled: dict[tuple[int, ...], tuple[jax.Array, Cache, int]] = {}
        self._uses: dict[tuple[int, ...], int] = {}
        for each in asked:
            prompt = tuple(each.prompt)
            self._uses[prompt] = self._uses.get(prompt, 0) + 1

    def run(self) -> list[TurnCompletion]:
        """Draws until all completions are over."""
        self._open(range(self._rows.n))
        while self._drawing or self._listener.waiting:
            waits = bool(self._listener.waiting)
            if waits:
                for heard in self._listener.hear(until_one=not self._drawing):
                    self._hear(heard)
            if self._drawing:
                self._decode(_GLANCE if self._listener.waiting else BLOCK)
        return self._done

    # Between turns

    def _open(self, places: Sequence[int]) -> None:
        """Opens the episodes of the completions that these places hold next."""
        heads = [self._queues[place][0] for place in places if self._queues[place]]
        self._listener.open([self._done[i].asked for i in heads])

    def _hear(self, heard: Heard) -> None:
        i = self._index[heard.number]
        made, place = self._done[i], i % self._rows.n
        if heard.kind == "earned":
            made.earned = heard.earned
        elif heard.lost is not None:
            made.lost = heard.lost
            self._end(i)
        elif heard.kind == "opened":
            self._begin(i, place, heard.ids)
        else:
            self._go_on(i, place, heard)

    def _begin(self, i: int, place: int, opened: list[int]) -> None:
        """Begins the first turn of a completion."""
        made = self._done[i]
        made.prompt = opened or made.asked.prompt
        limits = self._of.limits
        if len(made.prompt) >= limits.total:
            made.lost = (
                f"{made.asked.name}: the prompt has {len(made.prompt)} tokens with what its "
                f"environment opened it with, and --seq-len {limits.total} leaves no room"
            )
            made.prompt = made.asked.prompt
            return self._end(i)
        logits, cache = self._prefill(tuple(made.prompt), shared=not opened)
        self._begin_turn(i, place, logits, cache)

    def _prefill(self, prompt: tuple[int, ...], *, shared: bool) -> tuple[jax.Array, Cache]:
        """Runs a prompt, once for all completions of it."""
        if not shared:
            return self._rows.prefill(self._params, prompt)
        if prompt not in self._prefilled:
            self._prefilled[prompt] = (*self._rows.prefill(self._params, prompt), 0)
        logits, cache, n = self._prefilled.pop(prompt)
        if n + 1 < self._uses[prompt]:
            self._prefilled[prompt] = logits, cache, n + 1
        return logits, cache

    def _go_on(self, i: int, place: int, heard: Heard) -> None:
        """Begins the turn after one that called, if there is room for what was answered."""
        made = self._done[i]
        made.count(heard.answers)
        left = self._room(made) - len(heard.ids)
        if left < 0:  # as in TRL, where what does not fit is left out
            return self._end(i)
        made.hear(heard.answers)
        before, last = len(made.prompt) + len(made.ids) - 1, made.ids[-1]
        made.answer(heard.ids)
        if left == 0:
            made.ended = False
            return self._end(i)
        ids = [last, *heard.ids]  # the newest token is not in the cache
        logits, cache = self._rows.extend(self._params, place, before, ids)
        self._begin_turn(i, place, logits, cache)

    def _begin_turn(self, i: int, place: int, logits: jax.Array, cache: Cache) -> None:
        made = self._done[i]
        sampling = self._sampling._replace(key=turn_key(self._keys[i], len(made.starts)))
        made.starts.append(len(made.ids))
        self._firsts.append((i, self._rows.begin(place, logits, cache, sampling)))
        self._drawing[place] = i

    def _room(self, made: TurnCompletion) -> int:
        """Returns the number of tokens that a completion may still have."""
        limits = self._of.limits
        return min(limits.new_tokens, limits.total - len(made.prompt)) - len(made.ids)

    # Within turns

    def _decode(self, until: int) -> None:
        """Draws tokens of all rows that draw, until one has to stop."""
        begun = {i for i, _ in self._firsts}
        room = np.zeros(self._rows.n, np.int32)
        for place, i in self._drawing.items():
            room[place] = self._room(self._done[i]) - (i in begun)
        drawing = np.isin(np.arange(self._rows.n), [*self._drawing])
        ends = np.array(sorted(self._ends), np.int32)
        active = DrawingRows(drawing, room, ends, np.int32(until))
        block = self._rows.decode(self._params, active)
        firsts, block = jax.device_get(([tokens for _, tokens in self._firsts], block))
        for (i, _), tokens in zip(self._firsts, firsts, strict=True):
            self._done[i].draw(tokens.ids.tolist(), tokens.logps.tolist())
        self._firsts.clear()
        n = int(block.steps)
        for place, i in [*self._drawing.items()]:
            made = self._done[i]
            made.draw(block.ids[place, :n].tolist(), block.logps[place, :n].tolist())
            if made.ids[-1] in self._ends or self._room(made) <= 0:
                del self._drawing[place]
                self._end_turn(i)

    def _end_turn(self, i: int) -> None:
        """Has the calls of a turn run, or ends the completion."""
        made, limits = self._done[i], self._of.limits
        text, n = self._of.stops.cut(made.turn)
        if n is not None:  # a text ended the completion
            made.cut(n)
            made.ended = True
            made.say(text)
            return self._end(i)
        made.ended = made.ids[-1] in self._ends
        before = [*made.prompt, *made.ids[: made.starts[-1]]]
        content, calls = self._of.read(made.turn, before)
        may_call = made.ended and (limits.turns is None or len(made.starts) < limits.turns)
        made.say(content, calls)
        if calls and may_call:
            self._listener.call(made.asked.number, calls, made.ids[-1])
        else:
            self._end(i)

    def _end(self, i: int) -> None:
        """Ends a completion, and gives its place to the next one."""
        made = self._done[i]
        if not made.messages:  # it was lost before its first turn
            made.say("")
        self._listener.end(made.asked.number, is_lost=made.lost is not None)
        place = i % self._rows.n
        if made.starts and self._of.programs.with_routing:
            made.routing = self._rows.routing(place)
        self._queues[place].popleft()
        self._open([place])
