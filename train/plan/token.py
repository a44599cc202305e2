"""Plans a decoding step of some rows: the bytes that a device reads, and the time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import lora_jax as lj
from lora_jax.bank.mixing import Choice, mixed
from lora_jax.bank.slots import WeightSlots, map_slots, slots_of
from lora_jax.core.few_rows import MAX_KERNEL_ROWS
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import LoraWeight, map_leaves
from lora_jax.lorafy import nodes_of
from lora_jax.models.families import module_of
from lora_jax.models.layers.cache import Cache, init_cache
from lora_jax.models.sampling.loop import next_logits
from lora_jax.quantized import is_coded
from lora_jax.quantized.rows import KERNEL_NAME
from train.console.errors import UserError
from train.plan.clock.summary import Clock, clock_of
from train.plan.compile import compiler_message, optimized_hlo_of
from train.plan.job import PlanJob, PlanVariant, abstract_params, bytes_per_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """A decoding step, with one token per row; None for unknown values.

    Attributes:
      rows: the number of rows.
      adapters: the number of adapters that they have: 0 for the base alone, 1 for one of all.
      cached: the tokens that the cache of a row has room for, all of which are read.
      bytes: what a device has to read: base, adapter, and the cache; of a table of embeddings that
        is no head, nothing, and of experts no more than the rows choose.
      floor_seconds: the time that this takes at the published rate of the memory.
      seconds: the time by the estimate; see `train.plan.clock`.
      clock: the estimate.
      without_kernel: the reason why XLA's form reads the codes on a TPU rather than a kernel; None
        where a kernel does, or there are no codes.
      refused: the compiler's message if it refused the program.
    """

    rows: int
    adapters: int = 1
    cached: int
    bytes: int
    floor_seconds: float | None
    seconds: float | None = None
    clock: Clock | None = None
    without_kernel: str | None = None
    refused: str | None = None


def plan_token(job: PlanJob, variant: PlanVariant, rows: int, adapters: int | None = None) -> Token:
    """Compiles a decoding step for the machine of a plan.

    Args:
      job: the model and the machine; `seq_len` is the length of the cache.
      variant: the adapter.
      rows: the number of rows.
      adapters: the number of adapters of the rows, by default 1, mixed from 2 on; 0 for the base
        alone.

    Raises:
      UserError: the adapters are no plain factors, and several are asked for.
    """
    adapters = 1 if adapters is None else adapters
    machine = job.machine
    params = param_shapes_for_rows(job, variant, adapters)
    lowered, cache = lower_token(job, params, rows)
    cache_bytes = bytes_per_device((cache.key, cache.value, cache.recurrent))
    read_bytes = _bytes_read_per_token(job, params, rows) + cache_bytes
    token = Token(
        rows=rows,
        adapters=adapters,
        cached=job.seq_len,
        bytes=read_bytes,
        floor_seconds=None if machine.bandwidth is None else read_bytes / machine.bandwidth,
    )
    try:
        compiled = lowered.compile(compiler_options=machine.compilations[0] or None)
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(token, refused=compiler_message(error))
    text = optimized_hlo_of(compiled, lowered, machine)
    clock = clock_of(text, machine)
    has_kernel = text is not None and KERNEL_NAME in text
    without_kernel: str | None = None
    if machine.platform == "tpu" and text and not has_kernel:
        without_kernel = _reason_without_kernel(job, params, rows)
    return dataclasses.replace(
        token,
        seconds=clock.seconds if clock else None,
        clock=clock,
        without_kernel=without_kernel,
    )


def param_shapes_for_rows(job: PlanJob, variant: PlanVariant, adapters: int) -> Tree:
    """Returns the abstract tree of a decoding step with a number of adapters; see `plan_token`."""
    params = abstract_params(job, variant)
    if adapters == 0:
        return lj.strip(params)
    if adapters == 1:
        return params
    return _bank_shapes(params, adapters + 1, job.layout.whole)


def _bank_shapes(params: Tree, n_slots: int, sharding: jax.sharding.Sharding) -> Tree:
    """Returns the abstract tree of an adapter bank, with one slot for the base.

    Raises:
      UserError: a node is more than factors.
    """
    nodes = nodes_of(params)

    def with_slots(path: str, leaf: Leaf) -> Leaf:
        """Returns a leaf with slots for the factors of all adapters."""
        node = nodes.get(path)
        if node is None:
            return leaf
        if not isinstance(node, LoraWeight) or node.extras:
            raise UserError(
                "--decode-adapters needs adapters that only have the factors A and B, but the "
                f"adapter of {path} has more arrays. Remove --decode-adapters."
            )
        arrays: dict[str, Any] = {}
        for name in ("a", "b", "scale"):
            shape = node.shape_of(name)
            slots_shape = (*shape[: node.n_batch], n_slots, *shape[node.n_batch :])
            arrays[name] = jax.ShapeDtypeStruct(slots_shape, jnp.float32, sharding=sharding)
        return WeightSlots(leaf, arrays, node.roles, node.uses)

    return map_leaves(with_slots, lj.strip(params))


def _base_of(params: Tree) -> Tree:
    """Returns the base of an adapted tree or of a bank's tree."""
    return lj.strip(map_slots(lambda _, slots: slots.base, params))


