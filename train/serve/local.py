"""A server inside a process: an engine over a model, and the application over that engine."""

import dataclasses
from collections.abc import Callable, Sequence

from lora_jax.core.types import Model, Tree
from lora_jax.training.layout import Layout, layout_of_one_device
from train.serve.app import make_app
from train.serve.engine.base import ServedBase
from train.serve.engine.engine import Engine
from train.serve.engine.sizes import Sizes

__all__ = ["EngineLimits", "make_app", "make_engine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of an engine, which compiles for them.

    Attributes:
      max_length: tokens of a sequence at most, prompt and completion together.
      max_rank: the largest rank of an adapter.
      sequences: completions that are drawn side by side.
      slots: adapters that these may have.
      tenants: adapters that train at once.
      tokens: tokens of a batch that is trained on at once; by default `max_length`.
      prefixes: bytes of what was computed of prompts, and is kept to be found again.
      fast_prompts: whether prompts run together; see `Sizes`.
    """

    max_length: int = 1024
    max_rank: int = 32
    sequences: int = 32
    slots: int = 8
    tenants: int = 64
    tokens: int | None = None
    prefixes: int = 10**9
    fast_prompts: bool = False


def make_engine(
    model: Model,
    params: Tree,
    name: str,
    *,
    eos: Sequence[int],
    text_of: Callable[[Sequence[int]], str],
    limits: EngineLimits = EngineLimits(),
    layout: Layout | None = None,
    tokenizer: str | None = None,
) -> Engine:
    """Returns an engine: `warm_up` compiles what requests need, and `start` begins to compute.

    Args:
      model: a model of `lora_jax.models`.
      params: its parameters, which are not copied.
      name: its name, for clients.
      eos: tokens that end a text.
      text_of: decodes tokens, special ones too.
      limits: limits of requests.
      layout: the mesh; by default the first device.
      tokenizer: name of the tokenizer, if it is not the model's own.
    """
    layout = layout or layout_of_one_device()
    base = ServedBase(model, params, name, limits.max_rank, layout, tokenizer)
    sizes = Sizes(
        max_length=limits.max_length,
        tokens=limits.tokens or limits.max_length,
        sequences=limits.sequences,
        chunk=min(limits.max_length, 64 if layout.platform == "cpu" else 256),
        parts=layout.batch_parts,
        prefixes=limits.prefixes,
        fast_prompts=limits.fast_prompts,
    )
    return Engine(
        base,
        sizes,
        layout,
        eos=eos,
        text_of=text_of,
        slots=limits.slots,
        tenants=limits.tenants,
    )
