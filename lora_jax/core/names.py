"""Names within traced programs, which adapters give and others look for."""

FACTORS = "lora"  # scope of all that an adapter adds to a product, for profiles

# The name of s·xA for policies of rematerialisation, where the rank is at most 1/32 of what x has
# along the contracted axes: kept, it takes little memory, and x need not be read for it again.
NARROW_PRODUCT = "lora_xA"

# The names of the input and of the result of an operation after which the tokens lie along the same
# axes, in the same order, whatever it did to them in between: attention, or a mixture of experts.
TOKENS, SAME_TOKENS = "lora_tokens", "lora_same_tokens"

# With the name of a mesh's axis behind it, the name of a kernel in a `jax.shard_map` whose products
# the function sums over that axis. One device then adds the bias on B.
SUMMED_OVER = "lora_summed_over_"
