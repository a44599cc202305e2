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
_MAX_ROWS = 128
_MULTIPLE = 16  # prompts are padded to a multiple of this, so that few lengths are compiled

Chat = Sequence[Mapping[str, str]]


def tokenize_chats(outline: ModelInfo, chats: Sequence[Chat]) -> list[list[int]]:
    """Returns the tokens of each chat, up to the start of the assistant's answer.

    Raises:
      TrainingError: the chat template drops something of a chat.
    """
    texts = []
    for chat in chats:
        conversation = Conversation([dict(turn) for turn in chat])
        texts.append(render_prompt(conversation, outline.tokenizer))
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
    can_share = not _has_own_cache(model) and not invocations_of(params)
    n_shared = _n_shared(prompts) if can_share else 0
    suffixes = [prompt[n_shared:] for prompt in prompts]
    suffix_length = -(-max(map(len, suffixes)) // _MULTIPLE) * _MULTIPLE
    row_length = suffix_length + new_tokens
    eos_ids = end_tokens(outline)
    shared = None
    if n_shared:
        prefix = np.asarray(prompts[0][:n_shared])
        shared = share(model, params, prefix, more_tokens=row_length - 1, apply=forward)
    completions: list[list[int]] = []
    for batch, n_real in _batches(suffixes, _n_rows(model, row_length)):
        ids, mask = pad_left(batch, suffix_length, eos_ids[0] if eos_ids else 0)
        answers = generate(
            model,
            params,
            ids,
            mask,
            max_new_tokens=new_tokens,
            eos_token_id=eos_ids or None,
            apply=forward,
            shared=shared,
        )
        for answer in np.asarray(answers)[:n_real].tolist():
            completions.append(_up_to_end(answer, eos_ids))
        progress(len(completions), len(prompts))
    return completions


def _up_to_end(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Returns the tokens of an answer up to the first that ends it, this one included."""
    for index, token in enumerate(answer):
        if token in eos_ids:
            return answer[: index + 1]
    return answer


def _has_own_cache(model: Model) -> bool:
    """Returns True for a model with a cache of its own, such as those of `lora_jax.torch`."""
    return hasattr(model.config, "empty_cache")


def _n_rows(model: Model, slots: int) -> int:
    """Returns the number of rows whose caches fit into the memory of a batch's."""
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, slots, model.dtype))
    arrays = cache if _has_own_cache(model) else (cache.key, cache.value, cache.recurrent)
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    return max(1, min(_MAX_ROWS, _CACHE_BYTES // row_bytes))


def _batches(
    prompts: Sequence[list[int]], max_rows: int
) -> Iterator[tuple[Sequence[list[int]], int]]:
    """Yields batches of one size and the number of real rows; the last batch is filled up.

    Args:
      prompts: the rows.
      max_rows: the number of rows that a batch may have. Batches are as equal as they can be.
    """
    n_batches = -(-len(prompts) // max_rows)
    batch_rows = -(-len(prompts) // n_batches)
    for start in range(0, len(prompts), batch_rows):
        batch = list(prompts[start : start + batch_rows])
        n_real = len(batch)
        while len(batch) < batch_rows:
            batch.append(prompts[0])
        yield batch, n_real


def _n_shared(prompts: Sequence[list[int]]) -> int:
    """Returns the length of the prompts' common prefix; leaves at least two tokens of each."""
    max_shared = max(0, min(map(len, prompts)) - 2)
    # The prefix that the first and the last prompt of a sorted list share is that of all.
    return min(max_shared, common_prefix(min(prompts), max(prompts)))
