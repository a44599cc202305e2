"""The methods of quantisation that a config.json may name, and the tensors in their codes."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, check_known
from lora_jax.hf.keys import Row, WeightsError
from lora_jax.hf.stored.integers import awq, bnb_nf4, gptq, pack_quantized
from lora_jax.hf.stored.layouts import fp8, mxfp4_blocks, packed_floats
from lora_jax.hf.stored.raw import Fetch, Header
from lora_jax.hf.stored.tensor import CodedTensor, CodeFacts, Files
from lora_jax.quantized import Coded

_CLASSES = ("Linear", "Module")  # of the layers whose weights are kept in codes
_PARAMETER = re.compile(r"\.weight(_packed)?$")
_PATTERN = "re:"


def check_target(target: object) -> str:
    """Returns a target: a module's name, "re:" and a pattern, or a class.

    Raises:
      ConfigError: it is none of these.
    """
    try:
        if isinstance(target, str):
            re.compile(target.removeprefix(_PATTERN) if target.startswith(_PATTERN) else "")
            return target
        problem = f"is a {type(target).__name__}"
    except re.error as error:
        problem = f"is no pattern: {error}"
    raise ConfigError(f"config_groups: the target {target!r} {problem}")


class Targets:
    """Finds the part of config.json that describes a module in codes.

    A name comes before patterns, these in their alphabetical order, and patterns before classes, as
    in compressed-tensors (``match_targets``). Patterns match from the beginning of a name.

    Args:
      facts: target -> what config.json says of its modules.
    """

    def __init__(self, facts: Mapping[str, CodeFacts]):
        self._facts = facts
        patterns = sorted(target for target in facts if target.startswith(_PATTERN))
        self._patterns = [(re.compile(p.removeprefix(_PATTERN)), facts[p]) for p in patterns]
        self._rest = next((facts[name] for name in _CLASSES if name in facts), None)

    def facts_of(self, tensor: str) -> CodeFacts | None:
        """Returns the facts of the first target that names a weight's module; None without one."""
        module = _PARAMETER.sub("", tensor)
        if module in self._facts:
            return self._facts[module]
        matching = (facts for pattern, facts in self._patterns if pattern.match(module))
        return next(matching, self._rest)


def common_facts(facts: Collection[CodeFacts]) -> CodeFacts:
    """Returns the facts that kinds have in common, for a module that no target names."""
    blocks, sizes = ({kind[i] for kind in facts} - {None} for i in range(2))
    block, size = (next(iter(each)) if len(each) == 1 else None for each in (blocks, sizes))
    return CodeFacts(block, size, symmetric=all(kind.symmetric for kind in facts))


Layout = Callable[[str, Files], CodedTensor | None]


class Method(NamedTuple):
    """A method, as a config.json describes it.

    Attributes:
      name: its quant_method.
      layouts: the layouts of its tensors.
      facts: what it says of the codes.
      targets: what it says of those of some modules, by target; see `groups.Targets`.
    """

    name: str
    layouts: tuple[Layout, ...]
    facts: CodeFacts = CodeFacts()
    targets: Mapping[str, CodeFacts] = MappingProxyType({})


def read_method(fields: Fields) -> Method | None:
    """Returns the method of a parsed config.json; None if it names none.

    Raises:
      ConfigError: the method, or one of its options, is not kept in codes; names it.
    """
    config = fields.get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ConfigError(f"quantization_config is a {type(config).__name__}, not fields")
    given = config.get("quant_method")
    name = check_known("quantization_config: quant_method", given, METHODS)
    try:
        return METHODS[name](config)
    except ConfigError as error:
        raise ConfigError(f"quantization_config, {name}: {error}") from None


def _square(size: object) -> int | None:
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or size[0] != size[1] or size[0] < 2:
        raise ConfigError(f"blocks of {size} weights are not kept in codes, only square ones")
    return int(size[0])


def _require(config: Fields, what: str, **wanted: Collection[object]) -> None:
    """Raises a ConfigError if a field that is given has another value than one of those wanted."""
    for name, values in wanted.items():
        if config.get(name) is not None:
            check_known(f"{what}{name}", config[name], values)


def _fp8(config: Fields) -> Method:
    _require(config, "", fmt=("e4m3", "e5m2"))
    return Method("fp8", (fp8,), CodeFacts(_square(config.get("weight_block_size"))))


def _mxfp4(config: Fields) -> Method:
    return Method("mxfp4", (mxfp4_blocks,))


def _bitsandbytes(config: Fields) -> Method:
    if not (config.get("load_in_4bit") or config.get("_load_in_4bit")):
        raise ConfigError("only load_in_4bit is kept in codes, not 8 bits")
    _require({"bnb_4bit_quant_type": "fp4", **config}, "", bnb_4bit_quant_type=("nf4",))
    return Method("bitsandbytes", (bnb_nf4,))


def _read_words(layout: Layout) -> Callable[[Fields], Method]:
    def method(config: Fields) -> Method:
        _require(config, "", bits=(4,), version=("gemm", "GEMM"))
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if layout is gptq:
            check_known("checkpoint_format", form, ("gptq", "gptq_v2"))
        group = config.get("group_size", 128)
        group = None if group == -1 else group
        less = layout is gptq and form == "gptq"
        return Method(str(config["quant_method"]), (layout,), CodeFacts(None, group, less))

    return method


