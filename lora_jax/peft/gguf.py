"""Writes an adapter as a GGUF file for llama.cpp.

llama.cpp computes Wx + s·B(Ax), too. It has one alpha for all tensors, so each tensor's s is
alpha / r. If a tensor has another s, its B is multiplied by the ratio. The rows of B are in the
order of W's rows.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.types import Fields, Model, Tree
from lora_jax.core.weight import LoraWeight, map_leaves
from lora_jax.folders import local_path
from lora_jax.hf.gguf.write import FILE_TYPES, FLOAT_TYPES, GGUFTensor, check_gguf_type, write_gguf
from lora_jax.models.decoder.gguf import order_rows_as_gguf
from lora_jax.models.decoder.gguf_form import check_form, make_gguf_namer, projections_in_fused
from lora_jax.models.decoder.keys import has_fused_experts
from lora_jax.peft.config import INVOCATION_FIELD
from lora_jax.peft.contents import adapter_contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import ROUTER, Expert, keys_of_expert, select_experts
from lora_jax.peft.names import KEY_PREFIX
from lora_jax.peft.served import FACTOR_KEY_ENDS, expert_factors, scale_of_module

_MERGE_REMEDY = "Merge the adapter into its base instead (--merged --gguf)."
# Features that llama.cpp's adapters lack, by the field of adapter_config.json that turns them on.
_FEATURE_OF_UNSUPPORTED_FIELD = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases on B",
    "modules_to_save": "modules that train in full",
    "trainable_token_indices": "rows of the embedding that train in full",
}


class AdaptedTensor(NamedTuple):
    """An adapted tensor: its Hugging Face name, A [..., r, in], B [..., out, r] and s."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """The number of A's rows."""
        return int(self.a.shape[-2])


