"""Prints the TPU compiler's estimate of a layer that is recomputed, with products shared and not.

A program of its own: libtpu refuses XLA_FLAGS that are for CPUs.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

import lora_jax as lj
from lora_jax.adapt.rules import products
from lora_jax.core.names import NARROW_PRODUCT
from train.plan.clock.groups import ADAPTER, BASE, RECOMPUTED
from train.plan.clock.read import Estimate, read_clock
from train.plan.machines import find_machine

# Attention's projections in Llama-3.1-8B.
WIDTHS = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
LAYERS, TOKENS = 2, 2048


def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
    def times(x: jax.Array, name: str) -> jax.Array:
        return x @ weights[name]["kernel"]

    normal = jnp.tanh(x)
    q, k, v = (times(normal, name) for name in "qkv")
    return x + times(jnp.tanh(q) * jnp.tile(k * v, 4), "o"), None


def estimate(device: Any, policy: Any) -> Estimate:
    """Returns the estimate of a loss and its gradient with respect to A and B."""
    place = SingleDeviceSharding(device)
    plain = {
        name: {"kernel": jax.ShapeDtypeStruct((LAYERS, *shape), jnp.bfloat16, sharding=place)}
        for name, shape in WIDTHS.items()
    }
    x = jax.ShapeDtypeStruct((1, TOKENS, 4096), jnp.bfloat16, sharding=place)
    adapter, base = lj.split(lj.lorafy(plain, [lj.LoraRule(targets=".*", rank=16)]))
    adapter = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place), adapter
    )

    def run(params: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("layers"):
            return lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, params)[0]

    def loss(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(lj.adapt(run)(lj.join(adapter, base), x).astype(jnp.float32) ** 2)

    return read_clock(jax.jit(jax.value_and_grad(loss)).lower(adapter, base, x).compile().as_text())


def facts(made: Estimate) -> dict[str, float]:
    """Returns the seconds and the FLOPs of an estimate, by name."""
    return {
        "seconds": made.fusions,
        "of A and B": made.cost(ADAPTER).seconds,
        "base FLOPs": made.cost(BASE).flops,
        "FLOPs of A and B recomputed": made.cost(ADAPTER, RECOMPUTED).flops,
    }


if __name__ == "__main__":
    device = find_machine("v5e:1x1").devices[0]
    shared = estimate(device, jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT))
    products.shared_product = lambda *_: None  # each weight has a product of its own
    jax.clear_caches()  # of the layer's trace
    alone = estimate(device, None)
    print(json.dumps([facts(shared), facts(alone)]))
