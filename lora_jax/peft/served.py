"""Converts an adapter to the layout that serving engines read.

The engine is vLLM. It scales every update by lora_alpha / r, and ignores rank_pattern and
alpha_pattern. So all modules get one rank, filled up with zeros, and B contains the scale. vLLM
needs every projection of the experts, so projections that are not adapted get zeros:

- gpt-oss: PEFT's two tensors of a layer, as `lora_jax.peft.experts` packs them;
- Mixtral, Qwen's mixtures: a module for each expert's gate, up and down, under the names of the
  checkpoint, as PEFT names them in transformers 4.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.types import Fields, JsonObject, Model
from lora_jax.models.decoder.keys import has_fused_experts
from lora_jax.peft.config import INVOCATION_FIELD
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import (
    GATE_UP,
    ROUTER,
    Expert,
    common_end_of_name,
    keys_of_expert,
    pack_expert_factors,
    select_experts,
    unpack_expert_a,
    unpack_expert_b,
)
from lora_jax.peft.modules import rank_and_alpha
from lora_jax.peft.names import KEY_PREFIX

FACTOR_KEY_ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


class _Factors(NamedTuple):
    """A [n, r, in] and B [n, r, out] of n experts, or of one module; B contains the scale."""

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[1])

    def pad_to_rank(self, rank: int) -> "_Factors":
        """Returns the factors padded with zeros to a higher rank."""
        padding = ((0, 0), (0, rank - self.rank), (0, 0))
        return _Factors(np.pad(self.a, padding), np.pad(self.b, padding))


_FactorsByModule = dict[str, _Factors]  # by the module's name, without `PREFIX`


def convert_for_serving(
    fields: Fields, tensors: Mapping[str, np.ndarray], model: Model
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns an adapter's fields and tensors in the layout that serving engines read.

    Args:
      fields: the fields of adapter_config.json, as `lora_jax.peft.save` writes them.
      tensors: the tensors of adapter_model.safetensors, by key.
      model: the model that they adapt.

    Raises:
      PeftError: for an adapter of a kind that is not served.
    """
    if fields["peft_type"] != "LORA":
        raise PeftError(
            f"peft_type is {fields['peft_type']}, but engines serve only LORA. Merge the adapter "
            "into its base."
        )
    if fields.get(INVOCATION_FIELD):
        raise PeftError(
            "vLLM cannot run an activated LoRA. Write the adapter without for_serving, and run it "
            "with PEFT or train.serve."
        )
    experts = select_experts(fields, model)
    expert_keys = {key for expert in experts for key in keys_of_expert(expert, experts)}
    served_tensors = {key: tensor for key, tensor in tensors.items() if key not in expert_keys}
    # All modules but the experts: a is [1, r, in], and b is [1, r, out].
    factors_by_keys: dict[tuple[str, str], _Factors] = {}  # by the keys of A and B
    for key_a in list(served_tensors):
        for end_a, end_b in FACTOR_KEY_ENDS:
            if key_a.endswith(end_a):
                stem = key_a.removesuffix(end_a)
                key_b = stem + end_b
                a = served_tensors.pop(key_a)
                b = served_tensors.pop(key_b)
                scale = scale_of_module(fields, stem.removeprefix(KEY_PREFIX))
                factors_by_keys[key_a, key_b] = _scale_factors(a[None], b.T[None], scale)
    served_fields: JsonObject = dict(fields)
    if experts:
        expert_factors_by_module, target_fields = _convert_experts(fields, tensors, experts, model)
        served_fields |= target_fields
        end_a, end_b = FACTOR_KEY_ENDS[0]
        for module, factors in expert_factors_by_module.items():
            stem = KEY_PREFIX + module
            factors_by_keys[stem + end_a, stem + end_b] = factors
    # All modules get the largest rank, and a scale of lora_alpha / r = 1.
    rank = max((factors.rank for factors in factors_by_keys.values()), default=1)
    for (key_a, key_b), factors in factors_by_keys.items():
        a, b = pack_expert_factors(*factors.pad_to_rank(rank))
        served_tensors[key_a] = np.ascontiguousarray(a)
        served_tensors[key_b] = np.ascontiguousarray(b)
    served_fields |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    return served_fields, served_tensors


