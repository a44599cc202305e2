"""The FLOPs of a training step in closed form, to hold those of its HLO against."""

import math
import re
from typing import Any

from lora_jax.models import kinds
from lora_jax.weight import LoraWeight, Trained, leaves_of

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
    kind_of, total = kinds(config), 0.0
    heads_of = ("head", "embedding") if config.tie_word_embeddings else ("head",)
    layers_again, scores_again = remat == "full", remat in ("full", _KEEPS_ONLY_DENSE)
    for path, leaf in leaves_of(params)[0]:
        kind = kind_of[path]
        is_head = kind in heads_of
        if not is_head and not path.endswith("kernel"):  # a norm, a bias; a table is looked up
            continue
        shape = leaf.shape
        size = math.prod(shape)
        if kind == "experts":
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
