"""Generates answers: to many prompts in batches of few shapes, or to one prompt as a stream.

A schema (--schema) may give their form. A `GeneratedAnswer` grows by its tokens: it knows where it
ends, and the text to show so far.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.core.types import Forward, Tokenizer, Tree
from lora_jax.models import stream
from lora_jax.models.causal import CausalLM
from lora_jax.models.sampling.adjust import mask_words
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarError
from lora_jax.models.sampling.prompts import pad_left
from lora_jax.models.sampling.text import StopTexts, TextStream
from lora_jax.training.data.vision.pictures import image_inputs
from train.console.errors import UserError, as_user_errors, read_user_file
from train.generate.options import GenerateOptions
from train.generate.prompts import PromptTokens
from train.run.pretrained import ModelInfo, end_tokens

_PADDING_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few lengths are compiled
_CALL_TOKENS = 16  # of a batch between two looks at what has ended
FinishReason = Literal["eos", "stop", "length"]


class GeneratedAnswer:
    """The tokens of an answer that is being generated.

    Attributes:
      tokens: the tokens, the one that ends the answer included.
      most: the most tokens.
      said: the text that `take_new_text` has returned.
      ended: why no more follow: a token that ends answers, a text of --stop, or the length; None
        while more may follow.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, ends: Collection[int], stops: Sequence[str], most: int
    ) -> None:
        """Creates an empty answer.

        Args:
          tokenizer: the model's.
          ends: the tokens that end an answer.
          stops: the texts that end an answer.
          most: the most tokens.
        """
        self.tokens: list[int] = []
        self.ended: FinishReason | None = None
        self.most = most
        self.said = ""
        self._end_tokens = ends
        self._stops = StopTexts(tokenizer, stops)
        self._stream = TextStream(self._stops)
        self._streamed = ""  # the text that the stream has given
        self._n_streamed = 0  # tokens that the stream has taken

    def add(self, tokens: Sequence[int]) -> None:
        """Appends tokens up to the end of the answer, and ignores later ones."""
        if self.ended is not None:
            return
        n_before = len(self.tokens)
        for token in tokens:
            if self.ended is None:
                self.tokens.append(token)
                if token in self._end_tokens:
                    self.ended = "eos"
                elif len(self.tokens) == self.most:
                    self.ended = "length"
        n_until_stop = self._stops.length(self.tokens, n_before)
        if n_until_stop is None:
            return
        ends_with_eos = self.ended == "eos" and n_until_stop == len(self.tokens)
        if not ends_with_eos:
            del self.tokens[n_until_stop:]
            self.ended = "stop"

    @property
    def text(self) -> str:
        """The answer so far, up to a stop text."""
        return self._stops.shown(self._stops.decoded(self.tokens)).strip()

    def take_new_text(self) -> str:
        """Returns the text that was added since the last call.

        It ends before what a further token could change: a character whose bytes are not all there,
        white space (an answer ends without it), or the beginning of a text of --stop. All that is
        returned together is `text` at the end.
        """
        if self.ended is None:
            for token in self.tokens[self._n_streamed :]:
                self._streamed += self._stream.add(token)
            self._n_streamed = len(self.tokens)
        shown = self._streamed.strip() if self.ended is None else self.text
        n_said = len(os.path.commonprefix([shown, self.said]))
        self.said = shown
        return shown[n_said:]


@dataclasses.dataclass(frozen=True)
class AnswerGenerator:
    """Generates answers with a model and its parameters.

    Attributes:
      model, params: the model.
      apply: runs in the place of `model.apply`; None for that.
      outline: the model's, with its tokenizer.
      options: the options.
      grammar: form of the answers; None for any.
    """

    model: CausalLM
    params: Tree
    apply: Forward | None
    outline: ModelInfo
    options: GenerateOptions
    grammar: CompiledGrammar | None = None

    def answer(self, most: int | None = None) -> GeneratedAnswer:
        """Returns an empty answer with a maximum number of tokens."""
        return GeneratedAnswer(
            self.outline.tokenizer,
            ends=end_tokens(self.outline),
            stops=self.options.stop,
            most=most or self.options.max_new_tokens,
        )

    def tokens(
        self, prompts: Sequence[PromptTokens], numbers: Sequence[int], *, per_call: int, most: int
    ) -> Iterator[np.ndarray]:
        """Yields the next token of each prompt, [prompts] each time.

        Args:
          prompts: their tokens.
          numbers: the number of each, from which its key comes.
          per_call: the tokens that are decoded at once.
          most: the most tokens of an answer.
        """
        options = self.options
        prompt_slots = padded_length(max(map(len, prompts)))
        ids, mask = pad_left(prompts, prompt_slots, 0)
        images = [prompt.images for prompt in prompts]
        inputs = None
        if any(row.grids for row in images):
            assert self.outline.images is not None
            inputs = image_inputs(images, self.outline.images)
        allow = None
        if self.grammar is not None:
            allow = AnswerMasks(self.grammar, len(prompts), self.outline)
        key = None
        if options.temperature > 0:
            key = row_keys(jax.random.key(options.seed), np.asarray(numbers, np.uint32))
        return stream(
            self.model,
            self.params,
            ids,
            mask,
            max_new_tokens=most,
            tokens_per_call=per_call,
            cache_len=prompt_slots + options.max_new_tokens - 1,
            eos_token_id=end_tokens(self.outline) or None,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            key=key,
            apply=self.apply,
            inputs=inputs,
            allow=allow,
        )


