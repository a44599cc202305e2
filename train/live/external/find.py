"""Finds the server of --sampler, and asks it before a run begins."""

import time
from collections.abc import Iterator
from typing import Any

from lora_jax.training.processes import is_first
from lora_jax.training.run.log import duration
from train.console.errors import UserError
from train.live.external.sampler import sampling_options
from train.live.prompts import PromptFeed
from train.live.sampler_server import SamplerServer


def find_server(data: Any, *, several_turns: bool) -> SamplerServer | None:
    """Returns the server of a run's options, once it has answered the first process; or None.

    Raises:
      UserError: it is not there, it loads no adapters, or completions have several turns.
    """
    if data.sampler is None:
        return None
    if several_turns:
        raise UserError(
            f"--sampler {data.sampler} draws completions of one turn, and those of --dataset "
            f"{data.dataset} have several: leave --sampler out"
        )
    server = SamplerServer(data.sampler, data.sampler_timeout)
    if is_first():
        server.probe()
        server.check_loads()
    return server


def lines_of_server(server: SamplerServer, feed: PromptFeed) -> Iterator[str]:
    """Yields lines on a server, which draws completions of the first prompt by its base."""
    names = server.probe()
    options = sampling_options(feed.config.data, feed.outline)
    began = time.perf_counter()
    drawn = server.complete(names[0], feed.prompts.tokens[0], options, feed.config.optim.seed)
    if drawn is None:
        raise UserError(f"--sampler {server.url}: it lists the model {names[0]}, and has none such")
    n = sum(len(made.ids) for made in drawn)
    yield (
        f"{server.url} serves {', '.join(names)}; {names[0]} drew {n} tokens in {len(drawn)} "
        f"completions of the first prompt, in {duration(time.perf_counter() - began)}"
    )
    yield "whether it draws from the adapter is tried as training begins"
