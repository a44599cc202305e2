"""Describes NVIDIA GPUs for their compiler, so that plans need no GPU.

XLA compiles for a GPU from a description of the card: its cores, its memories, its clock. Those of
the cards of data centres are XLA's own (xla/backends/gpu/target_config/specs); those of the others
are written from NVIDIA's data sheets and the architecture's tuning guides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from train.console.errors import UserError
from train.console.extras import install_command

_MIB = 2**20


class _Architecture(NamedTuple):
    """The facts that all cards of one compute capability share; sizes are in bytes."""

    fpus_per_core: int
    threads_per_core: int
    shared_per_core: int
    shared_per_block: int
    accelerated: bool = False


# Compute capability -> its architecture: Turing, Ampere, Ada, Hopper, Blackwell.
_ARCHITECTURES = {
    (7, 5): _Architecture(64, 1024, 65_536, 65_536),
    (8, 0): _Architecture(64, 2048, 167_936, 166_912),
    (8, 6): _Architecture(128, 1536, 102_400, 101_376),
    (8, 9): _Architecture(128, 1536, 102_400, 101_376),
    (9, 0): _Architecture(128, 2048, 233_472, 232_448, accelerated=True),
    (10, 0): _Architecture(128, 2048, 233_472, 232_448, accelerated=True),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      name: the name that its driver reports.
      compute: the compute capability.
      cores: the number of streaming multiprocessors.
      clock: GHz, boosted.
      memory: bytes that a program can have: less than the data sheet says, by what ECC and the
        driver keep.
      bandwidth: bytes/s of device memory.
      l2: bytes of its cache.
      flops: published peak FLOP/s in bf16 with sums in fp32, without sparsity; in fp32 where the
        card computes no bf16.
      from_data_sheet: whether XLA has no description of the card, so that this one is ours.
      sibling: a card of the same compute capability that JAX knows, where it does not know this
        one: JAX compiles a kernel by the name of the card.
    """

    name: str
    compute: tuple[int, int]
    cores: int
    clock: float
    memory: int
    bandwidth: float
    l2: int
    flops: float
    from_data_sheet: bool = False
    sibling: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """The remarks about the card for a plan."""
        remarks: list[str] = []
        if self.from_data_sheet:
            remarks.append(
                f"XLA has no description of the {self.name}, so the plan uses NVIDIA's data sheet"
            )
        has_bf16 = self.compute >= (8, 0)
        if not has_bf16:
            remarks.append(
                f"the {self.name} does not compute in bf16, so XLA uses fp32, and the peak is "
                "that of fp32"
            )
        return tuple(remarks)

    @property
    def description(self) -> str:
        """The card in the text form of XLA's GpuTargetConfigProto."""
        major, minor = self.compute
        architecture = _ARCHITECTURES[self.compute]
        name = f"{self.name} (as {self.sibling})" if self.sibling else self.name
        feature = "ACCELERATED_FEATURES" if architecture.accelerated else "NONE"
        suffix = "a" if architecture.accelerated else ""
        return f"""
            gpu_device_info {{
              name: "{name}" device_vendor: "NVIDIA Corporation"
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {feature}
              }}
              platform_version: "Compute Capability {major}.{minor}{suffix}"
              core_count: {self.cores} fpus_per_core: {architecture.fpus_per_core}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory} memory_bandwidth: {self.bandwidth:.0f}
              l2_cache_size: {self.l2}
              shared_memory_per_block: 49152 shared_memory_per_core: {architecture.shared_per_core}
              shared_memory_per_block_optin: {architecture.shared_per_block}
              threads_per_block_limit: 1024 threads_per_warp: 32
              threads_per_core_limit: {architecture.threads_per_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              device_address_bits: 64 pcie_bandwidth: 34359738368
              driver_version: "13.0.0" runtime_version: "12.9.0"
              compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{name}"
        """


def _gib_to_bytes(number: float) -> int:
    return int(number * 2**30)


# Peaks: NVIDIA's data sheets. Memory of the cards that XLA does not describe: what drivers report.
CARDS = {
    "a100-40gb": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 42_331_013_120, 1555.2e9, 40 * _MIB, 312e12
    ),
    "a100-80gb": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 85_100_068_864, 2039.04e9, 40 * _MIB, 312e12
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 84_942_979_072, 3352.32e9, 50 * _MIB, 989.4e12
    ),
    "h200": Gpu(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 1.98, 151_397_597_184, 4800e9, 50 * _MIB, 989.4e12
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 1.965, 191_514_411_008, 7672.32e9, 132_644_864, 2250e12
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        128,
        2.52,
        _gib_to_bytes(23.64),
        1008e9,
        72 * _MIB,
        165.2e12,
        True,
    ),
    "rtx3090": Gpu(
        *(
            "NVIDIA GeForce RTX 3090",
            (8, 6),
            82,
            1.695,
            _gib_to_bytes(23.69),
            936e9,
            6 * _MIB,
            71e12,
            True,
        ),
        sibling="NVIDIA A10",
    ),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 2.04, _gib_to_bytes(22.03), 300e9, 48 * _MIB, 121e12, True),
    "l40s": Gpu(
        *("NVIDIA L40S", (8, 9), 142, 2.52, _gib_to_bytes(44.4), 864e9, 96 * _MIB, 362e12, True),
        sibling="NVIDIA L40",
    ),
    "t4": Gpu("Tesla T4", (7, 5), 40, 1.59, _gib_to_bytes(14.56), 320e9, 4 * _MIB, 8.1e12, True),
}

# Shares of a card's memory that JAX reserves: by default, and with
# XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, which leaves room for CUDA's context and little else.
DEFAULT_MEMORY_SHARE, LARGEST_MEMORY_SHARE = 0.75, 0.95
# On a GPU, the compiler tries several kernels for each product, and keeps the fastest. Without one,
# all are Triton's, or else all are cuBLAS's: a plan compiles both, and shows the larger memory.
GPU_COMPILATIONS: tuple[dict[str, Any], ...] = ({}, {"xla_gpu_enable_triton_gemm": False})


def find_gpus(topology: str, kind: str, size: str) -> Sequence[Any]:
    """Returns descriptions of a topology's devices. The devices need not be present.

    Args:
      topology: the topology as given, for errors.
      kind: a card of `CARDS`.
      size: the number of GPUs, "8"; or hosts and GPUs per host, "2x8".

    Raises:
      UserError: the size has another form, or the GPU's compiler is not installed.
    """
    from jax.experimental import topologies

    n_hosts, _, gpus_per_host = size.rpartition("x")
    counts = [int(count) for count in (n_hosts or "1", gpus_per_host) if count.isdigit()]
    has_three_sizes = "x" in n_hosts
    if has_three_sizes or not all(0 < count <= 4096 for count in counts):
        raise UserError(
            f"--topology {topology} has an unknown size. Pass a number of GPUs, such as {kind}:8, "
            f"or hosts and GPUs per host, such as {kind}:2x8."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        gpus = topologies.get_topology_desc(
            platform="cuda",
            target_config=CARDS[kind].description,
            topology=f"{n_hosts or 1}x1x{gpus_per_host}",  # NVLink joins those of a host, not hosts
        )
    except Exception as error:  # any error here is about the plugin
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"--topology {topology} needs the GPU's compiler, which is not installed for JAX "
            f"{jax.__version__} ({reason}). It needs no GPU. Install it with "
            f"{install_command('gpu-plan')}, or pip install jax-cuda13-plugin jax-cuda13-pjrt "
            "(cuda12 with JAX 0.10) of JAX's own version."
        ) from None
    return gpus.devices
