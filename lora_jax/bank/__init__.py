"""Many adapters over one base: mixed within a batch, switched, or summed.

bank = lora_jax.bank.Bank(params, rules, slots=8)       # room for eight adapters over one base
bank.add("sql", "runs/sql/adapter")                     # a folder, or an adapted tree
forward = lora_jax.bank.mixed(model.apply)              # each example by its own adapter
logits = forward({"params": bank.choose(["sql", "base"])}, input_ids)

both = lora_jax.bank.combine([one, other], [1.0, -0.5])  # W + ΔW₁ − ΔW₂/2, as one adapter
tree, lost = lora_jax.bank.extract(before, after, rank=16)  # a LoRA of full fine-tuning
"""

from lora_jax.bank.bank import Bank
from lora_jax.bank.mixing import Choice, MixedWarning, choose, mixed
from lora_jax.bank.stored import BankError
from lora_jax.bank.sums.combine import combine
from lora_jax.bank.sums.extract import Extraction, ExtractWarning, extract
from lora_jax.bank.together.tenants import Tenant
from lora_jax.bank.together.together import Together

__all__ = [
    "Bank",
    "BankError",
    "Choice",
    "ExtractWarning",
    "Extraction",
    "MixedWarning",
    "Tenant",
    "Together",
    "choose",
    "combine",
    "extract",
    "mixed",
]
