"""openpi (NNX around Linen): π0, π0.5 and π0-FAST, with small Gemmas and a small SigLIP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn

PIXELS = 28
VOCABULARY = 37


def _lines(model: Any, rng: Any, observation: Any, actions: Any) -> Made:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def losses(params, rng, observation, actions):
        model = nnx.merge(graphdef, params, rest)
        return model.compute_loss(rng, observation, actions)

    return Made(losses, params, (rng, observation, actions))


def _shrink() -> None:
    """Makes the models of the repository small: its vision tower has one size only."""
    import ml_collections
    from openpi.models import gemma, gemma_fast, model, siglip

    sizes = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1}
    gemma.PALIGEMMA_VOCAB_SIZE = VOCABULARY
    gemma.get_config = lambda variant: gemma.Config(**sizes, head_dim=8)
    gemma_fast.get_config = lambda variant: ml_collections.ConfigDict(
        {"variant": "gemma_2b", **sizes, "head_dim": 8, "norm_eps": 1e-6}
        | {"vocab_size": VOCABULARY, "scan": True, "remat_policy": "nothing_saveable"}
    )
    vision = {"width": 12, "depth": 2, "mlp_dim": 20, "num_heads": 2, "patch_size": (14, 14)}
    siglip.decode_variant = lambda variant: vision
    model.IMAGE_RESOLUTION = (PIXELS, PIXELS)
    model.preprocess_observation.__kwdefaults__["image_resolution"] = (PIXELS, PIXELS)


def _arguments(module: str, name: str, **settings: Any) -> tuple[Any, ...]:
    import importlib

    _shrink()
    config = getattr(importlib.import_module(f"openpi.models.{module}"), name)(
        dtype="float32", action_dim=5, action_horizon=4, max_token_len=6, **settings
    )
    model = config.create(jax.random.key(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    model = nnx.merge(graphdef, drawn(params), rest)
    keys = iter(jax.random.split(jax.random.key(1), 20))

    def fill(leaf: Any) -> Any:
        if leaf.dtype == jnp.bool_:
            return jnp.ones(leaf.shape, bool)
        if leaf.dtype == jnp.int32:
            return jax.random.randint(next(keys), leaf.shape, 0, VOCABULARY)
        return jax.random.uniform(next(keys), leaf.shape, minval=-1.0)

    observation, actions = jax.tree.map(fill, config.inputs_spec(batch_size=2))
    return model, jax.random.key(2), observation, actions


REPOSITORY = Repository(
    name="openpi",
    title="openpi",
    address="https://github.com/Physical-Intelligence/openpi",
    pins="jax 0.5.3, flax 0.10.2",
    source="src",
    requirements=(
        "einops",
        "ml_collections",
        "augmax",
        "jaxtyping==0.2.36",
        "beartype==0.19.0",
    ),
    shown=("jaxtyping", "beartype"),
    absent=("torch", "openpi.models_pytorch"),
    models=(
        Model("π0", _lines, lambda: _arguments("pi0_config", "Pi0Config")),
        Model("π0.5", _lines, lambda: _arguments("pi0_config", "Pi0Config", pi05=True)),
        Model("π0-FAST", _lines, lambda: _arguments("pi0_fast", "Pi0FASTConfig")),
    ),
)
