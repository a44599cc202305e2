"""Makes transformers' modules compute experts by `lora_jax.models.decoder.experts`."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers.integrations.moe import ExpertsInterface

from lora_jax.models.decoder.experts import implementation
from lora_jax.torch.attention import current_placement
from lora_jax.torch.backend import call_jax, to_jax_arrays, to_torch

EXPERTS_NAME = "lora_jax"


def _apply_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Returns the weighted sum of each token's experts, [tokens, d_model].

    No kernel is copied for a token: each block of rows reads the kernels of one expert.

    Args:
      module: the experts, with the properties that `use_experts_implementation` gives them.
      hidden_states: [tokens, d_model].
      top_k_index: [tokens, k], the experts of each token.
      top_k_weights: [tokens, k], their routing weights.
    """
    activation = module._apply_gate if module.has_gate else module.act_fn
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    names = (up_name, "down_proj")
    kernels = [getattr(module, name) for name in names]
    biases = [getattr(module, f"{name}_bias") for name in names] if module.has_bias else []
    apply = implementation("auto", current_placement())

    def activate(products: jax.Array) -> jax.Array:
        """Applies the module's own activation, which also splits gate and up."""
        features: jax.Array = to_jax_arrays(activation(to_torch(products)))
        return features

    def run(
        tokens: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        kernels: list[jax.Array],
        biases: list[jax.Array],
    ) -> jax.Array:
        """Computes the rows of all experts, and sums those of each token."""
        n_tokens, k = chosen.shape
        if not module.is_transposed:  # the kernels are [experts, out, in]
            kernels = [kernel.swapaxes(-1, -2) for kernel in kernels]
        rows = jnp.repeat(tokens, k, axis=0)
        out = apply(
            activate, rows, chosen.reshape(-1).astype(jnp.int32), *kernels, biases=tuple(biases)
        )
        if module.has_post_expert_norm:
            out = to_jax_arrays(module.post_expert_norm(to_torch(out)))
        weighted = out * weights.reshape(-1, 1)
        return weighted.reshape(n_tokens, k, -1).sum(1).astype(tokens.dtype)

    result: torch.Tensor = call_jax(run, hidden_states, top_k_index, top_k_weights, kernels, biases)
    return result


ExpertsInterface.register(EXPERTS_NAME, _apply_experts)
