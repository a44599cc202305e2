"""Greedy answers to many chats, in batches of one shape; a common prefix is prefilled once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapt.activate import invocations_of
from lora_jax.core.types import Model
from lora_jax.models import generate, init_cache, share
from lora_jax.models.sampling.prompts import common_prefix, pad_left
from lora_jax.training.data.rows import Conversation
from lora_jax.training.data.templates import render_prompt
from train.run.pretrained import ModelInfo, end_tokens
from train.run.task import EvaluatedModel, Progress

_CACHE_BYTES = 2**30  # of a batch: more rows share each pass over the weights
_MOST_ROWS = 128
_MULTIPLE = 16  # prompts are padded to a multiple of this, so that few lengths are compiled

Chat = Sequence[Mapping[str, str]]


def tokenize_chats(outline: ModelInfo, chats: Sequence[Chat]) -> list[list[int]]:
    """Returns the tokens of each chat, up to the start of the assistant's answer.

    Raises:
      TrainingError: the chat template drops something of a chat.
    """
    made = (Conversation([dict(turn) for turn in chat]) for chat in chats)
    texts = [render_prompt(chat, outline.tokenizer) for chat in made]
    return outline.tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer_prompts(
    evaluated: EvaluatedModel,
    outline: ModelInfo,
    prompts: Sequence[list[int]],
    **options: Any,
) -> list[str]:
    """Returns the continuation of each prompt, decoded greedily; see `complete_prompts`."""
    completions = complete_prompts(evaluated, outline, prompts, **options)
    texts: list[str] = outline.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [text.strip() for text in texts]


def complete_prompts(
    evaluated: EvaluatedModel,
    outline: ModelInfo,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    progress: Progress = lambda done, total: None,
) -> list[list[int]]:
    """Returns the tokens of each prompt's greedy continuation, with the one that ends it.

    A prefix shared by all prompts (a system prompt, solved examples) runs through the model once,
    and is held once for all rows; not for an activated LoRA, whose invocation is looked for in
    whole prompts.

    Args:
      evaluated: a decoder.
      outline: the model's outline, with its tokenizer.
      prompts: their tokens.
      new_tokens: the maximum number of tokens of an answer.
      progress: is called with the number of answers so far, and of all.
    """
    model, params, forward = evaluated
    apart = _has_own_cache(model) or bool(invocations_of(params))
    n_shared = 0 if apart else _n_shared(prompts)
    rests = [prompt[n_shared:] for prompt in prompts]
    length = -(-max(map(len, rests)) // _MULTIPLE) * _MULTIPLE
    ends = end_tokens(outline)
    shared = None
    if n_shared:
        first, more = np.asarray(prompts[0][:n_shared]), length + new_tokens - 1
        shared = share(model, params, first, more_tokens=more, apply=forward)
    completions: list[list[int]] = []
    for batch, n_real in _batches(rests, _n_rows(model, length + new_tokens)):
        ids, mask = pad_left(batch, length, ends[0] if ends else 0)
        new = generate(
            model,
            params,
            ids,
            mask,
            max_new_tokens=new_tokens,
            eos_token_id=ends or None,
            apply=forward,
            shared=shared,
        )
        for answer in np.asarray(new)[:n_real].tolist():
            n = next((at for at, token in enumerate(answer, start=1) if token in ends), new_tokens)
            completions.append(answer[:n])
        progress(len(completions), len(prompts))
    return completions


def _has_own_cache(model: Model) -> bool:
    """Returns True for a model with a cache of its own, such as those of `lora_jax.torch`."""
    return hasattr(model.config, "empty_cache")


def _n_rows(model: Model, slots: int) -> int:
    """Returns the number of rows whose caches fit into the memory of a batch's."""
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, slots, model.dtype))
    kept = cache if _has_own_cache(model) else (cache.key, cache.value, cache.recurrent)
    kept = jax.tree.leaves(kept)
    of_row = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    return max(1, min(_MOST_ROWS, _CACHE_BYTES // of_row))


def _batches(prompts: Sequence[list[int]], most: int) -> Iterator[tuple[Sequence[list[int]], int]]:
    """Yields batches of one size and the number of real rows; the last batch is filled up.

    Args:
      prompts: the rows.
      most: the number of rows that a batch may have. Batches are as equal as they can be.
    """
    size = -(-len(prompts) // -(-len(prompts) // most))
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        yield [*batch, *[prompts[0]] * (size - len(batch))], len(batch)


def _n_shared(prompts: Sequence[list[int]]) -> int:
    """Returns the length of the prompts' common prefix; leaves at least two tokens of each."""
    most = max(0, min(map(len, prompts)) - 2)
    return min(most, common_prefix(min(prompts), max(prompts)))  # of both is of all
