"""The FLOPs of a training step in closed form, by which plans are judged."""

import math
import re
from collections.abc import Iterator
from typing import Any

import lora_jax as lj
from lora_jax.core.product import is_worth_keeping
from lora_jax.core.weight import LoraWeight, Trained, is_node, leaves_of
from lora_jax.models import DecoderConfig, kinds
from lora_jax.models.layers.attend import Attend, count_scores
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.delta import chunk_size
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.models.layers.masks import Split
from train.plan.job import PlanJob, PlanVariant, abstract_params
from train.plan.tasks import REFERENCE

_KEEPS_ONLY_DENSE = "dots_with_no_batch_dims_saveable"  # attention scores are not kept
# How often both products of a block, or their like in its gradients, are computed. A block's scores
# are computed again, and all of it once more where its layer is; a policy that keeps products keeps
# a block's.
_OF_BLOCKS = {"none": 3.5, "dots_saveable": 3, _KEEPS_ONLY_DENSE: 4.5}
# Policies that compute each layer twice, and the kernels whose products they keep all the same.
_PROJECTED = r"attn/((q|k|v|qkv|q_a|q_b|kv_b|o|out)_proj|kv_a_proj_with_mqa|c_attn|c_proj)/"
_KEPT = {"full": None, "offload": None, "attention": None, "projections": re.compile(_PROJECTED)}
_KEPT["products"] = re.compile(rf"{_PROJECTED}|(?<!experts/)(gate|up|gate_up)_proj/|mlp/c_fc/")
_OF_BLOCKS |= dict.fromkeys(_KEPT, 4.5)
# Of a kernel's products: two forward, once more with rematerialisation, and seven backward; five
# where the backward pass is one kernel, which holds the gradients of all keys of a row.
_OF_KERNELS = {
    **dict.fromkeys(("none", "products", "projections", "attention"), 4.5),
    "dots_saveable": 5.5,
    _KEEPS_ONLY_DENSE: 5.5,
    "full": 5.5,
    "offload": 5.5,
}

_LONGEST_OF_ONE_KERNEL = 16_384  # tokens of a row, with heads of 128


def plan_flops(job: PlanJob, variant: PlanVariant) -> int:
    """Returns the FLOPs of a plan's step, and of the reference or the scorer that it needs."""
    params = abstract_params(job, variant)
    total = batch_flops(job, variant, params)
    if job.task_facts.between:
        scored_by = lj.strip(params) if REFERENCE in job.task_facts.between else params
        total += batch_flops(job, variant, scored_by, forward=True)
    return job.grad_accum * total


def batch_flops(job: PlanJob, variant: PlanVariant, params: Any, forward: bool = False) -> int:
    """Returns the FLOPs of a batch of a plan; of its forward pass alone if asked."""
    is_whole = job.layout.sequence_parts == 1
    flops = step_flops(
        job.outline.config,
        params,
        batch=job.rows,
        seq=job.row_tokens,
        remat=variant.remat,
        attention=job.attention_choice.attend,
        split=job.layout.split(job.row_tokens),
        chunked=job.head_chunk > 0,
        predicted=job.predicted_tokens
        if is_whole
        else job.row_tokens,  # split rows have heads at all
        forward=forward,
        branched=job.share_prompt,
    )
    return round(flops)


