"""octo (Linen): image tokenizers, the transformer and a diffusion head."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn


def _prepare() -> None:
    """Puts back the names of JAX that octo uses and JAX no longer has."""
    jax.random.KeyArray = jax.Array
    jax.tree_map = jax.tree.map
    clip = jnp.clip
    jnp.clip = lambda x, a_min=None, a_max=None: clip(x, a_min, a_max)


def _lines(module: Any, params: Any, batch: Any, rng: Any) -> Made:
    def loss(params, batch, rng):
        bound = module.bind({"params": params}, rngs={"dropout": rng})
        observation = batch["observation"]
        mask = observation["timestep_pad_mask"]
        embeddings = bound.octo_transformer(observation, batch["task"], mask, train=True)
        return bound.heads["action"].loss(
            embeddings, batch["action"], mask, batch["action_pad_mask"], train=True
        )

    return Made(loss, params, (batch, rng))


def _arguments() -> tuple[Any, ...]:
    from octo.model.components.action_heads import DiffusionActionHead
    from octo.model.components.tokenizers import ImageTokenizer, LanguageTokenizer
    from octo.model.components.vit_encoders import SmallStem16
    from octo.model.octo_module import OctoModule
    from octo.utils.spec import ModuleSpec

    stem = {"features": (32, 64, 96, 64), "num_features": 24}
    module = OctoModule.create(
        observation_tokenizers={
            "primary": ModuleSpec.create(
                ImageTokenizer,
                obs_stack_keys=["image_primary"],
                task_stack_keys=["image_primary"],
                encoder=ModuleSpec.create(SmallStem16, **stem),
            )
        },
        task_tokenizers={"language": ModuleSpec.create(LanguageTokenizer)},
        heads={
            "action": ModuleSpec.create(
                DiffusionActionHead,
                readout_key="readout_action",
                action_horizon=4,
                action_dim=3,
                hidden_dim=20,
                num_blocks=2,
            )
        },
        readouts={"action": 1},
        transformer_kwargs={
            "num_layers": 2,
            "mlp_dim": 24,
            "num_attention_heads": 2,
            "attention_dropout_rate": 0.0,
            "dropout_rate": 0.0,
            "add_position_embedding": False,
        },
        token_embedding_size=16,
        max_horizon=3,
        repeat_task_tokens=True,
        use_correct_attention=True,
    )
    keys = jax.random.split(jax.random.key(0), 4)
    images = jax.random.randint(keys[0], (2, 2, 32, 32, 3), 0, 256).astype(jnp.uint8)
    batch = {
        "observation": {
            "image_primary": images,
            "timestep_pad_mask": jnp.ones((2, 2), bool),
            "pad_mask_dict": {"image_primary": jnp.ones((2, 2), bool)},
        },
        "task": {
            "image_primary": images[:, 0],
            "language_instruction": jax.random.normal(keys[1], (2, 5, 12)),
            "pad_mask_dict": {
                "image_primary": jnp.ones(2, bool),
                "language_instruction": jnp.ones(2, bool),
            },
        },
        "action": jax.random.normal(keys[2], (2, 2, 4, 3)),
        "action_pad_mask": jnp.ones((2, 2, 4, 3), bool),
    }
    observation = batch["observation"]
    params = module.init(
        keys[3], observation, batch["task"], observation["timestep_pad_mask"], train=False
    )["params"]
    return module, drawn(params), batch, jax.random.key(1)


REPOSITORY = Repository(
    name="octo",
    title="octo",
    address="https://github.com/octo-models/octo",
    pins="jax 0.4.20, flax 0.7.5",
    requirements=("einops",),
    absent=("distrax",),
    notes=(
        "Before `import octo`, three names go back into JAX: `jax.tree_map = jax.tree.map`, "
        "`jax.random.KeyArray = jax.Array`, and `jnp.clip` with its old arguments `a_min` and "
        "`a_max`.",
        "The stem standardizes its kernels. Each is merged where its mean square is computed, and "
        "is factored in the convolution.",
    ),
    prepare=_prepare,
    models=(Model("Octo: image tokenizer, transformer, diffusion head", _lines, _arguments),),
)
