"""MaxText (Linen): a small decoder of its base configuration, with layers in a scan."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn

VOCABULARY = 37
SETTINGS = (
    "run_name=small",
    "enable_checkpointing=False",
    "skip_jax_distributed_system=True",
    "log_config=False",
    "enable_nnx=False",
    "pure_nnx=False",
    "enable_dropout=False",
    "attention=dot_product",
    "dtype=float32",
    "weight_dtype=float32",
    "base_emb_dim=16",
    "base_num_query_heads=2",
    "base_num_kv_heads=1",
    "base_mlp_dim=24",
    "base_num_decoder_layers=2",
    "head_dim=8",
    f"vocab_size={VOCABULARY}",
    "max_target_length=6",
    "per_device_batch_size=2",
)


def _lines(model: Any, params: Any, ids: Any, positions: Any, segments: Any) -> Made:
    def logits(params, ids, positions, segments):
        return model.apply(
            {"params": params},
            ids,
            positions,
            decoder_segment_ids=segments,
            enable_dropout=False,
        )

    return Made(logits, params, (ids, positions, segments))


def _arguments() -> tuple[Any, ...]:
    from flax.core import meta
    from maxtext.configs import pyconfig
    from maxtext.models import models
    from maxtext.utils import maxtext_utils
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    config = pyconfig.initialize(["train", f"{MAXTEXT_CONFIGS_DIR}/base.yml", *SETTINGS])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = models.transformer_as_linen(config, mesh, quant=None, model_mode="train")
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCABULARY)
    positions = jnp.broadcast_to(jnp.arange(6), ids.shape)
    segments = jnp.ones_like(ids)
    keys = dict.fromkeys(("params", "dropout", "aqt"), jax.random.key(0))
    variables = model.init(keys, ids, positions, decoder_segment_ids=segments, enable_dropout=False)
    return model, drawn(meta.unbox(variables["params"])), ids, positions, segments


REPOSITORY = Repository(
    name="maxtext",
    title="MaxText",
    address="https://github.com/AI-Hypercomputer/maxtext",
    pins="Python 3.12, jax other than 0.7.1",
    source="src",
    requirements=(
        "omegaconf",
        "pydantic",
        "tabulate",
        "jaxopt",
        "einops",
        "chex",
        "ml_collections",
        "absl-py",
        "jaxtyping",
        "pyyaml",
        "sympy",
        "qwix",
        "transformers",
        "tensorboardX",
        "packaging",
        "psutil",
        "jinja2",
        "pillow",
        "requests",
    ),
    python=("3.13", "3.12"),
    shown=("qwix", "transformers"),
    absent=(
        "maxtext.common.checkpointing",
        "aqt",
        "drjax",
        "google.cloud",
        "pathwaysutils",
        "sentencepiece",
        "tiktoken",
        "tokamax",
    ),
    notes=(
        "`flax.core.meta.unbox` gives the arrays of the parameters. The lines are those of the "
        "Linen model, `enable_nnx=False pure_nnx=False`.",
    ),
    models=(Model("a decoder of two layers of base.yml", _lines, _arguments),),
)
