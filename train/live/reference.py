"""The reference model of a loss: its parameters, and its log-probabilities of examples."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.base import is_base
from lora_jax.core.types import Batch, Tree
from lora_jax.core.weight import is_node, leaves_of
from lora_jax.saving.fingerprint import checksum
from lora_jax.training.data.preferences import Preferences
from lora_jax.training.layout import Layout, OnMesh
from lora_jax.training.losses import sequence_logps
from lora_jax.training.processes import is_first
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.console.output import tell
from train.data import cache
from train.options.common import Options
from train.options.scripts.dpo import BASE, KTO, NONE
from train.processes import hosts
from train.run.costs import versions
from train.run.log import doing
from train.run.pretrained import ModelInfo
from train.run.task import ModelContext


def sequence_scorer(model: Any, layout: Layout, chunk: int | None) -> OnMesh:
    """Returns a function (params, batch) that computes log-probabilities of sequences as the loss.

    Its result is [batch, n], and its batch must be on the mesh.
    """
    forward = forward_of(layout.constrained(model))

    def score(params: Tree, batch: Batch) -> jax.Array:
        logps = sequence_logps(forward, params, batch, **layout.chunks(chunk))
        return logps.policy.reshape(batch["counts"].shape)

    return layout.jitted(score)


def forward_of(model: Any) -> Callable[..., Any]:
    """Returns a model's ``apply`` for any tree: adapted, quantized, or plain."""
    apply_adapted = lj.adapt(model.apply)

    def forward(variables: Any, *args: Any, **options: Any) -> Any:
        leaves = [leaf for _, leaf in leaves_of(variables["params"])[0]]
        is_plain = not any(is_node(leaf) or is_base(leaf) for leaf in leaves)
        apply = model.apply if is_plain else apply_adapted
        return apply(variables, *args, **options)

    return forward


def is_live(config: Options) -> bool:
    """Returns True if the reference is also needed during training."""
    cached = getattr(config.data, "reference_logps", "live") == "cached"
    return not cached or _diverges(config)


def _diverges(config: Options) -> bool:
    """Returns True for KTO, which compares with the reference at every step."""
    return KTO in getattr(config.optim, "loss", ())


def reference_params(
    config: Options, outline: ModelInfo, plain: Tree, takes_from_base: bool
) -> Tree | None:
    """Returns the parameters of --reference with the arrays of the base; None without a reference.

    Args:
      config: the options of the run.
      outline: the model without its weights.
      plain: the base's parameters.
      takes_from_base: whether the adapter has changed the base by taking factors from it.

    Raises:
      UserError: the parameters do not fit the base, or need a second copy of the base.
    """
    reference = getattr(config.data, "reference", NONE)
    if reference == NONE:
        return None
    base_changes = takes_from_base or config.adapter.full and not _keeps_base(config)
    if is_live(config) and base_changes:
        raise _second_base_error(config, reference)
    if reference == BASE:
        return plain
    source = find_adapter(reference, "--reference")
    mismatch = config.adapter.allow_base_mismatch
    return source.load(outline, plain, outline.name, allow_base_mismatch=mismatch)


def _second_base_error(config: Options, reference: str) -> UserError:
    """Returns the error for a base that training changes and that the reference needs, too."""
    if config.adapter.full:
        cause = "--full trains"
        remedy = "an adapter"
    else:
        cause = "--init takes factors from"
        remedy = "another --init"
    could_be_cached = getattr(config.data, "reference_logps", None) == "live"
    if could_be_cached and not _diverges(config):
        remedy = f"--reference-logps cached, or {remedy}"
    return UserError(
        f"--reference {reference} needs the unchanged base during training, but {cause} the base "
        f"itself. Use {remedy}."
    )


def _keeps_base(config: Options) -> bool:
    """Returns True if full fine-tuning keeps the base besides the weights that train.

    Preferences score all rows before training instead. Drawn completions cannot be scored before.
    """
    return not hasattr(config.data, "reference_logps")


def check_reference(config: Options, outline: ModelInfo) -> None:
    """Raises a UserError if --reference names an adapter of another base. Reads no weights."""
    if config.data.reference not in (BASE, NONE, None):
        source = find_adapter(config.data.reference, "--reference")
        source.check(outline, allow_base_mismatch=config.adapter.allow_base_mismatch)