def step_flops(
    config: DecoderConfig,
    params: Any,
    *,
    batch: int,
    seq: int,
    remat: str,
    attention: Attend | None,
    split: Split | None,
    chunked: bool,
    predicted: int | None = None,
    forward: bool = False,
    branched: bool = False,
) -> float:
    """Returns the FLOPs of the matrix products of one step of a decoder, or of its forward pass.

    Each product costs one pass forward and one for the gradient of its input, and one more if its
    kernel trains. With rematerialisation the layers run forward once more, except for their last
    product. Norms, softmax and the like are not counted. Causal masks save nothing in dense
    attention; blocks skip the keys behind their span, and run forward once more.

    Args:
      config: the configuration of a decoder or of GPT-2.
      params: the adapted tree; the leaves may be abstract.
      batch, seq: the shape of the step's batch.
      remat: the activations recomputed in each layer: "full" for all, or the name of a policy.
      attention: the implementation of attention; None for all scores at once.
      split: how sequences are split over devices.
      chunked: whether the head runs over chunks of predictions, and is recomputed if it trains.
      predicted: tokens of a row that are predicted; by default all.
      forward: leaves out the gradient, and what is recomputed for it.
      branched: whether rows have prompts with several completions.
    """
    total = 0.0
    layers_again, products_kept = remat in _KEPT, _KEPT.get(remat)
    for path, leaf, size, is_head in _multiplied(config, params):
        tokens = batch * (predicted if is_head and predicted is not None else seq)
        last = re.search(r"(down_proj|mlp/c_proj|w2)/kernel$", path) is not None
        multiplied_again = layers_again and not (products_kept and products_kept.search(path))
        again = chunked and is_node(leaf) if is_head else multiplied_again and not last
        passes = 1 if forward else 2 + again + isinstance(leaf, Trained)
        total += 2 * tokens * size * passes
        if isinstance(leaf, LoraWeight):
            share = size / math.prod(leaf.shape)
            narrow = is_worth_keeping(leaf.rank, math.prod(leaf.roles.sizes(leaf.shape, "in")))
            for name in ("a", "b"):
                # What a compact weight trains is folded into B, whose gradient it goes through.
                trains = name == "b" or name not in leaf.frozen
                kept = remat != "offload" and name == "a" and narrow and not leaf.is_compact
                twice = layers_again if name == "a" else multiplied_again
                again = chunked if is_head else twice and not kept
                passes = 1 if forward else 2 + trains + again
                total += 2 * tokens * share * math.prod(leaf.shape_of(name)) * passes
    linear = len(getattr(config, "linear_layers", ()))
    whole, windowed = _head_sizes(config)
    pair = 4 * batch * (whole + windowed)  # of a query and a key, forward
    passes = 1 if forward else 3 + (remat in (*_KEPT, _KEEPS_ONLY_DENSE))
    if linear:
        total += linear * batch * _delta_rule_flops(config, seq, passes)
    if isinstance(attention, Blockwise):
        return total + pair * attention.pairs(seq, split) * (1 if forward else _OF_BLOCKS[remat])
    if isinstance(attention, Splash | Flash):
        pairs = float(attention.pairs(seq, split))
        if branched:  # over rows that are not split
            pairs = float(count_scores(attention, seq, branched=True))
        if windowed:
            near = attention.pairs(seq, split, window=config.sliding_window)
            pairs += (near - pairs) * windowed / (whole + windowed)
        is_one_kernel = isinstance(attention, Splash) and seq <= _LONGEST_OF_ONE_KERNEL
        passes = _OF_KERNELS[remat] - is_one_kernel
        return total + pair * pairs * (1 if forward else passes)
    return total + pair * seq**2 * passes


def _multiplied(config: DecoderConfig, params: Any) -> Iterator[tuple[str, Any, float, bool]]:
    """Yields each weight that multiplies tokens: its path, leaf, size for a token, and if a head.

    A token passes through some of the experts.
    """
    kind_of = kinds(config)
    heads_of = ("head", "embedding") if config.tie_word_embeddings else ("head",)
    for path, leaf in leaves_of(params)[0]:
        is_head = kind_of[path] in heads_of
        if not is_head and not path.endswith("kernel"):  # a norm, a bias; a table is looked up
            continue
        size: float = math.prod(leaf.shape)
        if kind_of[path] == "experts":
            size *= config.num_experts_per_tok / config.num_experts
        yield path, leaf, size, is_head


def _head_sizes(config: DecoderConfig) -> tuple[int, int]:
    """Returns the sizes of all heads, summed over layers without a window, and with one."""
    windowed = len(getattr(config, "windowed_layers", ()))
    whole = config.num_hidden_layers - len(getattr(config, "linear_layers", ())) - windowed
    wide = getattr(config, "global_head_dim", 0) or config.head_dim
    heads = config.num_attention_heads
    return heads * wide * whole, heads * config.head_dim * windowed


def _delta_rule_flops(config: DecoderConfig, seq: int, passes: int) -> float:
    """Returns the FLOPs of a row in a linear layer's products, but for its projections."""
    heads, key, value = config.recurrent_shapes[1]
    size = chunk_size(seq)
    tokens = -(-seq // size) * size
    # Scores of keys and of queries, their sums and those of a system's solution; the state is read
    # twice and written. The system's inverse has no gradient through the products that make it.
    products = passes * (size * (3 * key + 2 * value) + 3 * key * value)
    inverses = max(1, passes - 2) * max(0, size.bit_length() - 2) + (passes > 1)
    return 2.0 * tokens * heads * (products + 2 * inverses * size**2)
