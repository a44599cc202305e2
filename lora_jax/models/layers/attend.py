"""Softmax attention: its implementations by name, and the choice between them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.core.names import SAME_TOKENS, TOKENS
from lora_jax.models.layers.attention import DENSE, AttentionCall, AttentionInputs, Implementation
from lora_jax.models.layers.blockwise import ON_GPU, Blockwise
from lora_jax.models.layers.cache import Shared
from lora_jax.models.layers.kernels.cudnn import Cudnn
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.models.layers.kernels.splash_branches import CALLS_WITH_BRANCHES as SPLASH_CALLS
from lora_jax.models.layers.masks import Mask, Split
from lora_jax.models.layers.placement import UNPLACED, Placement

# From this many queries on, "auto" never holds all scores: see tests/benchmarks/attention.py.
MIN_LONG_ROW_QUERIES = 512


class Attend(Protocol):
    """An implementation of attention; see ``attend`` for the arguments. It must be hashable.

    On a mesh it is called in ``jax.shard_map``, with a device's batch, heads and queries, and with
    all keys of those: see ``Split`` for the queries of a long row. A model without ``sinks`` gives
    none.
    """

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Mask,
        scale: float | jax.Array | None = None,
        cap: float | None = None,
        sinks: jax.Array | None = None,
        /,
    ) -> jax.Array: ...


Kernel = Splash | Flash | Cudnn  # each has `refusal`, and `fallback` for the calls that it refuses

IMPLEMENTATIONS: dict[str, Implementation] = {
    "dense": DENSE,
    "blockwise": Blockwise(),
    "splash": Splash(),
    "flash": Flash(),
    "cudnn": Cudnn(),
}
ATTENTION = ("auto", *IMPLEMENTATIONS)
_REQUIRED_PLATFORM = {"splash": "tpu", "flash": "gpu", "cudnn": "gpu"}
_BEST_ON_PLATFORM = {"tpu": "splash", "gpu": "flash"}


def attend(
    inputs: AttentionInputs,
    *,
    attention: str | Attend = "auto",
    placement: Placement = UNPLACED,
    shared: Shared | None = None,
) -> jax.Array:
    """Computes softmax(soft_cap(scale * q k^T)) v, with scores and softmax in fp32 or wider.

    Args:
      inputs: the arrays and the options of the call:

        - q, [batch, seq, heads, head_dim];
        - k and v, [batch, keys, kv_heads, head_dim]. Queries are grouped by key/value head, so that
          keys and values are never repeated in memory.
        - mask: the keys that each query may see. A query that sees none, or that is padding, gets
          some average of values, which depends on the implementation and is finite.
        - scale: a number or []; 1 / sqrt(head_dim) by default.
        - cap: see ``soft_cap``.
        - sinks, [heads]: exp(sink) is added to the sum of a query's weights, so that they add up to
          less than 1 (gpt-oss). None for none.
      attention: the implementation; see ``implementation``.
      placement: partitions the work over a mesh; see ``Placement.attention``.
      shared: keys and values, [kv_heads, n, head_dim], that come before those of every row, in the
        mask too. "dense" without a mesh multiplies all rows with them at once; others copy them for
        each row.

    Returns:
      [batch, seq, heads, head_dim].
    """
    q, k, v, *_ = inputs
    inputs = inputs._replace(q=checkpoint_name(q, TOKENS))
    local = implementation(attention, q.shape[1], placement.platform, kernels=placement.kernels)
    if shared is not None:
        if local is DENSE and placement == UNPLACED:
            return DENSE.compute(inputs, shared)
        # The other implementations read a copy of the shared keys and values for each row.
        shared_copies = shared.repeat(q.shape[0])  # [batch, n, kv_heads, head_dim]
        inputs = inputs._replace(
            k=jnp.concatenate([shared_copies.key.astype(k.dtype), k], axis=1),
            v=jnp.concatenate([shared_copies.value.astype(v.dtype), v], axis=1),
        )
    out: jax.Array = placement.attention(local)(*inputs.arguments)
    named_out: jax.Array = checkpoint_name(out, SAME_TOKENS)
    return named_out


def implementation(
    attention: str | Attend, seq: int, platform: str, *, kernels: bool = True
) -> Attend:
    """Returns an implementation of attention by name; returns a function unchanged.

    - "dense" holds all scores, [batch, heads, seq, keys] in fp32.
    - "blockwise" holds those of a block of queries; see ``Blockwise``.
    - "splash" is a kernel for TPUs that holds none; see ``Splash``.
    - "flash" is a kernel for GPUs from Ampere on that holds none; see ``Flash``.
    - "cudnn" is cuDNN's kernel for GPUs; see ``Cudnn``.
    - "auto" is "dense" for fewer than 512 queries. From 512 on it is "splash" on a TPU, "flash" on
      a GPU from Ampere on, and "blockwise" elsewhere, or where there are several devices and no
      placement.

    A call that a kernel does not support (keys in a cache, say) goes to "blockwise";
    ``choose_implementation`` tells.

    Args:
      attention: a name, or a function with the arguments of ``Attend``.
      seq: the number of queries, on all devices together.
      platform: the kind of device; see ``platform_of``.
      kernels: whether "auto" may be a kernel; see ``Placement.kernels``.

    Raises:
      ValueError: for another name, or a kernel that does not run on the platform.
    """
    if not isinstance(attention, str):
        return attention
    if attention == "auto":
        best = _BEST_ON_PLATFORM.get(platform, "blockwise") if kernels else "blockwise"
        attention = best if seq >= MIN_LONG_ROW_QUERIES else "dense"
    if attention not in IMPLEMENTATIONS:
        raise ValueError(f"There is no attention {attention!r}. Use one of {', '.join(ATTENTION)}.")
    required_platform = _REQUIRED_PLATFORM.get(attention, platform)
    if required_platform != platform:
        raise ValueError(
            f"attention {attention!r} runs only on a {required_platform}, but the model is "
            f"compiled for a {platform}. Use attention='auto', which chooses what runs there."
        )
    if attention == "blockwise" and platform.startswith("gpu"):
        return ON_GPU
    return IMPLEMENTATIONS[attention]


class AttentionChoice(NamedTuple):
    """The implementation that is used for a call.

    Attributes:
      attend: the implementation.
      name: its name, or the text of a function.
      why: why it is not the one that was asked for; None if it is.
    """

    attend: Attend
    name: str
    why: str | None = None

    def __str__(self) -> str:
        return self.name if self.why is None else f"{self.name} ({self.why})"


def choose_implementation(
    attention: str | Attend, call: AttentionCall, seq: int, platform: str
) -> AttentionChoice:
    """Returns the implementation for a call, and why it differs from the requested one.

    >>> import jax.numpy as jnp
    >>> from lora_jax.models.layers.attend import choose_implementation
    >>> from lora_jax.models.layers.attention import AttentionCall
    >>> call = AttentionCall(queries=2048, head_dim=64, dtype=jnp.float16)
    >>> print(choose_implementation("auto", call, 2048, "tpu"))
    blockwise (splash: the kernel has no float16)

    Args:
      attention, seq, platform: see ``implementation``.
      call: the call on one device.

    Raises:
      ValueError: see ``implementation``.
    """
    requested = implementation(attention, seq, platform)
    requested_name = _implementation_name(requested)
    reason = requested.refusal(call) if isinstance(requested, Kernel) else None
    if not isinstance(requested, Kernel) or reason is None:
        return AttentionChoice(requested, requested_name)
    fallback = requested.fallback
    return AttentionChoice(fallback, _implementation_name(fallback), f"{requested_name}: {reason}")


def _implementation_name(attend: Attend) -> str:
    """Returns the name of an implementation with any options."""
    for name, known in IMPLEMENTATIONS.items():
        if type(attend) is type(known):
            return name
    return str(attend)


def count_scores(attend: Attend, seq: int, *, branched: bool = False) -> int:
    """Returns the number of scores per head for a causal row, on one device.

    Args:
      attend: an implementation; a caller's own function is assumed to compute all scores.
      seq: tokens of the row.
      branched: whether it has prompts with several completions.
    """
    pairs = attend.pairs(seq) if isinstance(attend, Blockwise | Splash | Flash) else seq**2
    return pairs * (SPLASH_CALLS if branched and isinstance(attend, Splash) else 1)


class AttentionConfig(Protocol):
    """A configuration with the sizes of its model's heads."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...


