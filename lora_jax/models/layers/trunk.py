"""Helpers around a stack of layers: positions, causal masks, and rematerialisation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lora_jax.core.extend import Primitive
from lora_jax.core.names import NARROW_PRODUCT, RAGGED_CALL
from lora_jax.models.layers.attention import KERNEL_OUTPUT
from lora_jax.models.layers.cache import Cache, NewEntries
from lora_jax.models.layers.masks import Mask, MaskTokens

# The policies in jax.checkpoint_policies: its other functions make policies.
REMAT_POLICIES = (
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
)


OFFLOAD = "offload"
ATTENTION = "attention"
PROJECTIONS = "projections"
PRODUCTS = "products"
_INPUT = "layer_input"  # the array that "offload" moves
_PROJECTED = "projected"  # products of attention's kernels
_MULTIPLIED = "multiplied"  # products of the kernels of MLPs
# The names that a layer keeps, from the least memory to the most.
_KEPT_NAMES: dict[bool | str, tuple[str, ...]] = {True: (NARROW_PRODUCT,)}
_KEPT_NAMES[ATTENTION] = (*_KEPT_NAMES[True], KERNEL_OUTPUT)
_KEPT_NAMES[PROJECTIONS] = (*_KEPT_NAMES[ATTENTION], _PROJECTED)
_KEPT_NAMES[PRODUCTS] = (*_KEPT_NAMES[PROJECTIONS], _MULTIPLIED)
# The policies that a number of layers can have: each layer then has the policy, or the one before.
_COUNTED_POLICIES = (True, ATTENTION, PROJECTIONS, PRODUCTS)
_KEEPS_NARROW = jax.checkpoint_policies.save_only_these_names(*_KEPT_NAMES[True])
# From twice as many tokens of a row on, an MLP that is recomputed takes so many at most at a time.
CHUNK = 4096


class TokenPlaces(NamedTuple):
    """The positions of the tokens of one call.

    Attributes:
      positions: [batch, seq] int32.
      key_positions: [batch, keys] int32, the keys' positions; -1 in slots with nothing to see.
      first_slot: [] int32, the slot of the first query; [batch] with a token a row.
      is_token: [batch, seq] bool, False at padding.
      rope_positions: [batch, seq, pairs] int32, the position of each of RoPE's pairs in a row with
        images; None where all pairs have ``positions``.
    """

    positions: jax.Array
    key_positions: jax.Array
    first_slot: jax.Array
    is_token: jax.Array
    rope_positions: jax.Array | None = None


def place_tokens(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache | None,
    segment_ids: jax.Array | None,
) -> TokenPlaces:
    """Returns the positions of queries and keys; see ``Decoder.__call__`` for the arguments.

    Raises:
      ValueError: for segment_ids together with a cache, or more tokens than a cache can hold.
    """
    seq = input_ids.shape[1]
    if cache is not None and segment_ids is not None:
        raise ValueError(
            "segment_ids cannot be used together with a cache, which holds one sequence per row. "
            "Remove segment_ids, or call the model without cache=."
        )
    if cache is not None and seq > cache.positions.shape[1]:
        raise ValueError(
            f"{seq} tokens do not fit into a cache of {cache.positions.shape[1]} slots. Make a "
            f"cache with max_len={seq} or more."
        )
    is_token = jnp.ones(input_ids.shape, bool)  # [batch, seq], False at padding
    if attention_mask is not None:
        is_token = attention_mask.astype(bool)
    if positions is None:
        positions = _count_positions(is_token, segment_ids, cache)
    positions = positions.astype(jnp.int32)
    key_positions = jnp.where(is_token, positions, -1)  # [batch, seq]
    first_slot = jnp.zeros((), jnp.int32)
    if cache is not None:
        first_slot = cache.first
        key_positions = put_slots(cache.positions, key_positions, first_slot, batch=0, axis=1)
    return TokenPlaces(
        positions=positions, key_positions=key_positions, first_slot=first_slot, is_token=is_token
    )


def causal_mask(
    placed: TokenPlaces,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    branches: jax.Array | None = None,
) -> Mask:
    """Returns the causal mask of real tokens within the same segment.

    A window counts slots, as in transformers, whatever positions the caller gives. In a cache it
    counts positions, since padding may lie between the tokens of a row; with branches, since other
    completions do. Shared tokens come before a cache's slots.
    """
    first_slot = placed.first_slot
    if first_slot.ndim:  # a token a row, which may see all tokens of its row
        first_slot = jnp.int32(placed.key_positions.shape[1] - 1)
    query_slots = first_slot + jnp.arange(placed.positions.shape[1], dtype=jnp.int32)
    key_slots = jnp.arange(placed.key_positions.shape[1], dtype=jnp.int32)
    query_positions, key_positions = placed.positions, placed.key_positions
    # Shared tokens stand in slots before 0.
    if cache is not None and cache.shared is not None:
        n_shared = cache.shared.n_tokens
        shared_positions = jnp.arange(n_shared, dtype=jnp.int32)
        key_slots = jnp.concatenate([shared_positions - n_shared, key_slots])
        shared_positions = jnp.broadcast_to(shared_positions, (key_positions.shape[0], n_shared))
        key_positions = jnp.concatenate([shared_positions, key_positions], axis=1)
    if cache is None and branches is None:  # windows count slots
        query_positions = jnp.broadcast_to(query_slots, query_positions.shape)
        key_positions = jnp.where(key_positions >= 0, key_slots, -1)
    mask = Mask(
        queries=MaskTokens(query_slots, query_positions, segment_ids),
        keys=MaskTokens(key_slots, key_positions, segment_ids),
        causal=True,
        aligned=cache is None,
    )
    return mask if branches is None else mask.branching(branches.astype(jnp.int32))


def extend_cache(cache: Cache, placed: TokenPlaces, new: NewEntries) -> Cache:
    """Returns the cache with this call's keys and values added.

    Args:
      cache: the cache before the call.
      placed: the positions of the call's tokens.
      new: keys and values, [layers, batch, seq, kv_heads, head_dim] each; then the memory of linear
        layers, a ``Recurrent``, or None without such layers; then the experts of each token,
        [layers, batch, seq, k], or None if the cache does not keep them. Trailing None may be left
        out.
    """
    # Entries that are not given are None.
    keys, values, recurrent, experts = [*new, None, None][:4]
    routing = cache.routing
    if routing is not None:
        routing = put_slots(routing, experts, placed.first_slot, batch=1, axis=2)

    def extend(cached: jax.Array, entries: jax.Array) -> jax.Array:
        return put_slots(cached, entries.swapaxes(2, 3), placed.first_slot, batch=1, axis=3)

    return Cache(
        key=jax.tree.map(extend, cache.key, keys),
        value=jax.tree.map(extend, cache.value, values),
        positions=placed.key_positions,
        filled=cache.filled if cache.filled is None else cache.filled + placed.positions.shape[1],
        length=jnp.maximum(cache.length, jnp.max(placed.key_positions, axis=1) + 1),
        shared=cache.shared,
        recurrent=recurrent,
        routing=routing,
    )


def put_slots(
    cached: jax.Array, new: jax.Array, first: jax.Array, batch: int, axis: int
) -> jax.Array:
    """Returns a cache array with new entries written from slot `first` on.

    Args:
      cached: the array, rows along the axis `batch`, slots along `axis`.
      new: the new entries, laid out as the array.
      first: [] or [batch] int32.
      batch, axis: see `cached`.
    """
    new = new.astype(cached.dtype)
    if not first.ndim:  # all rows have the same slot
        return lax.dynamic_update_slice_in_dim(cached, new, first, axis)
    # In place; under vmap, rows would be moved to the front, and the cache copied.
    dimension_numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, cached.ndim - 1)),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=(batch,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(
        cached,
        first[:, None],
        jnp.moveaxis(new.squeeze(axis), batch, 0),
        dimension_numbers,
        indices_are_sorted=True,
        unique_indices=True,
        mode="clip",
    )


def scan_layers(
    layer: type[nn.Module], remat: bool | str, n: int, in_axes: Any = (nn.broadcast, 0)
) -> Callable[..., nn.Module]:
    """Returns n layers as a scan, with their parameters stacked on axis 0.

    Args:
      layer: the scan's body.
      remat: what is recomputed in the backward pass; see ``Decoder``. With a number of layers, such
        as "products:7", the layers are two scans.
      n: the number of layers.
      in_axes: the axes of the body's inputs after the first; by default one input that all layers
        share, and one with an entry for each.

    Raises:
      ValueError: see ``rematerialise`` and ``policies_of_layers``.
    """
    policies = policies_of_layers(remat, n)
    is_split = len(policies) > 1
    scanned = nn.scan(
        rematerialise(layer, False if is_split else remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=n,
    )
    if not is_split:
        return scanned

    class SplitScan(scanned):  # type: ignore[misc, valid-type]
        """Layers with two policies: a scan for each, over the indices of its layers.

        A slice of a stack of kernels would be a copy. So both scans read the whole stacks, and a
        layer takes its parameters while it is computed, and again in the backward pass.
        """

        def __call__(self, x: jax.Array, *inputs: Any) -> Any:
            has_cache = any(getattr(value, "cache", None) is not None for value in inputs)
            if self.is_initializing() or has_cache:  # there is no backward pass
                return super().__call__(x, *inputs)
            options = {
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(self)
                if field.init and field.name not in ("parent", "name")
            }
            axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(inputs)
            outputs_of_scans = []
            for policy, layer_indices in policies.items():
                x, outputs = _scan_indices(
                    layer(**options | {"remat": policy}, parent=None),
                    self.variables["params"],
                    layer_indices,
                    x,
                    inputs,
                    axes,
                )
                outputs_of_scans.append(outputs)
            return x, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *outputs_of_scans)

    return SplitScan


def _scan_indices(
    layer: nn.Module,
    stacks: Any,
    layer_indices: range,
    x: jax.Array,
    inputs: Sequence[Any],
    axes: Sequence[Any],
) -> Any:
    """Scans over the indices of layers, whose parameters each iteration takes from whole stacks.

    Args:
      layer: a layer with its policy.
      stacks: the parameters of all layers, stacked on axis 0.
      layer_indices: the layers that are scanned.
      x: the carry.
      inputs, axes: the layer's other inputs, and their axes; see ``scan_layers``.
    """
    stacked_inputs = [
        jax.tree.map(lambda array: array[layer_indices.start : layer_indices.stop], value)
        for value, axis in zip(inputs, axes, strict=True)
        if axis == 0
    ]

    def run_layer(x: jax.Array, xs: tuple[jax.Array, list[Any]]) -> Any:
        layer_index, layer_inputs = xs
        take = functools.partial(
            lax.dynamic_index_in_dim,
            index=layer_index,
            keepdims=False,
            allow_negative_indices=False,
        )
        remaining_inputs = iter(layer_inputs)
        arguments = [
            next(remaining_inputs) if axis == 0 else value
            for value, axis in zip(inputs, axes, strict=True)
        ]
        return layer.apply({"params": jax.tree.map(take, stacks)}, x, *arguments)

    run_layer = jax.checkpoint(run_layer, policy=remat_policy(layer.remat), prevent_cse=False)
    # The indices are constants, so that `adapt` knows them.
    return lax.scan(run_layer, x, (np.asarray(layer_indices, np.int32), stacked_inputs))


def policies_of_layers(remat: bool | str, n: int) -> dict[bool | str, range]:
    """Returns the policies of n layers, and the layers that have each of them.

    Args:
      remat: see ``Decoder``. Of "products:7", the last seven layers have "products". The layers
        that keep more are those whose arrays the backward pass needs first.
      n: the number of layers.

    Raises:
      ValueError: a number without a policy that can have one, or not between 1 and n - 1.

    >>> from lora_jax.models.layers.trunk import policies_of_layers
    >>> policies_of_layers("products:7", 32)
    {'projections': range(0, 25), 'products': range(25, 32)}
    """
    policy, has_number, number = str(remat).partition(":")
    if not has_number:
        return {remat: range(n)}
    names = _COUNTED_POLICIES[1:]
    if policy not in names or not number.isdecimal() or not 0 < int(number) < n:
        raise ValueError(
            f"There is no remat policy {remat!r} for {n} layers. Write one of {', '.join(names)}, "
            f"a colon, and a number of layers from 1 to {n - 1}."
        )
    n_leaner = n - int(number)
    leaner_policy = _COUNTED_POLICIES[names.index(policy)]
    return {leaner_policy: range(n_leaner), policy: range(n_leaner, n)}


def rematerialise(layer: type[nn.Module], remat: bool | str) -> Callable[..., nn.Module]:
    """Returns a scanned layer that is recomputed in the backward pass.

    Args:
      layer: the layer; with "offload", it starts with ``name_layer_input``.
      remat: what is recomputed; see ``Decoder``.

    Raises:
      ValueError: see ``remat_policy``.
    """
    if remat is False:
        return layer
    # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
    return nn.remat(layer, policy=remat_policy(remat), prevent_cse=False)


def remat_policy(remat: bool | str) -> Any:
    """Returns the `jax.checkpoint` policy for a value of ``Decoder.remat``.

    Raises:
      ValueError: for a policy that is neither one of ours nor of ``REMAT_POLICIES``.
    """
    policy: Any = _KEEPS_NARROW
    if remat in _KEPT_NAMES:
        policy = jax.checkpoint_policies.save_only_these_names(*_KEPT_NAMES[remat])
    elif remat == OFFLOAD:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=(_INPUT,),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif isinstance(remat, str):
        if remat not in REMAT_POLICIES:
            known = ", ".join((OFFLOAD, ATTENTION, PROJECTIONS, PRODUCTS, *REMAT_POLICIES))
            raise ValueError(f"There is no remat policy {remat!r}. Use True, False or {known}.")
        policy = _jax_policy(remat)
    return policy


def name_layer_input(x: jax.Array, remat: bool | str) -> jax.Array:
    """Returns a layer's input under the checkpoint name that "offload" uses."""
    return checkpoint_name(x, _INPUT) if remat == OFFLOAD else x


