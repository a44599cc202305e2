"""The FLOPs that a training step needs, in closed form."""

import math
from typing import Any

from lora_jax.core.weight import Trained, leaves_of
from lora_jax.models import DecoderConfig, kinds
from lora_jax.models.layers.delta import chunk_size


def model_flops(
    config: DecoderConfig, params: Any, *, batch: int, seq: int, predicted: int | None = None
) -> float:
    """Returns the FLOPs that a step needs, by which its use of a machine (MFU) is measured.

    A weight that multiplies tokens costs 4 FLOPs a token, forward and for the gradient of its
    input, and 6 if it trains: 4ND for adapters, 6ND in full fine-tuning (Kaplan et al. 2020,
    section 2.1). Attention counts the pairs that its masks leave, forward and twice that backward.
    Nothing is recomputed, and an adapter's own products do not count.

    Args:
      config: the configuration of a decoder or of GPT-2.
      params: the adapted tree; the leaves may be abstract.
      batch, seq: the number of sequences, and the tokens of each.
      predicted: tokens of a sequence that are predicted; by default all.
    """
    total = 0.0
    kind_of = kinds(config)
    heads_of = ("head", "embedding") if config.tie_word_embeddings else ("head",)
    for path, leaf in leaves_of(params)[0]:
        is_head = kind_of[path] in heads_of
        if not is_head and not path.endswith("kernel"):  # a norm, a bias; a table is looked up
            continue
        tokens = batch * (predicted if is_head and predicted is not None else seq)
        size: float = math.prod(leaf.shape)
        if kind_of[path] == "experts":  # a token passes through some of them
            size *= config.num_experts_per_tok / config.num_experts
        total += 2 * tokens * size * (2 + isinstance(leaf, Trained))
    linear = len(getattr(config, "linear_layers", ()))
    windowed = len(getattr(config, "windowed_layers", ()))
    whole = config.num_hidden_layers - linear - windowed
    wide = getattr(config, "global_head_dim", 0) or config.head_dim
    pairs = wide * whole * seq * (seq + 1) / 2
    if windowed:
        reach = min(config.sliding_window or seq, seq)
        near = reach * (reach + 1) / 2 + (seq - reach) * reach
        pairs += config.head_dim * windowed * near
    total += 3 * 4 * batch * config.num_attention_heads * pairs
    if linear:
        total += linear * batch * _delta_rule_flops(config, seq)
    return total


def _delta_rule_flops(config: DecoderConfig, seq: int) -> float:
    """Returns the FLOPs of a row in a linear layer's products and their gradients.

    Those of its projections are left out.
    """
    heads, key, value = config.recurrent_shapes[1]
    size = chunk_size(seq)
    tokens = -(-seq // size) * size
    # Scores of keys and of queries, their sums and those of a system's solution; the state is read
    # twice and written. The system's inverse has no gradient through the products that make it.
    products = 3 * (size * (3 * key + 2 * value) + 3 * key * value)
    inverses = max(0, size.bit_length() - 2) + 1
    return 2.0 * tokens * heads * (products + 2 * inverses * size**2)
