"""The quantization methods that a config.json may name, and the tensors that they quantize."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_supported
from lora_jax.hf.keys import Row, WeightsError
from lora_jax.hf.stored.integers import find_awq, find_bnb_nf4, find_gptq, find_pack_quantized
from lora_jax.hf.stored.layouts import find_fp8, find_mxfp4_experts, find_packed_floats
from lora_jax.hf.stored.raw import FetchRows, Header
from lora_jax.hf.stored.tensor import CodedTensor, CodeSettings, FolderTensors
from lora_jax.quantized import Coded

_LAYER_CLASSES = ("Linear", "Module")  # of the layers whose weights are kept in codes
_PARAMETER_SUFFIX = re.compile(r"\.weight(_packed)?$")
_PATTERN_PREFIX = "re:"


def check_target(target: object) -> str:
    """Returns a valid target: a module's name, "re:" and a pattern, or a class.

    Raises:
      ConfigError: it is none of these.
    """
    try:
        if isinstance(target, str):
            if target.startswith(_PATTERN_PREFIX):
                re.compile(target.removeprefix(_PATTERN_PREFIX))
            return target
        problem = f"is a {type(target).__name__}"
    except re.error as error:
        problem = f"is not a regular expression: {error}"
    raise ConfigError(f"config_groups: the target {target!r} {problem}")


class Targets:
    """Finds the settings in config.json that apply to a quantized module.

    A name comes before patterns, these in their alphabetical order, and patterns before classes, as
    in compressed-tensors (``match_targets``). Patterns match from the beginning of a name.

    Args:
      settings: target -> what config.json says of its modules.
    """

    def __init__(self, settings: Mapping[str, CodeSettings]):
        self._settings = settings
        self._settings_of_patterns: list[tuple[re.Pattern[str], CodeSettings]] = []
        for target in sorted(settings):
            if target.startswith(_PATTERN_PREFIX):
                pattern = re.compile(target.removeprefix(_PATTERN_PREFIX))
                self._settings_of_patterns.append((pattern, settings[target]))
        classes = [name for name in _LAYER_CLASSES if name in settings]
        self._settings_of_class = settings[classes[0]] if classes else None

    def settings_of(self, tensor: str) -> CodeSettings | None:
        """Returns the settings of the first target that matches a weight's module, or None."""
        module = _PARAMETER_SUFFIX.sub("", tensor)
        if module in self._settings:
            return self._settings[module]
        for pattern, settings in self._settings_of_patterns:
            if pattern.match(module):
                return settings
        return self._settings_of_class


def common_settings(settings: Collection[CodeSettings]) -> CodeSettings:
    """Returns the settings that all targets share, for a module that no target matches."""
    blocks = {kind.block for kind in settings} - {None}
    groups = {kind.group for kind in settings} - {None}
    return CodeSettings(
        block=blocks.pop() if len(blocks) == 1 else None,
        group=groups.pop() if len(groups) == 1 else None,
        symmetric=all(kind.symmetric for kind in settings),
    )


Layout = Callable[[str, FolderTensors], CodedTensor | None]


class Method(NamedTuple):
    """A quantization method, as described by a config.json.

    Attributes:
      name: its quant_method.
      layouts: the layouts of its tensors.
      settings: what it says of the codes.
      targets: what it says of those of some modules, by target; see `Targets`.
    """

    name: str
    layouts: tuple[Layout, ...]
    settings: CodeSettings = CodeSettings()
    targets: Mapping[str, CodeSettings] = MappingProxyType({})


def read_method(fields: Fields) -> Method | None:
    """Returns the quantization method of a parsed config.json; None without one.

    Raises:
      ConfigError: the method, or one of its options, is not kept in codes; names it.
    """
    config = fields.get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ConfigError(f"quantization_config is a {type(config).__name__}, not an object")
    quant_method = config.get("quant_method")
    name = check_supported("quantization_config: quant_method", quant_method, METHODS)
    try:
        return METHODS[name](config)
    except ConfigError as error:
        raise ConfigError(f"quantization_config, {name}: {error}") from None


def _read_square_block(sizes: Any) -> int | None:
    """Returns the size of square blocks; raises a ConfigError for other blocks."""
    if sizes is None:
        return None
    is_pair = isinstance(sizes, list) and len(sizes) == 2
    if not is_pair or sizes[0] != sizes[1] or sizes[0] < 2:
        raise ConfigError(f"blocks of {sizes} weights cannot stay quantized, only square ones can")
    return int(sizes[0])


def _check_fields(config: Fields, prefix: str, **supported: Collection[object]) -> None:
    """Raises a ConfigError if a present field has an unsupported value."""
    for name, values in supported.items():
        if config.get(name) is not None:
            check_supported(f"{prefix}{name}", config[name], values)


