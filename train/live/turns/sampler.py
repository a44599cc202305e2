"""Draws completions of several turns in rows, which call tools, wait and continue independently.

A row on the devices holds a fixed sequence of completions, one after the other. Therefore neither
the time at which a tool answers nor the other rows change the tokens that a row draws. A completion
has an index among the requests of a draw, and its row is that index modulo the number of rows.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lora_jax.core.types import Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.slots import DrawnTokens
from lora_jax.models.sampling.text import StopTexts
from lora_jax.models.sampling.turns import DrawingRows, TokenBlock, turn_key
from train.live.turns.episodes import EpisodeMessage, Listener
from train.live.turns.programs import BLOCK, TurnPrograms, TurnRows, make_sampling
from train.live.turns.rows import ReadTurn, TurnCompletion, TurnLimits, TurnRequest

_TOKENS_WHILE_WAITING = 8  # tokens per row between two checks for answers, while a row waits


class Drawing(NamedTuple):
    """Options of the sampler.

    Attributes:
      temperature, top_p, top_k: see `lora_jax.models.sample`. Temperature 0 takes the most likely
        token.
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
        vocab_size: int,
    ) -> None:
        """Creates a sampler with the options of all draws.

        Args:
          programs: the compiled functions.
          drawing: the options for drawing tokens.
          limits: the limits of a completion.
          stops: texts that end a completion.
          read: reads the calls of a turn.
          vocab_size: the size of the model's vocabulary.
        """
        self.programs = programs
        self.drawing = drawing
        self.limits = limits
        self.stops = stops
        self.read = read
        self.vocab_size = vocab_size

    def draw(
        self,
        params: Tree,
        requests: Sequence[TurnRequest],
        key: jax.Array,
        listener: Listener,
        *,
        n_rows: int,
        max_prompt_tokens: int,
    ) -> list[TurnCompletion]:
        """Draws the completions.

        Args:
          params: the model's parameters.
          requests: the prompts, whose numbers determine the keys.
          key: the draw's key.
          listener: the episodes.
          n_rows: the number of rows side by side.
          max_prompt_tokens: the maximum number of tokens of a prompt.

        Raises:
          Dropped: a signal came; see `Listener.hear`.
        """
        row_length = min(max_prompt_tokens + self.limits.new_tokens, self.limits.total)
        keys = row_keys(key, np.array([request.number for request in requests]))
        rows = self.programs.empty(n_rows, row_length)
        with jax.set_mesh(self.programs.mesh), listener:
            return _Draw(self, params, list(requests), keys, listener, rows).run()


