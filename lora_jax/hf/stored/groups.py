"""Modules in codes of different kinds, by compressed-tensors' targets."""

import re
from collections.abc import Collection, Mapping

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.stored.tensor import CodeFacts

_CLASSES = ("Linear", "Module")  # of the layers whose weights are kept in codes
_PARAMETER = re.compile(r"\.weight(_packed)?$")
_PATTERN = "re:"


def check_target(target: object) -> str:
    """Returns a target: a module's name, "re:" and a pattern, or a class.

    Raises:
      ConfigError: it is none of these.
    """
    try:
        if isinstance(target, str):
            re.compile(target.removeprefix(_PATTERN) if target.startswith(_PATTERN) else "")
            return target
        problem = f"is a {type(target).__name__}"
    except re.error as error:
        problem = f"is no pattern: {error}"
    raise ConfigError(f"config_groups: the target {target!r} {problem}")


class Targets:
    """Finds what config.json says of a module in codes.

    A name comes before patterns, these in their alphabetical order, and patterns before classes, as
    in compressed-tensors (``match_targets``). Patterns match from the beginning of a name.

    Args:
      facts: target -> what config.json says of its modules.
    """

    def __init__(self, facts: Mapping[str, CodeFacts]):
        self._facts = facts
        patterns = sorted(target for target in facts if target.startswith(_PATTERN))
        self._patterns = [(re.compile(p.removeprefix(_PATTERN)), facts[p]) for p in patterns]
        self._rest = next((facts[name] for name in _CLASSES if name in facts), None)

    def facts_of(self, tensor: str) -> CodeFacts | None:
        """Returns what the first target that names a weight's module says; None if none does."""
        module = _PARAMETER.sub("", tensor)
        if module in self._facts:
            return self._facts[module]
        matching = (facts for pattern, facts in self._patterns if pattern.match(module))
        return next(matching, self._rest)


def common_facts(facts: Collection[CodeFacts]) -> CodeFacts:
    """Returns what kinds have in common, for a module that no target names."""
    blocks, sizes = ({one[i] for one in facts} - {None} for i in range(2))
    block, size = (next(iter(each)) if len(each) == 1 else None for each in (blocks, sizes))
    return CodeFacts(block, size, symmetric=all(one.symmetric for one in facts))
