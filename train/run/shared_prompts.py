"""The choice whether completions share their prompt in a training step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax.core.weight import leaves_of
from lora_jax.models.layers.attend import AttentionChoice, choose_attention, scores_of
from lora_jax.training.layout import Layout
from train.console.errors import UserError, as_user_errors
from train.processes.mesh import make_mesh
from train.run.pretrained import ModelInfo

SHARED = "prompts_shared"  # the fact about examples that tells the choice
OF_SHARING = ("neftune", "dropout", "batch_size")  # the options that the choice depends on
LEAST = 0.25  # a smaller share of the tokens saves less than longer rows of attention cost


class PromptRows(NamedTuple):
    """Rows of a prompt and all its completions.

    Attributes:
      completions: completions of a prompt.
      share: the share of the tokens that are prompts, where each completion has its own.
      rows: rows in memory at once, on all devices together.
      shared: a number of such rows, and the tokens of one.
      alone: as many completions as they have, in rows with a prompt for each.
    """

    completions: int
    share: float
    rows: int
    shared: tuple[int, int]
    alone: tuple[int, int]


class SharedPrompts(NamedTuple):
    """The choice, and the lines that tell it."""

    shared: bool
    lines: tuple[str, ...] = ()


def choose_sharing(config: Any, outlines: Sequence[ModelInfo], rows: PromptRows) -> SharedPrompts:
    """Chooses between a prompt that its completions share, and one for each of them.

    Args:
      config: the options.
      outlines: the models that read the rows.
      rows: the rows that there would be.

    Raises:
      UserError: --no-share-prompt has no effect, since they would not share it anyway.
    """
    if rows.completions > 1:
        optim, run = config.optim, config.run
        mesh = make_mesh(run.mesh, optim.batch_size, slice_axis=run.slice_axis)
        layout = Layout.of(mesh, outlines[0].config)
        why = obstacle(outlines, layout, rows, attention=optim.attention, dtype=optim.dtype)
        if optim.neftune:
            why = "--neftune scales its noise by the tokens of a sequence"
    else:
        why = "a prompt has one completion"
    if not config.data.share_prompt:
        if why is not None and not config.run.resume:
            raise UserError(f"--no-share-prompt has no effect: {why}; leave it out")
        return SharedPrompts(False)
    if why is not None:
        line = f"each completion has a prompt of its own: {why}"
        return SharedPrompts(False, (line,) if rows.completions > 1 else ())
    left = 1 - rows.share * (1 - 1 / rows.completions)
    line = (
        f"completions share their prompt: {left:.0%} of the tokens that a prompt for each would "
        "make"
    )
    if config.adapter.dropout:
        line += "; dropout is drawn once for a prompt, not for each of its completions"
    return SharedPrompts(True, (line,))


def obstacle(
    outlines: Sequence[ModelInfo], layout: Layout, rows: PromptRows, *, attention: str, dtype: str
) -> str | None:
    """Returns the reason why the completions of a prompt do not share it; None if they can.

    Args:
      outlines: the models that read the rows.
      layout: the placement on the mesh.
      rows: the rows that there would be.
      attention, dtype: see ``choose_attention``.
    """
    for outline in outlines:
        if outline.is_torch:
            return f"{outline.name} runs as a torch module, whose attention knows no branches"
        if getattr(outline.config, "linear_layers", ()):
            return f"{outline.name} has linear layers, which read a row from beginning to end"
    if layout.sequence_parts > 1:
        return f"the mesh splits rows over sequence={layout.sequence_parts}"
    if rows.rows % layout.batch_parts:
        return f"{rows.rows} prompts do not divide over {layout.batch_parts} parts of the mesh"
    if rows.share < LEAST:
        return f"prompts are {rows.share:.0%} of the tokens, and {LEAST:.0%} are needed"
    for outline in outlines:
        with as_user_errors(ValueError):
            alone, shared = (
                choose_attention(
                    outline.config,
                    tokens,
                    dtype=dtype,
                    attention=attention,
                    platform=layout.platform,
                    branched=branched,
                )
                for branched, tokens in ((False, rows.alone[1]), (True, rows.shared[1]))
            )
        if shared.why is not None and alone.why is None:
            return shared.why
        if _flops(outline, shared, *rows.shared, True) > _flops(outline, alone, *rows.alone, False):
            return f"attention over {rows.shared[1]:,} tokens would take more than prompts do"
    return None


def _flops(
    outline: ModelInfo, chosen: AttentionChoice, rows: int, tokens: int, branched: bool
) -> float:
    """Returns the FLOPs of a model's layers in a forward pass, but for an adapter's."""
    config: Any = outline.config
    weights = 0.0
    for path, leaf in leaves_of(outline.params)[0]:
        kind = outline.kinds[path]
        if path.endswith("kernel") and kind not in ("head", "embedding"):
            share = config.num_experts_per_tok / config.num_experts if kind == "experts" else 1
            weights += share * math.prod(leaf.shape)
    scores = scores_of(chosen.attend, tokens, branched=branched)
    heads = config.num_attention_heads * config.head_dim
    return rows * (2 * weights * tokens + 4 * heads * config.num_hidden_layers * scores)