def _read_fp8(config: Fields) -> Method:
    _check_fields(config, "", fmt=("e4m3", "e5m2"))
    block = _read_square_block(config.get("weight_block_size"))
    return Method("fp8", (find_fp8,), CodeSettings(block=block))


def _read_mxfp4(config: Fields) -> Method:
    return Method("mxfp4", (find_mxfp4_experts,))


def _read_bitsandbytes(config: Fields) -> Method:
    """Returns bitsandbytes' method, after a check that it is NF4."""
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise ConfigError(
            "8-bit bitsandbytes weights cannot stay quantized. Use a checkpoint with "
            "load_in_4bit=True."
        )
    _check_fields({"bnb_4bit_quant_type": "fp4", **config}, "", bnb_4bit_quant_type=("nf4",))
    return Method("bitsandbytes", (find_bnb_nf4,))


def _make_reader_of_packed_words(layout: Layout) -> Callable[[Fields], Method]:
    """Returns the function that reads a quantization_config of GPTQ or AWQ."""

    def method(config: Fields) -> Method:
        """Reads the quantization_config."""
        _check_fields(config, "", bits=(4,), version=("gemm", "GEMM"))
        format = config.get("checkpoint_format") or config.get("format") or "gptq"
        if layout is find_gptq:
            check_supported("checkpoint_format", format, ("gptq", "gptq_v2"))
        group = config.get("group_size", 128)
        settings = CodeSettings(
            group=None if group == -1 else group,
            zero_is_less=layout is find_gptq and format == "gptq",
        )
        return Method(str(config["quant_method"]), (layout,), settings)

    return method


def _read_compressed_tensors(config: Fields) -> Method:
    """Returns compressed-tensors' method, whose module groups may differ in format."""
    sparsity = config.get("sparsity_config") or {}
    _check_fields(sparsity, "sparsity_config: ", format=("dense",))
    _check_fields(config, "", quantization_status=("compressed",), format=_COMPRESSED_FORMATS)
    settings_of_target: dict[str, CodeSettings] = {}
    settings_of_groups: list[CodeSettings] = []
    for group in (config.get("config_groups") or {}).values():
        settings = _read_group_settings(group)
        settings_of_groups.append(settings)
        for target in group.get("targets") or ():
            settings_of_target[check_target(target)] = settings
    are_groups_equal = len(set(settings_of_groups)) <= 1
    return Method(
        name="compressed-tensors",
        layouts=(find_pack_quantized, find_packed_floats, find_fp8),
        settings=common_settings(settings_of_groups),
        targets={} if are_groups_equal else settings_of_target,
    )


def _read_group_settings(group: Fields) -> CodeSettings:
    """Returns the settings of one module group of compressed-tensors."""
    _check_fields(group, "", format=_COMPRESSED_FORMATS)
    weights = group.get("weights") or {}
    _check_fields(weights, "weights: ", num_bits=(4, 8), actorder=("weight", "static", False))
    if weights.get("num_bits") == 8 and weights.get("type") != "float":
        raise ConfigError("8-bit integer weights cannot stay quantized")
    strategy = weights.get("strategy")
    block_sizes = weights.get("block_structure") if strategy == "block" else None
    return CodeSettings(
        block=_read_square_block(block_sizes),
        group=weights.get("group_size") if strategy == "group" else None,
        symmetric=weights.get("symmetric") is not False,
    )


