"""Chooses the implementation of products with kernels that are sharded over TPUs.

XLA for TPUs has two forms. A windowed product (a collective matmul; Wang et al., ASPLOS 2023) is a
loop: a device multiplies by its part of the kernel while the next part comes from its neighbour. A
whole product gathers the kernel during other work, and multiplies at once. Both transfer the same
number of bytes. Windows hide the transfer, but many small products take longer than one.

By the estimate of a TPU v5e's compiler, whole products were the faster ones at both sizes that were
tried. These are ms a step, of two layers of Llama-3.1-8B and a small head on 4x4 chips, with LoRA
on all linear layers:

    fsdp=16, 512 tokens a device             29.1 windowed, 25.5 whole
    fsdp=4, tensor=4, 8,192 tokens a device  76.6 windowed, 70.5 whole
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from lora_jax.models.specs import SHARDS
from lora_jax.training.errors import TrainingError

Form = Literal["windowed", "whole"]

# The option is the MiB of an operand from which on XLA takes windows; this is more than any has.
COMPILER_OPTIONS: dict[Form, dict[str, str]] = {
    "windowed": {},
    "whole": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}


class ChosenForm(NamedTuple):
    """The chosen implementation of products, with the reason."""

    form: Form
    reason: str

    def __str__(self) -> str:
        return f"{self.form} ({self.reason})"


def choose_form(
    mesh: Mapping[str, int], platform: str, asked: Form | None = None
) -> ChosenForm | None:
    """Chooses the implementation of products with sharded kernels; None without such kernels.

    Args:
      mesh: sizes of the mesh's axes.
      platform: platform of its devices.
      asked: the form to take; by default whole, the faster one in the estimates above.

    Raises:
      TrainingError: a form was asked for where it has no effect.
    """
    kernel_shards = math.prod(mesh[name] for name in (*SHARDS, "tensor"))
    if platform != "tpu" or kernel_shards == 1:
        if asked is None:
            return None
        reason = "each device has all kernels"
        if platform != "tpu":
            reason = f"the devices are {platform}s"
        raise TrainingError(
            lambda option: (
                f"{option('collective_matmul', asked)} only has an effect on kernels that several "
                f"TPUs share, but here {reason}. Remove {option('collective_matmul')}."
            )
        )
    if asked is not None:
        return ChosenForm(asked, "as asked")
    return ChosenForm("whole", "the default")