def name_projection(x: jax.Array, remat: bool | str) -> jax.Array:
    """Returns an attention projection under the checkpoint name that "projections" saves."""
    return checkpoint_name(x, _PROJECTED) if remat in (PROJECTIONS, PRODUCTS) else x


def name_mlp_product(x: jax.Array, remat: bool | str) -> jax.Array:
    """Returns a product in an MLP under the checkpoint name that "products" saves."""
    return checkpoint_name(x, _MULTIPLIED) if remat == PRODUCTS else x


def apply_chunked(module: nn.Module, body: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Computes ``body(module, x)``, in chunks of tokens if a long row is recomputed.

    A layer that is recomputed keeps its input alone. Its MLP is several times as wide, and the
    backward pass would hold all of it. The parameters are those of ``module``, as without chunks.

    Args:
      module: a ``ModelPart``, in its compact method.
      body: computes [batch, seq, features] of x, each token by itself.
      x: [batch, seq, d_model].
    """
    batch, seq, _ = x.shape
    is_recomputed = module.remat in (True, OFFLOAD, ATTENTION, PROJECTIONS)
    takes_chunks = is_recomputed and module.placement.takes_chunks
    if not takes_chunks or seq < 2 * CHUNK or module.is_initializing():
        return body(module, x)
    # Equal chunks, if few of them divide the row; else chunks of 4,096 tokens, and a remainder.
    min_chunks = -(-seq // CHUNK)
    divisors = [n for n in range(min_chunks, 4 * min_chunks) if seq % n == 0]
    n_chunks = divisors[0] if divisors else seq // CHUNK
    chunk_tokens = seq // n_chunks if seq % n_chunks == 0 else CHUNK
    looped_tokens = n_chunks * chunk_tokens

    def run_chunk(module: nn.Module, _: None, x: jax.Array) -> tuple[None, jax.Array]:
        return None, body(module, x)

    # A chunk keeps no more than a layer keeps: the layer would compute the rest again.
    policy = None if module.remat == OFFLOAD else _KEEPS_NARROW
    scanned = nn.scan(
        nn.remat(run_chunk, prevent_cse=False, policy=policy),
        variable_broadcast="params",
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
    )
    chunks = x[:, :looped_tokens].reshape(batch, n_chunks, chunk_tokens, -1)
    _, outputs = scanned(module, None, chunks)
    out: jax.Array = outputs.reshape(batch, looped_tokens, -1)
    if looped_tokens == seq:
        return out
    return jnp.concatenate([out, body(module, x[:, looped_tokens:])], axis=1)


@functools.cache
def _jax_policy(name: str) -> Callable[..., object]:
    """Returns a JAX policy by name; policies that save dots also save ragged products."""
    policy: Callable[..., object] = getattr(jax.checkpoint_policies, name)
    if "dots" not in name:
        return policy

    def saves_products(primitive: Primitive, *args: object, **params: object) -> object:
        if primitive.name in ("ragged_dot_general", RAGGED_CALL):
            return True
        return policy(primitive, *args, **params)

    return saves_products


def _count_positions(
    present: jax.Array, segment_ids: jax.Array | None, cache: Cache | None
) -> jax.Array:
    """Returns each token's position: the number of real tokens before it, [batch, seq]."""
    count = jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1
    if segment_ids is not None:
        is_change = segment_ids[:, 1:] != segment_ids[:, :-1]
        is_start = jnp.concatenate([jnp.ones_like(is_change[:, :1]), is_change], axis=1)
        tokens_before = count - present.astype(jnp.int32) + 1  # real tokens before this slot
        count = count - lax.cummax(jnp.where(is_start, tokens_before, 0), axis=1)
    if cache is not None:
        count = count + cache.length[:, None]
    return jnp.maximum(count, 0)
