"""The FLOPs of a training step in closed form, to hold those of its HLO against."""

import math
import re
from typing import Any

from lora_jax.paths import flatten_with_paths
from lora_jax.weight import LoraWeight, Trained, is_node

_KEEPS_ONLY_DENSE = "dots_with_no_batch_dims_saveable"  # not the scores of attention


def step_flops(
    config: Any, params: Any, *, batch: int, seq: int, remat: str, chunked: bool
) -> float:
    """The products of a step of a decoder: forward, back to the input, and to what trains.

    Each product costs one pass forward and one back to its input, and one more where its kernel
    trains; with rematerialisation the layers run forward once more, but for their last product.
    Norms, softmax and the like are left out, and causal masks spare nothing.

    Args:
      config: a decoder's, or GPT-2's.
      params: the adapted tree; shapes will do.
      batch, seq: of the step; all tokens are predicted.
      remat: what is recomputed of each layer: "full" for all, or the policy's name.
      chunked: whether the head is, a chunk of predictions at a time.
    """
    tokens = batch * seq
    leaves, _ = flatten_with_paths(params, is_leaf=is_node)
    tied = config.tie_word_embeddings
    total = 0.0
    layers_again, scores_again = remat == "full", remat in ("full", _KEEPS_ONLY_DENSE)
    for path, leaf in leaves:
        is_head = path.endswith(("lm_head/kernel", "embed_tokens/embedding", "wte/embedding"))
        if is_head and not tied and path.endswith("embedding"):
            continue  # looked up, not multiplied
        if not (is_head or path.endswith("kernel")):
            continue
        shape = leaf.shape
        size = math.prod(shape)
        if "/experts/" in path:
            size *= config.num_experts_per_tok / config.num_experts
        last = re.search(r"(down_proj|mlp/c_proj|w2)/kernel$", path) is not None
        again = chunked if is_head else layers_again and not last
        passes = 2 + again + isinstance(leaf, Trained)
        total += 2 * tokens * size * passes
        if isinstance(leaf, LoraWeight):
            share = size / math.prod(shape)
            factors = leaf.a.size + leaf.b.size
            total += 2 * tokens * share * factors * (3 + (chunked if is_head else layers_again))
    heads = config.num_attention_heads * config.head_dim
    scores = 4 * batch * seq**2 * heads * config.num_hidden_layers
    return total + scores * (3 + scores_again)
