"""Layouts of floats of 8 and 4 bits in files: their names, shapes and bits.

Each layout takes a tensor's name in the files, and returns the whole that it belongs to; None if it
is not the first tensor of such a whole. Rows are outputs, and blocks of 4-bit codes run along rows.
"""

import dataclasses

import numpy as np

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.tensor import CodedTensor, CodeFacts, Files, LazyArray, unpack
from lora_jax.quantized.formats import FP8, FP8_E5M2, MXFP4, NVFP4

_FLOATS = ("F32", "F16", "BF16")
_POWERS = ("F8_E8M0", "U8")  # a byte b is 2^(b - 127), and 255 is NaN
_INPUTS = (  # scales of activations, which no weight needs
    *("input_scale", "activation_scale", "input_global_scale"),
    *("output_scale", "k_scale", "v_scale"),
)


def fp8(name: str, files: Files) -> CodedTensor | None:
    """Finds FP8 with one scale for the tensor, for each row or for each block; it multiplies."""
    dtype, shape = files.tensors[name]
    if dtype not in ("F8_E4M3", "F8_E5M2") or len(shape) < 2:
        return None
    stem = name.removesuffix("weight")
    scales = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale", f"{stem}qscale_weight")
    scale = files.find(name, (*_FLOATS, *_POWERS), *scales)
    *lead, n_out, n_in = shape
    if (block := files.facts.block) is not None:
        blocks = (*lead, -(-n_out // block), -(-n_in // block))
        of_scales = files.piece(scale, blocks)
    elif files.tensors[scale].shape[-2:] in ((n_out, 1), (*lead, n_out)[-2:]):
        of_scales = files.piece(scale, (*lead, n_out, 1), (*lead, n_out))
    else:
        of_scales = files.piece(scale, (*lead, 1, 1), tuple(lead) or (1,), tuple(lead))
    format = FP8 if dtype == "F8_E4M3" else FP8_E5M2
    format = dataclasses.replace(format, block=block or format.block)
    pieces = {"codes": files.piece(name, shape, raw=True), "scales": of_scales}
    return CodedTensor(name, format, pieces, (name, scale, *_inputs(stem, files)))


def _inputs(stem: str, files: Files) -> list[str]:
    return [stem + name for name in _INPUTS if stem + name in files.tensors]


def mxfp4_blocks(name: str, files: Files) -> CodedTensor | None:
    """Finds gpt-oss's experts, [experts, out, in / 32, 16 bytes]; shown as [experts, in, out]."""
    dtype, shape = files.tensors[name]
    if not name.endswith("_blocks") or dtype != "U8":
        return None
    whole = name.removesuffix("_blocks")
    scale = files.find(whole, _POWERS, f"{whole}_scales")
    if len(shape) < 3 or shape[-1] != 16:
        raise WeightsError(f"{name} is {list(shape)}, expected [..., 16]: blocks of 32 codes")
    *lead, n_out, n_blocks, _ = shape
    of_scales = files.piece(scale, (*lead, n_out, n_blocks))

    def codes(rows: slice | None) -> np.ndarray:
        numbers = unpack(files.fetch(name, rows))
        return numbers.reshape(*numbers.shape[:-2], -1).swapaxes(-1, -2)

    def scales(rows: slice | None) -> np.ndarray:
        return of_scales.read(rows).swapaxes(-1, -2)

    pieces = {
        "codes": LazyArray((*lead, 32 * n_blocks, n_out), MXFP4.code_dtype, codes),
        "scales": LazyArray((*lead, n_blocks, n_out), of_scales.dtype, scales),
    }
    return CodedTensor(whole, MXFP4, pieces, (name, scale))


def packed_floats(name: str, files: Files) -> CodedTensor | None:
    """Finds MXFP4, and NVFP4 with a second scale for the tensor: two codes a byte, the low first.

    compressed-tensors calls the bytes ``weight_packed`` and divides by the second scale; ModelOpt
    calls them ``weight`` and multiplies by it.
    """
    dtype, shape = files.tensors[name]
    stem, weight, rest = name.rpartition("weight")
    if dtype != "U8" or len(shape) != 2 or weight + rest not in ("weight", "weight_packed"):
        return None
    scale = files.find(name, (*_POWERS, "F8_E4M3"), f"{stem}weight_scale")
    format = NVFP4 if files.tensors[scale].dtype == "F8_E4M3" else MXFP4
    n_out, n_in = shape[0], 2 * shape[1]
    n_groups = files._replace(facts=CodeFacts(group=format.block)).groups(name, n_in)
    pieces = {
        "codes": LazyArray(
            (n_out, n_in), format.code_dtype, lambda _: unpack(files.fetch(name, None))
        ),
        "scales": files.piece(scale, (n_out, n_groups)),
    }
    tensors = [name, scale, *_inputs(stem, files)]
    if format is NVFP4:
        role, second = ("scale_divisor", "global_scale") if rest else ("scale_steps", "scale_2")
        second = files.find(name, ("F32",), f"{stem}weight_{second}")
        pieces[role] = files.piece(second, (1, 1), (1,), ())
        tensors.append(second)
    return CodedTensor(f"{stem}weight", format, pieces, tensors)
