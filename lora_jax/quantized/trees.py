"""Quantizes the kernels of a parameter tree (`quantize`), and dequantizes them again.

A leaf is coded if it is a `Coded` rather than an array. `report` is a table of the bytes that
`quantize` saves and the error that it costs, leaf by leaf.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike

from lora_jax.adapt.observed import traced_roles
from lora_jax.core.aliases import flatten_with_aliases, restore_alias_form
from lora_jax.core.axes import EMBEDDING_NAMES, AxisRoles
from lora_jax.core.base import as_array, is_abstract, is_base
from lora_jax.core.paths import leaf_name, most_similar
from lora_jax.core.types import BaseLike, Forward, Leaf, Tree
from lora_jax.core.weight import is_node, leaves_of, map_leaves
from lora_jax.quantized.coded import Coded, bytes_of
from lora_jax.quantized.encode import Coding, QuantizeWarning, coding_of, encode
from lora_jax.quantized.formats import Format, format_of
from lora_jax.rules import ALL_LINEAR, AnyOf, LoraRule, Targets
from lora_jax.select.matching import LeafFacts, matches
from lora_jax.select.resolve import Adaptation, resolve

ROUTERS = ("router", "gate")  # modules that choose experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantRule:
    """Quantizes each kernel that `targets` selects; the fields are those of a `LoraRule`.

    Args:
      targets: a list of names, each a run of whole path segments, a regular expression for the
        whole path, or a preset; by default all kernels but embeddings and the output head.
      exclude: paths that stay as they are, in either of the first two forms; by default, modules
        with the name of a router of experts.
      format: a name ("nf4", "nf4-double", "int4", "int8", …) or a `Format` of your own.
      in_axes, out_axes: the kernel's axis roles, where they are not Flax's. Both or neither.

    >>> lj.quantized.QuantRule(targets=["mlp"], format="int8").format
    'int8'
    """

    targets: Targets = ALL_LINEAR
    exclude: Targets = ROUTERS
    format: str | Format = "nf4"
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        format_of(self.format)
        _lora_rule(self)


def _lora_rule(rule: QuantRule) -> LoraRule:
    """Returns the LoraRule that selects the same kernels."""
    names = ("targets", "exclude", "in_axes", "out_axes")
    return LoraRule(**{name: getattr(rule, name) for name in names})


def plan(
    params: Tree,
    format: str | Format = "nf4",
    *,
    keep: Targets = (),
    rules: Sequence[QuantRule] | None = None,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, Coding | None]:
    """Returns the coding of each leaf that `quantize` selects, by path; None if no blocks fit.

    Use it to encode tensor by tensor: ``encode(array, plan[path])``. Arguments and errors are those
    of `quantize`.

    >>> shape = jax.ShapeDtypeStruct((128, 96), jnp.bfloat16)
    >>> lj.quantized.plan({"up": {"kernel": shape}, "lm_head": {"kernel": shape}}, "int8")
    {'up/kernel': Coding(format=Format('int8'), axis=-2, block=64)}
    """
    leaves, _ = leaves_of(params)
    for path, leaf in leaves:
        if is_node(leaf):
            raise ValueError(
                f"quantize: the tree is already adapted (at {path!r}). Quantize the plain "
                "tree, lora_jax.strip(params), then adapt it with lorafy. lora_jax.swap "
                "puts the trained adapter onto it."
            )
    quant_rules = (QuantRule(format=format),) if rules is None else tuple(rules)
    for rule in quant_rules:
        if not isinstance(rule, QuantRule):
            raise TypeError(f"quantize: a rule must be a QuantRule, not {rule!r}.")
    arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    _check_keep(keep, [path for path, _ in arrays])
    roles = traced_roles(trace, arrays)
    routers = set()
    if rules is None and kinds is not None:
        routers = {path for path, kind in kinds.items() if kind == "router"}
    arrays = [
        (path, leaf)
        for path, leaf in arrays
        if not (is_base(leaf) or matches(keep, path) or path in routers)
    ]
    lora_rules = [_lora_rule(rule) for rule in quant_rules]
    try:
        decisions = resolve(arrays, lora_rules, LeafFacts(roles, kinds))
    except ValueError as error:
        message = str(error).replace("LoraRule", "QuantRule")
        n_coded = sum(is_coded(leaf) for _, leaf in leaves)
        if n_coded:
            message += f" ({n_coded} leaves of the tree are already quantized)"
        raise ValueError(message) from None
    # Of rules that select the same kernels, the first wins.
    format_by_rule: dict[LoraRule, str | Format] = {}
    for lora_rule, quant_rule in zip(lora_rules, quant_rules, strict=True):
        format_by_rule.setdefault(lora_rule, quant_rule.format)
    shapes = {path: leaf.shape for path, leaf in arrays}
    codings = {}
    for path, decision in decisions.items():
        if isinstance(decision, Adaptation):
            axis_roles = decision.roles
            if leaf_name(path) in EMBEDDING_NAMES:  # blocks lie along a row, which a look-up reads
                axis_roles = AxisRoles(axis_roles.out_axes, axis_roles.in_axes)
            codings[path] = coding_of(shapes[path], format_by_rule[decision.rule], axis_roles)
    return codings


def _check_keep(keep: Targets, paths: Sequence[str]) -> None:
    """Raises a ValueError for a pattern or a name that matches no path."""
    if isinstance(keep, AnyOf):
        return
    names = (keep,) if isinstance(keep, str) else keep
    for name in names:
        targets = name if isinstance(keep, str) else (name,)
        if not any(matches(targets, path) for path in paths):
            lines = "\n  ".join(["The most similar paths are:", *most_similar(name, paths)])
            raise ValueError(f"quantize: keep={name!r} names no leaf. {lines}")


def quantize(
    params: Tree,
    format: str | Format = "nf4",
    *,
    keep: Targets = (),
    rules: Sequence[QuantRule] | None = None,
    trace: Sequence[object] | None = None,
    kinds: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    donate: bool = False,
) -> Tree:
    """Returns `params` with quantized kernels: a frozen base in 8 or 4 bits.

    Give the result to `lorafy`; `lora_jax.adapt` runs functions on it, adapted or not, and decodes
    the kernel of one product at a time. Embeddings, the output head, norms, biases and routers stay
    as they are. Leaves are encoded one by one, where they lie; codes and scales lie on a mesh as
    the kernel did.

    Args:
      params: a plain tree of arrays of JAX or NumPy, tracers, or `jax.ShapeDtypeStruct`\\ s. Leaves
        that are in codes already stay so.
      format: "nf4" (4 bits by the quantiles of a normal distribution, QLoRA's), "nf4-double" (its
        scales in 8 bits, too), "int4" or "int8" (evenly spaced), or a `Format` of your own.
      keep: further leaves that stay as they are: names or a regular expression, as in `LoraRule`.
      rules: `QuantRule`\\ s in the place of `format`, to select other kernels, or give some of them
        another format; the first that selects a leaf wins.
      trace, kinds: as for `lorafy`.
      dtype: dtype of the arrays that codes stand for; each kernel's own by default.
      donate: delete each kernel's array once it is encoded, so that the tree and its codes never
        lie in memory together.

    Raises:
      ValueError: a rule selects nothing, `keep` names what is not there, there is no such format,
        the tree is adapted already, or a kernel holds a NaN or an infinity.

    Warns:
      QuantizeWarning: no blocks fit some of the kernels, which stay as they are; or the format
        cannot hold the scales of some blocks of a kernel, whose weights are lost.

    >>> params = {"dense": {"kernel": jnp.ones((128, 96)), "bias": jnp.zeros(96)}}
    >>> base = lj.quantized.quantize(params, "nf4")
    >>> base["dense"]["kernel"]
    Coded('nf4', shape=(128, 96), dtype=float32)
    >>> lj.lorafy(base, [lj.LoraRule(targets=["dense"], rank=2)])["dense"]["kernel"].base.nbytes
    6912
    """
    codings = plan(params, format, keep=keep, rules=rules, trace=trace, kinds=kinds)
    paths_without_blocks = [path for path, coding in codings.items() if coding is None]
    if paths_without_blocks:
        warnings.warn(
            f"quantize: {paths_without_blocks[0]!r} (and {len(paths_without_blocks) - 1} "
            "more) cannot be divided into blocks, because the sizes of their in axes have "
            "few divisors. They are not quantized.",
            QuantizeWarning,
            stacklevel=2,
        )

    def encode_leaf(path: str, leaf: Leaf) -> Leaf:
        """Quantizes one leaf, and deletes the original if it was donated."""
        coding = codings.get(path)
        if coding is None:
            return leaf
        coded = encode(leaf, coding, dtype=dtype, name=repr(path))
        if donate and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            jax.block_until_ready(coded)
            leaf.delete()
        return coded

    return map_leaves(encode_leaf, params)


def is_coded(value: Leaf) -> bool:
    """Returns True if a leaf is quantized.

    >>> lj.quantized.is_coded(lj.quantized.encode(jnp.ones((64, 3))))
    True
    """
    return isinstance(value, Coded)


def without_rows_kernel(params: Tree) -> Tree:
    """Returns the tree with weights whose products with few rows are XLA's, also on a TPU.

    >>> base = lj.quantized.quantize({"dense": {"kernel": jnp.ones((128, 96))}})
    >>> lj.quantized.without_rows_kernel(base)["dense"]["kernel"].allows_kernel
    False
    """

    def without_kernel(_: str, leaf: Leaf) -> Leaf:
        return dataclasses.replace(leaf, allows_kernel=False) if is_coded(leaf) else leaf

    return map_leaves(without_kernel, params)


def dequantize(params: Tree) -> Tree:
    """Returns the tree with arrays in place of codes, also in adapted weights.

    >>> base = lj.quantized.quantize({"dense": {"kernel": jnp.ones((128, 96))}})
    >>> lj.quantized.dequantize(base)["dense"]["kernel"].dtype
    dtype('float32')
    """
    path_leaves, treedef = flatten_with_aliases(params, is_base)
    leaves = [_decode(leaf) if is_base(leaf) else leaf for _, leaf in path_leaves]
    return restore_alias_form(params, treedef.unflatten(leaves))


def _decode(base: BaseLike) -> Leaf:
    """Returns W, decoded by one compiled function, with the sharding of the codes."""
    if is_abstract(base):
        return jax.eval_shape(as_array, base)
    codes = jax.tree.leaves(base)[0]
    sharding = None
    if not isinstance(codes, jax.core.Tracer) and hasattr(codes, "sharding"):
        sharding = codes.sharding
    return _decoder(sharding if isinstance(sharding, NamedSharding) else None)(base)


@functools.lru_cache(maxsize=256)
def _decoder(sharding: Sharding | None) -> Forward:
    """Returns the compiled function that decodes W."""
    return jax.jit(as_array, out_shardings=sharding)


def requantize(params: Tree, like: Tree) -> tuple[Tree, dict[str, float]]:
    """Quantizes a merged tree like another tree, and returns the error of each weight.

    `lora_jax.merge` gives arrays in the place of adapted codes, since rounding W + s·AB to codes
    again loses much of an update that is smaller than a step of the codes. Use this function where
    the result has to be as small as the base was.

    Args:
      params: a plain tree, such as `lora_jax.merge` returns.
      like: a tree of that structure, adapted or plain, whose codes say which leaves are encoded,
        and how.

    Returns:
      The tree; and by path, for each leaf that was encoded, ‖Ŵ − W‖/‖W‖ of the codes Ŵ.

    Raises:
      ValueError: the trees have other paths, or a leaf's codes come from a GGUF file in a format
        that is only read.

    >>> base = lj.quantized.quantize({"dense": {"kernel": jnp.ones((128, 96))}})
    >>> tree = lj.lorafy(base, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> _, errors = lj.quantized.requantize(lj.merge(tree), like=tree)
    >>> errors
    {'dense/kernel': 0.0}
    """
    base_by_path = dict(_base_leaves(like))
    paths = {path for path, _ in leaves_of(params)[0]}
    differences = sorted(base_by_path.keys() ^ paths)
    if differences:
        raise ValueError(
            f"requantize: the two trees differ at {differences[0]!r} (and at "
            f"{len(differences) - 1} more paths)."
        )
    errors: dict[str, float] = {}

    def encode_leaf(path: str, leaf: Leaf) -> Leaf:
        """Quantizes one leaf like the other tree's base."""
        base = base_by_path[path]
        if not is_coded(base) or is_base(leaf):
            return leaf
        format_of(base.format)
        block_axes = [axis - base.ndim for axis, size in enumerate(base.blocks) if size > 1]
        axis = block_axes[0] if block_axes else -2
        coding = Coding(base.format, axis, base.blocks[axis])
        coded = encode(leaf, coding, dtype=base.dtype, name=repr(path))
        errors[path] = error_of(coded, leaf)
        return coded

    return map_leaves(encode_leaf, params), errors


def _base_leaves(params: Tree) -> list[tuple[str, BaseLike]]:
    """Returns the leaves by path, with bases in place of adapted weights."""
    return [(path, leaf.base if is_node(leaf) else leaf) for path, leaf in leaves_of(params)[0]]


def error_of(coded: BaseLike, array: jax.Array) -> float:
    """Returns ‖Ŵ − W‖/‖W‖ of an array W and its dequantized array Ŵ.

    >>> kernel = jax.random.normal(jax.random.key(1), (4096, 16))
    >>> round(lj.quantized.error_of(lj.quantized.encode(kernel, "nf4"), kernel), 3)
    0.092
    """
    return float(_relative_error(coded, array))


@jax.jit
def _relative_error(coded: BaseLike, array: jax.Array) -> jax.Array:
    exact = array.astype(jnp.float32)
    square = jnp.sum(jnp.square(as_array(coded).astype(jnp.float32) - exact))
    return jnp.sqrt(square / jnp.maximum(jnp.sum(jnp.square(exact)), jnp.finfo(jnp.float32).tiny))


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
    """A report with a row for each leaf, which prints as a table."""

    rows: Sequence[LeafReport]

    @property
    def before(self) -> int:
        """The bytes of all leaves as arrays."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """The bytes of all leaves as stored."""
        return sum(row.after for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.path) for row in self.rows), default=0)
        total = LeafReport(path="total", format="", before=self.before, after=self.after)
        return "\n".join(f"{row.path:{width}}  {row}" for row in (*self.rows, total))


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
    exact_leaves = {} if of is None else dict(leaves_of(of)[0])

    def row(path: str, leaf: Leaf) -> LeafReport:
        """Returns the report of one leaf."""
        if not is_coded(leaf):
            size = bytes_of(leaf)
            return LeafReport(path=path, format="", before=size, after=size)
        return LeafReport(
            path=path,
            format=leaf.format.name,
            before=math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize,
            after=leaf.nbytes,
            error=error_of(leaf, exact_leaves[path]) if path in exact_leaves else None,
        )

    leaves = [(path, leaf) for path, leaf in _base_leaves(params) if hasattr(leaf, "shape")]
    return QuantReport([row(path, leaf) for path, leaf in leaves])