def _convert_experts(
    fields: Fields, tensors: Mapping[str, np.ndarray], experts: Sequence[Expert], model: Model
) -> tuple[_FactorsByModule, JsonObject]:
    """Returns the factors of experts and routers by module, and the fields that target them."""
    config = model.config
    routers: _FactorsByModule = {}
    kernels_of_mlp: dict[str, dict[str, _Factors]] = {}  # by the name of the experts' kernel
    for expert in experts:
        a, b = expert_factors(expert, experts, tensors)
        factors = _scale_factors(a, b, scale_of_module(fields, expert.name))
        mlp = f"model.layers.{expert.layer}.{config.family.mlp_name}"
        if expert.parameter == ROUTER:
            routers[f"{mlp}.{config.family.router_name}"] = factors
        else:
            kernel = expert.path.split("/")[-2]
            kernels_of_mlp.setdefault(mlp, {})[kernel] = factors
    are_fused = has_fused_experts(config)
    factors_by_module = dict(routers)
    targets: list[str] = []  # the parameters or modules of experts
    for mlp, kernels in kernels_of_mlp.items():
        for kernel, factors in _fill_missing_kernels(kernels, config).items():
            if are_fused:
                targets.append(f"{mlp}.experts.{kernel}")
                wrapper = ".base_layer" if kernel == GATE_UP else ""
                factors_by_module[f"{mlp}.experts{wrapper}"] = factors
                continue
            for index in range(config.num_experts):
                module = f"{mlp}.experts.{index}.{kernel}"
                targets.append(module)
                one_expert = slice(index, index + 1)
                factors_by_module[module] = _Factors(factors.a[one_expert], factors.b[one_expert])
    return factors_by_module, _expert_target_fields(fields, config, targets, list(routers))


def _fill_missing_kernels(kernels: Mapping[str, _Factors], config: Any) -> dict[str, _Factors]:
    """Returns the factors of each kernel of a layer's experts, with zeros for missing kernels."""
    dtype = list(kernels.values())[0].a.dtype
    all_kernels = {}
    for kernel, (n_in, n_out) in config.expert_shapes.items():
        zeros = _Factors(
            a=np.zeros((config.num_experts, 1, n_in), dtype),
            b=np.zeros((config.num_experts, 1, n_out), dtype),
        )
        all_kernels[kernel] = kernels.get(kernel, zeros)
    return all_kernels


def _expert_target_fields(
    fields: Fields, config: Any, experts: Sequence[str], routers: Sequence[str]
) -> JsonObject:
    """Returns target_modules or target_parameters, which name experts and routers.

    Args:
      fields: the fields of adapter_config.json.
      config: the model's configuration.
      experts: names of the experts' parameters, or of their modules.
      routers: names of the routers' modules.
    """
    n_layers = config.num_hidden_layers - config.first_k_dense_replace
    if has_fused_experts(config):
        router_parameters = [f"{name}.{ROUTER}" for name in routers]
        names = _shorten_names(experts, n_layers, common_end_of_name)
        names += _shorten_names(router_parameters, n_layers, common_end_of_name)
        return {"target_parameters": sorted(names)}
    names = list(fields["target_modules"] or [])
    if config.shared_expert_intermediate_size:  # whose projections have the same last names
        names += _shorten_names(experts, n_layers, lambda name: ".".join(name.split(".")[-3:]))
    else:
        names += _shorten_names(experts, n_layers * config.num_experts, _last_name)
    names += _shorten_names(routers, n_layers, _last_name)
    return {"target_modules": sorted(names), "target_parameters": None}


def expert_factors(
    expert: Expert, experts: Sequence[Expert], tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [experts, r, in] and B [experts, r, out] of a kernel of a layer's experts.

    Args:
      expert: the kernel.
      experts: all that the adapter adapts.
      tensors: PEFT's, by key.
    """
    key_a, key_b = keys_of_expert(expert, experts)
    a = unpack_expert_a(tensors[key_a], expert.n_experts)
    b = unpack_expert_b(tensors[key_b], expert.n_experts, expert.half)
    if expert.half is None:
        return a, b
    # Ranks whose B is 0 in this half belong to the other half.
    is_rank_used = b.any(axis=(0, 2))
    return a[:, is_rank_used], b[:, is_rank_used]


def _shorten_names(names: Sequence[str], n_per_end: int, end: Callable[[str], str]) -> list[str]:
    """Returns the ends of names if each end matches `n_per_end` modules; else the names."""
    ends = list(dict.fromkeys(map(end, names)))
    return ends if len(names) == n_per_end * len(ends) else list(names)


def _last_name(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def scale_of_module(fields: Fields, name: str) -> float:
    """Returns the scale of a module's update, from the fields of adapter_config.json."""
    rank, alpha = rank_and_alpha(fields, name)
    return alpha / (rank**0.5 if fields["use_rslora"] else rank)


def _scale_factors(a: np.ndarray, b: np.ndarray, scale: float) -> _Factors:
    return _Factors(a, (b.astype(accumulation_dtype(b.dtype)) * scale).astype(b.dtype))