def padded_length(n: int) -> int:
    """Returns the padded length of a prompt; from 256 tokens on, at most a quarter is padding."""
    step = max(_PADDING_MULTIPLE, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields the indices of each batch, with long prompts first so that memory fails early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def generate_answers(
    generator: AnswerGenerator,
    prompts: Sequence[PromptTokens],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[int, GeneratedAnswer]]:
    """Yields finished answers with the indices of their prompts.

    Args:
      generator: the model with an adapter.
      prompts: their tokens; the index of each is the number that its key comes from.
      progress: is called with the number of answers so far.
    """
    n_done = 0
    size = min(generator.options.batch_size, len(prompts))
    for batch in batches([len(prompt) for prompt in prompts], size):
        answers = {i: generator.answer() for i in batch}
        unfinished = dict(answers)
        n_missing = size - len(batch)
        padded_batch = [*batch, *[batch[0]] * n_missing]  # all batches have one size
        steps = generator.tokens(
            [prompts[i] for i in padded_batch],
            padded_batch,
            per_call=_CALL_TOKENS,
            most=generator.options.max_new_tokens,
        )
        while unfinished:
            call_steps = list(itertools.islice(steps, _CALL_TOKENS))
            if not call_steps:
                break
            tokens_of_prompts = np.stack(call_steps, axis=1)
            for answer, tokens in zip(answers.values(), tokens_of_prompts, strict=False):
                answer.add(tokens.tolist())
            for i in [i for i, answer in unfinished.items() if answer.ended]:
                yield i, unfinished.pop(i)
                n_done += 1
            progress(n_done)


def stream_answer(
    generator: AnswerGenerator,
    answer: GeneratedAnswer,
    prompt: PromptTokens,
    number: int,
    say: Callable[[str], None],
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Prints the answer to one prompt while it is generated.

    Args:
      generator: the model with an adapter.
      answer: an empty one, which takes the tokens.
      prompt: its tokens.
      number: the number that its key comes from.
      say: takes the next piece of text.
      stopped: tells, before each further token, whether to leave it at that.
    """
    for tokens in generator.tokens([prompt], [number], per_call=1, most=answer.most):
        answer.add(tokens.tolist())
        text = answer.take_new_text()
        if text:
            say(text)
        if answer.ended or stopped():
            return


def read_schema(file: str, outline: ModelInfo) -> CompiledGrammar:
    """Returns the grammar of the JSON that the schema in a file describes.

    Raises:
      UserError: the file holds no schema, or one that is not supported; the message has its place.
    """
    option = f"--schema {file}: "
    if not end_tokens(outline):
        raise UserError(
            f"{option}The model has no token that ends an answer, and --schema needs one. Use "
            "another model, or remove --schema."
        )
    text = read_user_file(file, option)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{option}The file is not valid JSON ({error}). Correct the file."
        ) from None
    compiler = GrammarCompiler(outline.tokenizer, _vocab_size(outline), end_tokens(outline))
    try:
        return compiler.schema(schema)
    except GrammarError as error:
        path = ".".join(error.path)
        place = f"{path}: " if path else ""
        raise UserError(f"{option}{place}{error}") from None


def _vocab_size(outline: ModelInfo) -> int:
    """Returns the number of logits of the model."""
    config: Any = outline.config
    return int(config.vocab_size)


class AnswerMasks:
    """The tokens that a grammar allows next in each answer; the argument `allow` of ``stream``."""

    def __init__(self, grammar: CompiledGrammar, rows: int, outline: ModelInfo) -> None:
        """Creates the state of the grammar for empty answers.

        Args:
          grammar: form of each.
          rows: the number of answers.
          outline: the model's.
        """
        self._grammar = grammar
        self._end_tokens = frozenset(end_tokens(outline))
        self._matchers = {i: grammar.begin() for i in range(rows)}  # of answers that go on
        self._shape = rows, mask_words(_vocab_size(outline))

    def __call__(self, newest: np.ndarray | None) -> np.ndarray:
        """Advances the grammar by the newest tokens; returns the masks of the next tokens."""
        tokens = [] if newest is None else newest.tolist()
        for i, token in enumerate(tokens):
            if i not in self._matchers:
                continue
            if token in self._end_tokens:
                del self._matchers[i]
            else:
                with as_user_errors(GrammarError, prefix="--schema: "):
                    self._matchers[i].accept(token)
        masks = np.full(self._shape, 0xFFFFFFFF, np.uint32)
        if self._matchers:
            self._grammar.fill(self._matchers, masks)
        return masks
