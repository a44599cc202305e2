"""gemma, Google DeepMind's (Linen): Gemma 3 and Gemma 4 of `gm.nn`."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn

SIZES = {
    "num_embed": 37,
    "embed_dim": 16,
    "hidden_dim": 24,
    "num_heads": 2,
    "head_dim": 8,
    "num_kv_heads": 1,
    "final_logit_softcap": None,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "sliding_window_size": 3,
}


def _lines(model: Any, params: Any, tokens: Any) -> Made:
    def logits(params, tokens):
        return model.apply({"params": params}, tokens).logits

    return Made(logits, params, (tokens,))


def _initialized(model: Any) -> tuple[Any, ...]:
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 3, SIZES["num_embed"])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    return model, drawn(params), tokens


def _gemma3() -> tuple[Any, ...]:
    from gemma import gm

    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        **SIZES, use_qk_norm=True, attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL)
    )
    return _initialized(gm.nn.Transformer(config=config, dtype=jnp.float32))


EXPERTS = {"enable_moe": True, "num_experts": 3, "expert_dim": 10, "top_k_experts": 2}


def _gemma4(**settings: Any) -> tuple[Any, ...]:
    from gemma.gm.nn.gemma4 import _config, _gemma4, _modules

    kinds = _modules.AttentionType
    config = _config.TransformerConfig(
        **SIZES,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        local_rope_proportion=1.0,
        global_rope_proportion=0.25,
        **settings,
    )
    return _initialized(_gemma4._Gemma4Base(config=config, dtype=jnp.float32))


REPOSITORY = Repository(
    name="gemma",
    title="gemma",
    address="https://github.com/google-deepmind/gemma",
    pins="Python 3.12 and no version of JAX",
    # Its newest release brings what it imports; the newest sentencepiece wants a protobuf that its
    # tensorflow refuses.
    requirements=("gemma", "sentencepiece<0.2.3"),
    python=("3.13", "3.12"),
    shown=("kauldron",),
    notes=(
        "`gm.nn.LoRA(rank=2, model=model)` wraps the same ten kernels of this Gemma 3. Its product "
        "has no scale, as with `alpha` equal to `rank` here.",
        "pip had not chosen versions of what it imports after nineteen minutes; `uv pip install` "
        "chose them within one.",
    ),
    models=(
        Model("Gemma 3: a local and a global layer", _lines, _gemma3),
        Model("Gemma 4: inputs per layer", _lines, lambda: _gemma4(per_layer_input_dim=6)),
        Model(
            "Gemma 4: experts",
            _lines,
            lambda: _gemma4(
                enable_moe=True,
                num_experts=3,
                expert_dim=10,
                top_k_experts=2,
                moe_dense_hidden_dim=12,
            ),
        ),
    ),
)
