"""Maps adapters of experts, which transformers stores as two parameters of one module.

`experts.gate_up_proj` is [experts, 2·inner, d_model] and `experts.down_proj` [experts, d_model,
inner]; here gate, up and down are separate kernels. (gpt-oss's are [experts, in, out], there as
here: gate and up are one kernel, whose outputs take turns.) PEFT (``target_parameters``) packs the
factors of all experts e, of rank r, into two matrices:

    A [experts·r, in]    row e·r + k is the k-th of expert e
    B [out, r·experts]   column k·experts + e is the k-th of expert e

gate and up share the A of gate_up_proj. Where their A's differ, the pair is written with both side
by side: the same function, at the sum of their ranks. The router is no linear layer in transformers
either: it is a parameter, ``gate.weight``, packed as one expert.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from lora_jax.core.types import Fields, Model
from lora_jax.hf.keys import Row
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import Module, ends_with
from lora_jax.peft.names import KEY_PREFIX

INPUT_PARAMETERS = ("gate_up_proj", "up_proj")
GATE_UP, DOWN, ROUTER = "gate_up_proj", "down_proj", "weight"
# In transformers 5, PEFT takes these names of projections for those of the experts alone.
MODEL_TYPES_TAKEN_FOR_EXPERTS = ("qwen3_next", "glm4_moe", "deepseek_v3")
MLP_PROJECTION = re.compile(r"\.mlp\.(shared_experts?\.|)(?:gate|up|down)_proj\.")

_REASON_AGAINST_EXPERTS = (
    "No parameter of this model is a kernel of experts that an adapter can be applied to: the "
    "model has no experts, or computes them without transformers' ExpertsInterface. Use "
    "target_modules."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert(Module):
    """A kernel of one layer's experts or router, with the parameter that holds it in PEFT.

    Attributes:
      parameter: "gate_up_proj", "up_proj", "down_proj", or a router's "weight".
      half: the half of gate_up_proj's outputs, 0 or 1; None for all outputs of a parameter.
      n: the number of experts in the parameter; 1 for a router.
      layer: the layer's number.
    """

    parameter: str
    half: int | None
    n_experts: int
    layer: int


def list_experts(model: Model) -> list[Expert]:
    """Lists every kernel of a model's experts and routers, layer by layer; [] without experts."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "key_rows"):  # a torch module
        return _list_experts_of_rows(config.key_rows())
    n_experts = getattr(config, "num_experts", None)
    if config is None or not n_experts:
        return []
    family = config.family
    *input_kernels, down_kernel = family.expert_names
    has_gate_and_up = len(input_kernels) > 1
    experts = []
    for layer in range(config.num_hidden_layers):
        if not config.kind_of(layer).sparse:
            continue
        stack, stack_index = config.place_of(layer)
        mlp_module = f"model.layers.{layer}.mlp"
        mlp_path = f"{stack}/{family.mlp_name}"
        experts.append(
            Expert(
                name=f"{mlp_module}.{family.router_name}.{ROUTER}",
                path=f"{mlp_path}/{family.router_name}/kernel",
                index=(stack_index,),
                layer=layer,
                kind="router",
                parameter=ROUTER,
                half=None,
                n_experts=1,
            )
        )
        for kernel_index, kernel in enumerate(family.expert_names):
            is_down = kernel == down_kernel
            parameter = DOWN if is_down else GATE_UP
            experts.append(
                Expert(
                    name=f"{mlp_module}.experts.{parameter}",
                    path=f"{mlp_path}/experts/{kernel}/kernel",
                    index=(stack_index,),
                    layer=layer,
                    kind="experts",
                    parameter=parameter,
                    half=kernel_index if has_gate_and_up and not is_down else None,
                    n_experts=n_experts,
                )
            )
    return experts


def _list_experts_of_rows(rows: Sequence[Row]) -> list[Expert]:
    """Lists the kernels of experts and routers in the key table of a torch module."""
    experts = []
    for row in rows:
        parameter = row.hf.rsplit(".", 1)[-1]
        is_experts = row.kind == "experts" and len(row.shape) == 3
        is_router = row.kind == "router" and parameter == ROUTER
        if not row.path.endswith("/kernel") or not (is_experts or is_router):
            continue
        for position, (index, name) in enumerate(zip(row.members, row.hf_names, strict=True)):
            expert = Expert(
                name=name,
                path=row.path,
                index=index,
                layer=row.numbers[position] if row.numbers else position,
                kind=row.kind,
                parameter=parameter,
                half=None,
                n_experts=row.shape[0] if is_experts else 1,
            )
            experts.append(expert)
    return experts


def can_hold(model: Model, path: str) -> bool:
    """Returns True if PEFT's files can hold an adapter of a weight of a model.

    They cannot hold projections of MLPs that PEFT takes for those of experts; see `save`.

    Args:
      model: a model of `lora_jax.models`.
      path: the path of a weight in its tree.

    >>> from lora_jax import models, peft
    >>> fields = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...           "intermediate_size": 6, "num_attention_heads": 2}
    >>> model = models.Decoder(models.read_config(fields))
    >>> peft.can_hold(model, "model/layers/mlp/up_proj/kernel")
    True
    """
    is_of_mlp = MLP_PROJECTION.search(path.replace("/", ".") + ".") is not None
    model_type = getattr(model.config, "model_type", None)
    return not is_of_mlp or model_type not in MODEL_TYPES_TAKEN_FOR_EXPERTS


def common_end_of_name(name: str) -> str:
    """Returns the last two parts of a parameter's name, which all layers share."""
    return ".".join(name.split(".")[-2:])


