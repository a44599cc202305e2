"""Shardings of parameters on a mesh; a family's key table assigns one to each parameter.

The axes of a mesh; one of size one changes nothing:

- data: the batch; parameters are replicated over it.
- fsdp: the batch too; parameters are sharded over it, and gathered layer by layer.
- expert: the batch too; each device keeps some of the experts, to which tokens are sent (see
  `lora_jax.training.exchange`), and of all other parameters its part as over fsdp, gathered layer
  by layer.
- sequence: the tokens of a sequence; parameters are sharded over it as over fsdp, so that longer
  rows on more devices cost no copy of them.
- tensor: heads and inner features. Where a product's out axis is sharded over it, the next product
  contracts it again: one sum over the axis for attention, one for the MLP.

Biases are sharded over tensor like the out axis of their kernel; norms are replicated.
"""

from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH = ("data", "fsdp", "expert")
_WITHIN_EXPERT = ("fsdp", "sequence")
# Kernels are gathered over these, a layer at a time; those of experts over the first two.
SHARDS = (*_WITHIN_EXPERT, "expert")

COLUMNS = P(SHARDS, "tensor")  # a kernel whose out axis is heads, inner features or words
ROWS = P("tensor", SHARDS)  # a kernel that contracts them again; the table of words
# A stack of experts: each device has whole ones, if they are enough, so that a layer's are gathered
# in their order. Parts of experts had to be copied into it: by the estimate of a TPU v5e's
# compiler, 1,048 of 1,508 ms of fusions (Qwen3-30B-A3B, expert=4,fsdp=4, gathered over both), where
# 227 of 684 remained.
_EXPERTS = ("expert", *_WITHIN_EXPERT)
EXPERT_COLUMNS = P(_EXPERTS, _WITHIN_EXPERT, "tensor")
EXPERT_ROWS = P(_EXPERTS, "tensor", _WITHIN_EXPERT)
POSITIONS = P(None, SHARDS)
ROUTER = P(SHARDS, None)  # whole on each device
REPLICATED = P()
