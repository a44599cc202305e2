"""maxdiffusion (Linen): the transformer of Flux."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn


def _lines(transformer: Any, params: Any, inputs: Any) -> Made:
    def velocity(params, inputs):
        return transformer.apply({"params": params}, **inputs).sample

    return Made(velocity, params, (inputs,))


def _arguments() -> tuple[Any, ...]:
    from flax.core import meta
    from maxdiffusion.models.flux.transformers.transformer_flux_flax import FluxTransformer2DModel

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    transformer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        mesh=mesh,
    )
    keys = jax.random.split(jax.random.key(0), 6)
    inputs = {
        "hidden_states": jax.random.normal(keys[0], (2, 4, 8)),
        "encoder_hidden_states": jax.random.normal(keys[1], (2, 3, 12)),
        "pooled_projections": jax.random.normal(keys[2], (2, 10)),
        "timestep": jnp.array([0.25, 0.75]),
        "img_ids": jax.random.uniform(keys[3], (2, 4, 3)),
        "txt_ids": jnp.zeros((2, 3, 3)),
        "guidance": None,
    }
    params = meta.unbox(jax.jit(transformer.init)(keys[4], **inputs)["params"])
    return transformer, drawn(params), inputs


REPOSITORY = Repository(
    name="maxdiffusion",
    title="maxdiffusion",
    address="https://github.com/AI-Hypercomputer/maxdiffusion",
    pins="jax 0.9.0 and flax 0.12.6, or newer",
    source="src",
    requirements=(
        "einops",
        "chex",
        "requests",
        "huggingface_hub",
        "pillow",
        "tqdm",
        "tensorboardX",
        "pyyaml",
        "packaging",
    ),
    absent=("maxdiffusion.checkpointing", "google.cloud", "aqt", "qwix", "torch"),
    notes=(
        "The model is initialized with boxed parameters: `flax.core.meta.unbox` gives the arrays.",
        "The model has no guidance: with `guidance_embeds=True`, the repository's own forward pass "
        "embeds the time twice and fails.",
    ),
    models=(Model("Flux: two double and two single blocks", _lines, _arguments),),
)
