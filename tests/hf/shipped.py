"""Checkpoints in codes, written by hand: random codes and scales by layout, and what they mean.

The numbers are worked out element by element from the layouts' definitions, in NumPy, and share
nothing with the reader.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_jax.quantized.formats import NF4_VALUES

Tensors = dict[str, np.ndarray]
BLOCK = 128

_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8",
    "int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


def write(path: Path, tensors: Tensors) -> None:
    """Writes a safetensors file, of dtypes that its library for NumPy cannot write."""
    header, at = {}, 0
    for name, array in tensors.items():
        ends = [at, at + array.nbytes]
        header[name] = {
            "dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": ends
        }  # fmt: skip
        at = ends[1]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def e4m3(code: np.ndarray) -> np.ndarray:
    """The values of E4M3's bytes, by its definition."""
    sign, exponent, mantissa = code >> 7, (code >> 3 & 15).astype(int), code & 7
    small = mantissa / 8 * 2.0**-6
    values = np.where(exponent == 0, small, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where((code & 127) == 127, np.nan, values)
    return (np.where(sign == 1, -1, 1) * values).astype(np.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def power(byte: np.ndarray) -> np.ndarray:
    """The values of E8M0's bytes."""
    return np.where(byte == 255, np.nan, 2.0 ** (byte.astype(float) - 127)).astype(np.float32)


def spread(scales: np.ndarray, shape: tuple[int, int], rows: int, columns: int) -> np.ndarray:
    """The scale of each element, with blocks of these sizes; the last may be smaller."""
    r, c = np.indices(shape)
    return np.asarray(scales, np.float32)[r // rows, c // columns]


def packed(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, two in a byte along the last axis, the first one in the low bits."""
    numbers = numbers.astype(np.uint8)
    return numbers[..., ::2] | numbers[..., 1::2] << 4


def words(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, eight in a word along the last axis."""
    spare = -numbers.shape[-1] % 8
    numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, spare)]).astype(np.uint32)
    each = numbers.reshape(*numbers.shape[:-1], -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return np.bitwise_or.reduce(each, axis=-1).view(np.int32)


def _scales(rng: np.random.Generator, *shape: int, of: float = 0.05) -> np.ndarray:
    return (of * rng.uniform(0.5, 1.5, shape)).astype(np.float32)


def _fp8_codes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Codes of values up to 2, so that a model's activations stay small."""
    return (rng.integers(0, 2, shape) << 7 | rng.integers(0, 65, shape)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
      config: what config.json says of it.
      tensors: (rng, [out, in], name of the module) -> the module's tensors, and its weight in fp32.
    """

    config: dict[str, Any]
    tensors: Callable[[np.random.Generator, tuple[int, int], str], tuple[Tensors, np.ndarray]]


def e5m2(code: np.ndarray) -> np.ndarray:
    """The values of E5M2's bytes, the upper halves of fp16 numbers."""
    return (code.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


_OF_VALUES = {e4m3: ml_dtypes.float8_e4m3fn, e5m2: ml_dtypes.float8_e5m2}


def fp8(
    kind: str, scale: str, dtype: Any, values: Any = e4m3
) -> Callable[..., tuple[Tensors, np.ndarray]]:
    def tensors(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
        n_out, n_in = shape
        by = {"block": (BLOCK, BLOCK), "row": (1, n_in), "tensor": (n_out, n_in)}[kind]
        codes = _fp8_codes(rng, shape)
        drawn = _scales(rng, -(-n_out // by[0]), -(-n_in // by[1]))
        if dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
            held = rng.integers(121, 124, drawn.shape, np.uint8)
            drawn, held = power(held), held.view(dtype)
        else:
            held = drawn.astype(dtype)
            drawn = held.astype(np.float32)
        weight = values(codes) * spread(drawn, shape, *by)
        shapes = {"tensor": (), "row": held.shape, "block": held.shape}
        found = {
            f"{name}.weight": codes.view(_OF_VALUES[values]),
            f"{name}.{scale}": held.reshape(shapes[kind]),
        }
        if kind == "tensor":
            found[f"{name}.activation_scale"] = np.float32([1.5])
        return found, weight

    return tensors


def mxfp4(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
    codes = rng.integers(0, 16, shape)
    scale = rng.integers(120, 124, (shape[0], shape[1] // 32), np.uint8)
    weight = E2M1[codes] * spread(power(scale), shape, 1, 32)
    found = {"weight_packed": packed(codes), "weight_scale": scale}
    return {f"{name}.{part}": array for part, array in found.items()}, weight


def experts(rng: Any, shape: tuple[int, int, int], name: str) -> tuple[Tensors, np.ndarray]:
    """gpt-oss's: a weight of [experts, in, out] whose rows in the file are outputs."""
    n, n_in, n_out = shape
    codes = rng.integers(0, 16, (n, n_out, n_in))
    scale = rng.integers(121, 126, (n, n_out, n_in // 32), np.uint8)
    weight = E2M1[codes] * np.stack([spread(power(s), (n_out, n_in), 1, 32) for s in scale])
    blocks = packed(codes).reshape(n, n_out, n_in // 32, 16)
    return {f"{name}_blocks": blocks, f"{name}_scales": scale}, weight.transpose(0, 2, 1)


def nvfp4(names: tuple[str, str, str], divide: bool) -> Callable[..., tuple[Tensors, np.ndarray]]:
    def tensors(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
        codes = rng.integers(0, 16, shape)
        scale = (56 + rng.integers(0, 16, (shape[0], shape[1] // 16))).astype(np.uint8)
        second = np.float32([37.1 if divide else 0.0271])
        by = e4m3(scale) / second if divide else e4m3(scale) * second
        weight = E2M1[codes] * spread(by, shape, 1, 16)
        held = (packed(codes), scale.view(ml_dtypes.float8_e4m3fn), second)
        return {f"{name}.{part}": x for part, x in zip(names, held, strict=True)}, weight

    return tensors


def w4a16(zeros: bool) -> Callable[..., tuple[Tensors, np.ndarray]]:
    def tensors(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
        n_out, n_in = shape
        codes = rng.integers(-8, 8, shape)
        scale = _scales(rng, n_out, n_in // 32, of=0.02).astype(ml_dtypes.bfloat16)
        by = spread(scale, shape, 1, 32)
        found = {
            "weight_packed": words(codes + 8), "weight_scale": scale,
            "weight_shape": np.array(shape, np.int64),
        }  # fmt: skip
        offset = np.zeros(shape)
        if zeros:
            zero = rng.integers(-8, 8, scale.shape)
            found["weight_zero_point"] = words((zero + 8).T).T
            offset = spread(zero, shape, 1, 32)
        weight = ((codes - offset) * by.astype(np.float64)).astype(np.float32)
        return {f"{name}.{part}": array for part, array in found.items()}, weight

    return tensors


def by_input(method: str) -> Callable[..., tuple[Tensors, np.ndarray]]:
    """AWQ, and GPTQ of the first version, whose zeros are stored less one."""

    def tensors(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
        n_out, n_in = shape
        codes = rng.integers(0, 16, (n_in, n_out))
        zero = rng.integers(0, 16, (n_in // 32, n_out))
        scale = _scales(rng, n_in // 32, n_out, of=0.02).astype(np.float16)
        groups = np.arange(n_in) // 32
        if method == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]  # the columns that a word's numbers are
            mixed = lambda x: x.reshape(len(x), -1, 8)[:, :, order].reshape(len(x), -1)  # noqa: E731
            found = {"qweight": words(mixed(codes)), "qzeros": words(mixed(zero))}
        else:
            found = {
                "qweight": words(codes.T).T, "qzeros": words(zero), "g_idx": groups.astype(np.int32)
            }  # fmt: skip
            zero = zero + 1
        found["scales"] = scale
        weight = ((codes - zero[groups]) * scale.astype(np.float64)[groups]).astype(np.float32).T
        return {f"{name}.{part}": array for part, array in found.items()}, weight

    return tensors


# A table of bitsandbytes' scales; a file's kernels all have the same.
_OF_SCALES = np.sort(np.random.default_rng(5).uniform(-1, 1, 256)).astype(np.float32)


def nf4(nested: bool, storage: Any = np.uint8) -> Callable[..., tuple[Tensors, np.ndarray]]:
    def tensors(rng: Any, shape: tuple[int, int], name: str) -> tuple[Tensors, np.ndarray]:
        n_out, n_in = shape
        codes = rng.integers(0, 16, shape)
        n_blocks = n_out * n_in // 64
        flat = codes.reshape(-1).astype(np.uint8)
        facts = {"quant_type": "nf4", "blocksize": 64, "shape": list(shape), "dtype": "bfloat16"}
        found = {"quant_map": np.array(NF4_VALUES, np.float32)}
        if nested:
            facts |= {"nested_blocksize": 256, "nested_offset": 0.0713, "nested_dtype": "float32"}
            coded = rng.integers(0, 256, n_blocks, np.uint8)
            table = _OF_SCALES
            most = _scales(rng, -(-n_blocks // 256))
            scale = [
                np.float32(np.float32(table[c] * most[i // 256]) + np.float32(0.0713))
                for i, c in enumerate(coded)
            ]
            scale = np.array(scale, np.float32)
            found |= {"absmax": coded, "nested_quant_map": table, "nested_absmax": most}
        else:
            scale = found["absmax"] = _scales(rng, n_blocks, of=0.1)
        found["quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        values = np.array(NF4_VALUES, np.float32)[codes]
        weight = (values.reshape(-1, 64) * scale[:, None]).reshape(shape)
        named = {f"{name}.weight.{part}": array for part, array in found.items()}
        held = (flat[::2] << 4 | flat[1::2]).view(storage)
        return {f"{name}.weight": held[:, None], **named}, weight

    return tensors


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """config.json's part of compressed-tensors."""
    group = {"weights": {"symmetric": True, "type": "float", **weights}, "targets": ["Linear"]}
    own = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return {**own, "quantization_status": "compressed", "config_groups": {"group_0": group}}


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
_BLOCKS = {**_FP8, "weight_block_size": [BLOCK, BLOCK]}
_POWERS = {**_BLOCKS, "scale_fmt": "ue8m0"}
_STATIC = {**_FP8, "activation_scheme": "static", "weight_block_size": None}
_ROWS = compressed("float-quantized", num_bits=8, strategy="channel")
_SQUARES = compressed(
    "float-quantized", num_bits=8, strategy="block", block_structure=[BLOCK, BLOCK]
)
_GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
_WORDS = compressed("pack-quantized", type="int", **_GROUPS)
_ASYMMETRIC = compressed("pack-quantized", type="int", symmetric=False, **_GROUPS)
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_INVERSE = "weight_scale_inv"

LAYOUTS = {
    "fp8 blocks, fp32": Layout(_BLOCKS, fp8("block", _INVERSE, np.float32)),
    "fp8 blocks, bf16": Layout(_BLOCKS, fp8("block", _INVERSE, ml_dtypes.bfloat16)),
    "fp8 blocks, fp16": Layout(_BLOCKS, fp8("block", _INVERSE, np.float16)),
    "fp8 blocks, bytes": Layout(_POWERS, fp8("block", _INVERSE, np.uint8)),
    "fp8 blocks, powers": Layout(_POWERS, fp8("block", "scale", ml_dtypes.float8_e8m0fnu)),
    "fp8 e5m2": Layout({**_FP8, "fmt": "e5m2"}, fp8("row", _INVERSE, np.float32, e5m2)),
    "fp8 static": Layout(_STATIC, fp8("tensor", _INVERSE, np.float32)),
    "compressed fp8 rows": Layout(_ROWS, fp8("row", "weight_scale", ml_dtypes.bfloat16)),
    "compressed fp8 blocks": Layout(_SQUARES, fp8("block", "weight_scale", np.float32)),
    "compressed mxfp4": Layout(compressed("mxfp4-pack-quantized", **_GROUPS), mxfp4),
    "compressed nvfp4": Layout(
        compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        nvfp4(("weight_packed", "weight_scale", "weight_global_scale"), divide=True),
    ),
    "modelopt nvfp4": Layout(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        nvfp4(("weight", "weight_scale", "weight_scale_2"), divide=False),
    ),
    "w4a16": Layout(_WORDS, w4a16(zeros=False)),
    "w4a16 with zeros": Layout(_ASYMMETRIC, w4a16(zeros=True)),
    "awq": Layout(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, by_input("awq")
    ),
    "gptq": Layout(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, by_input("gptq")
    ),
    "gpt-oss": Layout({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, experts),
    "nf4": Layout(_BNB, nf4(nested=False)),
    "nf4 nested": Layout({**_BNB, "bnb_4bit_use_double_quant": True}, nf4(nested=True)),
    "nf4 nested, in bf16": Layout(
        {**_BNB, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "bfloat16"},
        nf4(nested=True, storage=ml_dtypes.bfloat16),
    ),
}


def ship(
    folder: Path, fields: dict[str, Any], tensors: Tensors, layout: str, shards: int = 1
) -> Tensors:
    """Writes a checkpoint whose linear layers lie in a layout.

    Args:
      folder: is made.
      fields: of config.json.
      tensors: the model's; those of layers' kernels give their shapes alone.
      layout: a name of `LAYOUTS`.
      shards: the number of files; a weight and its scale lie in different ones.

    Returns:
      The model's tensors, with the weights that the codes mean.
    """
    rng, meant, held = np.random.default_rng(7), {}, {}
    for name, array in tensors.items():
        meant[name] = array
        if not name.endswith("_proj" if layout == "gpt-oss" else "_proj.weight"):
            held[name] = array
            continue
        made, meant[name] = LAYOUTS[layout].tensors(rng, array.shape, name.removesuffix(".weight"))
        held |= made
    folder.mkdir(exist_ok=True)
    config = fields | {"quantization_config": LAYOUTS[layout].config}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write(folder / "model.safetensors", held)
        return meant
    files = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(held)}
    for file in set(files.values()):
        write(folder / file, {name: x for name, x in held.items() if files[name] == file})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return meant


def plain(folder: Path, fields: dict[str, Any], tensors: Tensors) -> None:
    """Writes the same model in floats."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    write(folder / "model.safetensors", tensors)