def head_dim_of(config: AttentionConfig) -> int:
    """Returns the size of a head of a model."""
    size: int = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return size


def choose_attention(
    config: AttentionConfig,
    seq: int,
    *,
    dtype: DTypeLike,
    attention: str | Attend = "auto",
    platform: str = "cpu",
    split: Split | None = None,
    branched: bool = False,
) -> AttentionChoice:
    """Returns the implementation for rows of a length without a cache, and the reason.

    >>> from lora_jax import models
    >>> from lora_jax.models.layers.attend import choose_attention
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_positions": 4096}
    >>> config = models.read_config(fields)
    >>> print(choose_attention(config, 2048, dtype="float16", platform="tpu"))
    blockwise (splash: the kernel has no float16)

    Args:
      config: the configuration of a model of ``lora_jax.models``.
      seq: tokens per row.
      dtype: dtype of the computation.
      attention: the name that was asked for; see ``Decoder``.
      platform: the kind of device; see ``lora_jax.models.layers.placement.platform_of``.
      split: how the queries of a row are split over devices; None where they are not.
      branched: whether rows have prompts with several completions; see ``Mask.branching``.

    Raises:
      ValueError: for an unknown name, or one that does not run on the platform.
    """
    call = AttentionCall(
        queries=seq // (split.parts if split else 1),
        head_dim=head_dim_of(config),
        dtype=jnp.dtype(dtype),
        capped=getattr(config, "attn_logit_softcapping", None) is not None,
        sinks=getattr(config, "sinks", False),
        branched=branched,
        windowed=bool(getattr(config, "windowed_layers", ())),
        split=split,
    )
    return choose_implementation(attention, call, seq, platform)
