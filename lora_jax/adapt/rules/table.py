"""The rule for each primitive that knows what to do with an adapted weight.

Products and look-ups keep the factored form, layout and arithmetic carry the factors along, control
flow is entered. Everything else merges.
"""

from lora_jax.adapt.interpreter import Rule
from lora_jax.adapt.rules.arithmetic import ARITHMETIC_RULES
from lora_jax.adapt.rules.chains import CHAIN_RULES
from lora_jax.adapt.rules.choices import CHOICE_RULES
from lora_jax.adapt.rules.control import CONTROL_RULES
from lora_jax.adapt.rules.layout import LAYOUT_RULES
from lora_jax.adapt.rules.lookups import LOOK_UP_RULES
from lora_jax.adapt.rules.products import PRODUCT_RULES
from lora_jax.adapt.rules.ragged import RAGGED_RULES
from lora_jax.adapt.rules.reductions import REDUCTION_RULES
from lora_jax.adapt.rules.solves import SOLVE_RULES

RULES: dict[str, Rule] = {
    **PRODUCT_RULES,
    **LOOK_UP_RULES,
    **RAGGED_RULES,
    **CHAIN_RULES,
    **LAYOUT_RULES,
    **ARITHMETIC_RULES,
    **REDUCTION_RULES,
    **CHOICE_RULES,
    **CONTROL_RULES,
    **SOLVE_RULES,
}
