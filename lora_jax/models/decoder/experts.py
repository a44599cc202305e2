"""Computes the gated MLPs of experts, each on the rows of its own tokens.

A token costs k products, however many experts there are. Two implementations achieve that:

- "blocks" lays the rows out in blocks of equal size, each of one expert, padded with zeros; a scan
  takes them one by one through their expert's kernels. It runs everywhere, and pads by up to a
  block for each expert.
- "ragged" sorts the rows by expert and multiplies them by ``jax.lax.ragged_dot``, padding seven
  rows at most. That takes a compiler with a kernel for it: XLA for TPU, under ``compiler_options``.
  XLA for CPU and GPU, and for TPU without the option, multiplies all rows with every expert, and
  masks.

Quantized kernels are formed from their codes: one expert's for each block, or a layer's for the
ragged products. By the TPU's compiler, gpt-oss-20b's step on a row of 2,048 tokens, 160 blocks of
64 a layer, takes less than half of the time with the latter; with blocks of 512 they take as long.
On one TPU, the ragged products of most formats form no kernel: they decode it tile by tile (see
`lora_jax.quantized.ragged`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.extend import Primitive
from lora_jax.core.names import RAGGED_CALL
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.format import ModelConfig
from lora_jax.models.layers.placement import UNPLACED, Placement

_MAX_BLOCK_ROWS = 512  # rows
_SUBLANES = 8  # the TPU kernel takes multiples of this many rows; XLA masks for others
_LARGE_BLOCK_ROWS = 256  # rows whose product takes a TPU longer than forming a kernel from codes
# Bytes of a kernel of a layer's experts that ragged products form from codes.
_MAX_FORMED_BYTES = 2**30


# The products of all kernels but the last -> what the last multiplies, such as act(gate) * up.
GatedActivation = Callable[..., jax.Array]


class Experts(Protocol):
    """An implementation of the MLPs of experts. It must be hashable."""

    def __call__(
        self,
        gated: GatedActivation,
        rows: jax.Array,
        chosen: jax.Array,
        /,
        *kernels: jax.Array,
        biases: Sequence[jax.Array] = (),
    ) -> jax.Array:
        """Returns gated(row @ gate, row @ up) @ down of each row, with its expert's kernels.

        Args:
          gated: see ``GatedActivation``.
          rows: [rows, d_model].
          chosen: [rows] int32, each row's expert.
          *kernels: gate and up, [experts, d_model, d_ff] each or one kernel for both, and down,
            [experts, d_ff, d_model].
          biases: what is added to each kernel's products, [experts, out] each; () for nothing.

        Returns:
          [rows, d_model].
        """


def apply_blocks(
    gated: GatedActivation,
    rows: jax.Array,
    chosen: jax.Array,
    *kernels: jax.Array,
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """Applies experts to blocks of rows; see ``Experts`` for the arguments."""
    blocks = assign_rows_to_blocks(chosen, kernels[0].shape[0])

    def run_block(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        """Applies one expert to one block of rows."""
        block_rows, expert = block

        def multiply(x: jax.Array, index: int) -> jax.Array:
            """Returns x times one of the expert's kernels, plus its bias."""
            kernel = lax.dynamic_index_in_dim(kernels[index], expert, keepdims=False)
            product: jax.Array = x @ kernel
            if not biases:
                return product
            bias: jax.Array = lax.dynamic_index_in_dim(biases[index], expert, keepdims=False)
            return product + bias

        n_up_kernels = len(kernels) - 1
        features = gated(*(multiply(block_rows, index) for index in range(n_up_kernels)))
        return None, multiply(features, n_up_kernels)

    # No slot is written or read twice, so that the derivatives add in a fixed order.
    n_slots = blocks.experts.size * blocks.rows
    slots = jnp.zeros((n_slots, rows.shape[1]), rows.dtype)
    slots = slots.at[blocks.slots].set(rows, unique_indices=True)
    rows_of_blocks = slots.reshape(-1, blocks.rows, rows.shape[1])
    # The backward pass indexes the kernels of each block again: they are not kept for all blocks.
    policy = jax.checkpoint_policies.dots_saveable
    body = jax.checkpoint(run_block, policy=policy, prevent_cse=False)
    _, out = lax.scan(body, None, (rows_of_blocks, blocks.experts))
    out = jnp.reshape(out, (-1, out.shape[-1]))
    return out.at[blocks.slots].get(unique_indices=True)


