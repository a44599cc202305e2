"""Writes an adapter as a GGUF file for llama.cpp.

llama.cpp computes Wx + s·B(Ax) as well. It has one alpha for all tensors, of which each has s =
alpha / r: where that is not a tensor's s, B holds the rest. The rows of B are in the order of W's.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.magnitude import wide
from lora_jax.core.types import Fields, Model, Tree
from lora_jax.core.weight import LoraWeight, map_leaves
from lora_jax.folders import local_path
from lora_jax.hf.gguf.write import FILE_TYPES, FLOATS, Entry, check_type, write_gguf
from lora_jax.models.decoder.gguf import pair_rows
from lora_jax.models.decoder.gguf_form import check_form, fused_parts, name_of
from lora_jax.models.decoder.keys import has_fused_experts
from lora_jax.peft.config import INVOCATION
from lora_jax.peft.contents import contents
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import ROUTER, Expert, keys_of_expert, targeted_experts
from lora_jax.peft.names import PREFIX
from lora_jax.peft.served import ENDS, expert_factors, scale_of

_WAY_OUT = "merge it into its base, which llama.cpp runs (--merged --gguf)"
# Fields of adapter_config.json that stand for something llama.cpp's adapters lack.
_LACKING = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases on B",
    "modules_to_save": "modules that train in full",
    "trainable_token_indices": "rows of the embedding that train in full",
}


class Factors(NamedTuple):
    """An adapted tensor: Hugging Face's name, A [..., r, in], B [..., out, r] and s."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float


def save_gguf(
    path: str | os.PathLike[str],
    model: Model,
    params: Tree,
    *,
    gguf_type: str = "f32",
    overwrite: bool = False,
) -> list[str]:
    """Writes an adapter as a GGUF file, which appears whole or not at all. For example::

        peft.save_gguf("sql.gguf", model, params)     # llama-server -m base.gguf --lora sql.gguf

    Args:
      path: the file.
      model: the model of `lora_jax.models`.
      params: an adapted tree. What `save` writes as plain LoRA is written so here, too; and so are
        VeRA and other variants whose A and B follow from a seed.
      gguf_type: type of the factors: "f32", "f16" or "bf16".
      overwrite: replace a file that is there. Without it, an existing file is an error.

    Returns:
      What a user of the file should know, a sentence each; mostly nothing.

    Raises:
      PeftError: for an adapter that llama.cpp has no form for; says what to do.
      ConfigError: for a model that it does not run.
      FileExistsError: if the file exists.
    """
    path = local_path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; name another file, or give overwrite=True")
    check_type(gguf_type, FLOATS)
    notes = check_form(getattr(model, "config", None))
    # llama.cpp takes an alpha of 0 for a scale of 1.
    factors = [f for f in _factors(model, params) if f.a.shape[-2] and f.scale]
    if not factors:
        raise PeftError("the adapter changes nothing: there is nothing to write")
    alpha = Counter(f.scale * f.a.shape[-2] for f in factors).most_common(1)[0][0]
    arch = model.config.family.gguf
    fields = {
        "general.architecture": arch,
        "general.type": "adapter",
        "general.file_type": FILE_TYPES[gguf_type],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    named = name_of(model.config)
    entries = [e for f in factors for e in _entries(f, named(f.name), alpha, gguf_type.upper())]
    write_gguf(path, fields, entries)
    folded = sum(not _says(f, alpha) for f in factors)
    if folded:
        notes.append(
            f"GGUF has one alpha, {alpha:g}: of {folded} of {len(factors)} tensors, whose alpha / "
            "rank is another, B holds the rest of the scale"
        )
    return notes


def _says(factors: Factors, alpha: float) -> bool:
    """Returns True if the file's alpha gives a tensor's scale, as fp32 has it."""
    return bool(np.float32(alpha / factors.a.shape[-2]) == np.float32(factors.scale))


def _entries(factors: Factors, name: str, alpha: float, kind: str) -> Iterator[Entry]:
    a, b = factors.a, factors.b
    if not _says(factors, alpha):
        rest = factors.scale * a.shape[-2] / alpha
        b = (b.astype(wide(b.dtype)) * rest).astype(b.dtype)
    if name == "token_embd.weight":  # llama.cpp looks rows of A up
        a = a.T
    for end, array in (("lora_a", a), ("lora_b", b)):
        yield Entry(f"{name}.{end}", array.shape, kind, _reader(array))


def _reader(array: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(array, np.float32)


def _factors(model: Model, params: Tree) -> Iterator[Factors]:
    """Yields the adapted tensors of a tree, under Hugging Face's names and in GGUF's order."""
    config = model.config
    fields, tensors = contents(model, map_leaves(_plain, params), embedding_layers=False)
    _check(fields, config)
    chosen = targeted_experts(fields, model)
    of_experts = {key for expert in chosen for key in keys_of_expert(expert, chosen)}
    for expert in chosen:
        yield from _expert_tensors(expert, chosen, tensors, fields, config)
    for key, a in tensors.items():
        for end_a, end_b in ENDS:
            if not key.endswith(end_a) or key in of_experts:
                continue
            stem = key.removesuffix(end_a)
            name = stem.removeprefix(PREFIX)
            b = pair_rows(tensors[stem + end_b], f"{name}.weight", config)
            yield Factors(f"{name}.weight", a, b, scale_of(fields, name))


def _plain(path: str, leaf: Any) -> Any:
    """Returns a weight as plain LoRA where its factors follow from a seed or from W."""
    return leaf.as_lora() if isinstance(leaf, LoraWeight) and leaf.is_compact else leaf


def _check(fields: Fields, config: Any) -> None:
    """Raises a PeftError for an adapter that llama.cpp has no form for."""
    lacking = [what for field, what in _LACKING.items() if fields.get(field)]
    if tokens := fields.get(INVOCATION):
        raise PeftError(
            f"the adapter is an activated LoRA, which acts from its invocation {tokens} on: most "
            "programs that read GGUF would run it on all tokens, and it cannot be merged. Run it "
            "by train.serve, or write PEFT's files (train.export --output)"
        )
    if fields["bias"] != "none":
        lacking.append("trained biases")
    if lacking:
        raise PeftError(f"llama.cpp's adapters have no {' and no '.join(lacking)}: {_WAY_OUT}")
    tables = {"embed_tokens", "lm_head"} & {
        target.rsplit(".", 1)[-1] for target in fields["target_modules"] or ()
    }
    if tables and config.tie_word_embeddings:
        raise PeftError(
            f"the adapter is on {' and '.join(sorted(tables))}, and this model's head is its "
            f"embedding, which llama.cpp's adapters cannot tell apart: {_WAY_OUT}"
        )


def _expert_tensors(
    expert: Expert,
    chosen: list[Expert],
    tensors: Mapping[str, np.ndarray],
    fields: Fields,
    config: Any,
) -> Iterator[Factors]:
    a, b = expert_factors(expert, chosen, tensors)
    b, scale = b.swapaxes(-1, -2), scale_of(fields, expert.name)
    mlp = f"model.layers.{expert.layer}.mlp"
    if expert.parameter == ROUTER:
        yield Factors(f"{mlp}.{config.family.router_name}.weight", a[0], b[0], scale)
        return
    name = f"{mlp}.experts.{expert.path.split('/')[-2]}"
    if not has_fused_experts(config):
        yield Factors(f"{name}.weight", a, b, scale)
        return
    for part, cut in fused_parts(name):
        yield Factors(f"{part}.weight", a, b[:, cut], scale)
