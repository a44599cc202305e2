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
from train.live.reference import forward_of, sequence_scorer
from train.plan.flops.checked import count_traced
from train.plan.job import bytes_per_device
from train.plan.tasks import REFERENCE, SAMPLER, SCORER
from train.run.costs import tree_bytes


class Program(NamedTuple):
    """A traced and lowered program of a run.

    Attributes:
      traced: the program.
      lowered: the same, lowered.
      params: the shapes of its parameters.
      shared_bytes: bytes of its arguments that a device has during a step, too.
      runs_per_step: how often it runs for a step; 0 where that is not known.
    """

    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    params: Tree
    shared_bytes: int
    runs_per_step: int = 1


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
        sharding = layout.of_batch(shape, parts=False)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    microbatch = {name: placed(array.shape[1:], array.dtype) for name, array in batch.items()}
    n_microbatches = batch["ids"].shape[0]
    adapter_bytes, base_bytes = map(bytes_per_device, lj.split(params))
    with jax.set_mesh(layout.mesh):
        if "old" not in batch:
            reference_params = lj.strip(params) if reference is None else reference
            scorer = sequence_scorer(model, layout, chunk).trace(reference_params, microbatch)
            reference_program = Program(
                traced=scorer,
                lowered=scorer.lower(),
                params=reference_params,
                shared_bytes=base_bytes,
                runs_per_step=n_microbatches,
            )
            return {REFERENCE: reference_program}
        constrained_model = layout.constrained(model)
        chunks = layout.chunks(chunk)
        score: Any = make_scorer(forward_of(constrained_model), layout=layout, **chunks)
        scorer = score.trace(params, microbatch)
        n_rows, row_tokens = microbatch["ids"].shape
        # If a row has several completions, they have an axis of the targets.
        *group_axis, completion_tokens = microbatch["targets"].shape[1:]
        n_prompts = n_rows if group_axis else n_rows // group
        prompt_tokens = row_tokens - math.prod(group_axis) * completion_tokens
        prompt_ids = placed((n_prompts, prompt_tokens), jnp.int32)
        sampler = _trace_sampler(
            constrained_model, params, prompt_ids, completion_tokens, group, layout.whole
        )
        return {
            SCORER: Program(
                traced=scorer,
                lowered=scorer.lower(),
                params=params,
                shared_bytes=base_bytes + adapter_bytes,
                runs_per_step=n_microbatches,
            ),
            SAMPLER: Program(
                traced=sampler,
                lowered=sampler.lower(),
                params=params,
                shared_bytes=base_bytes + adapter_bytes,
                runs_per_step=0,
            ),
        }


def _trace_sampler(
    model: Any,
    params: Tree,
    prompt_ids: jax.ShapeDtypeStruct,
    completion_tokens: int,
    group: int,
    replicated: Any,
) -> jax.stages.Traced:
    """Traces `lora_jax.models.sample` for prompts. Its sampling limits are arguments."""
    apply = lj.adapt(model.apply)

    def draw(params: Tree, ids: Any, mask: Any, keys: Any, top_p: Any, top_k: Any) -> Any:
        """Draws completions, with all limits of the sampling as arguments."""
        return sample(
            model,
            params,
            ids,
            mask,
            n=group,
            max_new_tokens=completion_tokens,
            temperature=1.0,
            top_p=top_p,
            top_k=top_k,
            key=keys,
            apply=apply,
        )

    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype  # nothing runs on devices elsewhere
    n_completions = prompt_ids.shape[0] * group
    return jax.jit(draw).trace(
        params,
        prompt_ids,
        jax.ShapeDtypeStruct(prompt_ids.shape, jnp.bool_, sharding=prompt_ids.sharding),
        jax.ShapeDtypeStruct((n_completions,), key_dtype, sharding=replicated),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    )


def token_flops(model: Any, params: Tree, rows: int) -> int | None:
    """Returns the FLOPs of one decoded token for each row; None if the jaxpr cannot be counted.

    Attention to earlier tokens is left out.
    """
    apply = lj.adapt(model.apply)
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    forward = jax.jit(lambda params, ids: apply({"params": params}, ids))
    count = count_traced(forward.trace(params, ids).jaxpr)
    return count.flops if count else None


def cache_bytes(model: Any, rows: int, length: int) -> int:
    """Returns the bytes of the sampler's keys and values, on all devices together."""
    return tree_bytes(
        jax.eval_shape(lambda: init_cache(model.config, rows, length - 1, model.dtype))
    )
