"""Names in traced programs that the adapter code writes and that other code looks for."""

FACTORS = "lora"  # scope of all operations that an adapter adds to a product, for profiles

# The name of s·xA for policies of rematerialisation, where the rank is at most 1/32 of the elements
# of a row of x. Keeping s·xA then takes little memory, and saves reading x again.
NARROW_PRODUCT = "lora_xA"

# The primitive of ragged products with a quantized W; see `lora_jax.core.ragged_call`.
RAGGED_CALL = "coded_ragged_dot"

# The names of the input and of the result of an operation, attention or a mixture of experts, that
# may reorder the tokens inside, and returns them along the axes of its input, in their order.
TOKENS, SAME_TOKENS = "lora_tokens", "lora_same_tokens"

# Followed by the name of a mesh's axis: the name of a kernel in a `jax.shard_map` whose products
# the function sums over that axis. One device then adds the bias on B.
SUMMED_OVER = "lora_summed_over_"

# The scopes of attention that holds all scores, because no fast implementation fits the call. Each
# has the reason.
ALL_SCORES_REASONS = {
    "attention_of_all_scores_by_mask": "its mask differs between queries or heads",
    "attention_of_all_scores_by_bias": "it adds numbers to the scores",
    "attention_of_all_scores_by_lengths": "it has no mask, and other queries than keys",
}
