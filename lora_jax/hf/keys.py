"""Converts between Hugging Face's tensors and our parameters, by key tables.

A table is a list of rows, one for each parameter, made from a configuration alone (see
``lora_jax.models.key_table``). Reading and writing both follow it, and ``check_tensors`` compares a
file with it: nothing may be missing, left over, or of another shape.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Leaf, Tree
from lora_jax.quantized import is_coded

# "embedding" is the table of tokens, "positions" those of positions and of token types; "pooler" is
# the dense layer behind BERT's, "transform" that inside a masked language model's head; "head"
# turns hidden states into logits of tokens, "classifier" into logits of classes; "patches" is what
# an image is embedded by, "connector" maps its vectors to those of a text.
Kind = Literal[
    "embedding",
    "patches",
    "connector",
    "positions",
    "attention",
    "mlp",
    "experts",
    "router",
    "norm",
    "pooler",
    "transform",
    "head",
    "classifier",
]


Params = dict[str, Any]  # the parameters of a model, a plain nested dict


class WeightsError(ValueError):
    """Weights cannot be read, or do not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter: its path and shape in our tree, and its tensors in Hugging Face's files.

    Attributes:
      path: ours, "/"-joined: ``model/layers/mlp/up_proj/kernel``.
      hf: Hugging Face's name, with a ``{}`` for each axis of the stack: the layer's number and
        the expert's.
      shape: ours, of one member of the stack: [in, out] for a kernel.
      stack: the sizes of the axes in front: (layers,), (layers, experts), or ().
      numbers: the layers' numbers in Hugging Face's names; None if the stack holds all layers.
      transpose: True if Hugging Face stores the axes of a kernel in reverse: [out, in].
      aliases: other names under which a file may hold this very tensor (a tied head).
      in_module: the name in transformers 5's module, by which PEFT knows it, if files keep the one
        of transformers 4; as `hf` otherwise.
      part: the name of the optional part that the parameter belongs to, such as "classifier": one
        that a file lacks as a whole is freshly initialised.
      kind: the part of the model, the same for a kernel and its bias; None if unknown.
      wide: True if it is fp32 at least, whatever the dtype of the others.
      spec: the sharding over a mesh of the last axes, those of the stack among them; () if
        replicated.
    """

    path: str
    hf: str
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    numbers: tuple[int, ...] | None = None
    transpose: bool = False
    aliases: tuple[str, ...] = ()
    in_module: str | None = None
    part: str | None = None
    kind: Kind | None = None
    wide: bool = False
    spec: PartitionSpec = PartitionSpec()

    def dtype_of(self, others: DTypeLike) -> np.dtype:
        """Returns the parameter's dtype in a tree with this dtype."""
        return np.promote_types(others, np.float32) if self.wide else np.dtype(others)

    @property
    def members(self) -> list[tuple[int, ...]]:
        """The index of each tensor in the stack, or one empty index without a stack."""
        return list(itertools.product(*map(range, self.stack)))

    @property
    def hf_names(self) -> list[str]:
        """Hugging Face's tensor names, in the order of ``members``."""
        if self.numbers is None:
            return [self.hf.format(*index) for index in self.members]
        names = []
        for layer, *expert in self.members:
            names.append(self.hf.format(self.numbers[layer], *expert))
        return names

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each Hugging Face tensor."""
        n_leading = self.n_leading_axes
        shape = self.shape
        return (*shape[:n_leading], *shape[n_leading:][::-1]) if self.transpose else shape

    @property
    def n_leading_axes(self) -> int:
        """The number of axes that come first in both orders: one in kernels of several experts."""
        return 1 if len(self.shape) == 3 else 0

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The parameter's shape, with the stack axes first."""
        return (*self.stack, *self.shape)


