"""Recognizes heads and embeddings, which "all-linear" excludes, by names and by a trace.

Names alone mislead: SigLIP's ``img/head`` is a projector between two models. Where a function was
traced, a leaf with such a name stays out only if the function shows that it is a head or a table.
"""

import re
from collections.abc import Mapping

from lora_jax.core.axes import EMBEDDING_NAMES, ObservedRoles
from lora_jax.core.paths import leaf_name

HEAD, EMBEDDING, ONE_HOT = "head", "embedding", "one-hot"
# Modules of embeddings, and of the heads that compute the model's output from the last hidden
# state.
_EMBEDDING = re.compile(r"embed\w*|\w*embeddings?|wte|wpe")
_HEAD = re.compile(r"\w*lm_head|head|unembed\w*|classifier|score|logits")
# In masked language models, the module of the output layer contains other layers, too.
_DENSE_BEFORE_HEAD = re.compile(r"(.*/)?lm_head/dense/\w+")
_DECODER_OF_BERT = re.compile(r"((.*/)?cls/predictions/decoder)/\w+")


def is_table_or_head(path: str) -> bool:
    """Returns True if a leaf is an embedding or an output head, by its name."""
    return leaf_name(path) in EMBEDDING_NAMES or named_module(path) is not None


def named_module(path: str) -> str | None:
    """Returns the outermost module of a leaf that has the name of a head or an embedding.

    A head's own layers may be called ``embed``, so the outermost module counts.

    >>> from lora_jax.select.named_heads import named_module
    >>> named_module("model/time_embedding/linear_1/kernel")
    'model/time_embedding'
    """
    if _DENSE_BEFORE_HEAD.fullmatch(path):
        return None
    decoder = _DECODER_OF_BERT.fullmatch(path)
    if decoder:
        return decoder[1]
    names = path.split("/")
    for index, name in enumerate(names):
        if _EMBEDDING.fullmatch(name) or _HEAD.fullmatch(name):
            return "/".join(names[: index + 1])
    return None


def head_reason(path: str, roles: Mapping[str, ObservedRoles | str] | None) -> str:
    """Returns the reason why "all-linear" excludes a kernel as a head or a table, or "".

    Args:
      path: path of the kernel.
      roles: the observed roles of each leaf; None: names decide.
    """
    if not is_table_or_head(path):
        return ""
    if roles is None:
        module = leaf_name(named_module(path) or path)
        kind = EMBEDDING if _EMBEDDING.fullmatch(module) else HEAD
        return f"{kind}: without a trace, the name {module!r} in its path decides"
    observed = roles.get(path)
    if isinstance(observed, ObservedRoles) and observed.product_order.is_one_hot_lookup:
        return f"{ONE_HOT}: the function multiplies one-hot vectors by it, as by a table"
    # The whole module is a head if one of its kernels acts as one.
    module = named_module(path) or path
    for leaf_path, leaf_roles in roles.items():
        is_in_module = leaf_path == module or leaf_path.startswith(f"{module}/")
        if not is_in_module or not isinstance(leaf_roles, ObservedRoles):
            continue
        if leaf_roles.not_kernel_reason:
            continue
        if leaf_roles.product_order.is_last:
            return f"{HEAD}: no other weight's product follows that of {leaf_path!r}"
        if leaf_roles.product_order.is_output:
            return f"{HEAD}: the product of {leaf_path!r} is an output of the function"
    return ""