_COMPRESSED_FORMATS = (
    *("float-quantized", "naive-quantized", "pack-quantized"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision"),
)


def _read_modelopt(config: Fields) -> Method:
    _check_fields(config, "", quant_algo=("FP8", "NVFP4"))
    return Method("modelopt", (find_packed_floats, find_fp8))


METHODS: dict[str, Callable[[Fields], Method]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed_tensors,
    "mxfp4": _read_mxfp4,
    "bitsandbytes": _read_bitsandbytes,
    "gptq": _make_reader_of_packed_words(find_gptq),
    "awq": _make_reader_of_packed_words(find_awq),
    "modelopt": _read_modelopt,
}


def find_coded_tensors(
    method: Method | None, tensors: Mapping[str, Header], fetch: FetchRows, where: str
) -> dict[str, CodedTensor]:
    """Finds the quantized tensors of a folder.

    The files are believed, and config.json says what they do not: the size of a block.

    Args:
      method: the method that config.json names.
      tensors: what the files' headers say of each.
      fetch: reads one; only small ones, such as a shape, are read here.
      where: the folder, for messages.

    Returns:
      name -> tensor, each name as if it held an array.

    Raises:
      WeightsError: codes without scales, or of another shape than config.json says; lists them all.
    """
    if method is None:
        stored: dict[str, CodedTensor] = {}
        problems = _float8_problems(tensors, "names no quantization_config")
    else:
        stored, problems = _find_by_layouts(method, tensors, fetch)
        if not stored and not problems:
            problems = [f"config.json names {method.name}, but no tensor is quantized that way"]
        if not problems:
            tensors_in_codes = {name for tensor in stored.values() for name in tensor.tensors}
            others = {n: header for n, header in tensors.items() if n not in tensors_in_codes}
            problems = _float8_problems(others, f"says {method.name}")
    if problems:
        raise WeightsError(
            f"{where}: the quantized weights cannot be read:\n  " + "\n  ".join(problems)
        )
    return stored


def _find_by_layouts(
    method: Method, tensors: Mapping[str, Header], fetch: FetchRows
) -> tuple[dict[str, CodedTensor], list[str]]:
    """Returns the tensors quantized by a method, by name, and problems with others."""
    targets = Targets(method.targets)
    stored: dict[str, CodedTensor] = {}
    problems: list[str] = []
    claimed_names: set[str] = set()
    for layout in method.layouts:
        for name in tensors:
            if name in claimed_names:
                continue
            settings = targets.settings_of(name) or method.settings
            try:
                tensor = layout(name, FolderTensors(tensors, fetch, settings))
            except WeightsError as error:
                problems.append(str(error))
                claimed_names.add(name)
                continue
            if tensor is not None:
                stored[tensor.name] = tensor
                claimed_names.update(tensor.tensors)
    return stored, problems


def _float8_problems(tensors: Mapping[str, Header], config_phrase: str) -> list[str]:
    """Returns a problem for each 8-bit or 4-bit float matrix whose scales are unknown."""
    problems = []
    for name, (dtype, shape) in tensors.items():
        if dtype.startswith(("F8", "F4")) and len(shape) > 1:
            problems.append(f"{name} is {dtype}, but config.json {config_phrase}")
    return problems


_KINDS_WITHOUT_CODES = (
    "embedding",
    "positions",
    "router",
    "norm",
    "head",
    "classifier",
)  # of parameters


class ConfigCodes:
    """The quantized tensors that config.json announces; see `lora_jax.hf.sources.HasCodes`.

    Args:
      path: the config.json, for messages.
      fields: the parsed config.json.
      table: the model's key table.

    Raises:
      ConfigError: the shapes of codes do not follow from it.
    """

    def __init__(self, path: Path, fields: Fields, table: Sequence[Row]):
        self.where = str(path)
        headers: dict[str, Header] = {}
        method = read_method(fields)
        if method is not None:
            if method.name not in ("fp8", "mxfp4"):
                raise ConfigError(
                    f"{path} does not determine the shapes of weights quantized by {method.name}. "
                    "Make a copy without quantization_config, and name a format of lora_jax "
                    "(--quantize) instead."
                )
            float_modules = fields["quantization_config"].get("modules_to_not_convert") or ()
            for row in table:
                is_kernel = len(row.shape) > 1 and row.kind not in _KINDS_WITHOUT_CODES
                if not is_kernel:
                    continue
                for name in row.hf_names:
                    if not any(_is_in_module(name, module) for module in float_modules):
                        headers |= _headers_of_codes(method, name, row.hf_shape)
        self._stored = find_coded_tensors(method, headers, _fetch_nothing, self.where)
        self.coded_names = frozenset(self._stored)

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of a tensor's codes; None if it will not be quantized."""
        stored = self._stored.get(name)
        return None if stored is None else stored.shapes(dtype)


def _is_in_module(tensor: str, module: str) -> bool:
    """Returns True if a module's name, perhaps with stars, contains a tensor."""
    pattern = re.escape(module).replace(r"\*", "[^.]*")
    return re.match(rf"(.*\.)?{pattern}(\.|$)", tensor) is not None


def _headers_of_codes(method: Method, name: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Returns the headers of a quantized tensor, by their names in the files."""
    if method.layouts == (find_mxfp4_experts,):
        is_of_experts = len(shape) >= 3
        if not is_of_experts:
            return {}
        *lead, n_in, n_out = shape
        scale_shape = (*lead, n_out, n_in // 32)
        return {
            f"{name}_blocks": Header("U8", (*scale_shape, 16)),
            f"{name}_scales": Header("U8", scale_shape),
        }
    assert method.layouts == (find_fp8,)
    scale_shape = ()
    block = method.settings.block
    if block is not None:
        *lead, n_out, n_in = shape
        scale_shape = (*lead, -(-n_out // block), -(-n_in // block))
    return {
        name: Header("F8_E4M3", shape),
        f"{name}_scale_inv": Header("F32", scale_shape),
    }


def _fetch_nothing(name: str, rows: slice | None) -> np.ndarray:
    raise NotImplementedError(f"{name} has no file")
