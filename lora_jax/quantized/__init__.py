"""A base in 8 or 4 bits: codes with scales, in the place of kernels.

    base = lora_jax.quantized.quantize(params, "nf4")
    params = lora_jax.lorafy(base, rules)

Functions run on such trees through `lora_jax.adapt`.
"""

from typing import TYPE_CHECKING

from lora_jax.core.deprecated import renamed
from lora_jax.quantized.coded import Coded as Coded
from lora_jax.quantized.coded import bytes_of as bytes_of
from lora_jax.quantized.encode import Coding as Coding
from lora_jax.quantized.encode import QuantizeWarning as QuantizeWarning
from lora_jax.quantized.encode import coding_of as coding_of
from lora_jax.quantized.encode import encode as encode
from lora_jax.quantized.formats import FORMATS as FORMATS
from lora_jax.quantized.formats import Format as Format
from lora_jax.quantized.gguf import from_gguf as from_gguf
from lora_jax.quantized.report import QuantReport as QuantReport
from lora_jax.quantized.report import report as report
from lora_jax.quantized.trees import QuantRule as QuantRule
from lora_jax.quantized.trees import dequantize as dequantize
from lora_jax.quantized.trees import error_of as error_of
from lora_jax.quantized.trees import is_coded as is_coded
from lora_jax.quantized.trees import plan as plan
from lora_jax.quantized.trees import quantize as quantize
from lora_jax.quantized.trees import requantize as requantize

if TYPE_CHECKING:
    from lora_jax.quantized.report import QuantReport as Report  # noqa: F401, its earlier name
else:

    def __getattr__(name):
        return renamed(__name__, name, {"Report": QuantReport})
