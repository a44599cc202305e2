"""Shardings of parameters over a mesh: a table for each family, for ``lora_jax.sharding``.

The axes of a mesh; one of size one changes nothing:

- data: the batch; parameters are replicated over it.
- fsdp: the batch too; parameters are sharded over it, and gathered layer by layer.
- expert: the batch too; each device keeps some of the experts, gathered layer by layer.
- sequence: the tokens of a sequence; parameters are sharded over it as over fsdp, so that longer
  rows on more devices cost no copy of them.
- tensor: heads and inner features. Where a product's out axis is sharded over it, the next product
  contracts it again: one sum over the axis for attention, one for the MLP.

Biases are sharded like the out axis of their kernel; norms are replicated.
"""

from jax.sharding import PartitionSpec as P

Specs = tuple[tuple[str, P], ...]  # (regular expression for the path, spec of its last axes)

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH = ("data", "fsdp", "expert")
SHARDS = ("fsdp", "sequence")  # kernels are gathered over these, a layer at a time

DECODER: Specs = (
    (r"model/embed_tokens/embedding", P("tensor", SHARDS)),
    (r"lm_head/kernel", P(SHARDS, "tensor")),
    (r".*/experts/(gate_proj|up_proj|w1|w3)/kernel", P("expert", SHARDS, "tensor")),
    (r".*/experts/(down_proj|w2)/kernel", P("expert", "tensor", SHARDS)),
    (r".*/(mlp|block_sparse_moe)/gate/kernel", P(SHARDS, None)),  # the router: whole on each device
    (r".*/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", P(SHARDS, "tensor")),
    (r".*/(q|k|v|qkv|gate|up|gate_up)_proj/bias", P("tensor")),
    (r".*/(o|down)_proj/kernel", P("tensor", SHARDS)),
)

GPT2: Specs = (
    (r"transformer/wte/embedding", P("tensor", SHARDS)),
    (r"transformer/wpe/embedding", P(None, SHARDS)),
    (r"lm_head/kernel", P(SHARDS, "tensor")),
    (r".*/(c_attn|c_fc)/kernel", P(SHARDS, "tensor")),
    (r".*/(c_attn|c_fc)/bias", P("tensor")),
    (r".*/c_proj/kernel", P("tensor", SHARDS)),
)

ENCODER: Specs = (
    (r".*/word_embeddings/embedding", P("tensor", SHARDS)),
    (r".*/position_embeddings/embedding", P(None, SHARDS)),
    (r".*/attention/self/(query|key|value)/kernel", P(SHARDS, "tensor")),
    (r".*/attention/self/(query|key|value)/bias", P("tensor")),
    (r".*/intermediate/dense/kernel", P(SHARDS, "tensor")),
    (r".*/intermediate/dense/bias", P("tensor")),
    (r".*/output/dense/kernel", P("tensor", SHARDS)),
)
