"""Layouts of integers of 4 bits, and of bitsandbytes' NF4; see `lora_jax.hf.stored.layouts`."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lora_jax.hf.keys import WeightsError
from lora_jax.hf.stored.tensor import CodedTensor, Files, LazyArray, unpack
from lora_jax.quantized.coded import scales_of
from lora_jax.quantized.formats import INT4, NF4, NF4_NESTED, NF4_VALUES

_FLOATS = ("F32", "F16", "BF16")


def _words(files: Files, name: str) -> np.ndarray:
    """Returns the numbers of 4 bits in a tensor's words, less 8."""
    return unpack(files.fetch(name, None), less_8=True)


def _matrix(files: Files, name: str) -> tuple[int, int]:
    shape = files.tensors[name].shape
    if len(shape) != 2:
        raise WeightsError(f"{name} is {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def pack_quantized(name: str, files: Files) -> CodedTensor | None:
    """Finds compressed-tensors' W4A16: eight codes a word along a row, each stored plus 8."""
    stem = name.removesuffix("weight_packed")
    if stem == name or files.tensors[name].dtype != "I32":
        return None
    if (order := f"{stem}weight_g_idx") in files.tensors:
        raise WeightsError(f"{order}: groups in the order of activations are not kept in codes")
    shape = files.find(name, ("I64", "I32"), f"{stem}weight_shape")
    scale = files.find(name, _FLOATS, f"{stem}weight_scale")
    n_out, n_in = (int(n) for n in files.fetch(shape, None).reshape(-1))
    files.piece(name, (n_out, -(-n_in // 8)))  # has this shape
    groups = (n_out, files.groups(name, n_in))

    def codes(_: slice | None) -> np.ndarray:
        return _words(files, name)[:, :n_in]

    pieces = {
        "codes": LazyArray((n_out, n_in), INT4.code_dtype, codes),
        "scales": files.piece(scale, groups),
    }
    tensors = [name, shape, scale]
    zero = f"{stem}weight_zero_point"
    if zero in files.tensors or not files.facts.symmetric:  # packed along the outputs
        files.find(name, ("I32",), zero)
        files.piece(zero, (-(-n_out // 8), groups[1]))

        def zeros(_: slice | None) -> np.ndarray:
            words = np.ascontiguousarray(files.fetch(zero, None).T)
            return unpack(words, less_8=True)[:, :n_out].T.astype(np.int8)

        pieces["zeros"] = LazyArray(groups, np.int8, zeros)
        tensors.append(zero)
    return CodedTensor(f"{stem}weight", INT4, pieces, tensors)


def gptq(name: str, files: Files) -> CodedTensor | None:
    """Finds GPTQ's: eight codes a word along the inputs, with zeros for groups of them."""
    if not name.endswith("qweight") or files.tensors[name].dtype != "I32":
        return None
    stem = name.removesuffix("qweight")
    n_words, n_out = _matrix(files, name)
    n_in = 8 * n_words
    order = f"{stem}g_idx"
    if order in files.tensors:
        group = files.facts.group or n_in
        if not np.array_equal(files.fetch(order, None), np.arange(n_in) // group):
            raise WeightsError(f"{order}: groups in the order of activations are not kept in codes")

    def codes(_: slice | None) -> np.ndarray:
        return unpack(files.fetch(name, None).T, less_8=True)

    def reorder(numbers: np.ndarray) -> np.ndarray:
        return numbers

    return _store_with_zeros(name, files, (n_out, n_in), codes, reorder, [order])


def awq(name: str, files: Files) -> CodedTensor | None:
    """Finds AWQ's: eight codes a word along the outputs, mixed, with zeros for groups of inputs."""
    if not name.endswith("qweight") or files.tensors[name].dtype != "I32":
        return None
    n_in, n_words = _matrix(files, name)

    def reorder(numbers: np.ndarray) -> np.ndarray:
        return numbers.reshape(len(numbers), -1, 8)[..., _AWQ].reshape(len(numbers), -1)

    def codes(_: slice | None) -> np.ndarray:
        return reorder(_words(files, name)).T

    return _store_with_zeros(name, files, (8 * n_words, n_in), codes, reorder, [])


_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)  # the places of a word's numbers


def _store_with_zeros(
    name: str,
    files: Files,
    shape: tuple[int, int],
    codes: Callable[[slice | None], np.ndarray],
    reorder: Callable[[np.ndarray], np.ndarray],
    others: Sequence[str],
) -> CodedTensor:
    """Returns a tensor whose scales and packed zeros lie [groups, out]."""
    stem = name.removesuffix("qweight")
    n_out, n_in = shape
    n_groups = files.groups(name, n_in)
    scale = files.find(name, _FLOATS, f"{stem}scales")
    zero = files.find(name, ("I32",), f"{stem}qzeros")
    scales = files.piece(scale, (n_groups, n_out))
    files.piece(zero, (n_groups, n_out // 8))

    def zeros(_: slice | None) -> np.ndarray:
        numbers = reorder(_words(files, zero)).astype(np.int8)
        return (numbers + np.int8(files.facts.zero_is_less)).T

    pieces = {
        "codes": LazyArray(shape, INT4.code_dtype, codes),
        "scales": LazyArray((n_out, n_groups), scales.dtype, lambda _: scales.read(None).T),
        "zeros": LazyArray((n_out, n_groups), np.int8, zeros),
    }
    held = [other for other in others if other in files.tensors]
    return CodedTensor(f"{stem}weight", INT4, pieces, [name, scale, zero, *held])


def bnb_nf4(name: str, files: Files) -> CodedTensor | None:
    """Finds bitsandbytes' NF4: codes in one row, the first in high bits; scales coded or not.

    The bytes of codes lie in numbers of any dtype (bnb_4bit_quant_storage), such as BF16.
    """
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if state not in files.tensors:
        if f"{name}.absmax" in files.tensors:
            raise WeightsError(f"{name} is in codes, and no file holds its {state}")
        return None
    sizes, block = _facts(files, state, "shape", "blocksize")
    shape, n = tuple(sizes), math.prod(sizes)
    if len(shape) != 2 or shape[1] % block:
        raise WeightsError(f"{name}: blocks of {block} do not fit its rows of {shape[1:]} weights")
    held = files.tensors[name]
    if held.nbytes != n // 2 or max(held.shape) != math.prod(held.shape):
        raise WeightsError(
            f"{name} is {held.dtype} {list(held.shape)}, expected {n // 2} bytes in a row for the "
            f"{list(shape)} of its quant_state"
        )
    table = files.find(name, ("F32",), f"{name}.quant_map")
    if not np.array_equal(files.fetch(table, None), np.array(NF4_VALUES, np.float32)):
        raise WeightsError(f"{table} holds other values than those of NF4")
    absmax = files.find(name, ("F32", "U8"), f"{name}.absmax")
    tensors = [name, state, table, absmax]

    def codes(_: slice | None) -> np.ndarray:
        raw = files.fetch(name, None).reshape(-1).view(np.uint8)
        return unpack(raw, less_8=True, high_first=True).reshape(shape)

    pieces = {
        "codes": LazyArray(shape, NF4.code_dtype, codes),
        "scales": files.piece(absmax, (shape[0], shape[1] // block), (n // block,)),
    }
    if files.tensors[absmax].dtype == "F32":
        return CodedTensor(name, NF4, pieces, tensors)
    return _nested(files, CodedTensor(name, NF4_NESTED, pieces, tensors), block, state)


def _facts(files: Files, state: str, *names: str) -> list[Any]:
    """Returns the facts of a tensor of bitsandbytes, by these names.

    Raises:
      WeightsError: it does not say so.
    """
    try:
        facts = json.loads(files.fetch(state, None).tobytes())
        return [facts[name] for name in names]
    except (ValueError, LookupError) as error:
        raise WeightsError(f"{state} does not tell {' and '.join(names)}: {error!r}") from error


def _nested(files: Files, stored: CodedTensor, block: int, state: str) -> CodedTensor:
    """Returns a tensor of bitsandbytes whose scales are coded: s = step·v(code) + offset.

    In the file, a step is for `nested_blocksize` scales, which run on from row to row. Here, it is
    for a part of a row whose size divides both a row and what shares a step, so that it needs no
    other rows. Where that is a single block, scales are held in fp32: fewer bytes.
    """
    size, mean = _facts(files, state, "nested_blocksize", "nested_offset")
    name, (n_out, n_in), group = stored.name, stored.shape, block * size
    of_map = files.find(name, ("F32",), f"{name}.nested_quant_map")
    of_max = files.find(name, ("F32",), f"{name}.nested_absmax")
    files.piece(of_map, (256,))
    files.piece(of_max, (-(-n_out * n_in // group),))
    table = tuple(map(float, files.fetch(of_map, None)))
    format = dataclasses.replace(stored.format, scale_table=table)
    span = math.gcd(group, n_in)

    def steps(_: slice | None) -> np.ndarray:
        each = np.arange(0, n_out * n_in, span) // group
        most: np.ndarray = files.fetch(of_max, None)[each]
        return most.reshape(n_out, -1)

    def offset(_: slice | None) -> np.ndarray:
        return np.full((1, 1), mean, np.float32)

    pieces = {
        **stored.pieces,
        "scale_steps": LazyArray((n_out, n_in // span), np.float32, steps),
        "scale_mean": LazyArray((1, 1), np.float32, offset),
    }
    tensors = [*stored.tensors, of_map, of_max]
    if span > block:
        return CodedTensor(name, format, pieces, tensors)

    def scales(_: slice | None) -> np.ndarray:
        arrays = {part: pieces[part].read(None) for part in pieces if part != "codes"}
        whole: np.ndarray = scales_of(arrays, format, lambda steps, shape: steps)
        return whole

    of_blocks = LazyArray((n_out, n_in // block), np.float32, scales)
    return CodedTensor(name, NF4, {"codes": pieces["codes"], "scales": of_blocks}, tensors)
