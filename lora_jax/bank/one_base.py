"""The base that adapters share, and a check that a tree is over it."""

import jax

from lora_jax.bank.stored import BankError
from lora_jax.core.base import is_abstract
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import Trained, is_node, leaves_of
from lora_jax.saving.fingerprint import base_fingerprint, differing


class OneBase:
    """The base of all adapters of a bank, or of those that train side by side.

    Attributes:
      leaves: the base's arrays, by path.
    """

    def __init__(self, params: Tree) -> None:
        self.leaves = _arrays_of(params)
        self._sums: dict[str, dict[str, str]] = {}

    def check(self, what: str, tree: Tree) -> None:
        """Checks that the frozen leaves of an adapted tree are the base's.

        Leaves that are the same objects are equal; of others, checksums are compared (see
        `lora_jax.saving.fingerprint`). Those of the base are computed once.

        Args:
          what: the call and the adapter, for messages.
          tree: an adapted tree.

        Raises:
          BankError: the paths or the values differ.
        """
        theirs = _arrays_of(tree)
        if only := sorted(theirs.keys() ^ self.leaves.keys()):
            who = "its tree" if only[0] in theirs else "the base here"
            raise BankError(
                f"{what} is over another base: only {who} has {only[0]!r}, among {len(only)} such "
                f"leaves. {_REMEDY}"
            )
        others = {}
        for path, leaf in theirs.items():
            here = leaf.base if is_node(leaf) and not isinstance(leaf, Trained) else leaf
            mine = self.leaves[path]
            if not (isinstance(leaf, Trained) or is_abstract((here, mine)) or _is(here, mine)):
                others[path] = here
        fingerprint = base_fingerprint(others)
        for path in others.keys() - self._sums.keys():
            self._sums[path] = base_fingerprint({path: self.leaves[path]})
        expected = {k: v for path in others for k, v in self._sums[path].items()}
        if wrong := differing(expected, fingerprint):
            raise BankError(
                f"{what} is over another base: {len(wrong)} frozen leaves have other values, "
                f"{', '.join(wrong[:3])} among them. {_REMEDY}"
            )


def _arrays_of(tree: Tree) -> dict[str, Leaf]:
    """Returns the arrays and nodes of a tree, by path."""
    return {path: leaf for path, leaf in leaves_of(tree)[0] if is_node(leaf) or _is_array(leaf)}


def _is_array(leaf: object) -> bool:
    return hasattr(leaf, "shape")


def _is(here: Leaf, mine: Leaf) -> bool:
    """Returns True if two leaves are the same object, or hold the same arrays (codes, say)."""
    forms: list[jax.tree_util.PyTreeDef] = [jax.tree.structure(leaf) for leaf in (here, mine)]
    if here is mine or forms[0] != forms[1]:
        return here is mine
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(mine), strict=True)
    return all(a is b for a, b in pairs)


_REMEDY = (
    "Adapt the base that is here, or load the adapter onto it (lora_jax.load_adapter(folder, "
    "params)); or give allow_base_mismatch=True to use its factors over this base"
)
