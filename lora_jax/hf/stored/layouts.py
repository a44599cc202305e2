"""File layouts of 8-bit and 4-bit floats: their names, shapes and bits.

Each layout takes a tensor's name in the files, and returns the whole that it belongs to; None if it
is not the first tensor of such a whole. Rows are outputs, and blocks of 4-bit codes run along rows.
"""

import dataclasses

import numpy as np

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.tensor import (
    CodedTensor,
    CodeSettings,
    FolderTensors,
    LazyArray,
    unpack_int4,
)
from lora_jax.quantized.formats import FP8, FP8_E5M2, MXFP4, NVFP4

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_POWER_DTYPES = ("F8_E8M0", "U8")  # a byte b is 2^(b - 127), and 255 is NaN
_ACTIVATION_SCALES = (  # which no weight needs
    *("input_scale", "activation_scale", "input_global_scale"),
    *("output_scale", "k_scale", "v_scale"),
)


def find_fp8(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds FP8 with multiplied scales: one for the tensor, each row or each block."""
    dtype, shape = files.tensors[name]
    if dtype not in ("F8_E4M3", "F8_E5M2") or len(shape) < 2:
        return None
    stem = name.removesuffix("weight")
    names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale", f"{stem}qscale_weight")
    scale_name = files.find(name, (*_FLOAT_DTYPES, *_POWER_DTYPES), *names)
    scale_shape = files.tensors[scale_name].shape
    *lead, n_out, n_in = shape
    block = files.settings.block
    if block is not None:
        block_counts = (-(-n_out // block), -(-n_in // block))
        scales = files.lazy_array(scale_name, (*lead, *block_counts))
    elif scale_shape[-2:] in ((n_out, 1), (*lead, n_out)[-2:]):  # one for each row
        scales = files.lazy_array(scale_name, (*lead, n_out, 1), (*lead, n_out))
    else:
        scales = files.lazy_array(scale_name, (*lead, 1, 1), tuple(lead) or (1,), tuple(lead))
    format = FP8 if dtype == "F8_E4M3" else FP8_E5M2
    return CodedTensor(
        name=name,
        format=dataclasses.replace(format, block=block or format.block),
        arrays={"codes": files.lazy_array(name, shape, raw=True), "scales": scales},
        tensors=(name, scale_name, *_find_activation_scales(stem, files)),
    )


def _find_activation_scales(stem: str, files: FolderTensors) -> list[str]:
    """Returns the stored activation scales of a layer."""
    return [stem + name for name in _ACTIVATION_SCALES if stem + name in files.tensors]


def find_mxfp4_experts(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds gpt-oss's experts, stored [experts, out, in / 32, 16 bytes]."""
    dtype, shape = files.tensors[name]
    if not name.endswith("_blocks") or dtype != "U8":
        return None
    weight_name = name.removesuffix("_blocks")
    scale_name = files.find(weight_name, _POWER_DTYPES, f"{weight_name}_scales")
    if len(shape) < 3 or shape[-1] != 16:
        raise WeightsError(
            f"{name} has the shape {list(shape)}, but blocks of 32 codes need a last axis of 16"
        )
    *lead, n_out, n_blocks, _ = shape
    file_scales = files.lazy_array(scale_name, (*lead, n_out, n_blocks))

    def codes(rows: slice | None) -> np.ndarray:
        blocks = unpack_int4(files.fetch(name, rows))  # [..., out, in / 32, 32]
        return blocks.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)

    def scales(rows: slice | None) -> np.ndarray:
        return file_scales.read(rows).swapaxes(-1, -2)

    arrays = {
        "codes": LazyArray((*lead, 32 * n_blocks, n_out), MXFP4.code_dtype, codes),
        "scales": LazyArray((*lead, n_blocks, n_out), file_scales.dtype, scales),
    }
    return CodedTensor(name=weight_name, format=MXFP4, arrays=arrays, tensors=(name, scale_name))


def find_packed_floats(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds packed MXFP4 or NVFP4 (which has a second scale): two codes in each byte.

    compressed-tensors calls the bytes ``weight_packed`` and divides by the second scale; ModelOpt
    calls them ``weight`` and multiplies by it.
    """
    dtype, shape = files.tensors[name]
    is_matrix_of_bytes = dtype == "U8" and len(shape) == 2
    stem, weight, suffix = name.rpartition("weight")
    if not is_matrix_of_bytes or weight + suffix not in ("weight", "weight_packed"):
        return None
    scale_name = files.find(name, (*_POWER_DTYPES, "F8_E4M3"), f"{stem}weight_scale")
    format = NVFP4 if files.tensors[scale_name].dtype == "F8_E4M3" else MXFP4
    n_out, row_bytes = shape
    n_in = 2 * row_bytes
    n_groups = files._replace(settings=CodeSettings(group=format.block)).groups(name, n_in)

    def codes(_: slice | None) -> np.ndarray:
        return unpack_int4(files.fetch(name, None))

    arrays = {
        "codes": LazyArray((n_out, n_in), format.code_dtype, codes),
        "scales": files.lazy_array(scale_name, (n_out, n_groups)),
    }
    tensors = [name, scale_name, *_find_activation_scales(stem, files)]
    if format is NVFP4:
        if weight + suffix == "weight_packed":
            array_name = "scale_divisor"
            tensor_name = f"{stem}weight_global_scale"
        else:
            array_name = "scale_steps"
            tensor_name = f"{stem}weight_scale_2"
        files.find(name, ("F32",), tensor_name)
        arrays[array_name] = files.lazy_array(tensor_name, (1, 1), (1,), ())
        tensors.append(tensor_name)
    return CodedTensor(name=f"{stem}weight", format=format, arrays=arrays, tensors=tensors)
