"""Lists the features of an adapter that a serving engine refuses, or silently runs differently.

The engine is vLLM, whose loader reads adapter_config.json (``PEFTHelper``) and the names of the
tensors. It knows few of PEFT's fields and ignores all others, so a field that it does not know is a
problem just like one that it refuses. Of experts it needs every projection; see
`lora_jax.peft.served`. Its support of a model's architecture depends on its version and is not
checked.
"""

import os
import re
from collections.abc import Mapping

from lora_jax.core.types import Fields, Shaped
from lora_jax.models.decoder.families.registry import FAMILIES
from lora_jax.peft.config import FILE as CONFIG_FILE
from lora_jax.peft.config import INVOCATION, REFUSED, UNUSED, fields_of
from lora_jax.peft.experts import DOWN, GATE_UP
from lora_jax.peft.load import adapter_folder, read_tensors
from lora_jax.peft.modules import pattern_value
from lora_jax.peft.names import FILE, PREFIX
from lora_jax.variants import VARIANTS

MAX_RANK = 16  # vLLM's default
_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of its --max-lora-rank
_CLASSIFIERS = ("classifier", "score")
_A = ".lora_A.weight"
_BOTH = (".experts", ".experts.base_layer")
_AGAIN = "write it by --for-serving, which fills in zeros and changes the layout"
_MERGE = "merge it into the base (--merged)"
_SCALED = f"write it by --for-serving, which gives all one scale, or {_MERGE}"
_BY_PEFT = "merge it into the base by PEFT (merge_and_unload)"


def serving_problems(
    folder: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    max_rank: int = MAX_RANK,
    model_type: str | None = None,
) -> list[str]:
    """Lists a serving engine's problems with a PEFT adapter: a line each, with a remedy.

    Args:
      folder: a local folder, or a hub name; see `load`.
      adapter: the subfolder of one adapter, if the folder holds several.
      max_rank: the engine's limit, vLLM's ``--max-lora-rank``.
      model_type: the base's, which tells the layout that its experts need; None if unknown.

    Returns:
      The lines; [] for an adapter without a problem.

    Raises:
      PeftError: if the folder cannot be read.

    See the example of `lora_jax.peft.save`.
    """
    path = adapter_folder(folder, adapter)
    fields, _ = fields_of(path / CONFIG_FILE)
    if fields.get("peft_type", "LORA") != "LORA":
        return [f"peft_type {fields['peft_type']}: only LORA is served; {_BY_PEFT}"]
    tensors = read_tensors(path / FILE)
    return problems_of(fields, tensors, max_rank=max_rank, model_type=model_type)


def problems_of(
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
        *_start_problems(fields),
        *_trained_problems(fields, tensors),
        *_table_problems(fields, tensors),
        *_expert_problems(tensors, model_type),
        *_rank_problems(fields, _ranks(fields, tensors), max_rank),
    ]


def _ranks(fields: Fields, tensors: Mapping[str, Shaped]) -> dict[str, int]:
    """Returns r by the name of the module; of a layer's experts, by that of the parameter."""
    ranks = {}
    wanted = fields.get("target_parameters") or ()
    for key, tensor in tensors.items():
        for end in (".lora_A.weight", ".lora_embedding_A"):
            if not key.endswith(end):
                continue
            name, rank = key.removeprefix(PREFIX).removesuffix(end), int(tensor.shape[0])
            if name.endswith(_BOTH):  # A has the ranks of all experts
                inside = f"{PREFIX}{name}.base_layer{end}" in tensors
                stem, kind = name.removesuffix(".base_layer"), GATE_UP
                if stem == name and (inside or not any(GATE_UP in target for target in wanted)):
                    kind = DOWN
                name = f"{stem}.{kind}"
                rank = pattern_value(fields.get("rank_pattern"), name, fields.get("r", 8))
            ranks[name] = rank
    return ranks