class SubTensor(NamedTuple):
    """A tensor that is stored as a slice of another tensor: `name`, sliced by `file_index`."""

    name: str  # in the file
    file_index: tuple[int | slice, ...]

    def shape_of(self, file_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the slice, given the shape of the stored tensor."""
        return np.broadcast_to(np.int8(0), file_shape)[self.file_index].shape

    def index_in_tensor(self, part_index: tuple[slice, ...]) -> tuple[int | slice, ...]:
        """Returns the index in the stored tensor for a slice of this tensor."""
        remaining_slices = list(part_index)
        tensor_index: list[int | slice] = []
        for cut in self.file_index:
            if isinstance(cut, slice):  # an axis that the part has; an index removes the axis
                tensor_index.append(_slice_of_slice(cut, remaining_slices.pop(0)))
            else:
                tensor_index.append(cut)
        return (*tensor_index, *remaining_slices)


def _slice_of_slice(outer: slice, inner: slice) -> slice:
    """Returns the slice of an axis that equals slicing by `outer` and then by `inner`."""
    start = outer.start or 0
    stop = outer.stop if inner.stop is None else start + inner.stop
    return slice(start + (inner.start or 0), stop)


# Buffers that follow from the configuration. Files may hold them, but no table has a row for them.
_DERIVED_BUFFER = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)")


def find_absent_parts(shapes: Mapping[str, object], table: Sequence[Row]) -> list[str]:
    """Returns the optional parts that a file lacks completely, in the table's order."""
    stored_parts = {row.part for row in table if any(name in shapes for name in row.hf_names)}
    absent = [row.part for row in table if row.part and row.part not in stored_parts]
    return list(dict.fromkeys(absent))


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    table: Sequence[Row],
    where: str,
    ignored: re.Pattern[str] | None = None,
) -> None:
    """Compares a file's tensor names and shapes with the table.

    Args:
      shapes: Hugging Face's name -> shape, for all tensors in the file or folder.
      table: the model's, without the parts that the file need not hold.
      where: the file or folder, for the message.
      ignored: tensors of other heads than the table's, which a file may hold.

    Raises:
      WeightsError: one error that lists every missing, unexpected and misshaped tensor.
    """
    expected = {name: row.hf_shape for row in table for name in row.hf_names}
    aliases = {alias for row in table for alias in row.aliases}

    def is_expected(name: str) -> bool:
        is_named = name in expected or name in aliases
        is_derived = _DERIVED_BUFFER.fullmatch(name) is not None
        is_ignored = ignored is not None and ignored.fullmatch(name) is not None
        return is_named or is_derived or is_ignored

    missing_names = [name for name in expected if name not in shapes]
    missing = [f"missing {name} {list(expected[name])}" for name in missing_names]
    unexpected = [
        f"unexpected {name} {list(shape)}"
        for name, shape in shapes.items()
        if not is_expected(name)
    ]
    misshaped = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    problems = missing + unexpected + misshaped
    if not problems:
        return
    head_names = {name for row in table if row.kind == "head" for name in row.hf_names}
    if missing_names and head_names.issuperset(missing_names):
        problems.append(
            "The files have no head, and config.json does not tie a head to the embedding "
            "(tie_word_embeddings). The model may have been saved from AutoModel. Save it from "
            "AutoModelForCausalLM."
        )
    raise WeightsError(
        f"{where} does not fit the model's configuration: {len(missing)} missing, "
        f"{len(unexpected)} unexpected, {len(misshaped)} misshaped\n  " + "\n  ".join(problems)
    )


def write_converted(values: np.ndarray, out: np.ndarray, where: str) -> None:
    """Writes values into ``out``, in its dtype.

    Raises:
      WeightsError: for a value beyond the range of fp16, which would become an infinity.
    """
    with np.errstate(over="ignore"):
        out[...] = values
    can_overflow = out.dtype == np.float16 and values.dtype != np.float16
    if not can_overflow:
        return
    n_infinities_before = np.count_nonzero(np.isinf(values))
    n_infinities = np.count_nonzero(np.isinf(out))
    if n_infinities != n_infinities_before:
        raise WeightsError(f"{where} has values beyond the range of float16 (65504). Use bfloat16.")


def nest_leaves(leaves: Iterable[tuple[str, Leaf]]) -> Params:
    """Returns a nested dict made from "/"-joined paths and their values."""
    tree: Params = unflatten_dict(dict(leaves), sep="/")
    return tree


