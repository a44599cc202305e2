"""Cases on a mesh: tokens that are exchanged between experts, and kernels that devices share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.cases.case import Case, normal
from lora_jax.cases.mixtures import gated, mixture_cases
from lora_jax.models.decoder.experts import implementation
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.placement import Mixture
from lora_jax.models.specs import COLUMNS, EXPERT_COLUMNS, EXPERT_ROWS, ROWS
from lora_jax.training.layout import Layout
from lora_jax.training.mesh import make_mesh

_TABLE = [
    (r".*(gate|up)/kernel", EXPERT_COLUMNS),
    (r".*down/kernel", EXPERT_ROWS),
    (r".*wide/kernel", COLUMNS),
    (r".*back/kernel", ROWS),
]
_WIDTH, _INNER, _ROWS = 256, 512, 64  # _ROWS for each device


def make_layout(devices: Sequence[Any], **sizes: Any) -> Layout:
    """Returns the layout of experts (gate, up, down) and of a wide MLP (wide, back) on devices."""
    return Layout(make_mesh(devices, **sizes), _TABLE)


def exchange_cases(layout: Layout) -> list[Case]:
    """Returns the cases of tokens that go to the devices of their experts; see `place_mixture`.

    Args:
      layout: see `make_layout`; with as many parts of experts as devices.
    """
    n_experts = 2 * layout.mesh.size
    shape = (n_experts, 64, 2)
    cases = mixture_cases("float32", layout.platform, n_experts=n_experts, shape=shape)
    return [
        dataclasses.replace(case, name=case.name.replace("experts", "exchange")) for case in cases
    ]


def place_mixture(arrays: Any, layout: Layout) -> tuple[Any, ...]:
    """Returns the arrays of a mixture on a mesh."""
    (x, weights, kernels), chosen, cotangent = arrays
    params = {"gate": kernels[0], "up": kernels[1], "down": kernels[2]}
    placed = layout.placed({name: {"kernel": kernel} for name, kernel in params.items()})
    batch = {"x": x, "weights": weights, "chosen": chosen, "cotangent": cotangent}
    batch = layout.batch(batch, parts=False)
    kernels = tuple(placed[name]["kernel"] for name in params)
    return (batch["x"], batch["weights"], kernels), batch["chosen"], batch["cotangent"]


def exchanged_mixture(layout: Layout) -> Mixture:
    """Returns the mixture of a model on a mesh."""
    return layout.mixture(make_mixture(gated, implementation("auto", layout)))


def fsdp_case(layout: Layout) -> tuple[Case, tuple[Any, ...]]:
    """Returns the case of an adapted MLP whose kernels all devices share, with placed arrays.

    Args:
      layout: see `make_layout`; with as many parts of fsdp as devices.
    """
    kernels = {
        "wide": {"kernel": normal(1, (_WIDTH, _INNER)) / np.float32(np.sqrt(_WIDTH))},
        "back": {"kernel": normal(2, (_INNER, _WIDTH)) / np.float32(np.sqrt(_INNER))},
    }
    rule = lj.LoraRule(targets=[*kernels], rank=8, alpha=16)
    tree = lj.lorafy(kernels, [rule])
    shapes, base = lj.split(tree)
    adapter = jax.tree.map(lambda array: normal(3, array.shape) / np.float32(8), shapes)
    x = normal(4, (layout.mesh.size, _ROWS, _WIDTH))

    def run_mlp(params: Any, x: jax.Array) -> jax.Array:
        out: jax.Array = jax.nn.silu(x @ params["wide"]["kernel"]) @ params["back"]["kernel"]
        return out

    def values_and_gradients(forward: Callable[..., Any], adapter: Any, base: Any, x: Any) -> Any:
        def total(adapter: Any) -> tuple[jax.Array, jax.Array]:
            out = forward(lj.join(adapter, base), x)
            return jnp.mean(out**2), out

        (loss, out), gradients = jax.value_and_grad(total, has_aux=True)(adapter)
        return loss, out, gradients

    def compute(adapted: Callable[..., Any], *arrays: Any) -> Any:
        return values_and_gradients(adapted(run_mlp), *arrays)

    def compute_dense(*arrays: Any) -> Any:
        return values_and_gradients(lambda params, x: run_mlp(lj.merge(params), x), *arrays)

    case = Case(
        name="fsdp: an adapted MLP, float32",
        arrays=(adapter, base, x),
        compute=compute,
        reference=compute_dense,
        dtype="float32",
        roundings=8,
        terms=x.shape[0] * _ROWS,
    )
    placed_adapter, placed_base = lj.split(layout.placed(lj.join(adapter, base)))
    return case, (placed_adapter, placed_base, layout.batch({"x": x}, parts=False)["x"])
