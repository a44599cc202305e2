"""Prints JAX's devices. It runs as a separate process, because JAX may fail, hang or exit."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models.layers.attend import choose_implementation
from lora_jax.models.layers.attention import AttentionCall
from lora_jax.models.layers.kernels.flash_call import COMPILER, missing_compiler
from lora_jax.models.layers.placement import platform_of
from train.plan.local import memory_capacity_of
from train.plan.machines import topology_of_devices

LENGTH, HEAD = 2048, 128  # of the rows and heads that the choice of attention is told for


def main() -> None:
    """Prints the facts as a line of JSON, the last line on standard output."""
    facts = find_devices()
    sys.stdout.write("\n" + json.dumps(facts) + "\n")


def find_devices() -> dict[str, Any]:
    """Returns the devices of JAX's default backend, and the kernels that run on them."""
    devices = jax.local_devices()
    first = devices[0]
    platform = platform_of(first)
    missing = missing_compiler() if platform == "gpu" else None
    call = AttentionCall(queries=LENGTH, head_dim=HEAD, dtype=jnp.dtype(jnp.bfloat16))
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "of_all_processes": jax.device_count(),
        "memory": memory_capacity_of(first),
        "topology": topology_of_devices(devices),
        "attention": str(choose_implementation("auto", call, LENGTH, platform)),
        "flash_compiled_by": COMPILER if platform == "gpu" and missing is None else None,
        "flash_missing": missing,
        "experts": "ragged" if platform == "tpu" else "blocks",
    }
