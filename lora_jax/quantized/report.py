"""A table of what quantisation saves and costs, leaf by leaf."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import is_node, leaves_of
from lora_jax.quantized.coded import bytes_of
from lora_jax.quantized.trees import error_of, is_coded


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """The format, size and error of one quantized leaf.

    Attributes:
      path: path of the leaf.
      format: format of its codes; empty where it is an array.
      before: bytes of the array.
      after: bytes of its codes and scales.
      error: ‖Ŵ − W‖/‖W‖; None where it is not known.
    """

    path: str
    format: str
    before: int
    after: int
    error: float | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f"  error {self.error:.4f}"
        sizes = f"{self.before:>15,d} -> {self.after:>14,d} bytes"
        return f"{self.format or '-':10}  {sizes}{error}"


@dataclasses.dataclass(frozen=True)
class QuantReport:
    """A row for each leaf; printed, a table."""

    rows: Sequence[LeafReport]

    @property
    def before(self) -> int:
        """Bytes of all leaves as arrays."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """Bytes of all leaves as they are."""
        return sum(row.after for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.path) for row in self.rows), default=0)
        rows = (*self.rows, LeafReport("total", "", self.before, self.after))
        return "\n".join(f"{row.path:{width}}  {row}" for row in rows)


def report(params: Tree, of: Tree = None) -> QuantReport:
    """Returns the bytes of a tree before and after `quantize`, and the error of each leaf.

    Args:
      params: a tree with codes, adapted or plain; adapters are not counted.
      of: the tree before; without it, errors are not known.

    >>> params = {"dense": {"kernel": jnp.ones((128, 96), jnp.bfloat16), "bias": jnp.zeros(96)}}
    >>> found = lj.quantized.report(lj.quantized.quantize(params, "int8"), of=params)
    >>> print(found)
    dense/bias    -                       384 ->            384 bytes
    dense/kernel  int8                 24,576 ->         13,056 bytes  error 0.0000
    total         -                    24,960 ->         13,440 bytes
    """
    exact = {} if of is None else dict(leaves_of(of)[0])

    def row(path: str, leaf: Leaf) -> LeafReport:
        if not is_coded(leaf):
            size = bytes_of(leaf)
            return LeafReport(path, "", size, size)
        before = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        error = error_of(leaf, exact[path]) if path in exact else None
        return LeafReport(path, leaf.format.name, before, leaf.nbytes, error)

    bases = [(p, leaf.base if is_node(leaf) else leaf) for p, leaf in leaves_of(params)[0]]
    return QuantReport([row(path, leaf) for path, leaf in bases if hasattr(leaf, "shape")])