def _expert_problems(tensors: Mapping[str, Shaped], model_type: str | None) -> list[str]:
    """Lists experts of which a projection is not adapted, or in another model's layout."""
    names = [key.removesuffix(_A) for key in tensors if key.endswith(_A)]
    joined = {name for name in names if name.endswith(".experts")}
    alone = sorted(name for name in joined if f"{name}.base_layer" not in names)
    apart: dict[str, list[str]] = {}
    for name in names:
        if (match := re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+", name)) is not None:
            apart.setdefault(match[1], []).append(match[2])
    alone += [layer for layer, of in apart.items() if len(of) < 3 * len(set(of))]
    problems = []
    if alone:
        problems.append(
            f"experts: one projection of theirs is not adapted, in {len(alone)} layers, and an "
            f"engine needs all of them; {_AGAIN}"
        )
    family = FAMILIES.get(model_type or "")
    if family is not None and (joined if len(family.expert_names) > 2 else apart):
        problems.append(f"experts: not in the layout that is read for {model_type}; {_AGAIN}")
    return problems


def _kind_problems(fields: Fields) -> list[str]:
    """Lists fields with which the adapter is something other than W + s·BA."""
    problems = []
    for variant in VARIANTS:
        field = variant.in_peft.field if variant.in_peft else None
        if field and fields.get(field):
            problems.append(f"{field}: {variant.name} is refused; {_MERGE}")
    for name in (INVOCATION, *REFUSED):
        if fields.get(name) in (*UNUSED, [], {}):
            continue
        if name == INVOCATION:
            remedy = "run it by PEFT or train.serve, for it cannot be merged either"
        elif name == "layer_replication":
            remedy = f"{_BY_PEFT}, layers repeated and all"
        else:
            remedy = _BY_PEFT
        problems.append(f"{name}: not supported; {remedy}")
    return problems


def _start_problems(fields: Fields) -> list[str]:
    """Lists initialisers for which PEFT changes the base at each load."""
    init = str(fields.get("init_lora_weights")).lower()
    why = f"init_lora_weights={init}: PEFT changes the base at each load, and engines do not"
    if init.startswith(("pissa", "olora")):
        return [f"{why}; convert it to plain LoRA (--adapter this folder --output another)"]
    if init.startswith("corda"):
        remedy = "save it by PEFT with path_initial_model_for_weight_conversion"
        return [f"{why}; {remedy}"]
    return [f"{why}; {_BY_PEFT}"] if init.startswith("loftq") else []


def _trained_problems(fields: Fields, tensors: Mapping[str, Shaped]) -> list[str]:
    problems = []
    if (bias := fields.get("bias") or "none") != "none":
        problems.append(f"bias={bias}: trained biases are refused; {_MERGE}")
    saved = fields.get("modules_to_save") or []
    if other := sorted(name for name in saved if name not in _CLASSIFIERS):
        problems.append(f"modules_to_save {', '.join(other)}: only a classifier may be; {_MERGE}")
    if fields.get("trainable_token_indices") or any(".token_adapter." in key for key in tensors):
        problems.append(f"trainable_token_indices: trained tokens are refused; {_MERGE}")
    return problems


def _table_problems(fields: Fields, tensors: Mapping[str, Shaped]) -> list[str]:
    """Lists adapted embeddings: vLLM has them for embed_tokens (and a head called lm_head).

    (PEFT saves these tables' own weights beside, a file that older versions of vLLM refuse.)
    """
    ends = ".lora_embedding_A"
    tables = [key.removesuffix(ends).removeprefix(PREFIX) for key in tensors if key.endswith(ends)]
    problems = [
        f"{name}: of embeddings only embed_tokens may be adapted; {_MERGE}"
        for name in tables
        if name.rsplit(".", 1)[-1] != "embed_tokens"
    ]
    if tables and fields.get("ensure_weight_tying"):
        problems.append(
            f"ensure_weight_tying: the adapter of {tables[0]} would not reach the head; {_MERGE}"
        )
    return problems


def _rank_problems(fields: Fields, ranks: Mapping[str, int], max_rank: int) -> list[str]:
    problems = []
    r, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    if (highest := max([r, *ranks.values()])) > max_rank:
        allowed = next((limit for limit in _MAX_RANKS if limit >= highest), None)
        remedy = f"start the engine with --max-lora-rank {allowed}" if allowed else _MERGE
        problems.append(f"rank {highest}: above the maximum of {max_rank}; {remedy}")

    def scale(alpha: float, r: int) -> float:
        return alpha / (r**0.5 if fields.get("use_rslora") else r)

    other = []
    for name, rank in ranks.items():
        own = pattern_value(fields.get("alpha_pattern"), name, alpha)
        if abs(scale(own, rank) - scale(alpha, r)) > 1e-5 * scale(alpha, r):
            other.append(name)
    if other:
        problems.append(
            f"rank_pattern, alpha_pattern: ignored, so {len(other)} modules, {other[0]} among "
            f"them, would run with lora_alpha's scale instead of their own; {_SCALED}"
        )
    return problems