def save_gguf(
    path: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    gguf_type: str = "f32",
    overwrite: bool = False,
) -> list[str]:
    """Writes an adapter as a GGUF file, completely or not at all. For example::

        peft.save_gguf("sql.gguf", model, params)     # llama-server -m base.gguf --lora sql.gguf

    Args:
      path: the file.
      model: the model of `lora_jax.models`.
      params: an adapted tree. Variants that `save` writes as plain LoRA are written as plain LoRA
        here, too. So are VeRA and other variants whose A and B follow from a seed.
      gguf_type: type of the factors: "f32", "f16" or "bf16".
      overwrite: replace a file that is there. Without it, an existing file is an error.

    Returns:
      Notes for users of the file, a sentence each; usually none.

    Raises:
      PeftError: for an adapter that llama.cpp cannot run; says what to do.
      ConfigError: for a model that llama.cpp does not run.
      FileExistsError: if the file exists.
    """
    path = local_path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} already exists. Name another file, or pass overwrite=True to replace it."
        )
    check_gguf_type(gguf_type, FLOAT_TYPES)
    notes = check_form(getattr(model, "config", None))
    # llama.cpp takes an alpha of 0 for a scale of 1.
    factors = [f for f in _adapted_tensors(model, params) if f.rank > 0 and f.scale != 0]
    if not factors:
        raise PeftError(
            "The adapter has no update to write: all of its ranks or scales are 0. Train it first."
        )
    # The most common alpha is the file's.
    alphas = Counter(f.scale * f.rank for f in factors)
    alpha, _ = alphas.most_common(1)[0]
    fields = {
        "general.architecture": model.config.family.gguf,
        "general.type": "adapter",
        "general.file_type": FILE_TYPES[gguf_type],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    gguf_name = make_gguf_namer(model.config)
    entries: list[GGUFTensor] = []
    for tensor_factors in factors:
        name = gguf_name(tensor_factors.name)
        entries += _gguf_tensors(tensor_factors, name, alpha, gguf_type.upper())
    write_gguf(path, fields, entries)
    n_rescaled = sum(not _alpha_gives_scale(alpha, f) for f in factors)
    if n_rescaled > 0:
        notes.append(
            f"A GGUF adapter has one alpha, here {alpha:g}. B was rescaled in {n_rescaled} of "
            f"{len(factors)} tensors, whose scale is not alpha / rank."
        )
    return notes


def _alpha_gives_scale(alpha: float, factors: AdaptedTensor) -> bool:
    """Returns True if the file's alpha determines a tensor's scale, to fp32 precision."""
    return bool(np.float32(alpha / factors.rank) == np.float32(factors.scale))


def _gguf_tensors(factors: AdaptedTensor, name: str, alpha: float, kind: str) -> list[GGUFTensor]:
    """Returns A and B of an adapted tensor as GGUF tensors of the type `kind`."""
    a = factors.a
    b = factors.b
    if not _alpha_gives_scale(alpha, factors):
        remaining_scale = factors.scale * factors.rank / alpha
        b = (b.astype(accumulation_dtype(b.dtype)) * remaining_scale).astype(b.dtype)
    if name == "token_embd.weight":  # llama.cpp looks up rows of A
        a = a.T
    return [
        GGUFTensor(name=f"{name}.lora_a", shape=a.shape, kind=kind, read=_make_fp32_reader(a)),
        GGUFTensor(name=f"{name}.lora_b", shape=b.shape, kind=kind, read=_make_fp32_reader(b)),
    ]


def _make_fp32_reader(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(array, np.float32)


def _adapted_tensors(model: Model, params: Tree) -> Iterator[AdaptedTensor]:
    """Yields the adapted tensors of a tree, by Hugging Face's names, in GGUF's order."""
    config = model.config
    fields, tensors = adapter_contents(
        model, map_leaves(_as_plain_lora, params), embedding_layers=False
    )
    _check_llama_cpp_support(fields, config)
    experts = select_experts(fields, model)
    expert_keys = {key for expert in experts for key in keys_of_expert(expert, experts)}
    for expert in experts:
        yield from _adapted_expert_tensors(expert, experts, tensors, fields, config)
    for key, a in tensors.items():
        for end_a, end_b in FACTOR_KEY_ENDS:
            if not key.endswith(end_a) or key in expert_keys:
                continue
            stem = key.removesuffix(end_a)
            module = stem.removeprefix(KEY_PREFIX)
            name = f"{module}.weight"
            b = order_rows_as_gguf(tensors[stem + end_b], name, config)
            yield AdaptedTensor(name=name, a=a, b=b, scale=scale_of_module(fields, module))


def _as_plain_lora(path: str, leaf: Any) -> Any:
    """Returns a weight as plain LoRA if its factors derive from a seed or from W."""
    is_compact = isinstance(leaf, LoraWeight) and leaf.is_compact
    return leaf.as_lora() if is_compact else leaf


def _check_llama_cpp_support(fields: Fields, config: Any) -> None:
    """Raises a PeftError for an adapter that llama.cpp cannot run."""
    missing_features = [
        feature for field, feature in _FEATURE_OF_UNSUPPORTED_FIELD.items() if fields.get(field)
    ]
    invocation = fields.get(INVOCATION_FIELD)
    if invocation:
        raise PeftError(
            f"The adapter is an activated LoRA, which acts from its invocation {invocation} on. "
            "Most programs that read GGUF would apply it to all tokens, and it cannot be merged. "
            "Run it with train.serve, or write PEFT's files (train.export --output)."
        )
    if fields["bias"] != "none":
        missing_features.append("trained biases")
    if missing_features:
        listing = " and no ".join(missing_features)
        raise PeftError(f"llama.cpp's adapters have no {listing}. {_MERGE_REMEDY}")
    target_names = {target.rsplit(".", 1)[-1] for target in fields["target_modules"] or ()}
    tables = sorted({"embed_tokens", "lm_head"} & target_names)
    if tables and config.tie_word_embeddings:
        raise PeftError(
            f"The adapter changes {' and '.join(tables)}. This model's head is tied to its "
            f"embedding, and llama.cpp's adapters cannot tell the two apart. {_MERGE_REMEDY}"
        )


def _adapted_expert_tensors(
    expert: Expert,
    experts: list[Expert],
    tensors: Mapping[str, np.ndarray],
    fields: Fields,
    config: Any,
) -> Iterator[AdaptedTensor]:
    """Yields the adapted tensors of one kernel of a layer's experts or router."""
    # a is [experts, r, in], and b is [experts, out, r].
    a, b_by_rank = expert_factors(expert, experts, tensors)
    b = b_by_rank.swapaxes(-1, -2)
    scale = scale_of_module(fields, expert.name)
    mlp = f"model.layers.{expert.layer}.mlp"
    if expert.parameter == ROUTER:
        name = f"{mlp}.{config.family.router_name}.weight"
        yield AdaptedTensor(name=name, a=a[0], b=b[0], scale=scale)
        return
    kernel = expert.path.split("/")[-2]
    stem = f"{mlp}.experts.{kernel}"
    # gpt-oss's fused kernel is two tensors in GGUF, which take their rows of B.
    if not has_fused_experts(config):
        yield AdaptedTensor(name=f"{stem}.weight", a=a, b=b, scale=scale)
        return
    for part, outputs in projections_in_fused(stem):
        yield AdaptedTensor(name=f"{part}.weight", a=a, b=b[:, outputs], scale=scale)
