"""Finds the kernels that "all-linear" excludes, with the reasons, and warns of them."""

import re
from collections.abc import Container, Mapping, Sequence

from lora_jax.adapt.user_code import user_line_of_call, warn
from lora_jax.core.axes import ADDED, KERNEL_NAMES, LOOKED_UP, MERGED, ObservedRoles
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Leaf
from lora_jax.rules import ALL_LINEAR, LoraRule, Rule
from lora_jax.select.matching import SIDE_LEAVES, LeafFacts, is_linear, is_matrix, matches
from lora_jax.select.named_heads import EMBEDDING, HEAD, head_reason

UNNAMED = "unnamed"
_MOST_PATTERNS = 8  # that a warning lists
_NUMBER = re.compile(r"(?:(?<=/)|(?<=_)|^)\d+(?=/|$)")  # of a layer: "layers/3", "block_3"
_LM_HEAD = re.compile(r"(.*/)?\w*lm_head(/.*)?")


class LeftOutWarning(UserWarning):
    """Warns of a kernel that "all-linear" excludes although the user may expect it."""


def left_out_reasons(
    tree: Mapping[str, Leaf],
    rules: Sequence[Rule],
    facts: LeafFacts,
    selected_paths: Container[str],
) -> dict[str, str]:
    """Returns the reason for each leaf that "all-linear" excludes, by path.

    A reason begins with its kind: "looked up", "added", "head", "embedding", "one-hot", "every use
    would merge" or "unnamed". Biases and norms, and leaves that a rule excludes, have none.

    Args:
      tree: the leaves by path.
      rules: the rules.
      facts: facts about the leaves beyond their names.
      selected_paths: paths of the leaves that a rule selects.
    """
    reasons: dict[str, str] = {}
    linear_rules = [rule for rule in rules if _is_all_linear(rule)]
    for path, leaf in tree.items():
        is_candidate = is_matrix(leaf) and leaf_name(path) not in SIDE_LEAVES
        if path in selected_paths or not is_candidate:
            continue
        if all(matches(rule.exclude, path) for rule in linear_rules):
            continue
        reason = _reason(path, leaf, facts)
        if reason:
            reasons[path] = reason
    return reasons


def _is_all_linear(rule: Rule) -> bool:
    """Returns True if a rule's targets are "all-linear" or contain it."""
    if not isinstance(rule, LoraRule):
        return False
    if isinstance(rule.targets, str):
        return rule.targets == ALL_LINEAR
    return ALL_LINEAR in rule.targets


def _reason(path: str, leaf: Leaf, facts: LeafFacts) -> str:
    """Returns the reason why "all-linear" excludes a leaf; "" for a part of a norm."""
    if facts.kinds is not None:
        return f"{facts.kinds.get(path, UNNAMED)}: this kind of leaf is no target"
    if facts.roles is None:
        is_vector = sum(size > 1 for size in leaf.shape) < 2
        if is_vector or is_linear(path, leaf, facts):
            return head_reason(path, None)
        unnamed = f"{UNNAMED}: its name does not say that it is a kernel"
        return head_reason(path, None) or unnamed
    observed = facts.roles.get(path)
    if not isinstance(observed, ObservedRoles):
        return ""
    if observed.not_kernel_kind in (LOOKED_UP, ADDED, MERGED):
        return f"{observed.not_kernel_kind}: {observed.not_kernel_reason}"
    return "" if observed.not_kernel_reason else head_reason(path, facts.roles)


def warn_of_left_out(reasons: Mapping[str, str], facts: LeafFacts) -> None:
    """Warns once of kernels that "all-linear" excludes although the user may expect them.

    Args:
      reasons: see `left_out_reasons`.
      facts: facts about the leaves. Where these contain kinds, nothing is left out by name.
    """
    if facts.kinds is not None or not reasons:
        return
    paragraphs: list[str] = []
    if facts.roles is None:
        for kind in (HEAD, EMBEDDING):
            paths = [path for path in reasons if _is_named_kernel(path, reasons[path], kind)]
            if paths:
                pronoun = "it" if len(paths) == 1 else "them"
                paragraphs.append(
                    f"left out as {kind}s: {', '.join(_patterns(paths))}; name {pronoun} in "
                    f"targets to adapt {pronoun}"
                )
        unnamed = [path for path, reason in reasons.items() if reason.startswith(UNNAMED)]
        if unnamed:
            lines = [
                "left out, because the names of these arrays do not say that they are kernels; "
                "pass trace=(fn, params, x), or name them in targets with in_axes= and out_axes=:",
                *_patterns(unnamed),
            ]
            paragraphs.append("\n  ".join(lines))
    merged = [path for path, reason in reasons.items() if reason.startswith(MERGED)]
    if merged:
        paragraphs.append(
            f"left out, because adapt would merge every use: {', '.join(_patterns(merged))}; name "
            "them in targets to adapt them all the same"
        )
    if paragraphs:
        warn("\n".join(paragraphs), LeftOutWarning, user_line_of_call())


def _is_named_kernel(path: str, reason: str, kind: str) -> bool:
    """Returns True if a kernel is excluded as this kind by its name, unless it is an LM head."""
    is_kernel = leaf_name(path) in KERNEL_NAMES
    return is_kernel and reason.startswith(f"{kind}:") and not _LM_HEAD.fullmatch(path)


def _patterns(paths: Sequence[str]) -> list[str]:
    """Returns distinct paths with ``*`` for numbers, and the number of arrays of each."""
    counts: dict[str, int] = {}
    for path in paths:
        pattern = _NUMBER.sub("*", path)
        counts[pattern] = counts.get(pattern, 0) + 1
    lines = [
        f"{pattern} ({count} arrays)" if count > 1 else pattern for pattern, count in counts.items()
    ]
    n_more = len(lines) - _MOST_PATTERNS
    return lines if n_more <= 0 else [*lines[:_MOST_PATTERNS], f"and {n_more} more"]
