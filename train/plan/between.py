"""The programs that run between the steps of `train.dpo` and `train.grpo`.

The pass of a reference over pairs; the scorer of completions, and the sampler that draws them. They
are those of `train.live`, traced for shapes.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.core.types import Shaped, Tree
from lora_jax.models import sample
from lora_jax.models.layers.cache import init_cache
from lora_jax.training import make_scorer
from lora_jax.training.layout import Layout
from train.live.reference import running, sequence_scorer
from train.plan.flops.checked import count_traced
from train.plan.job import bytes_per_device
from train.plan.tasks import REFERENCE, SAMPLER, SCORER
from train.run.costs import tree_bytes


class Program(NamedTuple):
    """A program of a run, traced.

    Attributes:
      traced: the program.
      lowered: the same, lowered.
      params: the shapes of its parameters.
      shared: bytes of its arguments that a device has during a step, too.
      times: how often it runs for a step; 0 where that is not known.
    """

    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    params: Tree
    shared: int
    times: int = 1


def programs_between(
    model: Any,
    layout: Layout,
    params: Tree,
    batch: Mapping[str, Shaped],
    *,
    chunk: int | None = 0,
    group: int = 1,
    reference: Tree | None = None,
) -> dict[str, Program]:
    """Returns the programs beside a step, by name; {} for batches that need none.

    Args:
      model: the model.
      layout: the placement on the mesh.
      params: the adapted tree, as shapes with shardings.
      batch: the arrays of a step, [accumulate, batch, …], or their shapes; their names tell what
        it needs.
      chunk: see `lora_jax.training.layout.Layout.chunks`.
      group: completions of a prompt.
      reference: the reference's parameters; by default the base's.
    """
    if "old" not in batch and REFERENCE not in batch:
        return {}

    def placed(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        where = layout.of_batch(shape, parts=False)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    part = {name: placed(x.shape[1:], x.dtype) for name, x in batch.items()}
    (rows, length), times = part["ids"].shape, batch["ids"].shape[0]
    adapter, base = map(bytes_per_device, lj.split(params))
    with jax.set_mesh(layout.mesh):
        if "old" in batch:
            split = layout.chunks(chunk)
            score: Any = make_scorer(running(layout.constrained(model)), layout=layout, **split)
            scorer = score.trace(params, part)
            *each, new = part["targets"].shape[1:]  # each: the completions of a row
            prompts = rows if each else rows // group
            ids = placed((prompts, length - math.prod(each) * new), jnp.int32)
            drawn = _sampler(layout.constrained(model), params, ids, new, group, layout.whole)
            return {
                SCORER: Program(scorer, scorer.lower(), params, base + adapter, times),
                SAMPLER: Program(drawn, drawn.lower(), params, base + adapter, 0),
            }
        tree = lj.strip(params) if reference is None else reference
        traced = sequence_scorer(model, layout, chunk).trace(tree, part)
        return {REFERENCE: Program(traced, traced.lower(), tree, base, times)}


def _sampler(
    model: Any, params: Tree, ids: jax.ShapeDtypeStruct, new: int, group: int, whole: Any
) -> jax.stages.Traced:
    """Traces `lora_jax.models.sample` for prompts; limits of what is drawn are its arguments."""
    apply = lj.adapt(model.apply)

    def draw(params: Tree, ids: Any, mask: Any, keys: Any, top_p: Any, top_k: Any) -> Any:
        how: dict[str, Any] = {
            "n": group,
            "max_new_tokens": new,
            "temperature": 1.0,
            "apply": apply,
        }
        return sample(model, params, ids, mask, top_p=top_p, top_k=top_k, key=keys, **how)

    def shape(like: Any, of: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(of, like, sharding=whole)

    key = jax.eval_shape(lambda: jax.random.key(0)).dtype  # nothing runs on devices elsewhere
    keys = shape(key, (ids.shape[0] * group,))
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.bool_, sharding=ids.sharding)
    return jax.jit(draw).trace(params, ids, mask, keys, shape(jnp.float32), shape(jnp.int32))


def token_flops(model: Any, params: Tree, rows: int) -> int | None:
    """Returns the FLOPs of a token of each row as traced; None where its jaxpr is not understood.

    Attention to earlier tokens is left out.
    """
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    run = lj.adapt(model.apply)
    traced = jax.jit(lambda params, ids: run({"params": params}, ids)).trace(params, ids)
    counted = count_traced(traced.jaxpr)
    return counted and counted.flops


def cache_bytes(model: Any, rows: int, length: int) -> int:
    """Returns the bytes of the sampler's keys and values, on all devices together."""
    return tree_bytes(
        jax.eval_shape(lambda: init_cache(model.config, rows, length - 1, model.dtype))
    )