def _compressed(config: Fields) -> Method:
    sparse = config.get("sparsity_config") or {}
    _require(sparse, "sparsity_config: ", format=("dense",))
    _require(config, "", quantization_status=("compressed",), format=_FORMATS)
    targets: dict[str, CodeFacts] = {}
    kinds = []
    for group in (config.get("config_groups") or {}).values():
        _require(group, "", format=_FORMATS)
        weights = group.get("weights") or {}
        _require(weights, "weights: ", num_bits=(4, 8), actorder=("weight", "static", False))
        if weights.get("num_bits") == 8 and weights.get("type") != "float":
            raise ConfigError("integers of 8 bits are not kept in codes")
        strategy = weights.get("strategy")
        block = _square(weights.get("block_structure")) if strategy == "block" else None
        size = weights.get("group_size") if strategy == "group" else None
        kinds.append(CodeFacts(block, size, symmetric=weights.get("symmetric") is not False))
        targets |= dict.fromkeys(map(check_target, group.get("targets") or ()), kinds[-1])
    layouts = (pack_quantized, packed_floats, fp8)
    return Method(
        "compressed-tensors", layouts, common_facts(kinds), targets if len({*kinds}) > 1 else {}
    )


_FORMATS = (
    *("float-quantized", "naive-quantized", "pack-quantized"),
    *("mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision"),
)


def _modelopt(config: Fields) -> Method:
    _require(config, "", quant_algo=("FP8", "NVFP4"))
    return Method("modelopt", (packed_floats, fp8))


METHODS: dict[str, Callable[[Fields], Method]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "gptq": _read_words(gptq),
    "awq": _read_words(awq),
    "modelopt": _modelopt,
}


def stored_tensors(
    method: Method | None, tensors: Mapping[str, Header], fetch: Fetch, where: str
) -> dict[str, CodedTensor]:
    """Finds the tensors in codes among those of a folder.

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
    stored: dict[str, CodedTensor] = {}
    claimed: set[str] = set()
    problems: list[str] = []
    if method is not None:
        targets = Targets(method.targets)
        files = {
            name: Files(tensors, fetch, targets.facts_of(name) or method.facts) for name in tensors
        }
        for layout in method.layouts:
            for name in tensors:
                if name in claimed:
                    continue
                try:
                    tensor = layout(name, files[name])
                except WeightsError as error:
                    problems.append(str(error))
                    claimed.add(name)
                    continue
                if tensor is not None:
                    stored[tensor.name] = tensor
                    claimed.update(tensor.tensors)
        if not stored and not problems:
            problems.append(f"no tensor is in the codes of {method.name}, which config.json names")
    names = "names no quantization_config" if method is None else f"says {method.name}"
    problems += [
        f"{name} is {dtype}, and config.json {names}"
        for name, (dtype, shape) in tensors.items()
        if dtype.startswith(("F8", "F4"))
        and len(shape) > 1
        and name not in claimed
        and not problems
    ]
    if problems:
        raise WeightsError(f"{where}: its codes cannot be read\n  " + "\n  ".join(problems))
    return stored


_NEVER = ("embedding", "positions", "router", "norm", "head", "classifier")  # kinds of parameters


class ConfigCodes:
    """The tensors that will lie in codes; see `lora_jax.hf.sources.HasCodes`.

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
                    f"{path}: the shapes of {method.name}'s codes do not follow from config.json; "
                    "take quantization_config out of a copy, and say in which codes kernels are"
                )
            kept = fields["quantization_config"].get("modules_to_not_convert") or ()
            for row in table:
                if len(row.shape) > 1 and row.kind not in _NEVER:
                    for name in row.hf_names:
                        if not any(_names(pattern, name) for pattern in kept):
                            headers |= _headers(method, name, row.hf_shape)
        self._stored = stored_tensors(method, headers, _nothing, self.where)
        self.shipped = frozenset(self._stored)

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of a tensor's codes; None if it will lie in none."""
        stored = self._stored.get(name)
        return None if stored is None else stored.shapes(dtype)


def _names(pattern: str, name: str) -> bool:
    """Returns True if a module's name, perhaps with stars, is that of a tensor or of its parent."""
    each = re.escape(pattern).replace(r"\*", "[^.]*")
    return re.match(rf"(.*\.)?{each}(\.|$)", name) is not None


def _headers(method: Method, name: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Returns the headers of a tensor in codes, by the names in the files."""
    if method.layouts == (mxfp4_blocks,):
        if len(shape) < 3:  # the experts alone
            return {}
        *lead, n_in, n_out = shape
        blocks, scales = (*lead, n_out, n_in // 32, 16), (*lead, n_out, n_in // 32)
        return {f"{name}_blocks": Header("U8", blocks), f"{name}_scales": Header("U8", scales)}
    assert method.layouts == (fp8,)
    scales = ()
    if (block := method.facts.block) is not None:
        scales = (*shape[:-2], *(-(-n // block) for n in shape[-2:]))
    return {name: Header("F8_E4M3", shape), f"{name}_scale_inv": Header("F32", scales)}


def _nothing(name: str, rows: slice | None) -> np.ndarray:
    raise NotImplementedError(f"{name} has no file")
