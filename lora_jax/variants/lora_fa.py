"""LoRA-FA (Zhang et al., arXiv 2308.03303): A keeps its initial value, and only B trains.

`lora_jax.optim.project_b` is its optimiser's part.
"""

from lora_jax.variants.variant import InPeft, Variant

LORA_FA = Variant(
    option="freeze_a",
    name="LoRA-FA",
    help="Freeze A and train B with a projected gradient (LoRA-FA); saves the memory of A's "
    "inputs.",
    frozen=("a",),
    in_peft=InPeft(),
)
