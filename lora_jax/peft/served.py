"""Rewrites an adapter in the layout that serving engines read.

The engine is vLLM. It scales every update by lora_alpha / r, whatever rank_pattern and
alpha_pattern say: so all modules get one rank, filled up with zeros, and B holds the scale. Of
experts it needs every projection of each, so that zeros stand for those that are not adapted:

- gpt-oss: PEFT's two tensors of a layer, as `lora_jax.peft.experts` packs them;
- Mixtral, Qwen's mixtures: a module for each expert's gate, up and down, under the names of the
  checkpoint, as PEFT names them in transformers 4.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.core.magnitude import wide
from lora_jax.core.types import Fields, JsonObject, Model
from lora_jax.models.decoder.keys import has_fused_experts
from lora_jax.peft.config import INVOCATION
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import (
    GATE_UP,
    ROUTER,
    Expert,
    end_of,
    keys_of_expert,
    pack,
    targeted_experts,
    unpack_a,
    unpack_b,
)
from lora_jax.peft.modules import rank_and_alpha
from lora_jax.peft.names import PREFIX

ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


class _Factors(NamedTuple):
    """A [n, r, in] and B [n, r, out] of n experts, or of one module; B has the scale."""

    a: np.ndarray
    b: np.ndarray

    def filled(self, rank: int) -> "_Factors":
        """Returns factors of a higher rank, filled up with zeros."""
        more = ((0, 0), (0, rank - self.a.shape[1]), (0, 0))
        return _Factors(np.pad(self.a, more), np.pad(self.b, more))


_ByName = dict[str, _Factors]  # by the name of a module, which the keys begin with


def as_served(
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
        raise PeftError(f"peft_type {fields['peft_type']}: engines serve LORA alone; merge it")
    if fields.get(INVOCATION):
        raise PeftError(
            "vLLM's layout has no activated LoRA: leave out for_serving, and run it by PEFT or "
            "train.serve"
        )
    chosen = targeted_experts(fields, model)
    of_experts = {key for expert in chosen for key in keys_of_expert(expert, chosen)}
    out = {key: tensor for key, tensor in tensors.items() if key not in of_experts}
    factors_by_key: dict[tuple[str, str], _Factors] = {}
    for key in list(out):
        for end_a, end_b in ENDS:
            if key.endswith(end_a):
                stem = key.removesuffix(end_a)
                a, b = out.pop(key), out.pop(stem + end_b)
                scale = scale_of(fields, stem.removeprefix(PREFIX))
                factors_by_key[key, stem + end_b] = _scaled(a[None], b.T[None], scale)
    changes: JsonObject = {}
    if chosen:
        of_names, changes = _experts(fields, tensors, chosen, model)
        factors_by_key |= {
            (PREFIX + name + ENDS[0][0], PREFIX + name + ENDS[0][1]): factors
            for name, factors in of_names.items()
        }
    rank = max((factors.a.shape[1] for factors in factors_by_key.values()), default=1)
    for keys, factors in factors_by_key.items():
        out |= zip(keys, map(np.ascontiguousarray, pack(*factors.filled(rank))), strict=True)
    changes |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    return {**fields, **changes}, out


def _experts(
    fields: Fields, tensors: Mapping[str, np.ndarray], chosen: Sequence[Expert], model: Model
) -> tuple[_ByName, JsonObject]:
    """Returns the factors of experts and routers by their modules, and the fields on targets."""
    config = model.config
    joined, n = has_fused_experts(config), config.num_experts
    depth = config.num_hidden_layers - config.first_k_dense_replace
    routers: _ByName = {}
    kernels: dict[str, _ByName] = {}  # of each layer's experts, by the name of the kernel
    for expert in chosen:
        factors = _scaled(*expert_factors(expert, chosen, tensors), scale_of(fields, expert.name))
        mlp = f"model.layers.{expert.layer}.{config.family.mlp_name}"
        if expert.parameter == ROUTER:
            routers[f"{mlp}.{config.family.router_name}"] = factors
        else:
            kernels.setdefault(mlp, {})[expert.path.split("/")[-2]] = factors
    factors_by_key, experts = dict(routers), []
    for mlp, of in kernels.items():
        dtype = next(iter(of.values())).a.dtype
        for name, (fan_in, fan_out) in config.expert_shapes.items():
            nothing = _Factors(np.zeros((n, 1, fan_in), dtype), np.zeros((n, 1, fan_out), dtype))
            factors = of.get(name, nothing)
            if joined:
                experts.append(f"{mlp}.experts.{name}")
                factors_by_key[f"{mlp}.experts{'.base_layer' if name == GATE_UP else ''}"] = factors
                continue
            for e in range(n):
                experts.append(f"{mlp}.experts.{e}.{name}")
                factors_by_key[experts[-1]] = _Factors(*(x[e : e + 1] for x in factors))
    if joined:
        names = _shortened(experts, depth, end_of)
        names += _shortened([f"{name}.{ROUTER}" for name in routers], depth, end_of)
        return factors_by_key, {"target_parameters": sorted(names)}
    names = list(fields["target_modules"] or [])
    if config.shared_expert_intermediate_size:  # whose projections have the same last names
        names += _shortened(experts, depth, lambda name: ".".join(name.split(".")[-3:]))
    else:
        names += _shortened(experts, depth * n, _last)
    names += _shortened(routers, depth, _last)
    return factors_by_key, {"target_modules": sorted(names), "target_parameters": None}


def expert_factors(
    expert: Expert, chosen: Sequence[Expert], tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [experts, r, in] and B [experts, r, out] of a kernel of a layer's experts.

    Args:
      expert: the kernel.
      chosen: all that the adapter adapts.
      tensors: PEFT's, by key.
    """
    key_a, key_b = keys_of_expert(expert, chosen)
    a, b = unpack_a(tensors[key_a], expert.n), unpack_b(tensors[key_b], expert.n, expert.half)
    if expert.half is None:
        return a, b
    used = b.any(axis=(0, 2))  # without the ranks that the other half alone uses
    return a[:, used], b[:, used]


def _shortened(names: Iterable[str], each: int, end: Callable[[str], str]) -> list[str]:
    """Returns the ends of names, if these name `each` modules; else the names."""
    names = list(names)
    ends = list(dict.fromkeys(map(end, names)))
    return ends if len(names) == each * len(ends) else names


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def scale_of(fields: Fields, name: str) -> float:
    """Returns the factor of a module's update, by the fields of adapter_config.json."""
    rank, alpha = rank_and_alpha(fields, name)
    return alpha / (rank**0.5 if fields["use_rslora"] else rank)


def _scaled(a: np.ndarray, b: np.ndarray, scale: float) -> _Factors:
    return _Factors(a, (b.astype(wide(b.dtype)) * scale).astype(b.dtype))