class ExpertBlocks(NamedTuple):
    """The positions of rows in blocks.

    Attributes:
      rows: the number of rows of a block.
      experts: [blocks] int32, each block's expert.
      slots: [rows] int32, the place of each row, counted over all blocks.
    """

    rows: int
    experts: jax.Array
    slots: jax.Array


def assign_rows_to_blocks(chosen: jax.Array, n_experts: int) -> ExpertBlocks:
    """Assigns rows with these experts, [rows] int32, to blocks.

    A block has a quarter of the rows that an expert gets on average, but between 8 and 512: an
    expert's kernels are read, and formed from codes, once for each of its blocks.
    """
    block_rows, n_blocks = _block_size_and_count(chosen.size, n_experts)
    # Each expert gets as many blocks as its rows fill; the blocks follow in the experts' order.
    expert_rows = jnp.bincount(chosen, length=n_experts)
    expert_blocks = -(-expert_rows // block_rows)
    block_ends = jnp.cumsum(expert_blocks)  # the first block behind each expert's
    # A row's slot follows from its expert's first block, and its rank among the expert's rows.
    place_of_row = jnp.argsort(jnp.argsort(chosen))  # in the order of experts
    row_starts = jnp.cumsum(expert_rows) - expert_rows
    row_in_expert = place_of_row - row_starts[chosen]
    first_block = (block_ends - expert_blocks)[chosen]
    expert_of_block = jnp.searchsorted(block_ends, jnp.arange(n_blocks), side="right")
    expert_of_block = jnp.minimum(expert_of_block, n_experts - 1)  # blocks without rows have any
    return ExpertBlocks(
        rows=block_rows,
        experts=expert_of_block.astype(jnp.int32),
        slots=(first_block * block_rows + row_in_expert).astype(jnp.int32),
    )


def _block_size_and_count(n_rows: int, n_experts: int) -> tuple[int, int]:
    """Returns the rows in a block, and the number of blocks that always suffices."""
    quarter_of_average = n_rows // (4 * n_experts)
    block_rows = min(_MAX_BLOCK_ROWS, max(8, quarter_of_average // 8 * 8))
    n_partial_blocks = min(n_experts, n_rows)
    return block_rows, n_rows // block_rows + n_partial_blocks


def apply_ragged(
    gated: GatedActivation,
    rows: jax.Array,
    chosen: jax.Array,
    *kernels: jax.Array,
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """Applies experts to sorted rows; see ``Experts`` for the arguments."""
    n_rows = chosen.size
    order = jnp.argsort(chosen)  # stable
    expert_ids = jnp.arange(kernels[0].shape[0], dtype=chosen.dtype)
    expert_rows = jnp.sum(chosen == expert_ids[:, None], axis=1, dtype=jnp.int32)
    # No row is written or read twice, so that the derivatives add in a fixed order.
    sorted_rows = rows.at[order].get(unique_indices=True)
    n_padding = -n_rows % _SUBLANES
    if n_padding:  # rows of zeros, for the last expert
        sorted_rows = jnp.pad(sorted_rows, ((0, n_padding), (0, 0)))
        expert_rows = expert_rows.at[-1].add(n_padding)
    if biases:
        sorted_experts = jnp.asarray(chosen)[order]
        expert_of_row = jnp.pad(sorted_experts, (0, n_padding), constant_values=-1)

    def run_experts(sorted_rows: jax.Array, *kernels: jax.Array) -> jax.Array:
        """Applies the experts to sorted rows by ragged products."""

        def multiply(x: jax.Array, index: int) -> jax.Array:
            """Returns x times one kernel of each row's expert, plus the biases."""
            product = lax.ragged_dot(x, kernels[index], expert_rows)
            return product + biases[index][expert_of_row] if biases else product

        n_up_kernels = len(kernels) - 1
        features = gated(*(multiply(sorted_rows, index) for index in range(n_up_kernels)))
        return multiply(features, n_up_kernels)

    run = jax.checkpoint(run_experts, policy=_saves_products, prevent_cse=False)
    out = run(sorted_rows, *kernels)[:n_rows]
    return jnp.zeros_like(out).at[order].set(out, unique_indices=True)


def apply_formed(
    gated: GatedActivation,
    rows: jax.Array,
    chosen: jax.Array,
    *kernels: jax.Array,
    biases: Sequence[jax.Array] = (),
) -> jax.Array:
    """Dequantizes experts and applies them, for platforms with ragged kernels; see ``Experts``.

    A kernel is formed from its codes. Rows are sorted where small blocks would form experts again
    and again, if a layer's kernel, formed, leaves room for the rest. They lie in blocks for a token
    of decoding, and where blocks are so large that a product takes longer than forming its kernel.
    """
    is_ragged = uses_ragged_products(apply_formed, chosen.size, kernels)
    apply = apply_ragged if is_ragged else apply_blocks
    return apply(gated, rows, chosen, *kernels, biases=biases)


def uses_ragged_products(experts: Experts, n_rows: int, kernels: Sequence[jax.Array]) -> bool:
    """Returns True if an implementation multiplies so many rows by ragged products."""
    if experts != apply_formed:
        return experts == apply_ragged
    n_experts = kernels[0].shape[0]
    block_rows, n_blocks = _block_size_and_count(n_rows, n_experts)
    kernel_bytes = max(kernel.size * kernel.dtype.itemsize for kernel in kernels)
    forms_often = n_blocks > 2 * n_experts  # each block would form its expert's kernels
    return forms_often and block_rows < _LARGE_BLOCK_ROWS and kernel_bytes <= _MAX_FORMED_BYTES


def _saves_products(primitive: Primitive, *_: object, **__: object) -> bool:
    """Saves the results of ragged products as well as those of ``dots_saveable``."""
    return primitive.name in ("dot_general", "ragged_dot_general", RAGGED_CALL)


IMPLEMENTATIONS: dict[str, Experts] = {"blocks": apply_blocks, "ragged": apply_ragged}
EXPERTS = ("auto", *IMPLEMENTATIONS)
IN_CODES = "auto, in codes"  # "auto" of a model whose experts lie in codes


def implementation(experts: str | Experts, placement: Placement = UNPLACED) -> Experts:
    """Returns the implementation of experts by name; returns a function unchanged.

    - "blocks" and "ragged": see this module.
    - "auto" is "ragged" where a placement says that this is compiled to kernels (on a TPU, if each
      device sorts its own tokens), and "blocks" elsewhere. ``lora_jax.training`` compiles its
      steps with ``compiler_options``; where you compile a model yourself, "auto" is "blocks". Of
      experts in codes it is "ragged" where that is worth forming all of a layer; see
      ``apply_formed``.

    Args:
      experts: a name, or a function with the arguments of ``Experts``.
      placement: tells whether ragged products are kernels; see ``Placement.ragged_kernels``.

    Raises:
      ValueError: for another name; lists those that there are.
    """
    if not isinstance(experts, str):
        return experts
    if experts == IN_CODES and placement.ragged_kernels:
        return apply_formed
    if experts in ("auto", IN_CODES):
        experts = "ragged" if placement.ragged_kernels else "blocks"
    if experts not in IMPLEMENTATIONS:
        raise ValueError(
            f"There is no implementation of experts {experts!r}. Use one of {', '.join(EXPERTS)}."
        )
    return IMPLEMENTATIONS[experts]


def check_experts(config: ModelConfig, experts: str | Experts) -> None:
    """Raises a ConfigError if ``experts`` is given for a model without experts."""
    if experts != "auto" and not getattr(config, "num_experts", 0):
        raise ConfigError(
            f"experts={experts!r} chooses how a mixture of experts is computed, but this "
            f"{config.model_type} model has no experts. Remove experts."
        )


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Returns compiler options for mixtures of experts, and for 4-bit codes on GPUs.

    ``lora_jax.training`` and the scripts compile their steps with them. In your own code::

        model, params = models.from_pretrained(name, experts="ragged")
        step = jax.jit(step, compiler_options=models.compiler_options())

    Without them, XLA compiles ``jax.lax.ragged_dot`` for TPU to a masked product of all rows with
    every expert: as many times the FLOPs as there are experts. For GPUs, it copies a whole stack of
    4-bit codes of experts, to have the codes of a product's sums side by side.

    Args:
      platform: what is compiled for, such as "tpu"; by default JAX's default backend.

    Returns:
      The options; none for other platforms, whose compilers refuse these.

    >>> from lora_jax import models
    >>> models.compiler_options("tpu")
    {'xla_tpu_enable_ragged_dot_kernel': 'true'}
    >>> models.compiler_options("cpu")
    {}
    """
    platform = jax.default_backend() if platform is None else platform
    if platform.startswith("gpu"):  # of any age; see `placement.platform_of`
        return {"xla_gpu_experimental_pack_dot_operands_along_k_dimension": "False"}
    return {"xla_tpu_enable_ragged_dot_kernel": "true"} if platform == "tpu" else {}
