"""levanter (Equinox and Haliax): a small Llama, whose layers are stacked."""

from typing import Any

import jax

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn

VOCABULARY = 37


def _lines(model: Any, ids: Any) -> Made:
    import equinox as eqx
    import haliax as hax
    from levanter.layers.attention import AttentionMask

    params, static = eqx.partition(model, eqx.is_inexact_array)

    def logits(params, ids):
        model = eqx.combine(params, static)
        return model(hax.named(ids, ("batch", "position")), AttentionMask.causal()).array

    return Made(logits, params, (ids,))


def _arguments() -> tuple[Any, ...]:
    import equinox as eqx
    import haliax as hax
    from levanter.models.llama import LlamaConfig, LlamaLMHeadModel

    config = LlamaConfig(
        seq_len=6, hidden_dim=16, intermediate_dim=24, num_layers=2, num_heads=2, num_kv_heads=1
    )
    vocabulary = hax.Axis("vocab", VOCABULARY)
    model = LlamaLMHeadModel.init(vocabulary, config, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCABULARY)
    return eqx.combine(drawn(params), static), ids


REPOSITORY = Repository(
    name="levanter",
    title="levanter",
    address="https://github.com/stanford-crfm/levanter",
    pins="jax 0.6.2 or newer, haliax 1.4.dev404 or newer, safetensors before 0.7",
    source="src",
    # What its pyproject.toml lists, without the cap of safetensors, and two packages that it
    # imports and does not list.
    requirements=(
        "haliax>=1.4.dev404",
        "equinox>=0.11.7",
        "transformers>=4.53.0,<5.0",
        "wandb",
        "draccus>=0.11.5",
        "pyarrow>=11.0.0",
        "zstandard",
        "datasets>=3.1.0,<5.0",
        "gcsfs>=2024.2,<2026",
        "braceexpand",
        "jmp",
        "fsspec[http]>=2024.2,<2026",
        "tensorstore",
        "pytimeparse",
        "humanfriendly==10.0",
        "matplotlib",
        "tblib>=1.7.0,<4.0.0",
        "dataclasses-json~=0.6.4",
        "ray[default]>=2.34.0",
        "pydantic<3",
        "filelock~=3.13",
        "async-lru~=2.0",
        "tqdm-loggable",
        "deepdiff",
        "lenses",
        "jinja2",
        "protobuf>=6,<7",
        "chex",
        "gitpython",
    ),
    shown=("haliax", "equinox", "safetensors", "transformers"),
    notes=(
        "It caps safetensors below 0.7, and lora_jax requires 0.8. Its models run with 0.8: "
        "install its other requirements, chex and gitpython, and put `src` on the path.",
    ),
    models=(Model("Llama: two layers", _lines, _arguments),),
)