class _Draw:
    """The state of one draw: the completion of each row, and the next action of each completion."""

    def __init__(
        self,
        sampler: TurnSampler,
        params: Tree,
        requests: list[TurnRequest],
        keys: jax.Array,
        listener: Listener,
        rows: TurnRows,
    ) -> None:
        """Prepares the draw, and queues each completion for one of the rows."""
        self._sampler = sampler
        self._params = params
        self._listener = listener
        self._rows = rows
        drawing = sampler.drawing
        self._sampling = make_sampling(
            sampler.vocab_size, drawing.temperature, drawing.top_p, drawing.top_k, keys
        )
        self._keys = list(keys)
        self._end_tokens = frozenset(drawing.ends)
        self._completions = [TurnCompletion(request, request.prompt) for request in requests]
        self._index_of_number = {request.number: i for i, request in enumerate(requests)}
        # The remaining completions of each row. The first one is in the row now.
        self._queues = [deque(range(row, len(requests), rows.n)) for row in range(rows.n)]
        self._drawing: dict[int, int] = {}  # row -> the completion that draws tokens in it
        # The first tokens of turns, which are still on the devices.
        self._first_tokens: list[tuple[int, DrawnTokens[jax.Array]]] = []
        # The logits and the cache of each prompt, and the number of completions that used them.
        self._prefilled: dict[tuple[int, ...], tuple[jax.Array, Cache, int]] = {}
        self._n_uses = Counter(tuple(request.prompt) for request in requests)

    def run(self) -> list[TurnCompletion]:
        """Draws all completions and returns them."""
        self._open_episodes(range(self._rows.n))
        while self._drawing or self._listener.waiting:
            if self._listener.waiting:
                for message in self._listener.hear(until_one=not self._drawing):
                    self._handle_message(message)
            if self._drawing:
                self._decode(_TOKENS_WHILE_WAITING if self._listener.waiting else BLOCK)
        return self._completions

    # Between turns

    def _open_episodes(self, rows: Sequence[int]) -> None:
        """Opens the episodes of the next completion of each row."""
        indices = [self._queues[row][0] for row in rows if self._queues[row]]
        self._listener.open([self._completions[index].request for index in indices])

    def _handle_message(self, message: EpisodeMessage) -> None:
        """Continues or ends a completion after a message of its environment."""
        index = self._index_of_number[message.number]
        completion = self._completions[index]
        if message.kind == "earned":
            completion.earned = message.earned
        elif message.lost is not None:
            completion.lost = message.lost
            self._end_completion(index)
        elif message.kind == "opened":
            completion.opening = message.opening
            self._begin_completion(index, message.ids)
        else:
            self._continue_completion(index, message)

    def _begin_completion(self, index: int, opened_prompt: list[int]) -> None:
        """Begins the first turn of a completion.

        Args:
          index: the index of the completion.
          opened_prompt: the prompt with the environment's text; [] without such a text.
        """
        completion = self._completions[index]
        request = completion.request
        prompt = opened_prompt or request.prompt
        max_tokens = self._sampler.limits.total
        if len(prompt) >= max_tokens:
            completion.lost = (
                f"{request.name}: with the environment's text, the prompt has {len(prompt)} tokens "
                f"and leaves no room in --seq-len {max_tokens}. Increase --seq-len"
            )
            completion.prompt = request.prompt
            self._end_completion(index)
            return
        completion.prompt = prompt
        logits, cache = self._prefill(tuple(prompt), is_shared=not opened_prompt)
        self._begin_turn(index, logits, cache)

    def _prefill(self, prompt: tuple[int, ...], *, is_shared: bool) -> tuple[jax.Array, Cache]:
        """Runs a prompt, or returns the earlier result of another completion of it."""
        if not is_shared:
            return self._rows.prefill(self._params, prompt)
        if prompt in self._prefilled:
            logits, cache, n_uses = self._prefilled.pop(prompt)
        else:
            logits, cache = self._rows.prefill(self._params, prompt)
            n_uses = 0
        # The result is dropped after its last use.
        n_uses += 1
        if n_uses < self._n_uses[prompt]:
            self._prefilled[prompt] = (logits, cache, n_uses)
        return logits, cache

    def _continue_completion(self, index: int, message: EpisodeMessage) -> None:
        """Begins the turn after the answers of tools, if they leave room for it."""
        completion = self._completions[index]
        completion.count(message.answers)
        room_after_answers = self._room(completion) - len(message.ids)
        # As in TRL, a completion ends without answers that do not fit.
        if room_after_answers < 0:
            self._end_completion(index)
            return
        completion.hear(message.answers)
        newest_token = completion.ids[-1]  # it is not in the cache yet
        cached_tokens = len(completion.prompt) + len(completion.ids) - 1
        completion.answer(message.ids)
        if room_after_answers == 0:
            completion.ended = False
            self._end_completion(index)
            return
        logits, cache = self._rows.extend(
            self._params, self._row_of(index), cached_tokens, [newest_token, *message.ids]
        )
        self._begin_turn(index, logits, cache)

    def _begin_turn(self, index: int, logits: jax.Array, cache: Cache) -> None:
        """Draws the first token of a turn from the logits after all tokens before it."""
        completion = self._completions[index]
        row = self._row_of(index)
        key = turn_key(self._keys[index], len(completion.turn_starts))
        completion.turn_starts.append(len(completion.ids))
        tokens = self._rows.begin(row, logits, cache, self._sampling._replace(key=key))
        self._first_tokens.append((index, tokens))
        self._drawing[row] = index

    def _row_of(self, index: int) -> int:
        """Returns the row of a completion."""
        return index % self._rows.n

    def _room(self, completion: TurnCompletion) -> int:
        """Returns the remaining number of tokens of a completion."""
        limits = self._sampler.limits
        max_tokens = min(limits.new_tokens, limits.total - len(completion.prompt))
        return max_tokens - len(completion.ids)

    # Within turns

    def _decode(self, max_tokens: int) -> None:
        """Draws tokens in all active rows until one of them must stop."""
        block = self._draw_block(max_tokens)
        n_tokens = int(block.steps)
        for row, index in list(self._drawing.items()):
            completion = self._completions[index]
            ids = block.ids[row, :n_tokens].tolist()
            completion.draw(ids, block.logps[row, :n_tokens].tolist())
            if completion.ids[-1] in self._end_tokens or self._room(completion) <= 0:
                del self._drawing[row]
                self._end_turn(index)

    def _draw_block(self, max_tokens: int) -> TokenBlock:
        """Draws the next tokens and returns them on the host, after storing turns' first tokens."""
        # The active rows and the remaining tokens of each.
        is_drawing = np.zeros(self._rows.n, bool)
        room = np.zeros(self._rows.n, np.int32)
        for row, index in self._drawing.items():
            is_drawing[row] = True
            room[row] = self._room(self._completions[index])
        for index, _ in self._first_tokens:
            room[self._row_of(index)] -= 1
        active = DrawingRows(
            drawing=is_drawing,
            room=room,
            ends=np.array(sorted(self._end_tokens), np.int32),
            until=np.int32(max_tokens),
        )
        # One transfer brings the block and the first tokens to the host.
        device_block = self._rows.decode(self._params, active)
        device_tokens = [tokens for _, tokens in self._first_tokens]
        block: TokenBlock
        first_tokens, block = jax.device_get((device_tokens, device_block))
        for (index, _), tokens in zip(self._first_tokens, first_tokens, strict=True):
            self._completions[index].draw(tokens.ids.tolist(), tokens.logps.tolist())
        self._first_tokens.clear()
        return block

    def _end_turn(self, index: int) -> None:
        """Starts the calls of a turn, or ends the completion."""
        completion = self._completions[index]
        # A stop text ends the completion.
        text, n_until_stop = self._sampler.stops.cut(completion.turn)
        if n_until_stop is not None:
            completion.cut(n_until_stop)
            completion.ended = True
            completion.say(text)
            self._end_completion(index)
            return
        completion.ended = completion.ids[-1] in self._end_tokens
        ids_before_turn = [*completion.prompt, *completion.ids[: completion.turn_starts[-1]]]
        content, calls = self._sampler.read(completion.turn, ids_before_turn)
        completion.say(content, calls)
        max_turns = self._sampler.limits.turns
        has_turns_left = max_turns is None or len(completion.turn_starts) < max_turns
        if calls and completion.ended and has_turns_left:
            self._listener.call(completion.request.number, calls, completion.ids[-1])
        else:
            self._end_completion(index)

    def _end_completion(self, index: int) -> None:
        """Ends a completion, and opens the episode of the next completion in its row."""
        completion = self._completions[index]
        if not completion.messages:  # it was lost before its first turn
            completion.say("")
        self._listener.end(completion.request.number, is_lost=completion.lost is not None)
        row = self._row_of(index)
        if completion.turn_starts and self._sampler.programs.with_routing:
            completion.routing = self._rows.routing(row)
        self._queues[row].popleft()
        self._open_episodes([row])
