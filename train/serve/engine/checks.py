"""Checks requests before anything is computed."""

import numpy as np

from train.serve.requests import MOST_TARGETS, TOP, EngineFacts, RequestError, SampleRequest, Update


def check_sample(request: SampleRequest, facts: EngineFacts) -> None:
    """Raises a RequestError if a sample makes no sense."""
    n, most = len(request.prompt), facts.max_length
    if not n:
        raise RequestError("the prompt is empty: give one token at least")
    room = n if request.max_tokens == 0 else n + 1
    if room > most:
        raise RequestError(f"the prompt has {n} tokens: {most} with the completion at most")
    if not all(0 <= token < facts.vocab_size for token in request.prompt):
        raise RequestError(f"the prompt holds an id outside 0 to {facts.vocab_size - 1}")
    if not 1 <= request.n <= 1024:
        raise RequestError(f"{request.n} completions: from 1 to 1024 are possible")
    if request.max_tokens is not None and request.max_tokens < 0:
        raise RequestError(f"max_tokens is {request.max_tokens}: at least 0 is needed")
    if not (request.temperature >= 0 and np.isfinite(request.temperature)):
        raise RequestError(f"the temperature is {request.temperature}: 0 or more is needed")
    if not 0 < request.top_p <= 1:
        raise RequestError(f"top_p is {request.top_p}: above 0 and at most 1")
    if not (request.top_k == -1 or request.top_k >= 1):
        raise RequestError(f"top_k is {request.top_k}: at least 1, or -1 for all")
    if "" in request.stop:
        raise RequestError("a stop is an empty text: give one character at least")
    for name in ("top", "top_prompt"):
        if not 0 <= getattr(request, name) <= TOP:
            raise RequestError(f"{getattr(request, name)} likeliest tokens: {TOP} at most")
    if (ids := request.targets) is not None:
        if ids.ndim != 2 or len(ids) != n - 1 or not 1 <= ids.shape[1] <= MOST_TARGETS:
            raise RequestError(
                f"targets of the prompt have the shape {ids.shape}: its {n} tokens take [{n - 1}, "
                f"k], with k from 1 to {MOST_TARGETS}"
            )
        if ids.size and not -1 <= ids.min() <= ids.max() < facts.vocab_size:
            raise RequestError(
                f"targets of the prompt hold an id outside 0 to {facts.vocab_size - 1}; -1 is none"
            )


def check_update(how: Update) -> None:
    """Raises a RequestError if a step of AdamW by these numbers makes no sense."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(how, name)
        if not (np.isfinite(value) and (value >= 0 or name == "learning_rate")):
            raise RequestError(f"{name} is {value}: a finite number, not below 0, is needed")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(how, name) < 1:
            raise RequestError(f"{name} is {getattr(how, name)}: from 0 to below 1")