def check_leaves(params: Tree, table: Sequence[Row], *, in_codes: bool = False) -> dict[str, Leaf]:
    """Returns the arrays of a parameter tree, by path.

    Args:
      params: the tree.
      table: the model's.
      in_codes: accept codes in the place of arrays.

    Raises:
      WeightsError: one error that lists every parameter that is missing, unexpected, misshaped, or
        no array that this process holds.
    """
    leaves_and_paths = flatten_with_paths(params, lambda value: not isinstance(value, Mapping))[0]
    leaves = dict(leaves_and_paths)
    expected_shapes = {row.path: row.stacked_shape for row in table}
    problems = [f"missing {path}" for path in expected_shapes if path not in leaves]
    problems += [f"unexpected {path}" for path in leaves if path not in expected_shapes]
    for path, shape in expected_shapes.items():
        problem = _leaf_problem(leaves[path], shape, in_codes) if path in leaves else None
        if problem is not None:
            problems.append(f"{path} {problem}")
    if problems:
        raise WeightsError(
            "The parameter tree does not fit its configuration\n  " + "\n  ".join(problems)
        )
    return leaves


def _leaf_problem(leaf: Leaf, shape: tuple[int, ...], in_codes: bool) -> str | None:
    """Returns the reason why a leaf is not an array of the expected shape, or None."""
    if is_coded(leaf):
        if not in_codes:
            return (
                f"is quantized ({leaf.format.name}). Name the checkpoint with the same codes in "
                "save_pretrained(…, codes_from=…), or use lora_jax.quantized.dequantize(params)"
            )
        leaf = leaf.arrays["codes"]
    if not isinstance(leaf, np.ndarray | jax.Array):
        return (
            f"is a {type(leaf).__name__}, not an array (merge an adapted tree first with "
            "lora_jax.merge(params))"
        )
    if np.shape(leaf) != shape:
        return f"is {list(np.shape(leaf))}, expected {list(shape)}"
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return (
            "is partly on devices of other processes. Gather it first with "
            "jax.experimental.multihost_utils.process_allgather"
        )
    return None


def hf_tensors(params: Tree, table: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face's tensors of a parameter tree, one at a time.

    Args:
      params: the tree, with every parameter of the table and nothing else, sharded or not.
      table: the model's.

    Yields:
      (name, array): contiguous, in Hugging Face's layout and the parameter's dtype.

    Raises:
      WeightsError: see ``check_leaves``.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> model = models.GPT2(config)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> dict(models.hf_tensors(params, models.key_table(config)))["transformer.wpe.weight"].shape
    (16, 8)
    """
    leaves = check_leaves(params, table)
    for row in table:
        leaf = leaves[row.path]
        for index, name in zip(row.members, row.hf_names, strict=True):
            tensor = hf_tensor_of_member(row, leaf, index)
            yield name, np.ascontiguousarray(tensor)


def hf_tensor_of_member(row: Row, leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor of a parameter, or of its code array, in Hugging Face's layout."""
    array = _read_member_on_host(leaf, index)
    return reorder_axes(row, array)


def reorder_axes(row: Row, array: np.ndarray) -> np.ndarray:
    """Returns an array of a row with its axes in Hugging Face's order, or in ours if it has that.

    Both ways reverse the axes of a kernel, but leave the axis of experts where it is.
    """
    if not row.transpose:
        return array
    n_leading = row.n_leading_axes
    last_axes = reversed(range(n_leading, array.ndim))
    return array.transpose(*range(n_leading), *last_axes)


def _read_member_on_host(leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
    """Returns leaf[index] on the host without copying the rest of the leaf.

    It reads shard by shard, because JAX refuses to index an array on a mesh with explicit axes.
    JAX would also keep a NumPy copy of the whole leaf as long as the leaf lives.
    """
    if isinstance(leaf, np.ndarray):
        return leaf[index] if index else leaf
    n_stack_axes = len(index)
    member = np.empty(leaf.shape[n_stack_axes:], leaf.dtype)
    # Each shard fills its part of the member.
    for shard in leaf.addressable_shards:
        if shard.replica_id != 0:
            continue
        index_in_shard = _index_in_shard(index, shard.index, leaf.shape)
        if index_in_shard is None:
            continue
        values = _index_array(shard.data, index_in_shard) if index else shard.data
        member[shard.index[n_stack_axes:]] = np.asarray(values)
    return member


def _index_in_shard(
    index: tuple[int, ...], shard_slices: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Returns an index of the first axes relative to a shard; None if it is outside."""
    index_in_shard = []
    for axis, axis_index in enumerate(index):
        start, stop, _ = shard_slices[axis].indices(shape[axis])
        if not start <= axis_index < stop:
            return None
        index_in_shard.append(axis_index - start)
    return tuple(index_in_shard)


@jax.jit
def _index_array(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    """Returns array[index], with one compiled program for all members of a stack."""
    return array[index]