def reference_line(config: Options) -> str:
    """Returns a line that names the reference of the run."""
    reference = config.data.reference
    start = config.adapter.init_adapter
    if config.adapter.full and _keeps_base(config):
        return f"reference: {reference}; its weights stay in memory besides the trained weights"
    if start is None or reference == NONE:
        return f"reference: {reference}"
    if reference == BASE:
        return f"reference: base, without the adapter from which the run starts ({start})"
    if reference == start:
        return (
            f"reference: {reference}, the adapter from which the run starts (use --reference base "
            "for the base)"
        )
    return f"reference: {reference}; the run starts from {start}"


def add_reference(
    context: ModelContext, score: OnMesh, params: Tree, examples: Preferences
) -> Preferences:
    """Returns examples with the reference's log-probabilities, computed or from the cache.

    Args:
      context: the run.
      score: a `sequence_scorer`.
      params: the reference's parameters.
      examples: pairs, or rows.
    """
    # The log-probabilities of an earlier run, if all processes have them.
    n_rows = len(examples)
    cache_option = context.config.data.token_cache
    path = cache.cache_file_path(cache_option, f"reference-{_cache_key(context, params, examples)}")
    content = None if path is None else cache.read_cache_file(path)
    is_cached = content is not None
    is_cached_by_process = hosts.map_over_processes(lambda _: is_cached, range(jax.process_count()))
    if content is not None and all(is_cached_by_process):
        tell(
            context.console,
            f"the reference's log-probabilities come from an earlier run, in {path}",
        )
        logps = np.frombuffer(content, "<f4").reshape(n_rows, examples.segments_a_row)
        return dataclasses.replace(examples, reference=logps)

    with doing(context.console, f"the reference scores {n_rows:,} rows") as progress:
        batch_size = context.config.optim.batch_size
        computed_logps = scores(
            context.layout,
            score,
            params,
            examples,
            batch_size,
            lambda n_done: progress(n_done, n_rows),
        )
    assert computed_logps is not None
    is_worth_caching = cache_option is not None or n_rows >= cache.MIN_CACHED_ROWS
    if path is not None and is_first() and is_worth_caching:
        _write_cache(context, path, computed_logps)
    return dataclasses.replace(examples, reference=computed_logps)


def scores(
    layout: Layout,
    score: OnMesh,
    params: Tree,
    examples: Preferences,
    batch_size: int,
    on_the_way: Callable[[int], bool | None],
) -> np.ndarray | None:
    """Returns the log-probabilities of examples, float32 [n, segments_a_row].

    Args:
      layout: the placement of batches.
      score: a `sequence_scorer`.
      params: the parameters.
      examples: pairs, or rows.
      batch_size: the number of rows in memory at once.
      on_the_way: is called with the number of scored rows, equally in all processes. If it returns
        True, the scoring ends and the result is None.
    """
    logps = np.zeros((len(examples), examples.segments_a_row), np.float32)
    starts = range(0, len(examples), batch_size)
    for start, batch in zip(starts, examples.parts(batch_size), strict=True):
        rows = examples.by_length[start : start + batch_size]
        batch_logps = np.asarray(score(params, layout.batch(batch, parts=False)))
        logps[rows] = batch_logps[: len(rows)]
        is_stopped = on_the_way(start + len(rows))
        if is_stopped:
            return None
    return logps


def _write_cache(context: ModelContext, path: Path, logps: np.ndarray) -> None:
    """Writes log-probabilities for later runs, or prints a warning if this fails."""
    try:
        cache.write(path, [logps.astype("<f4").tobytes()])
    except OSError as error:
        tell(
            context.console,
            f"warning: the reference's log-probabilities are not kept, because {path.parent} "
            f"cannot be written ({error.strerror or error}). Choose another --token-cache",
        )


def _cache_key(context: ModelContext, params: Tree, examples: Preferences) -> str:
    """Returns a hash of everything on which the reference's log-probabilities depend.

    The tokens of the examples already depend on the tokenizer and its template.
    """
    optim = context.config.optim
    checksums = {
        jax.tree_util.keystr(path): checksum(array)
        for path, array in jax.tree_util.tree_leaves_with_path(params)
    }
    structure = str(jax.tree.structure(params))  # axes, ranks, quantization formats
    inputs = {
        "examples": examples.digest(),
        "arrays": checksums,
        "nodes": _FUNCTION_ADDRESS.sub("", structure),
        "config": repr(context.outline.config),
        "model": [optim.dtype, optim.experts],
        "version": versions().get("lora_jax"),
    }
    if examples.branches is not None:
        inputs["rows"] = "of shared prompts"  # shared prompts only change the rounding
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


_FUNCTION_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in its repr
