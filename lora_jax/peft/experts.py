"""Maps the adapters of experts, which in transformers are two parameters of one module.

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
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import Module, ends_with
from lora_jax.peft.names import PREFIX

GATE_UP, DOWN, ROUTER = "gate_up_proj", "down_proj", "weight"
# In transformers 5, PEFT takes these names of projections for those of the experts alone.
TAKEN_FOR_EXPERTS = ("qwen3_next", "glm4_moe", "deepseek_v3")
OF_MLP = re.compile(r"\.mlp\.(shared_experts?\.|)(?:gate|up|down)_proj\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert(Module):
    """A kernel of one layer's experts or its router, as a part of one of PEFT's parameters.

    Attributes:
      parameter: "gate_up_proj", "down_proj", or a router's "weight".
      half: the half of gate_up_proj's outputs: 0 or 1; None for the others, and for all of them.
      n: the number of experts in the parameter; 1 for a router.
      layer: the layer's number.
    """

    parameter: str
    half: int | None
    n: int
    layer: int


def experts_of(model: Model) -> list[Expert]:
    """Lists every kernel of a model's experts and routers, layer by layer; [] without experts."""
    config = getattr(model, "config", None)
    n = getattr(config, "num_experts", None)
    if config is None or not n:
        return []
    router = config.family.router_name
    *first, down = config.family.expert_names
    parts = (
        (router, router, ROUTER, None, 1),
        *(
            (f"experts/{name}", "experts", GATE_UP, half if len(first) > 1 else None, n)
            for half, name in enumerate(first)
        ),
        (f"experts/{down}", "experts", DOWN, None, n),
    )
    return [
        Expert(
            name=f"model.layers.{layer}.mlp.{module}.{parameter}",
            path=f"{stack}/{config.family.mlp_name}/{kernel}/kernel",
            index=(index,),
            layer=layer,
            kind="router" if parameter == ROUTER else "experts",
            parameter=parameter,
            half=half,
            n=packed,
        )
        for layer in range(config.num_hidden_layers)
        if config.kind_of(layer).sparse
        for stack, index in [config.place_of(layer)]
        for kernel, module, parameter, half, packed in parts
    ]


def can_hold(model: Model, path: str) -> bool:
    """Returns True where PEFT's adapters have a name for a weight of a model.

    They have none for projections of MLPs that PEFT takes for those of experts; see `save`.

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
    of_mlp = OF_MLP.search(path.replace("/", ".") + ".")
    return of_mlp is None or getattr(model.config, "model_type", None) not in TAKEN_FOR_EXPERTS


def end_of(name: str) -> str:
    """Returns the end of a parameter's name that is the same in all layers."""
    return ".".join(name.split(".")[-2:])


def targeted_experts(config: Fields, model: Model) -> list[Expert]:
    """Lists the kernels of experts and routers that target_parameters selects.

    Args:
      config: the fields of a PEFT configuration.
      model: the model.

    Raises:
      PeftError: for a name of another parameter, and for fields that do not go with experts.
    """
    wanted = config["target_parameters"] or []
    if not wanted:
        return []
    available = experts_of(model)
    names = dict.fromkeys(expert.name for expert in available)
    for target in wanted:
        if target not in names and not any(ends_with(name, [target]) for name in names):
            known = ", ".join(dict.fromkeys(map(end_of, names)))
            raise PeftError(
                f"target_parameters names {target!r}; what can be adapted as a parameter here is "
                + (known or "nothing, for the model has no experts: use target_modules")
            )
    for name in ("use_dora", "lora_bias", "lora_dropout"):
        if config[name]:
            raise PeftError(f"{name} does not go with target_parameters, in PEFT as here")
    return [e for e in available if e.name in wanted or ends_with(e.name, wanted)]


def keys_of_expert(expert: Expert, chosen: Sequence[Module]) -> tuple[str, str]:
    """Returns the keys of A and B; if both are adapted, gate_up_proj's lie inside down_proj's."""
    layer = expert.name.removesuffix(f".{expert.parameter}")
    both = expert.parameter == GATE_UP and any(m.name == f"{layer}.{DOWN}" for m in chosen)
    stem = f"{PREFIX}{layer}{'.base_layer' if both else ''}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def unpack_a(a: np.ndarray, n: int) -> np.ndarray:
    """Returns A, [experts·r, in], as [experts, r, in]."""
    return a.reshape(n, -1, a.shape[-1])


def unpack_b(b: np.ndarray, n: int, half: int | None) -> np.ndarray:
    """Returns B, [out, r·experts], as [experts, r, out], or a half of its outputs."""
    unpacked = b.reshape(b.shape[0], -1, n).transpose(2, 1, 0)
    return unpacked if half is None else np.split(unpacked, 2, axis=-1)[half]


def pack(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns [experts, r, in] and [experts, r, out] as PEFT's A and B."""
    n, rank, fan_out = b.shape
    return a.reshape(n * rank, -1), b.transpose(2, 1, 0).reshape(fan_out, rank * n)


def side_by_side(
    gate: tuple[np.ndarray, np.ndarray, float] | None,
    up: tuple[np.ndarray, np.ndarray, float] | None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Joins (A, B, s) of gate_up_proj's halves; None stands for a half without an adapter."""
    if gate is None or up is None:
        a, b, s = gate or up  # type: ignore[misc]
        nothing = np.zeros_like(b)
        return a, np.concatenate([nothing, b] if gate is None else [b, nothing], axis=-1), s
    (a_gate, b_gate, s_gate), (a_up, b_up, s_up) = gate, up
    if a_gate.shape == a_up.shape and np.array_equal(a_gate, a_up) and s_gate == s_up:
        return a_gate, np.concatenate([b_gate, b_up], axis=-1), s_gate
    b_up = b_up * np.asarray(s_up / s_gate, b_up.dtype)
    beside_gate = np.zeros((*b_gate.shape[:2], b_up.shape[-1]), b_up.dtype)
    beside_up = np.zeros((*b_up.shape[:2], b_gate.shape[-1]), b_up.dtype)
    b = np.block([[b_gate, beside_gate], [beside_up, b_up]])
    return np.concatenate([a_gate, a_up], axis=1), b, s_gate
