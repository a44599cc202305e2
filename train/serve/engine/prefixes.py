"""Stores the keys and values of token prefixes for reuse, by owner and within a size limit."""

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from lora_jax.models.sampling.blocks import CacheBlock


@dataclasses.dataclass(frozen=True)
class PrefixScope:
    """The owner and the weights of stored tokens. Only texts of the same scope are found.

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
    """A block of tokens in a tree of texts. The ancestors hold the tokens before it.

    Attributes:
      ids: the bytes of the block's tokens.
      block: the block; None in the root, the empty text.
      children: the blocks that follow in other texts, by their `ids`.
    """

    parent: "_Node | None" = None
    ids: bytes = b""
    block: CacheBlock | None = None
    children: "dict[bytes, _Node]" = dataclasses.field(default_factory=dict)

    @property
    def has_memory(self) -> bool:
        """True if the block includes the recurrent state of linear layers."""
        return self.block is not None and self.block.recurrent is not None


class _OwnerTexts:
    """The stored texts of an owner.

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
        """Returns the root of a scope's tree; None for a scope without stored texts."""
        return self.roots.get(_adapter_key(scope), {}).get(scope.kind)

    def set_root(self, scope: PrefixScope, root: _Node) -> None:
        """Sets the root of a scope's tree."""
        self.roots.setdefault(_adapter_key(scope), {})[scope.kind] = root

    def _remove_root(self, root: _Node) -> None:
        """Removes the scope whose tree has this root."""
        for root_of_kind in self.roots.values():
            for kind in [*root_of_kind]:
                if root_of_kind[kind] is root:
                    del root_of_kind[kind]

    def evict(self) -> None:
        """Removes the least recently used recurrent state or block.

        That is a memory of linear layers after which texts go on in one way alone, since few will
        go on in another; then blocks.
        """
        for node in self.used:
            if len(node.children) == 1 and node.has_memory:
                assert node.block is not None
                self.replace(node, node.block._replace(recurrent=None))
                return
        node, _ = self.used.popitem(last=False)
        assert node.parent is not None and node.block is not None
        del node.parent.children[node.ids]
        self.size -= node.block.size
        is_text_empty = node.parent.block is None and not node.parent.children
        if is_text_empty:
            self._remove_root(node.parent)

    def replace(self, node: _Node, block: CacheBlock) -> None:
        """Sets the block of a node, and updates the total size."""
        if node.block is not None:
            self.size -= node.block.size
        self.size += block.size
        node.block = block


class _Base:
    """Stands for the base among adapters."""


_BASE = _Base()


def _adapter_key(scope: PrefixScope) -> object:
    return _BASE if scope.adapter is None else scope.adapter


class PrefixStore:
    """Stores blocks of texts in one tree per scope, so that a common prefix is stored once.

    If there is no room, the owner that has the most gives up what it did not use for the longest
    time: nobody's many texts drive out those of others with fewer.
    """

    def __init__(self, chunk: int, max_bytes: int, needs_memory: bool = False) -> None:
        """Creates an empty store.

        Args:
          chunk: tokens of a block.
          max_bytes: bytes of all blocks at most.
          needs_memory: whether a text goes on only from a block that has the memory of linear
            layers.
        """
        self._chunk_tokens = chunk
        self._max_bytes = max_bytes
        self._needs_memory = needs_memory
        self._texts_of_owner: dict[Hashable, _OwnerTexts] = {}

    @property
    def size(self) -> int:
        """The bytes of all blocks. Any thread may read it."""
        return sum(texts.size for texts in [*self._texts_of_owner.values()])

    def clear(self) -> None:
        """Removes all blocks."""
        self._texts_of_owner.clear()

    def find(self, scope: PrefixScope, ids: np.ndarray) -> list[CacheBlock]:
        """Returns the stored blocks of a text's longest prefix, and marks them as used.

        Args:
          scope: the scope.
          ids: [n] int32.
        """
        if scope.owner not in self._texts_of_owner:
            return []
        texts = self._texts_of_owner[scope.owner]
        nodes: list[_Node] = []
        parent = texts.root(scope) or _Node()
        for block_ids in self._split_blocks(ids):
            child = parent.children.get(block_ids)
            if child is None:
                break
            nodes.append(child)
            parent = child
        while self._needs_memory and nodes and not nodes[-1].has_memory:
            nodes.pop()
        for node in reversed(nodes):
            texts.used.move_to_end(node)
        return [node.block for node in nodes if node.block is not None]

    def add(
        self, scope: PrefixScope, ids: np.ndarray, make_block: Callable[[], CacheBlock]
    ) -> None:
        """Stores the last block of a text if the blocks before it are stored.

        Args:
          scope: the scope.
          ids: [n] int32, the text up to the end of the block.
          make_block: computes the block; it is not called for one that is kept as a whole.
        """
        if not self._max_bytes:
            return
        texts = self._texts_of_owner.setdefault(scope.owner, _OwnerTexts())
        root = texts.root(scope) or _Node()
        *earlier_blocks, last_block = self._split_blocks(ids)
        parent = root
        text_nodes: list[_Node] = []
        for block_ids in earlier_blocks:
            child = parent.children.get(block_ids)
            if child is None:
                return
            text_nodes.append(child)
            parent = child
        node = parent.children.get(last_block)
        is_complete = node is not None and (node.has_memory or not self._needs_memory)
        if is_complete:
            return
        if node is None:
            node = _Node(parent, last_block)
        texts.replace(node, make_block())
        parent.children[last_block] = node
        texts.set_root(scope, root)
        text_nodes.append(node)
        for text_node in reversed(text_nodes):
            texts.used[text_node] = None
            texts.used.move_to_end(text_node)
        while self.size > self._max_bytes:
            self._evict()

    def _evict(self) -> None:
        """Removes a block of the owner with the largest stored texts."""
        owner = max(self._texts_of_owner, key=lambda owner: self._texts_of_owner[owner].size)
        self._texts_of_owner[owner].evict()
        if not self._texts_of_owner[owner].used:
            del self._texts_of_owner[owner]

    def _split_blocks(self, ids: np.ndarray) -> Iterator[bytes]:
        """Yields the complete blocks of a text."""
        text = np.ascontiguousarray(ids, np.int32)
        for end in range(self._chunk_tokens, len(text) + 1, self._chunk_tokens):
            yield text[end - self._chunk_tokens : end].tobytes()
