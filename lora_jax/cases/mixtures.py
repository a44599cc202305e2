"""Cases of mixtures of experts: tokens that choose evenly, and tokens that choose alike."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax import models
from lora_jax.cases.case import Case, normal
from lora_jax.models.layers.placement import Mixture

_ROUNDINGS = 6  # of gate and up, their product, the experts' outputs, and two of gradients
# Where tokens go: evenly; all to the first experts; or those of the first rows to these.
Choice = Literal["even", "one part", "one part of some"]


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up."""
    return jax.nn.silu(gate) * up


def choose_experts(
    choice: str, n_experts: int, shape: tuple[int, int, int], seed: int = 3
) -> np.ndarray:
    """Returns the experts of each token, of a shape [batch, seq, k], int32.

    Args:
      choice: see `Choice`; another word stands for "even".
      n_experts: the number of experts.
      shape: the shape.
      seed: seed of the choice.
    """
    batch, seq, k = shape
    rng = np.random.default_rng(seed)
    experts = np.tile(np.arange(n_experts), (batch, seq, 1))
    chosen = rng.permuted(experts, axis=-1)[..., :k]
    first = np.broadcast_to(np.arange(k)[::-1], shape)
    if choice == "one part":
        chosen = first
    if choice == "one part of some":
        chosen = np.concatenate([first[: batch // 2], chosen[batch // 2 :]])
    return chosen.astype(np.int32)


def mixture_cases(
    dtype: DTypeLike,
    platform: str,
    *,
    n_experts: int = 8,
    shape: tuple[int, int, int] = (8, 128, 2),
    width: int = 256,
    inner: int = 128,
) -> list[Case]:
    """Returns the cases of a mixture; the kernel is one, see `lora_jax.models.layers.placement`.

    Args:
      dtype: the dtype of tokens and kernels.
      platform: the platform, for its compiler options.
      n_experts: the number of experts.
      shape: [batch, seq, k], the experts of each token.
      width, inner: the sizes of a token and of an expert.
    """
    x = normal(1, (*shape[:2], width), dtype)
    weights = np.abs(normal(2, shape)) + np.float32(0.1)
    up_shape = (n_experts, width, inner)
    kernels = (
        normal(3, up_shape, dtype),
        normal(4, up_shape, dtype),
        normal(5, (n_experts, inner, width), dtype),
    )
    kernels = tuple((k / np.sqrt(np.float32(k.shape[1]))).astype(dtype) for k in kernels)
    cotangent = normal(6, x.shape, jnp.bfloat16).astype(np.float32)

    def values_and_gradients(mixture: Mixture, arrays: Any, chosen: Any, cotangent: Any) -> Any:
        def weighted_sum(x: Any, weights: Any, kernels: Any) -> tuple[jax.Array, jax.Array]:
            out = mixture(x, weights, chosen, kernels, ()).astype(jnp.float32)
            return jnp.sum(out * cotangent), out

        gradient = jax.value_and_grad(weighted_sum, argnums=(0, 1, 2), has_aux=True)
        (_, out), gradients = gradient(*arrays)
        return out, gradients

    def compute_dense(arrays: Any, chosen: Any, cotangent: Any) -> Any:
        arrays = jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
        return values_and_gradients(mix_densely, arrays, chosen, cotangent)

    return [
        Case(
            name=f"experts: {choice}, {jnp.dtype(dtype).name}",
            arrays=((x, weights, kernels), choose_experts(choice, n_experts, shape), cotangent),
            compute=values_and_gradients,
            reference=compute_dense,
            dtype=dtype,
            roundings=_ROUNDINGS,
            terms=max(width, shape[0] * shape[1]),
            compiler_options=models.compiler_options(platform),
        )
        for choice in get_args(Choice)
    ]


def mix_in_parts(mixture: Mixture, n_parts: int = 2) -> Mixture:
    """Returns a mixture that runs its parts one after another, as several devices do at once."""

    def mix(x: Any, weights: Any, chosen: Any, kernels: Any, biases: Any) -> jax.Array:
        part_experts = kernels[0].shape[0] // n_parts
        total = jnp.zeros_like(x)
        for first in range(0, n_parts * part_experts, part_experts):
            part_kernels = tuple(kernel[first : first + part_experts] for kernel in kernels)
            part_choice = chosen - first  # experts of other parts are outside the range
            total += mixture(x, weights, part_choice, part_kernels, biases, shares=n_parts)
        return total

    return mix


def mix_densely(x: Any, weights: Any, chosen: Any, kernels: Any, _: Any) -> jax.Array:
    """Returns a mixture by products of all tokens with all experts."""
    gate, up, down = kernels
    multiply = functools.partial(jnp.einsum, "bsd,edf->bsef")
    outs = jnp.einsum("bsef,efd->bsed", gated(multiply(x, gate), multiply(x, up)), down)
    is_chosen = jax.nn.one_hot(chosen, gate.shape[0], dtype=outs.dtype)  # [batch, seq, k, experts]
    return jnp.einsum("bsk,bske,bsed->bsd", weights, is_chosen, outs)
