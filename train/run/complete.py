"""Generates greedy answers to many chats, in batches of one shape and with a shared prefix."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.adapt.activate import invocations_of
from lora_jax.core.types import Model
from lora_jax.models import generate, init_cache, share
from lora_jax.models.sampling.prompts import count_common_prefix, pad_left
from lora_jax.training.data.rows import Conversation
from lora_jax.training.data.templates import render_prompt
from train.run.pretrained import ModelInfo, end_tokens
from train.run.task import EvaluatedModel, Progress

_BATCH_CACHE_BYTES = 2**30
_MAX_BATCH_ROWS = 128
_PROMPT_MULTIPLE_TOKENS = 16  # prompts are padded to a multiple, so that few lengths are compiled

Chat = Sequence[Mapping[str, str]]


def tokenize_chats(outline: ModelInfo, chats: Sequence[Chat]) -> list[list[int]]:
    """Returns the tokens of each chat, up to the start of the assistant's answer.

    Raises:
      TrainingError: the chat template drops a part of a chat.
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
    """Returns the tokens of each prompt's greedy continuation, including the token that ends it.

    A prefix shared by all prompts (a system prompt, solved examples) runs through the model once,
    and its cache is held once for all rows. An activated LoRA shares no prefix, because its
    invocation is searched in whole prompts.

    Args:
      evaluated: a decoder.
      outline: the model's outline, with its tokenizer.
      prompts: the tokens of each prompt.
      new_tokens: the maximum number of tokens of an answer.
      progress: is called with the number of answers so far, and the total.
    """
    model, params, forward = evaluated
    # Split each prompt into the common prefix and its own suffix.
    can_share = not _has_own_cache(model) and not invocations_of(params)
    n_prefix_tokens = _common_prefix_tokens(prompts) if can_share else 0
    suffixes = [prompt[n_prefix_tokens:] for prompt in prompts]
    max_suffix_tokens = max(map(len, suffixes))
    n_multiples = -(-max_suffix_tokens // _PROMPT_MULTIPLE_TOKENS)  # rounded up
    suffix_length = n_multiples * _PROMPT_MULTIPLE_TOKENS
    row_length = suffix_length + new_tokens
    eos_ids = end_tokens(outline)
    pad_id = eos_ids[0] if eos_ids else 0
    shared_prefix = None
    if n_prefix_tokens:
        prefix = np.asarray(prompts[0][:n_prefix_tokens])
        shared_prefix = share(model, params, prefix, more_tokens=row_length - 1, apply=forward)
    completions: list[list[int]] = []
    for batch, n_prompts in _equal_batches(suffixes, _max_batch_rows(model, row_length)):
        ids, mask = pad_left(batch, suffix_length, pad_id)
        answers = generate(
            model,
            params,
            ids,
            mask,
            max_new_tokens=new_tokens,
            eos_token_id=eos_ids or None,
            apply=forward,
            shared=shared_prefix,
        )
        for answer in np.asarray(answers)[:n_prompts].tolist():
            completions.append(_cut_after_end(answer, eos_ids))
        progress(len(completions), len(prompts))
    return completions


def _cut_after_end(answer: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Returns the tokens of an answer up to the first end token, including this token."""
    for index, token in enumerate(answer):
        if token in eos_ids:
            return answer[: index + 1]
    return answer


def _has_own_cache(model: Model) -> bool:
    """Returns True for a model with another kind of cache, such as those of `lora_jax.torch`."""
    return hasattr(model.config, "empty_cache")


def _max_batch_rows(model: Model, row_length: int) -> int:
    """Returns the number of rows whose caches fit into `_BATCH_CACHE_BYTES`."""
    cache = jax.eval_shape(lambda: init_cache(model.config, 1, row_length, model.dtype))
    arrays = cache if _has_own_cache(model) else (cache.key, cache.value, cache.recurrent)
    row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_CACHE_BYTES // row_bytes))


def _equal_batches(
    prompts: Sequence[list[int]], max_rows: int
) -> Iterator[tuple[Sequence[list[int]], int]]:
    """Yields batches of one size with their numbers of prompts. Copies fill the last batch.

    Args:
      prompts: the prompts.
      max_rows: the maximum number of rows of a batch.
    """
    n_batches = -(-len(prompts) // max_rows)
    batch_rows = -(-len(prompts) // n_batches)
    for start in range(0, len(prompts), batch_rows):
        batch = list(prompts[start : start + batch_rows])
        n_prompts = len(batch)
        while len(batch) < batch_rows:
            batch.append(prompts[0])
        yield batch, n_prompts


def _common_prefix_tokens(prompts: Sequence[list[int]]) -> int:
    """Returns the number of tokens of the prompts' common prefix.

    The prefix leaves at least two tokens of each prompt.
    """
    max_prefix_tokens = max(0, min(map(len, prompts)) - 2)
    # The first and the last prompt in sorted order share only the prefix that all prompts share.
    return min(max_prefix_tokens, count_common_prefix(min(prompts), max(prompts)))
