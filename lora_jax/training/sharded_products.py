"""The form of products with kernels that lie over the devices of a TPU.

XLA for TPUs knows two. Windowed (a collective matmul; Wang et al., ASPLOS 2023), a product is a
loop: a device multiplies by the part of the kernel that it has, while the next part comes from its
neighbour. Whole, a kernel is gathered beside other work, and multiplied at once. Both send the
same. Windows hide a product's own transfer, but their products are small, and take longer than one.

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
    """The form of a run's products, and the reason in words."""

    form: Form
    reason: str

    def __str__(self) -> str:
        return f"{self.form} ({self.reason})"


def choose_form(
    mesh: Mapping[str, int], platform: str, asked: Form | None = None
) -> ChosenForm | None:
    """Returns the form of products with sharded kernels; None where there is nothing to choose.

    Args:
      mesh: sizes of the mesh's axes.
      platform: platform of its devices.
      asked: the form to take; by default whole, the faster one in the estimates above.

    Raises:
      TrainingError: a form was asked for where it has no effect.
    """
    shared = math.prod(mesh[name] for name in (*SHARDS, "tensor"))
    if platform != "tpu" or shared == 1:
        if asked is None:
            return None
        why = f"the devices are {platform}s" if platform != "tpu" else "each device has all kernels"
        raise TrainingError(
            lambda option: (
                f"{option('collective_matmul', asked)} is about kernels that several TPUs share, "
                f"and here {why}: leave it out"
            )
        )
    if asked is not None:
        return ChosenForm(asked, "as asked")
    return ChosenForm("whole", "the default")
