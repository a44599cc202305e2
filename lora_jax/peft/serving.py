"""Lists the features of an adapter that a serving engine rejects or misreads.

The engine is vLLM. Its loader reads adapter_config.json (``PEFTHelper``) and the names of the
tensors. It reads few of PEFT's fields and ignores the others, so both refused and unknown fields
are problems. It needs every projection of the experts; see `lora_jax.peft.served`. The architecture
of the model is not checked, because it depends on the version of vLLM.
"""

import os
import re
from collections.abc import Mapping

from lora_jax.core.types import Fields, Shaped
from lora_jax.models.decoder.families.registry import FAMILIES
from lora_jax.peft.config import (
    CONFIG_FILE,
    INVOCATION_FIELD,
    REFUSED_FIELDS,
    UNUSED_VALUES,
    read_fields,
)
from lora_jax.peft.experts import DOWN, GATE_UP
from lora_jax.peft.load import find_adapter_folder, read_tensors
from lora_jax.peft.modules import pattern_value
from lora_jax.peft.names import KEY_PREFIX, WEIGHTS_FILE
from lora_jax.variants import VARIANTS

MAX_RANK = 16  # vLLM's default
_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank
_CLASSIFIER_NAMES = ("classifier", "score")
_KEY_END_A = ".lora_A.weight"
_KEY_END_EMBEDDING_A = ".lora_embedding_A"
_EXPERT_MODULE_ENDS = (".experts", ".experts.base_layer")  # the ends of their names
# Remedies.
_REWRITE_REMEDY = "Write the adapter with --for-serving, which adds zeros and changes the layout."
_MERGE_REMEDY = "Merge the adapter into its base (--merged)."
_RESCALE_REMEDY = (
    "Write the adapter with --for-serving, which gives all modules one scale, or merge it into its "
    "base (--merged)."
)
_PEFT_MERGE_REMEDY = "Merge the adapter into its base with PEFT (merge_and_unload)."


def serving_problems(
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    max_rank: int = MAX_RANK,
    model_type: str | None = None,
) -> list[str]:
    """Lists the problems that a serving engine has with a PEFT adapter, with remedies.

    Args:
      folder: a local folder, or a hub name; see `load`.
      adapter: the subfolder of one adapter, if the folder holds several.
      max_rank: the engine's limit, vLLM's ``--max-lora-rank``.
      model_type: the base's, which decides the layout of its experts; None if unknown.

    Returns:
      A line for each problem; [] for an adapter without a problem.

    Raises:
      PeftError: if the folder cannot be read.

    See the example of `lora_jax.peft.save`.
    """
    path = find_adapter_folder(folder, adapter)
    fields, _ = read_fields(path / CONFIG_FILE)
    if fields.get("peft_type", "LORA") != "LORA":
        return [f"peft_type {fields['peft_type']}: Only LORA is served. {_PEFT_MERGE_REMEDY}"]
    tensors = read_tensors(path / WEIGHTS_FILE)
    return list_problems(fields, tensors, max_rank=max_rank, model_type=model_type)


def list_problems(
    fields: Fields,
    tensors: Mapping[str, Shaped],
    *,
    max_rank: int = MAX_RANK,
    model_type: str | None = None,
) -> list[str]:
    """Lists the problems as `serving_problems` does, from parsed fields and tensors by name.

    Args:
      fields: parsed from adapter_config.json.
      tensors: key -> tensor; only shapes count.
      max_rank, model_type: see `serving_problems`.
    """
    return [
        *_kind_problems(fields),
        *_initialiser_problems(fields),
        *_trained_problems(fields, tensors),
        *_table_problems(fields, tensors),
        *_expert_problems(tensors, model_type),
        *_rank_problems(fields, _rank_of_each_module(fields, tensors), max_rank),
    ]


def _rank_of_each_module(fields: Fields, tensors: Mapping[str, Shaped]) -> dict[str, int]:
    """Returns r by the name of each module, or of each parameter of experts."""
    targets = fields.get("target_parameters") or ()
    is_gate_up_targeted = any(GATE_UP in target for target in targets)
    ranks = {}
    for key, tensor in tensors.items():
        for end in (_KEY_END_A, _KEY_END_EMBEDDING_A):
            if not key.endswith(end):
                continue
            name = key.removeprefix(KEY_PREFIX).removesuffix(end)
            if not name.endswith(_EXPERT_MODULE_ENDS):
                ranks[name] = int(tensor.shape[0])
                continue
            # A has the ranks of all experts. Where both parameters are adapted, the factors of
            # gate_up_proj lie inside those of down_proj.
            experts = name.removesuffix(".base_layer")
            is_inside = name != experts
            has_inner_factors = f"{KEY_PREFIX}{name}.base_layer{end}" in tensors
            is_down = not is_inside and (has_inner_factors or not is_gate_up_targeted)
            parameter = f"{experts}.{DOWN if is_down else GATE_UP}"
            ranks[parameter] = pattern_value(fields, "rank_pattern", parameter, fields.get("r", 8))
    return ranks


