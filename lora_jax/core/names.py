"""Names within traced programs, which adapters give and others look for."""

FACTORS = "lora"  # scope of all that an adapter adds to a product, for profiles

# The name of s·xA for policies of rematerialisation, where the rank is at most 1/32 of what x has
# along the contracted axes: kept, it takes little memory, and x need not be read for it again.
NARROW_PRODUCT = "lora_xA"

# The name of activations whose leading axes are [batch, seq], however their tokens were moved and
# put back before. The masks of activated adapters have this order.
IN_ORDER = "lora_tokens_in_order"

# The names of attention's queries, and of its result, whose tokens lie along the same axes.
QUERIES, ATTENDED = "lora_queries", "lora_attended"

# With the name of a mesh's axis behind it, the name of a kernel in a `jax.shard_map` whose products
# the function sums over that axis. One device then adds the bias on B.
SUMMED_OVER = "lora_summed_over_"
