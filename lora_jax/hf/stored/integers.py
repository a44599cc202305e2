"""Layouts of 4-bit integers, and of bitsandbytes' NF4; see `lora_jax.hf.stored.layouts`.

A *word* is an int32 that packs eight codes. A *group* is the inputs of one output that share a
scale, and a zero where codes have one.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.tensor import CodedTensor, FolderTensors, LazyArray, unpack_int4
from lora_jax.quantized.coded import scales_of
from lora_jax.quantized.formats import INT4, NF4, NF4_NESTED, NF4_VALUES

_FLOAT_DTYPES = ("F32", "F16", "BF16")


def _unpack_words(files: FolderTensors, name: str) -> np.ndarray:
    """Returns the 4-bit numbers in a tensor's 32-bit words, minus 8."""
    return unpack_int4(files.fetch(name, None), less_8=True)


def _matrix_shape(files: FolderTensors, name: str) -> tuple[int, int]:
    """Returns the two sizes of a matrix; raises an error for other tensors."""
    shape = files.tensors[name].shape
    if len(shape) != 2:
        raise WeightsError(
            f"{name} has the shape {list(shape)}, but a quantized weight must be a matrix"
        )
    return shape[0], shape[1]


def find_pack_quantized(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds compressed-tensors' W4A16: words of eight codes along a row, stored plus 8."""
    stem = name.removesuffix("weight_packed")
    if stem == name or files.tensors[name].dtype != "I32":
        return None
    order = f"{stem}weight_g_idx"
    if order in files.tensors:
        raise WeightsError(
            f"{order}: weights that are grouped in the order of activations cannot stay quantized"
        )
    shape_name = files.find(name, ("I64", "I32"), f"{stem}weight_shape")
    scale_name = files.find(name, _FLOAT_DTYPES, f"{stem}weight_scale")
    n_out, n_in = map(int, files.fetch(shape_name, None).reshape(-1))
    files.lazy_array(name, (n_out, -(-n_in // 8)))  # raises if the words have another shape
    n_groups = files.groups(name, n_in)

    def codes(_: slice | None) -> np.ndarray:
        return _unpack_words(files, name)[:, :n_in]

    arrays = {
        "codes": LazyArray((n_out, n_in), INT4.code_dtype, codes),
        "scales": files.lazy_array(scale_name, (n_out, n_groups)),
    }
    tensors = [name, shape_name, scale_name]
    zero_name = f"{stem}weight_zero_point"
    if zero_name in files.tensors or not files.settings.symmetric:  # packed along the outputs
        files.find(name, ("I32",), zero_name)
        files.lazy_array(zero_name, (-(-n_out // 8), n_groups))

        def zeros(_: slice | None) -> np.ndarray:
            words = np.ascontiguousarray(files.fetch(zero_name, None).T)
            return unpack_int4(words, less_8=True)[:, :n_out].T.astype(np.int8)

        arrays["zeros"] = LazyArray((n_out, n_groups), np.int8, zeros)
        tensors.append(zero_name)
    return CodedTensor(name=f"{stem}weight", format=INT4, arrays=arrays, tensors=tensors)


def find_gptq(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds GPTQ's tensors: words of eight codes along the inputs, with zeros by input group."""
    if not name.endswith("qweight") or files.tensors[name].dtype != "I32":
        return None
    n_words, n_out = _matrix_shape(files, name)
    n_in = 8 * n_words
    order_name = f"{name.removesuffix('qweight')}g_idx"
    tensors = [name]
    if order_name in files.tensors:
        group_size = files.settings.group or n_in
        group_of_input = np.arange(n_in) // group_size
        if not np.array_equal(files.fetch(order_name, None), group_of_input):
            raise WeightsError(
                f"{order_name}: weights that are grouped in the order of activations cannot stay "
                "quantized"
            )
        tensors.append(order_name)

    def codes(_: slice | None) -> np.ndarray:
        return unpack_int4(files.fetch(name, None).T, less_8=True)

    return _make_tensor_with_zeros(
        tensors=tensors,
        files=files,
        codes=LazyArray((n_out, n_in), INT4.code_dtype, codes),
        reorder=lambda zeros: zeros,
    )


def find_awq(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds AWQ's tensors: words of eight shuffled codes along the outputs, with zeros by group."""
    if not name.endswith("qweight") or files.tensors[name].dtype != "I32":
        return None
    n_in, n_words = _matrix_shape(files, name)

    def codes(_: slice | None) -> np.ndarray:
        return _reorder_awq(_unpack_words(files, name)).T

    return _make_tensor_with_zeros(
        tensors=[name],
        files=files,
        codes=LazyArray((8 * n_words, n_in), INT4.code_dtype, codes),
        reorder=_reorder_awq,
    )


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the places of a word's numbers


def _reorder_awq(numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers of AWQ's words in output order."""
    words = numbers.reshape(len(numbers), -1, 8)
    return words[..., _AWQ_ORDER].reshape(len(numbers), -1)


def _make_tensor_with_zeros(
    tensors: Sequence[str],
    files: FolderTensors,
    codes: LazyArray,
    reorder: Callable[[np.ndarray], np.ndarray],
) -> CodedTensor:
    """Returns a tensor with scales and packed zeros [groups, out].

    Args:
      tensors: the tensor of the codes, and others that it makes useless.
      files: the folder's tensors.
      codes: the codes, [out, in].
      reorder: puts the numbers in a row of words in the order of the outputs.
    """
    name = tensors[0]
    stem = name.removesuffix("qweight")
    n_out, n_in = codes.shape
    n_groups = files.groups(name, n_in)
    scale_name = files.find(name, _FLOAT_DTYPES, f"{stem}scales")
    zero_name = files.find(name, ("I32",), f"{stem}qzeros")
    file_scales = files.lazy_array(scale_name, (n_groups, n_out))
    files.lazy_array(zero_name, (n_groups, n_out // 8))  # raises if zeros have another shape

    def scales(_: slice | None) -> np.ndarray:
        return file_scales.read(None).T

    def zeros(_: slice | None) -> np.ndarray:
        file_zeros = reorder(_unpack_words(files, zero_name)).astype(np.int8)
        return (file_zeros + np.int8(files.settings.zero_is_less)).T

    arrays = {
        "codes": codes,
        "scales": LazyArray((n_out, n_groups), file_scales.dtype, scales),
        "zeros": LazyArray((n_out, n_groups), np.int8, zeros),
    }
    return CodedTensor(
        name=f"{stem}weight",
        format=INT4,
        arrays=arrays,
        tensors=[*tensors, scale_name, zero_name],
    )


def find_bnb_nf4(name: str, files: FolderTensors) -> CodedTensor | None:
    """Finds bitsandbytes' NF4: flat packed codes, whose scales may be quantized, too.

    The bytes of codes lie in numbers of any dtype (bnb_4bit_quant_storage), such as BF16.
    """
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if state not in files.tensors:
        if f"{name}.absmax" in files.tensors:
            raise WeightsError(
                f"{name} is quantized, but no file holds its {state}. Download it again."
            )
        return None
    sizes, block = _read_quant_state(files, state, "shape", "blocksize")
    shape = tuple(sizes)
    n_weights = math.prod(shape)
    if len(shape) != 2 or shape[1] % block:
        raise WeightsError(
            f"{name} has the shape {list(shape)}, whose rows cannot be divided into blocks of "
            f"{block} weights"
        )
    header = files.tensors[name]
    is_one_row = max(header.shape) == math.prod(header.shape)
    if header.nbytes != n_weights // 2 or not is_one_row:
        raise WeightsError(
            f"{name} is {header.dtype} {list(header.shape)}, but the shape {list(shape)} in its "
            f"quant_state needs one row of {n_weights // 2} bytes"
        )
    map_name = files.find(name, ("F32",), f"{name}.quant_map")
    if not np.array_equal(files.fetch(map_name, None), np.array(NF4_VALUES, np.float32)):
        raise WeightsError(f"{map_name} does not contain the values of NF4")
    scale_name = files.find(name, ("F32", "U8"), f"{name}.absmax")

    def codes(_: slice | None) -> np.ndarray:
        data = files.fetch(name, None).reshape(-1).view(np.uint8)
        return unpack_int4(data, less_8=True, high_first=True).reshape(shape)

    scale_shape = (shape[0], shape[1] // block)
    has_coded_scales = files.tensors[scale_name].dtype == "U8"
    stored = CodedTensor(
        name=name,
        format=NF4_NESTED if has_coded_scales else NF4,
        arrays={
            "codes": LazyArray(shape, NF4.code_dtype, codes),
            "scales": files.lazy_array(scale_name, scale_shape, (n_weights // block,)),
        },
        tensors=[name, state, map_name, scale_name],
    )
    return _add_nested_scales(files, stored, block, state) if has_coded_scales else stored


def _read_quant_state(files: FolderTensors, state: str, *fields: str) -> list[Any]:
    """Returns fields of the quant_state of a bitsandbytes tensor.

    Raises:
      WeightsError: it lacks one of them.
    """
    try:
        values = json.loads(files.fetch(state, None).tobytes())
        return [values[field] for field in fields]
    except (ValueError, LookupError) as error:
        raise WeightsError(f"{state} lacks {' and '.join(fields)}: {error!r}") from error


def _add_nested_scales(
    files: FolderTensors, stored: CodedTensor, block: int, state: str
) -> CodedTensor:
    """Returns a bitsandbytes tensor with quantized scales: s = step·v(code) + offset.

    In the file, a step is for `nested_blocksize` scales, which run on from row to row. Here, it is
    for a part of a row, a span, whose size divides both a row and what shares a step, so that it
    needs no other rows. Where that is a single block, scales are held in fp32: fewer bytes.
    """
    scales_per_step, mean = _read_quant_state(files, state, "nested_blocksize", "nested_offset")
    weights_per_step = block * scales_per_step
    name = stored.name
    n_out, n_in = stored.shape
    n_weights = n_out * n_in
    map_name = files.find(name, ("F32",), f"{name}.nested_quant_map")
    step_name = files.find(name, ("F32",), f"{name}.nested_absmax")
    # These two raise if a tensor has another shape.
    files.lazy_array(map_name, (256,))
    files.lazy_array(step_name, (-(-n_weights // weights_per_step),))
    scale_table = tuple(map(float, files.fetch(map_name, None)))
    format = dataclasses.replace(stored.format, scale_table=scale_table)
    span = math.gcd(weights_per_step, n_in)

    def steps(_: slice | None) -> np.ndarray:
        step_of_span = np.arange(0, n_weights, span) // weights_per_step
        step_values: np.ndarray = files.fetch(step_name, None)[step_of_span]
        return step_values.reshape(n_out, -1)

    def offset(_: slice | None) -> np.ndarray:
        return np.full((1, 1), mean, np.float32)

    nested_arrays = {
        **stored.arrays,
        "scale_steps": LazyArray((n_out, n_in // span), np.float32, steps),
        "scale_mean": LazyArray((1, 1), np.float32, offset),
    }
    tensors = [*stored.tensors, map_name, step_name]
    if span > block:
        return CodedTensor(name=name, format=format, arrays=nested_arrays, tensors=tensors)

    def scales(_: slice | None) -> np.ndarray:
        arrays = {n: array.read(None) for n, array in nested_arrays.items() if n != "codes"}
        values: np.ndarray = scales_of(arrays, format, lambda steps, shape: steps)
        return values

    fp32_scales = LazyArray((n_out, n_in // block), np.float32, scales)
    arrays = {"codes": stored.arrays["codes"], "scales": fp32_scales}
    return CodedTensor(name=name, format=NF4, arrays=arrays, tensors=tensors)
