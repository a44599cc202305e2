"""Quantizes a base to 8 or 4 bits: codes and scales replace its kernels.

    base = lora_jax.quantized.quantize(params, "nf4")
    params = lora_jax.lorafy(base, rules)

Functions run on such trees through `lora_jax.adapt`.
"""

from lora_jax.quantized.coded import Coded, bytes_of
from lora_jax.quantized.encode import Coding, QuantizeWarning, coding_of, encode
from lora_jax.quantized.formats import FORMATS, Format
from lora_jax.quantized.gguf import from_gguf
from lora_jax.quantized.trees import (
    QuantReport,
    QuantRule,
    dequantize,
    error_of,
    is_coded,
    plan,
    quantize,
    report,
    requantize,
    without_rows_kernel,
)

__all__ = [
    "FORMATS",
    "Coded",
    "Coding",
    "Format",
    "QuantReport",
    "QuantRule",
    "QuantizeWarning",
    "bytes_of",
    "coding_of",
    "dequantize",
    "encode",
    "error_of",
    "from_gguf",
    "is_coded",
    "plan",
    "quantize",
    "report",
    "requantize",
    "without_rows_kernel",
]
