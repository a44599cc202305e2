"""The memory of a traced step, predicted."""

from collections.abc import Mapping

import jax

from lora_jax.core.types import Shaped, Tree
from lora_jax.training.layout import Layout
from lora_jax.training.memory.axes import axes_of, bytes_of_part
from lora_jax.training.memory.live import peak_bytes
from lora_jax.training.step import State

_GAPS = 1.05  # a compiler's heap has gaps between its buffers


def predicted_bytes(
    traced: jax.stages.Traced, layout: Layout, state: State, base: Tree, batch: Mapping[str, Shaped]
) -> int:
    """Returns the bytes of a device that a traced step takes, its arguments among them.

    Args:
      traced: the step; see `lora_jax.training.setup.Setup.trace`.
      layout: the mesh.
      state, base, batch: its arguments, arrays or shapes with shardings; the state is donated.
    """
    donated, kept = jax.tree.leaves(state), jax.tree.leaves((base, dict(batch)))
    mesh = dict(layout.mesh.shape)
    most = peak_bytes(
        traced.jaxpr,
        [leaf.sharding for leaf in (*donated, *kept)],
        [True] * len(donated) + [False] * len(kept),
        mesh,
        platform=layout.platform,
    )
    held = sum(
        bytes_of_part(leaf, axes_of(leaf.sharding, leaf.ndim), mesh) for leaf in (*donated, *kept)
    )
    return held + round(_GAPS * (most - held))
