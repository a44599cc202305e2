"""The rule for each primitive that knows what to do with an adapted weight.

Products multiply in factored form, layout and arithmetic carry the factors along, control flow is
entered. Everything else merges.
"""

from lora_jax.adapt.arithmetic import ARITHMETIC_RULES
from lora_jax.adapt.chains import CHAIN_RULES
from lora_jax.adapt.choices import CHOICE_RULES
from lora_jax.adapt.control import CONTROL_RULES
from lora_jax.adapt.interpreter import Rule
from lora_jax.adapt.layout import LAYOUT_RULES
from lora_jax.adapt.products import PRODUCT_RULES
from lora_jax.adapt.reductions import REDUCTION_RULES

RULES: dict[str, Rule] = {
    **PRODUCT_RULES,
    **CHAIN_RULES,
    **LAYOUT_RULES,
    **ARITHMETIC_RULES,
    **REDUCTION_RULES,
    **CHOICE_RULES,
    **CONTROL_RULES,
}
