"""Answers by a JSON schema: --schema."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.models.sampling.adjust import mask_words
from lora_jax.models.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarError
from train.console.errors import UserError, as_user_errors
from train.run.pretrained import ModelInfo, end_tokens


def read_schema(file: str, outline: ModelInfo) -> CompiledGrammar:
    """Returns the grammar of the JSON that the schema in a file describes.

    Raises:
      UserError: the file holds no schema, or one that is not supported; the message has its place.
    """
    option = f"--schema {file}: "
    if not end_tokens(outline):
        raise UserError(f"{option}no token of the model ends an answer, as the schema needs")
    with as_user_errors(OSError, UnicodeDecodeError, prefix=option):
        text = Path(file).expanduser().read_text(encoding="utf-8")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}it is no JSON: {error}") from None
    compiler = GrammarCompiler(outline.tokenizer, _vocab_size(outline), end_tokens(outline))
    try:
        return compiler.schema(schema)
    except GrammarError as error:
        place = ".".join(error.path)
        raise UserError(f"{option}{place + ': ' if place else ''}{error}") from None


def _vocab_size(outline: ModelInfo) -> int:
    config: Any = outline.config
    return int(config.vocab_size)


class AnswerMasks:
    """The tokens that a grammar allows in the answers of a batch; an `Allow` of ``stream``."""

    def __init__(self, grammar: CompiledGrammar, rows: int, outline: ModelInfo) -> None:
        """Begins answers.

        Args:
          grammar: form of each.
          rows: the number of answers.
          outline: the model's.
        """
        self._grammar, self._ends = grammar, frozenset(end_tokens(outline))
        self._rows = {i: grammar.begin() for i in range(rows)}
        self._shape = rows, mask_words(_vocab_size(outline))

    def __call__(self, newest: np.ndarray | None) -> np.ndarray:
        """Takes the newest tokens; returns the masks of the next ones."""
        for i, token in enumerate([] if newest is None else newest.tolist()):
            if i in self._rows and token in self._ends:
                del self._rows[i]
            elif i in self._rows:
                with as_user_errors(GrammarError, prefix="--schema: "):
                    self._rows[i].accept(token)
        masks = np.full(self._shape, 0xFFFFFFFF, np.uint32)
        if self._rows:
            self._grammar.fill(self._rows, masks)
        return masks
