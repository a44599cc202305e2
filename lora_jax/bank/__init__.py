"""Many adapters over one base: mixed within a batch, switched, added up.

bank = lora_jax.bank.Bank(params, rules, slots=8)       # room for eight adapters over one base
bank.add("sql", "runs/sql/adapter")                     # a folder, or an adapted tree
forward = lora_jax.bank.mixed(model.apply)              # each example by its own adapter
logits = forward({"params": bank.choose(["sql", "base"])}, input_ids)
"""

from lora_jax.bank.bank import Bank as Bank
from lora_jax.bank.bank import BankError as BankError
from lora_jax.bank.mixed import Choice as Choice
from lora_jax.bank.mixed import choose as choose
from lora_jax.bank.mixed import mixed as mixed
