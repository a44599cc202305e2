"""Placement of a model's activations on a mesh: the interface, and the default without a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax

from lora_jax.core.types import Tree

Activation = Literal["residual", "inputs", "heads", "features"]
# (x [batch, seq, d_model], weights [batch, seq, k], experts [batch, seq, k], the kernels of the
# gates, of the up and of the down projections [experts, …], their biases) -> [batch, seq, d_model].
# With shares=n, the kernels are one of n equal parts of all experts, of which numbers outside
# 0 … experts - 1 are the others, and add nothing.
Mixture = Callable[..., jax.Array]
# An implementation of attention; see ``lora_jax.models.layers.attend.Attend``.
Attention = Callable[..., jax.Array]


OLD_GPU = "gpu before sm_80"  # no kernel is compiled for one


def platform_of(device: Any) -> str:
    """Returns the kind of a device or device description: "cpu", "gpu", `OLD_GPU` or "tpu".

    A GPU's kernels need compute capability 8.0: Ampere, Ada, Hopper or later.
    """
    platform: str = device.platform
    if platform == "gpu" and float(getattr(device, "compute_capability", 8)) < 8:
        return OLD_GPU
    return platform


class Placement:
    """Places a model's activations on devices; this class leaves them unchanged.

    A subclass does it for a mesh. It has to be hashable.
    """

    @property
    def platform(self) -> str:
        """Returns the kind of device for which the model is compiled; see ``platform_of``."""
        return platform_of(jax.devices()[0])

    @property
    def kernels(self) -> bool:
        """Returns True if "auto" may choose kernels, which XLA cannot partition.

        Without a placement, nothing says on which devices the arrays will be.
        """
        return jax.device_count() == 1

    @property
    def takes_chunks(self) -> bool:
        """Returns True if MLPs may process a long row in chunks; see ``apply_chunked``.

        Where a kernel lies on several devices, each chunk would gather it again.
        """
        return True

    @property
    def ragged_kernels(self) -> bool:
        """Returns True if ragged products run as kernels on each device's own sorted tokens.

        A placement that returns True is for steps that are compiled with
        ``lora_jax.models.compiler_options("tpu")``.
        """
        return False

    @property
    def token_parts(self) -> int:
        """Returns the number of shards of a batch's tokens."""
        return 1

    @property
    def word_parts(self) -> int:
        """Returns the number of shards of the head's vocabulary."""
        return 1

    def head_shardings(self, params: Tree) -> Tree | None:
        """Returns the parameters' shardings for a head inside a loop, or None.

        None to leave them as they are.
        """
        return None

    def constrain(self, x: jax.Array, kind: Activation) -> jax.Array:
        """Returns an activation, with a sharding constraint if there is a mesh.

        There are four kinds:

        - residual, [batch, seq, d_model]: the stream between layers, kept by rematerialisation;
        - inputs, [batch, seq, d_model]: the input of a block's first products;
        - heads, [batch, seq, heads, head_dim]: queries, keys and values;
        - features, [batch, seq, features]: the input of a block's last product.
        """
        return x

    def mixture(self, mixed: Mixture) -> Mixture:
        """Returns the mixture of experts to use; on a mesh, each device sorts its own tokens."""
        return mixed

    def attention(self, local: Attention) -> Attention:
        """Returns the attention to use; on a mesh, each device has its batch, heads and queries.

        Args:
          local: computes attention on a device. Where it has a part of the queries only, the
            mask's ``split`` says which.
        """
        return local


UNPLACED = Placement()