def _expert_problems(tensors: Mapping[str, Shaped], model_type: str | None) -> list[str]:
    """Lists experts with a missing projection, or in the layout of another model."""
    modules = [key.removesuffix(_KEY_END_A) for key in tensors if key.endswith(_KEY_END_A)]
    packed_layers = {name for name in modules if name.endswith(".experts")}
    expert_indices: dict[str, list[str]] = {}  # of each projection, by layer
    for name in modules:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+", name)
        if match is not None:
            expert_indices.setdefault(match[1], []).append(match[2])
    incomplete_layers = [name for name in packed_layers if f"{name}.base_layer" not in modules]
    for layer, indices in expert_indices.items():
        n_experts = len(set(indices))
        has_all_projections = len(indices) >= 3 * n_experts  # gate, up and down
        if not has_all_projections:
            incomplete_layers.append(layer)
    problems = []
    if incomplete_layers:
        problems.append(
            f"experts: In {len(incomplete_layers)} layers, a projection is not adapted, but an "
            f"engine needs all projections. {_REWRITE_REMEDY}"
        )
    family = FAMILIES.get(model_type or "")
    if family is not None:
        has_gate_and_up = len(family.expert_names) > 2
        has_other_layout = bool(packed_layers) if has_gate_and_up else bool(expert_indices)
        if has_other_layout:
            problems.append(
                f"experts: The engine reads another layout for {model_type}. {_REWRITE_REMEDY}"
            )
    return problems


def _kind_problems(fields: Fields) -> list[str]:
    """Lists fields that make the adapter something other than W + s·BA."""
    problems = []
    for variant in VARIANTS:
        field = variant.in_peft.field if variant.in_peft else None
        if field is not None and fields.get(field):
            problems.append(f"{field}: {variant.name} is refused. {_MERGE_REMEDY}")
    for name in (INVOCATION_FIELD, *REFUSED_FIELDS):
        is_unused = fields.get(name) in (*UNUSED_VALUES, [], {})
        if is_unused:
            continue
        if name == INVOCATION_FIELD:
            remedy = "It cannot be merged, either. Run it with PEFT or train.serve."
        elif name == "layer_replication":
            remedy = f"{_PEFT_MERGE_REMEDY} PEFT then saves the repeated layers, too."
        else:
            remedy = _PEFT_MERGE_REMEDY
        problems.append(f"{name}: The field is not supported. {remedy}")
    return problems


def _initialiser_problems(fields: Fields) -> list[str]:
    """Lists initialisers with which PEFT changes the base at each load."""
    init = str(fields.get("init_lora_weights")).lower()
    if init.startswith(("pissa", "olora")):
        remedy = "Convert it to plain LoRA (--adapter this folder --output another)."
    elif init.startswith("corda"):
        remedy = "Save it in PEFT with path_initial_model_for_weight_conversion."
    elif init.startswith("loftq"):
        remedy = _PEFT_MERGE_REMEDY
    else:
        return []
    problem = "PEFT changes the base at each load, but engines do not."
    return [f"init_lora_weights={init}: {problem} {remedy}"]


def _trained_problems(fields: Fields, tensors: Mapping[str, Shaped]) -> list[str]:
    """Lists trained biases, trained modules other than a classifier, and trained tokens."""
    problems = []
    bias = fields.get("bias") or "none"
    if bias != "none":
        problems.append(f"bias={bias}: Trained biases are refused. {_MERGE_REMEDY}")
    saved_modules = fields.get("modules_to_save") or []
    refused_modules = sorted(name for name in saved_modules if name not in _CLASSIFIER_NAMES)
    if refused_modules:
        listing = ", ".join(refused_modules)
        problems.append(
            f"modules_to_save {listing}: Only a classifier may be saved whole. {_MERGE_REMEDY}"
        )
    has_token_rows = any(".token_adapter." in key for key in tensors)
    if fields.get("trainable_token_indices") or has_token_rows:
        problems.append(f"trainable_token_indices: Trained tokens are refused. {_MERGE_REMEDY}")
    return problems


def _table_problems(fields: Fields, tensors: Mapping[str, Shaped]) -> list[str]:
    """Lists adapted embeddings other than embed_tokens, and tied embeddings.

    PEFT also saves the weights of adapted tables. Older versions of vLLM refuse such a file.
    """
    keys = [key for key in tensors if key.endswith(_KEY_END_EMBEDDING_A)]
    tables = [key.removesuffix(_KEY_END_EMBEDDING_A).removeprefix(KEY_PREFIX) for key in keys]
    problems = [
        f"{name}: The only embedding that may be adapted is embed_tokens. {_MERGE_REMEDY}"
        for name in tables
        if name.rsplit(".", 1)[-1] != "embed_tokens"
    ]
    if tables and fields.get("ensure_weight_tying"):
        problems.append(
            f"ensure_weight_tying: The adapter of {tables[0]} would not reach the head. "
            f"{_MERGE_REMEDY}"
        )
    return problems


def _rank_problems(fields: Fields, ranks: Mapping[str, int], max_rank: int) -> list[str]:
    """Lists ranks above the engine's limit, and modules whose scale differs."""
    problems = []
    common_rank = fields.get("r", 8)
    common_alpha = fields.get("lora_alpha", 8)
    largest_rank = max([common_rank, *ranks.values()])
    if largest_rank > max_rank:
        sufficient_limits = [limit for limit in _MAX_RANKS if limit >= largest_rank]
        remedy = _MERGE_REMEDY
        if sufficient_limits:
            remedy = f"Start the engine with --max-lora-rank {sufficient_limits[0]}."
        problems.append(f"rank {largest_rank}: It exceeds the maximum of {max_rank}. {remedy}")

    def scale(alpha: float, rank: int) -> float:
        return alpha / (rank**0.5 if fields.get("use_rslora") else rank)

    common_scale = scale(common_alpha, common_rank)
    rescaled_modules = []
    for name, rank in ranks.items():
        alpha = pattern_value(fields, "alpha_pattern", name, common_alpha)
        if abs(scale(alpha, rank) - common_scale) > 1e-5 * common_scale:
            rescaled_modules.append(name)
    if rescaled_modules:
        problems.append(
            "rank_pattern, alpha_pattern: The engine ignores them, so "
            f"{len(rescaled_modules)} modules, such as {rescaled_modules[0]}, would run with a "
            f"wrong scale. {_RESCALE_REMEDY}"
        )
    return problems
