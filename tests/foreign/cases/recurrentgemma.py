"""recurrentgemma, Google DeepMind's (Linen): Griffin, whose RG-LRU is a linear recurrence."""

import jax
import jax.numpy as jnp

from tests.foreign.case import Case, Made, rule
from tests.support import array


def _griffin() -> Made:
    from recurrentgemma import common
    from recurrentgemma import jax as griffin

    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=37,
        width=16,
        mlp_expanded_width=22,
        num_heads=2,
        block_types=(kinds.RECURRENT, kinds.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=3,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    model = griffin.Griffin(config)
    ids = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])
    positions = jnp.broadcast_to(jnp.arange(5), ids.shape)
    params = model.init(jax.random.key(1), ids, positions)["params"]

    def fn(params, ids, positions):  # type: ignore[no-untyped-def]
        return model.apply({"params": params}, ids, positions, return_cache=False)[0]

    return Made(
        fn, params, (ids, positions), rule(r".*(kernel|/w|input_embedding)", exclude=["conv_1d"])
    )


CASES = (
    Case(
        "recurrentgemma", "Griffin, a recurrent and an attention block, tied", "apply", 14, _griffin
    ),
)