def select_parameters(
    config: Fields, all_modules: Sequence[Module], table: Sequence[Row]
) -> list[Module]:
    """Lists the linear layers whose weights target_parameters selects.

    PEFT adapts such a weight as it adapts the layer itself, and names its tensors alike.

    Args:
      config: the fields of a PEFT configuration.
      all_modules: the modules that PEFT could adapt.
      table: the model's key table.

    Raises:
      PeftError: for the weight of a layer of another kind.
    """
    targets = config["target_parameters"] or []
    row_of_path = {row.path: row for row in table}
    parameters = []
    for module in all_modules:
        parameter = dataclasses.replace(module, is_parameter=True)
        name = parameter.name_for_patterns
        is_targeted = name in targets or ends_with(name, targets)
        if not is_targeted or module.kind in ("experts", "router"):
            continue
        is_linear = module.uses == "all" and row_of_path[module.path].transpose
        if module.is_embedding or not is_linear:
            reason = "an embedding" if module.is_embedding else "no linear layer of its own"
            raise PeftError(
                f"target_parameters names {name}, but {module.name} is {reason}. Of such a layer, "
                "only adapters by target_modules are read."
            )
        parameters.append(parameter)
    return parameters


def select_experts(
    config: Fields, model: Model, parameter_names: Sequence[str] = ()
) -> list[Expert]:
    """Lists the kernels of experts and routers that target_parameters selects.

    Args:
      config: the fields of a PEFT configuration.
      model: the model.
      parameter_names: the weights of linear layers that target_parameters selects.

    Raises:
      PeftError: for a name of another parameter, and for fields that do not go with experts.
    """
    targets = config["target_parameters"] or []
    if not targets:
        return []
    experts = list_experts(model)
    names = dict.fromkeys(expert.name for expert in experts)
    for target in targets:
        all_names = [*names, *parameter_names]
        is_known = target in all_names or any(ends_with(name, [target]) for name in all_names)
        if not is_known:
            known = ", ".join(dict.fromkeys(map(common_end_of_name, names)))
            raise PeftError(
                f"target_parameters names {target!r}, which no experts and no linear layers of "
                "this model have. " + (f"Use {known}." if known else _REASON_AGAINST_EXPERTS)
            )
    for field in ("use_dora", "lora_bias", "lora_dropout"):
        if config[field]:
            raise PeftError(
                f"{field} cannot be combined with target_parameters, in PEFT as well as here. "
                "Remove one of the two fields."
            )
    return [
        expert for expert in experts if expert.name in targets or ends_with(expert.name, targets)
    ]


def keys_of_expert(expert: Expert, chosen: Sequence[Module]) -> tuple[str, str]:
    """Returns the keys of A and B of an expert parameter.

    If both parameters of a layer are adapted, the keys of gate_up_proj lie inside those of
    down_proj.

    Args:
      expert: a kernel of the parameter.
      chosen: all adapted modules.
    """
    experts_module = expert.name.removesuffix(f".{expert.parameter}")
    is_down_adapted = any(module.name == f"{experts_module}.{DOWN}" for module in chosen)
    lies_inside = expert.parameter in INPUT_PARAMETERS and is_down_adapted
    stem = f"{KEY_PREFIX}{experts_module}"
    if lies_inside:
        stem += ".base_layer"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def unpack_expert_a(a: np.ndarray, n_experts: int) -> np.ndarray:
    """Reshapes PEFT's A, [experts·r, in], to [experts, r, in]."""
    return a.reshape(n_experts, -1, a.shape[-1])


def unpack_expert_b(b: np.ndarray, n_experts: int, half: int | None) -> np.ndarray:
    """Reshapes PEFT's B, [out, r·experts], to [experts, r, out], or half of its outputs."""
    unpacked = b.reshape(b.shape[0], -1, n_experts).transpose(2, 1, 0)
    if half is None:
        return unpacked
    halves: list[np.ndarray] = np.split(unpacked, 2, axis=-1)
    return halves[half]


def pack_expert_factors(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reshapes [experts, r, in] and [experts, r, out] to PEFT's A and B."""
    n_experts, rank, n_out = b.shape
    packed_a = a.reshape(n_experts * rank, -1)
    packed_b = b.transpose(2, 1, 0).reshape(n_out, rank * n_experts)
    return packed_a, packed_b


def join_gate_and_up(
    gate: tuple[np.ndarray, np.ndarray, float] | None,
    up: tuple[np.ndarray, np.ndarray, float] | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Joins (A, B, s) of gate_up_proj's halves; None stands for a half without an adapter."""
    # A half without an adapter gets outputs of zeros.
    if gate is None:
        assert up is not None
        a, b, scale = up
        return a, np.concatenate([np.zeros_like(b), b], axis=-1), scale
    if up is None:
        a, b, scale = gate
        return a, np.concatenate([b, np.zeros_like(b)], axis=-1), scale
    a_gate, b_gate, scale_gate = gate
    a_up, b_up, scale_up = up
    has_common_a = a_gate.shape == a_up.shape and np.array_equal(a_gate, a_up)
    # The halves share one A: only their outputs are joined.
    if has_common_a and scale_gate == scale_up:
        return a_gate, np.concatenate([b_gate, b_up], axis=-1), scale_gate
    # Otherwise both A's lie side by side. B is block diagonal, [experts, r_gate + r_up, out].
    b_up = b_up * np.asarray(scale_up / scale_gate, b_up.dtype)
    zeros_gate = np.zeros((*b_gate.shape[:2], b_up.shape[-1]), b_up.dtype)
    zeros_up = np.zeros((*b_up.shape[:2], b_gate.shape[-1]), b_up.dtype)
    b = np.block([[b_gate, zeros_gate], [zeros_up, b_up]])
    return np.concatenate([a_gate, a_up], axis=1), b, scale_gate
