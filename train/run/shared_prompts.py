"""Chooses whether completions share their prompt in a training step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax.core.weight import leaves_of
from lora_jax.models.layers.attend import AttentionChoice, choose_attention, count_scores
from lora_jax.training.layout import Layout
from train.console.errors import UserError, as_user_errors
from train.processes.mesh import make_mesh
from train.run.pretrained import ModelInfo

SHARED = "prompts_shared"  # the fact about examples that records the choice
OF_SHARING = ("neftune", "dropout", "batch_size")  # the options on which the choice depends
MIN_SHARE = 0.25  # a smaller share of the tokens saves less than longer rows of attention cost


class PromptRows(NamedTuple):
    """Rows of a prompt and all its completions.

    Attributes:
      completions: the number of completions of a prompt.
      share: the share of prompts in the tokens, if each completion has its own prompt.
      rows: the number of rows in memory at once, on all devices together.
      shared: a number of such rows, and the tokens of a row.
      alone: the number and the tokens of rows for the same completions, each with its own prompt.
    """

    completions: int
    share: float
    rows: int
    shared: tuple[int, int]
    alone: tuple[int, int]


class SharedPrompts(NamedTuple):
    """The choice, and the lines of the log about it."""

    shared: bool
    lines: tuple[str, ...] = ()


def choose_sharing(config: Any, outlines: Sequence[ModelInfo], rows: PromptRows) -> SharedPrompts:
    """Chooses between one prompt for all its completions and one for each completion.

    Args:
      config: the options.
      outlines: the models that read the rows.
      rows: the rows of both choices.

    Raises:
      UserError: --no-share-prompt has no effect, because completions would not share a prompt.
    """
    has_group = rows.completions > 1
    reason: str | None = "a prompt has one completion"
    if has_group:
        reason = _obstacle_of_run(config, outlines, rows)
    if not config.data.share_prompt:
        if reason is not None and not config.run.resume:
            raise UserError(
                f"--no-share-prompt has no effect, because {reason}. Remove --no-share-prompt."
            )
        return SharedPrompts(False)
    if reason is not None:
        line = f"the prompt is computed for each completion, because {reason}"
        return SharedPrompts(False, (line,) if has_group else ())
    token_share = 1 - rows.share * (1 - 1 / rows.completions)
    line = (
        f"completions share their prompt, which leaves {token_share:.0%} of the tokens of separate "
        "prompts"
    )
    if config.adapter.dropout:
        line += "; dropout is drawn once per prompt, not for each of its completions"
    return SharedPrompts(True, (line,))


def _obstacle_of_run(config: Any, outlines: Sequence[ModelInfo], rows: PromptRows) -> str | None:
    """Returns the reason why completions cannot share a prompt in a run; None if they can."""
    optim = config.optim
    run = config.run
    mesh = make_mesh(run.mesh, optim.batch_size, slice_axis=run.slice_axis)
    layout = Layout.of(mesh, outlines[0].config)
    reason = obstacle(outlines, layout, rows, attention=optim.attention, dtype=optim.dtype)
    if optim.neftune:
        return "--neftune scales its noise by the tokens of a sequence"
    return reason


def obstacle(
    outlines: Sequence[ModelInfo], layout: Layout, rows: PromptRows, *, attention: str, dtype: str
) -> str | None:
    """Returns the reason why completions cannot share their prompt; None if they can.

    Args:
      outlines: the models that read the rows.
      layout: the placement on the mesh.
      rows: the rows of both choices.
      attention, dtype: see ``choose_attention``.
    """
    for outline in outlines:
        if outline.is_torch:
            return f"{outline.name} runs as a torch module, which does not support shared prompts"
        if getattr(outline.config, "linear_layers", ()):
            return f"{outline.name} has linear layers, which do not support shared prompts"
    if layout.sequence_parts > 1:
        return f"the mesh splits rows over sequence={layout.sequence_parts}"
    if rows.rows % layout.batch_parts:
        return f"{rows.rows} prompts do not divide over {layout.batch_parts} parts of the mesh"
    if rows.share < MIN_SHARE:
        return f"prompts are only {rows.share:.0%} of the tokens, and sharing needs {MIN_SHARE:.0%}"
    for outline in outlines:
        reason = _obstacle_of_attention(outline, layout, rows, attention=attention, dtype=dtype)
        if reason is not None:
            return reason
    return None


def _obstacle_of_attention(
    outline: ModelInfo, layout: Layout, rows: PromptRows, *, attention: str, dtype: str
) -> str | None:
    """Returns the reason why a model's attention cannot share prompts; None if it can."""
    n_shared_rows, shared_tokens = rows.shared
    n_single_rows, single_tokens = rows.alone

    def choose(tokens: int, branched: bool) -> AttentionChoice:
        """Returns the attention that would run for rows of this many tokens."""
        return choose_attention(
            outline.config,
            tokens,
            dtype=dtype,
            attention=attention,
            platform=layout.platform,
            branched=branched,
        )

    with as_user_errors(ValueError):
        single = choose(single_tokens, branched=False)
        shared = choose(shared_tokens, branched=True)
    loses_kernel = shared.why is not None and single.why is None
    if loses_kernel:
        return shared.why
    shared_flops = n_shared_rows * _row_flops(outline, shared, shared_tokens, branched=True)
    single_flops = n_single_rows * _row_flops(outline, single, single_tokens, branched=False)
    if shared_flops > single_flops:
        return f"attention over {shared_tokens:,} tokens would cost more than sharing saves"
    return None


def _row_flops(
    outline: ModelInfo, choice: AttentionChoice, n_tokens: int, *, branched: bool
) -> float:
    """Returns the forward FLOPs of a row in a model's layers, without those of an adapter."""
    config: Any = outline.config
    # The weights that multiply each token, without the experts that it does not choose.
    n_weights = 0.0
    for path, leaf in leaves_of(outline.params)[0]:
        kind = outline.kinds[path]
        if path.endswith("kernel") and kind not in ("head", "embedding"):
            active_share = 1.0
            if kind == "experts":
                active_share = config.num_experts_per_tok / config.num_experts
            n_weights += active_share * math.prod(leaf.shape)
    n_scores = count_scores(choice.attend, n_tokens, branched=branched)
    heads_dim = config.num_attention_heads * config.head_dim
    return 2 * n_weights * n_tokens + 4 * heads_dim * config.num_hidden_layers * n_scores
