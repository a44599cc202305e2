"""gemma, Google DeepMind's (Linen): a small Gemma 3 with random weights. Python 3.12 or newer."""

import jax
import jax.numpy as jnp

from tests.foreign.case import Case, Made, rule
from tests.support import array


def _gemma3() -> Made:
    from gemma import gm

    kinds = gm.nn.AttentionType
    config = gm.nn.config.TransformerConfig(
        num_embed=37,
        embed_dim=14,
        hidden_dim=22,
        num_heads=2,
        head_dim=8,
        num_kv_heads=1,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=3,
    )
    model = gm.nn.Transformer(config=config, dtype=jnp.float32)
    ids = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])
    params = model.init(jax.random.key(1), ids)["params"]
    kernels = rule(r".*(/w|gating_einsum|linear|input_embedding)")
    return Made(lambda p, ids: model.apply({"params": p}, ids).logits, params, (ids,), kernels)


CASES = (
    Case(
        "gemma",
        "Gemma 3, a local and a global layer, tied",
        "apply",
        11,
        _gemma3,
        why="gradients through RMS norms round more; in double precision both agree to 1e-13",
        tolerance=1e-4,
    ),
)