def _quantized_leaves(params: Tree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_coded) if is_coded(leaf)]


def _reason_without_kernel(job: PlanJob, params: Tree, rows: int) -> str | None:
    """Returns the reason why no kernel reads the quantized weights; None without such weights."""
    formats = sorted({leaf.format.name for leaf in _quantized_leaves(_base_of(params))})
    if not formats:
        return None
    n_devices = len(job.machine.devices)
    if n_devices > 1:
        return f"the kernel runs on one device, but there are {n_devices}"
    if rows > MAX_KERNEL_ROWS:
        return f"the kernel takes {MAX_KERNEL_ROWS} rows at most"
    return f"no kernel takes {', '.join(formats)} in these shapes and dtypes"


def lower_token(job: PlanJob, params: Tree, rows: int) -> tuple[jax.stages.Lowered, Cache]:
    """Lowers a decoding step without sampling, as `train.serve` and `generate` run it.

    Args:
      job: see `plan_token`.
      params: shapes of a tree, plain, adapted or a bank's, with shardings.
      rows: the number of rows.

    Returns:
      The program, and the shapes of its cache, which it takes.
    """
    dtype = jnp.dtype(job.dtype)
    model = module_of(
        job.outline.config,
        dtype,
        dtype,
        attention=job.attention,
        experts=job.experts,
        params=_base_of(params),
    )
    has_slots = bool(slots_of(params))
    # As in the server, mixed batches run on the model as it is.
    apply = job.layout.constrained(model).apply
    if has_slots:
        apply = mixed(model.apply)
    elif nodes_of(params) or _quantized_leaves(params):
        apply = lj.adapt(apply)

    def replicated(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=job.layout.whole)

    def token(
        params: Tree, ids: jax.Array, slots: jax.Array | None, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        params = params if slots is None else Choice(params, slots)
        logits, cache = next_logits(apply, params, ids, cache)
        return jnp.argmax(logits, axis=-1), cache

    cache_shapes = jax.eval_shape(lambda: init_cache(model.config, rows, job.seq_len, dtype))
    cache: Cache = jax.tree.map(replicated, cache_shapes)
    ids = replicated(jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    slots = replicated(jax.ShapeDtypeStruct((rows,), jnp.int32)) if has_slots else None
    with jax.set_mesh(job.layout.mesh):
        lowered = jax.jit(token, donate_argnums=3).lower(params, ids, slots, cache)
    return lowered, cache


def print_token(console: Console, token: Token) -> None:
    """Prints the time of a decoding step, and the minimum time at the memory's rate."""
    rows = "one row" if token.rows == 1 else f"{token.rows} rows"
    adapters = {0: ", the base alone", 1: ""}.get(
        token.adapters, f", {token.adapters} adapters mixed"
    )
    table = Table(title=f"A token of {rows}{adapters}, caches of {token.cached:,} tokens")
    columns = ("GB read", "floor, ms", "estimate, ms", "of it kernels, ms", "times the floor")
    for column in columns:
        table.add_column(column, justify="right")
    ratio: float | None = None
    if token.seconds is not None and token.floor_seconds:
        ratio = token.seconds / token.floor_seconds
    kernel_seconds = token.clock.kernels if token.clock else None
    table.add_row(
        f"{token.bytes / 1e9:,.2f}",
        _format_scaled(token.floor_seconds, 1e3),
        _format_scaled(token.seconds, 1e3),
        _format_scaled(kernel_seconds, 1e3),
        _format_scaled(ratio, 1),
    )
    console.print(table)
    if token.refused:
        console.print(f"the token: {token.refused}", highlight=False, soft_wrap=True)
    note = "GB read: base, adapter and caches, by a device; floor: at its memory's published rate."
    if kernel_seconds:
        note += (
            " Kernels: assumed, no estimate of the compiler: their bytes at the memory's rate, or "
            "the cycles of their schedule on a v5e, whichever takes longer; attention by its FLOPs."
        )
    if token.without_kernel:
        note += f" XLA reads the codes without a kernel, because {token.without_kernel}."
    console.print(note, highlight=False, soft_wrap=True)


def _format_scaled(value: float | None, factor: float) -> str:
    return "–" if value is None else f"{factor * value:,.2f}"


def _bytes_read_per_token(job: PlanJob, params: Tree, rows: int) -> int:
    """Returns the bytes of an adapted tree that a device reads in a decoding step."""
    kinds = job.outline.kinds
    n_active_experts = job.outline.active_experts
    n_experts = getattr(job.outline.config, "num_experts", 0)
    # A table of embeddings is read where it is the head, too; of experts, those that rows choose.
    read_share = {"embedding": 0.0 if "head" in kinds.values() else 1.0}
    if n_active_experts and n_experts:
        read_share["experts"] = min(1.0, rows * n_active_experts / n_experts)
    leaves, _ = flatten_with_paths(_base_of(params), is_coded)
    base_bytes = 0.0
    for path, leaf in leaves:
        base_bytes += read_share.get(kinds[path], 1.0) * bytes_per_device(leaf)
    # What trains in full stands among the leaves already.
    factors: list[Any] = [slots.arrays for slots in slots_of(params).values()]
    if nodes_of(params):
        factors = [parts for parts in lj.split(params)[0].values() if "value" not in parts]
    return round(base_bytes) + bytes_per_device(factors)
