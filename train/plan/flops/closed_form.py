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
    flops = 0.0
    kind_of_path = kinds(config)
    head_kinds = ("head", "embedding") if config.tie_word_embeddings else ("head",)
    for path, leaf in leaves_of(params)[0]:
        is_head = kind_of_path[path] in head_kinds
        if not is_head and not path.endswith("kernel"):  # a norm, a bias; a table is looked up
            continue
        row_tokens = predicted if is_head and predicted is not None else seq
        size: float = math.prod(leaf.shape)
        if kind_of_path[path] == "experts":  # a token passes through some of them
            size *= config.num_experts_per_tok / config.num_experts
        n_products = 3 if isinstance(leaf, Trained) else 2  # forward, gradients of input and W
        flops += 2 * batch * row_tokens * size * n_products
    n_linear = len(getattr(config, "linear_layers", ()))
    n_windowed = len(getattr(config, "windowed_layers", ()))
    n_full = config.num_hidden_layers - n_linear - n_windowed
    # The pairs of tokens that masks leave in all layers, by the width of a head.
    full_width = getattr(config, "global_head_dim", 0) or config.head_dim
    pair_size = full_width * n_full * seq * (seq + 1) / 2
    if n_windowed:
        window = min(config.sliding_window or seq, seq)
        window_pairs = window * (window + 1) / 2 + (seq - window) * window
        pair_size += config.head_dim * n_windowed * window_pairs
    flops += 3 * 4 * batch * config.num_attention_heads * pair_size
    if n_linear:
        flops += n_linear * batch * _delta_rule_flops(config, seq)
    return flops


def _delta_rule_flops(config: DecoderConfig, seq: int) -> float:
    """Returns the FLOPs of a row in a linear layer's products and their gradients.

    Those of its projections are left out.
    """
    n_heads, key_dim, value_dim = config.recurrent_shapes[1]
    chunk = chunk_size(seq)
    n_tokens = -(-seq // chunk) * chunk
    # Scores of keys and of queries, their sums and those of a system's solution; the state is read
    # twice and written. The system's inverse has no gradient through the products that make it.
    chunk_products = chunk * (3 * key_dim + 2 * value_dim)
    state_products = 3 * key_dim * value_dim
    n_inverse_products = max(0, chunk.bit_length() - 2) + 1
    inverse_products = 2 * n_inverse_products * chunk**2
    return 2.0 * n_tokens * n_heads * (3 * (chunk_products + state_products) + inverse_products)
