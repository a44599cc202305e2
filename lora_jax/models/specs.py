"""Shardings of parameters over a mesh; a family's key table says which parameter has which.

The axes of a mesh; one of size one changes nothing:

- data: the batch; parameters are replicated over it.
- fsdp: the batch too; parameters are sharded over it, and gathered layer by layer.
- expert: the batch too; each device keeps some of the experts, and of all other parameters its part
  as over fsdp, gathered layer by layer.
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
SHARDS = (*_WITHIN_EXPERT, "expert")  # kernels are gathered over these, a layer at a time

COLUMNS = P(SHARDS, "tensor")  # a kernel whose out axis is heads, inner features or words
ROWS = P("tensor", SHARDS)  # a kernel that contracts them again; the table of words
EXPERT_COLUMNS = P("expert", _WITHIN_EXPERT, "tensor")  # a stack of experts, by expert
EXPERT_ROWS = P("expert", "tensor", _WITHIN_EXPERT)
POSITIONS = P(None, SHARDS)
ROUTER = P(SHARDS, None)  # whole on each device
REPLICATED = P()
