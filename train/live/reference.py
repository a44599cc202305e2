"""The reference of a loss of preferences: its parameters, and its log-probabilities of examples."""

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
    """Returns ``(params, batch) -> log-probabilities`` of sequences, as the loss computes them.

    These are [batch, n]; the batch lies on the mesh.
    """
    forward = running(layout.constrained(model))

    def score(params: Tree, batch: Batch) -> jax.Array:
        logps = sequence_logps(forward, params, batch, **layout.chunks(chunk))
        return logps.policy.reshape(batch["counts"].shape)

    return layout.jitted(score)


def running(model: Any) -> Callable[..., Any]:
    """Returns a model's ``apply`` for trees of any kind: adapted, in codes, and plain."""
    adapted = lj.adapt(model.apply)

    def forward(variables: Any, *args: Any, **options: Any) -> Any:
        leaves = [leaf for _, leaf in leaves_of(variables["params"])[0]]
        is_plain = not any(is_node(leaf) or is_base(leaf) for leaf in leaves)
        return (model.apply if is_plain else adapted)(variables, *args, **options)

    return forward


def is_live(config: Options) -> bool:
    """Returns True if the reference is needed while training, too."""
    cached = getattr(config.data, "reference_logps", "live") == "cached"
    return not cached or _diverges(config)


def _diverges(config: Options) -> bool:
    """Returns True for KTO, which compares with the reference at every step."""
    return KTO in getattr(config.optim, "loss", ())


def reference_params(
    config: Options, outline: ModelInfo, plain: Tree, takes_from_base: bool
) -> Tree | None:
    """Returns the parameters that --reference names, over the arrays of the base; None for none.

    Args:
      config: the options of the run.
      outline: the model's.
      plain: the base's parameters.
      takes_from_base: whether the adapter has taken factors out of the base.

    Raises:
      UserError: they do not fit the base, or would need a second base beside it.
    """
    given = getattr(config.data, "reference", NONE)
    if given == NONE:
        return None
    if is_live(config) and (takes_from_base or config.adapter.full and not _keeps_base(config)):
        what, other = "--init takes factors out of", "another --init"
        if config.adapter.full:
            what, other = "--full trains", "an adapter"
        if getattr(config.data, "reference_logps", None) == "live" and not _diverges(config):
            other = f"--reference-logps cached, or {other}"
        raise UserError(
            f"--reference {given}: {what} the base itself, and a second one would be needed beside "
            f"it while training: use {other}"
        )
    if given == BASE:
        return plain
    source = find_adapter(given, "--reference")
    mismatch = config.adapter.allow_base_mismatch
    return source.load(outline, plain, outline.name, allow_base_mismatch=mismatch)


def _keeps_base(config: Options) -> bool:
    """Returns True if full fine-tuning holds the base beside the weights that train.

    Preferences have a pass before training for it; completions are not known before.
    """
    return not hasattr(config.data, "reference_logps")


def check_reference(config: Options, outline: ModelInfo) -> None:
    """Raises a UserError if --reference names no adapter over this base; reads no weights."""
    if config.data.reference not in (BASE, NONE, None):
        source = find_adapter(config.data.reference, "--reference")
        source.check(outline, allow_base_mismatch=config.adapter.allow_base_mismatch)


def reference_line(config: Options) -> str:
    """Returns a line that names the reference of the run."""
    given, start = config.data.reference, config.adapter.init_adapter
    if config.adapter.full and _keeps_base(config):
        return f"reference: {given}; its weights stay in memory, beside those that train"
    if start is None or given == NONE:
        return f"reference: {given}"
    if given == BASE:
        return f"reference: base, without the adapter that the run begins with ({start})"
    if given == start:
        return f"reference: {given}, the adapter that the run begins with (else: --reference base)"
    return f"reference: {given}; the run begins with {start}"


def add_reference(
    of: ModelContext, score: OnMesh, params: Tree, examples: Preferences
) -> Preferences:
    """Returns examples with the reference's log-probabilities, computed or of an earlier run.

    Args:
      of: the run.
      score: a `sequence_scorer`.
      params: the reference's.
      examples: pairs, or rows.
    """
    shape = (len(examples), examples.segments_a_row)
    asked = of.config.data.token_cache
    path = cache.place_of(asked, f"reference-{_key(of, params, examples)}")
    kept = None if path is None else cache.read(path)
    everywhere = hosts.map_over_processes(lambda _: kept is not None, range(jax.process_count()))
    if kept is not None and all(everywhere):
        tell(
            of.console, f"the reference's log-probabilities are those of an earlier run, in {path}"
        )
        reference = np.frombuffer(kept, "<f4").reshape(shape)
        return dataclasses.replace(examples, reference=reference)
    n = len(examples)
    with doing(of.console, f"the reference reads {n:,} rows") as progress:
        size, say = of.config.optim.batch_size, lambda done: progress(done, n)
        logps = scores(of.layout, score, params, examples, size, say)
    assert logps is not None
    if path is not None and is_first() and (asked is not None or n >= cache.FEW):
        _keep(of, path, logps)
    return dataclasses.replace(examples, reference=logps)


def scores(
    layout: Layout,
    score: OnMesh,
    params: Tree,
    examples: Preferences,
    batch_size: int,
    on_the_way: Callable[[int], bool | None],
) -> np.ndarray | None:
    """Returns the log-probabilities of examples, fp32 [n, segments_a_row].

    Args:
      layout: the placement of batches.
      score: a `sequence_scorer`.
      params: the parameters.
      examples: pairs, or rows.
      batch_size: rows in memory at once.
      on_the_way: is called with the rows done so far, in all processes alike; True ends the
        reading, and None is returned.
    """
    logps = np.zeros((len(examples), examples.segments_a_row), np.float32)
    order, firsts = examples.by_length, range(0, len(examples), batch_size)
    for first, part in zip(firsts, examples.parts(batch_size), strict=True):
        rows = order[first : first + batch_size]
        logps[rows] = np.asarray(score(params, layout.batch(part, parts=False)))[: len(rows)]
        if on_the_way(first + len(rows)):
            return None
    return logps


def _keep(of: ModelContext, path: Path, logps: np.ndarray) -> None:
    try:
        cache.write(path, [logps.astype("<f4").tobytes()])
    except OSError as error:
        tell(
            of.console,
            f"warning: the reference's log-probabilities are not kept: {path.parent} cannot be "
            f"written ({error.strerror or error})",
        )


def _key(of: ModelContext, params: Tree, examples: Preferences) -> str:
    """Returns a hash of all that the reference's log-probabilities depend on.

    The tokens are the tokenizer's and its template's.
    """
    arrays = jax.tree_util.tree_flatten_with_path(params)[0]
    known = {
        "examples": examples.digest(),
        "arrays": {jax.tree_util.keystr(path): checksum(array) for path, array in arrays},
        "nodes": _ADDRESS.sub("", str(jax.tree.structure(params))),  # axes, ranks, formats of codes
        "config": repr(of.outline.config),
        "model": [of.config.optim.dtype, of.config.optim.experts],
        "version": versions().get("lora_jax"),
    }
    if examples.branches is not None:
        known["rows"] = "of shared prompts"  # which changes the rounding alone
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in its repr
