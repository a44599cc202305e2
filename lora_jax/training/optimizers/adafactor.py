"""Adafactor's direction: second moments as a row and a column of each large matrix."""

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.types import Shaped, Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.lorafy import map_parts, nodes_of

_NARROW = 128  # matrices narrower than this keep all second moments: a row would save little
_CLIP = 1.0  # the largest root mean square of a matrix's update


def factored_rms(params: Tree = None) -> optax.GradientTransformation:
    """Returns Adafactor's direction, without its scaling by the parameters' size.

    As transformers' Trainer uses it: the learning rate is the size of a step, as Adam's is. Second
    moments of a matrix are factored where both its sides have 128 or more; in a stack, each layer
    and expert by itself. A and B of a low rank keep all of theirs. A matrix's update is clipped to
    a root mean square of 1.

    Args:
      params: the adapted tree, which has the batch axes of A and B. Without it, an array's two
        largest axes are taken for its matrix.

    Source: Shazeer & Stern, *Adafactor*, arXiv 1804.04235.
    """
    stacked = {} if params is None else _batch_axes(params)

    def label(path: str, name: str, array: Shaped) -> str:
        largest = sorted(range(array.ndim), key=lambda axis: array.shape[axis])[-2:]
        return "whole" if set(largest) & stacked.get((path, name), set()) else "factored"

    def clipped(path: str, name: str, update: jax.Array) -> jax.Array:
        batch = stacked.get((path, name), set())
        axes = tuple(axis for axis in range(update.ndim) if axis not in batch)
        rms = jnp.sqrt(jnp.mean(update * update, axis=axes, keepdims=True))
        return update / jnp.maximum(1, rms / _CLIP)

    factored = optax.partition(
        {
            "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=_NARROW),
            "whole": optax.scale_by_factored_rms(factored=False),
        },
        lambda adapter: map_parts(label, adapter),
    )
    return optax.chain(factored, optax.stateless(lambda updates, _: map_parts(clipped, updates)))


def _batch_axes(params: Tree) -> dict[tuple[str, str], set[int]]:
    """Returns the axes of each trained array that count layers or experts."""
    axes: dict[tuple[str, str], set[int]] = {}
    for path, node in nodes_of(params).items():
        for name, array in node.parts().items():
            batch = set(range(array.ndim - 2))  # Flax's convention
            if isinstance(node, LoraWeight):
                places, labels = node.layout(name), node.labels
                batch = {
                    axis
                    for axis, place in enumerate(places)
                    if place >= 0 and labels[place] == "batch"
                }
            axes[path, name] = batch
    return axes
