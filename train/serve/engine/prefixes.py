"""Keys and values of tokens that were computed, to be found again: bounded, and by owner."""

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from lora_jax.models.sampling.blocks import CacheBlock


@dataclasses.dataclass(frozen=True)
class PrefixScope:
    """By whom, and for which weights, tokens were computed: what others have is not found.

    Attributes:
      owner: the owner; one finds nothing of another's, by times of answers neither.
      adapter: the adapter's arrays, which never change; None for the base. They are known by
        identity, and are not kept alive.
      kind: what else the numbers depend on.
    """

    owner: Hashable
    adapter: object | None
    kind: Hashable = None


@dataclasses.dataclass(eq=False)
class _Node:
    """A block of a text that begins as its ancestors say.

    Attributes:
      block: the block; None in the root, the empty text.
      later: the texts that go on from here, by their next tokens.
    """

    parent: "_Node | None" = None
    ids: bytes = b""
    block: CacheBlock | None = None
    later: "dict[bytes, _Node]" = dataclasses.field(default_factory=dict)

    @property
    def has_memory(self) -> bool:
        """True where the block has the memory of linear layers."""
        return self.block is not None and self.block.recurrent is not None


class _Owned:
    """The texts of an owner.

    Attributes:
      used: blocks, those used last at the end. A text's beginning is used whenever the text is, and
        counts as used after it: so the first block is none that others begin with.
      size: bytes of all blocks.
    """

    def __init__(self) -> None:
        self.roots: weakref.WeakKeyDictionary[object, dict[Hashable, _Node]]
        self.roots = weakref.WeakKeyDictionary()
        self.used: OrderedDict[_Node, None] = OrderedDict()
        self.size = 0

    def root(self, scope: PrefixScope) -> _Node | None:
        """Returns the empty text of a scope; None for a scope without any."""
        return self.roots.get(_key(scope), {}).get(scope.kind)

    def keep(self, scope: PrefixScope, root: _Node) -> None:
        """Has a scope begin with an empty text."""
        self.roots.setdefault(_key(scope), {})[scope.kind] = root

    def _forget(self, root: _Node) -> None:
        for kinds in self.roots.values():
            for kind in [kind for kind, node in kinds.items() if node is root]:
                del kinds[kind]

    def evict(self) -> None:
        """Forgets the part that was not used for the longest time.

        That is a memory of linear layers after which texts go on in one way alone, since few will
        go on in another; then blocks.
        """
        for node in self.used:
            if len(node.later) == 1 and node.has_memory:
                assert node.block is not None
                self.replace(node, node.block._replace(recurrent=None))
                return
        node, _ = self.used.popitem(last=False)
        assert node.parent is not None and node.block is not None
        del node.parent.later[node.ids]
        self.size -= node.block.size
        if node.parent.block is None and not node.parent.later:
            self._forget(node.parent)

    def replace(self, node: _Node, block: CacheBlock) -> None:
        """Gives a node a block, in the place of the one that it may have."""
        self.size += block.size - (node.block.size if node.block else 0)
        node.block = block


class _Base:
    """Stands for the base among adapters."""


_BASE = _Base()


def _key(scope: PrefixScope) -> object:
    return _BASE if scope.adapter is None else scope.adapter


class PrefixStore:
    """Keeps blocks of texts in a tree for each scope, so that equal beginnings are kept once.

    If there is no room, the owner that has the most gives up what it did not use for the longest
    time: nobody's many texts drive out those of others with fewer.
    """

    def __init__(self, chunk: int, most: int, needs_memory: bool = False) -> None:
        """Begins without any.

        Args:
          chunk: tokens of a block.
          most: bytes of all blocks at most.
          needs_memory: whether a text goes on only from a block that has the memory of linear
            layers.
        """
        self._chunk, self._most, self._needs_memory = chunk, most, needs_memory
        self._owners: dict[Hashable, _Owned] = {}

    @property
    def size(self) -> int:
        """The bytes of all blocks; any thread may ask."""
        return sum(owned.size for owned in [*self._owners.values()])

    def clear(self) -> None:
        """Forgets all."""
        self._owners.clear()

    def find(self, scope: PrefixScope, ids: np.ndarray) -> list[CacheBlock]:
        """Returns the blocks that a text can go on from, in order; they count as used.

        Args:
          scope: the scope.
          ids: [n] int32.
        """
        if scope.owner not in self._owners:
            return []
        owned, nodes = self._owners[scope.owner], list[_Node]()
        node = owned.root(scope) or _Node()
        for part in self._parts(ids):
            if (later := node.later.get(part)) is None:
                break
            nodes.append(node := later)
        while self._needs_memory and nodes and not nodes[-1].has_memory:
            nodes.pop()
        for node in reversed(nodes):
            owned.used.move_to_end(node)
        return [node.block for node in nodes if node.block is not None]

    def add(self, scope: PrefixScope, ids: np.ndarray, make: Callable[[], CacheBlock]) -> None:
        """Keeps the last block of a text of whole blocks, if those before it are kept.

        Args:
          scope: the scope.
          ids: [n] int32, the text up to the end of the block.
          make: computes the block; it is not called for one that is kept as a whole.
        """
        if not self._most:
            return
        owned = self._owners.setdefault(scope.owner, _Owned())
        nodes, (*before, last) = [owned.root(scope) or _Node()], self._parts(ids)
        for part in before:
            if (later := nodes[-1].later.get(part)) is None:
                return
            nodes.append(later)
        node = nodes[-1].later.get(last)
        if node is not None and (node.has_memory or not self._needs_memory):
            return
        node = node or _Node(nodes[-1], last)
        owned.replace(node, make())
        nodes[-1].later[last] = node
        owned.keep(scope, nodes[0])
        nodes.append(node)
        for node in reversed(nodes[1:]):
            owned.used[node] = None
            owned.used.move_to_end(node)
        while self.size > self._most:
            self._evict()

    def _evict(self) -> None:
        """Has the owner with the most forget a block."""
        owner = max(self._owners, key=lambda owner: self._owners[owner].size)
        self._owners[owner].evict()
        if not self._owners[owner].used:
            del self._owners[owner]

    def _parts(self, ids: np.ndarray) -> Iterator[bytes]:
        """Yields a text's whole blocks."""
        whole = np.ascontiguousarray(ids, np.int32)
        for end in range(self._chunk, len(whole) + 1, self._chunk):
            yield whole[end - self._chunk : end].tobytes()
