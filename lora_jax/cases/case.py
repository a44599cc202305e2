"""A case: arrays, what a kernel computes from them, and the same in dense arithmetic.

Rounding explains the bound of a case. A number that is rounded to a dtype gets a relative error of
at most the dtype's unit roundoff u: 2^-8 for bf16, 2^-11 for TF32, 2^-24 for fp32. Errors of
independent roundings add like random steps, and a sum of n products, in fp32, adds about sqrt(n)
steps of 2^-24. So the bound is ``roundings * u + 2 sqrt(terms) * 2^-24``: a result depends on two
sums in a row, and ``roundings`` is above the number of roundings on the way to it. A kernel that
sums in half precision makes sqrt(terms) roundings by u, and one that reads a wrong key changes
results by percents.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lora_jax.core.types import Tree

_DEVICE_AXIS = "device"
# Default products of fp32 numbers round their inputs: to TF32 on GPUs, to bf16 on TPUs.
_PRODUCT_ROUNDOFF = {"gpu": 2.0**-11, "tpu": 2.0**-8}
_SUM_ROUNDOFF = 2.0**-24


class Deviation(NamedTuple):
    """The error of a kernel's results, relative to the reference, and its bound."""

    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Returns True if the error is within the bound, and no NaN."""
        return self.error <= self.bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A small computation that a kernel takes part in.

    Attributes:
      name: the subject and the variant, such as "attention: causal, bfloat16".
      arrays: the arguments, a tuple of trees of NumPy's arrays.
      compute: (kernel, *arrays) -> values and gradients, a tree of arrays.
      reference: (*arrays) -> the same tree, in dense arithmetic with products in fp32.
      dtype: the dtype that is multiplied.
      roundings: a number above the roundings on the way to a result; see this module.
      terms: the terms of the longest sum.
      refusal: why the kernel does not run this case; None if it does.
      compiler_options: options with which the kernel is compiled.
    """

    name: str
    arrays: tuple[Tree, ...]
    compute: Callable[..., Tree]
    reference: Callable[..., Tree]
    dtype: DTypeLike
    roundings: float
    terms: int
    refusal: str | None = None
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def bound(self, platform: str) -> float:
        """Returns the largest relative error that rounding explains."""
        roundoff = float(jnp.finfo(self.dtype).eps) / 2
        roundoff = max(roundoff, _PRODUCT_ROUNDOFF.get(platform, 0.0))
        return self.roundings * roundoff + 2 * math.sqrt(self.terms) * _SUM_ROUNDOFF

    def compare(self, kernel: Any, device: jax.Device | None = None) -> Deviation:
        """Returns the error of a kernel on one device.

        Args:
          kernel: the first argument of `compute`.
          device: the device; by default JAX's first local one.
        """
        (deviation,) = self.compare_on(kernel, [device or jax.local_devices()[0]])
        return deviation

    def compare_on(self, kernel: Any, devices: Sequence[jax.Device]) -> list[Deviation]:
        """Returns the error of a kernel on each of some local devices, which run one program."""
        mesh = Mesh(np.array(devices), (_DEVICE_AXIS,))
        arrays = jax.device_put(self.arrays, NamedSharding(mesh, PartitionSpec()))
        stacks = jax.device_get(self.jitted(kernel, mesh)(*arrays))
        results = [jax.tree.map(lambda stack, n=n: stack[n], stacks) for n in range(len(devices))]
        return self._judge(results, devices[0].platform)

    def compare_placed(self, kernel: Any, arrays: tuple[Tree, ...], mesh: Mesh) -> Deviation:
        """Returns the error of a kernel that works on a mesh, over arrays that lie there."""
        whole = NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            run = jax.jit(functools.partial(self.compute, kernel), out_shardings=whole)
            results = jax.device_get(run(*arrays))
        (deviation,) = self._judge([results], mesh.devices.flat[0].platform)
        return deviation

    def _judge(self, results: Sequence[Tree], platform: str) -> list[Deviation]:
        """Returns the errors of results."""

        def compute_dense(*arrays: Any) -> Tree:
            with jax.default_matmul_precision("highest"):
                return self.reference(*arrays)

        expected = jax.device_get(jax.jit(compute_dense)(*self.arrays))
        bound = self.bound(platform)
        return [Deviation(relative_error(result, expected), bound) for result in results]

    def jitted(self, kernel: Any, mesh: Mesh) -> Any:
        """Returns the jitted computation of each device of a mesh; results have an axis for it."""

        def compute_on_device(*arrays: Any) -> Tree:
            results = self.compute(kernel, *arrays)
            return jax.tree.map(lambda array: array[None], results)

        run: Any = compute_on_device
        if mesh.size > 1:  # a kernel of few rows is for programs of one device
            run = jax.shard_map(
                compute_on_device,
                mesh=mesh,
                in_specs=PartitionSpec(),
                out_specs=PartitionSpec(_DEVICE_AXIS),
                check_vma=False,
            )
        return jax.jit(run, compiler_options=dict(self.compiler_options))


def relative_error(results: Tree, expected: Tree) -> float:
    """Returns the largest error of all arrays: in the root mean square, and in the maximum.

    Both are relative to the same measure of the expected array. The mean finds errors that all
    numbers have; the maximum finds one wrong number among many.
    """
    errors: list[float] = []
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        exact = np.asarray(reference, np.float64)
        difference = np.asarray(result, np.float64) - exact
        for norm in (_root_mean_square, _maximum):
            size = norm(exact) or float(np.finfo(np.float32).tiny)
            errors.append(norm(difference) / size)
    return float(np.max(errors))  # NaN if any is NaN


def _root_mean_square(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))


def _maximum(array: np.ndarray) -> float:
    return float(np.max(np.abs(array)))


def normal(seed: int, shape: Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
    """Returns standard normal numbers, rounded to a dtype."""
    values: np.ndarray = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return values
