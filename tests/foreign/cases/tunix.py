"""tunix, Google's (NNX): its Llama 3, Qwen 3 and Gemma 3 with random weights."""

import importlib
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tests.foreign.case import Case, Made, rule
from tests.foreign.nnx_modules import Wrap, both
from tests.support import array

IDS = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])
SIZES = {
    "num_layers": 2,
    "embed_dim": 14,
    "hidden_dim": 22,
    "num_heads": 2,
    "head_dim": 8,
    "num_kv_heads": 1,
}


def _made(wrap: Wrap, module: str, name: str, **sizes: Any) -> Made:
    models = importlib.import_module(f"tunix.models.{module}.model")
    model = getattr(models, name)(models.ModelConfig(**SIZES, **sizes), rngs=nnx.Rngs(params=1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    positions = jnp.broadcast_to(jnp.arange(5), IDS.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))

    called = wrap(lambda model, ids, positions, mask: model(ids, positions, None, mask)[0])

    def fn(params: Any, rest: Any, ids: Any, positions: Any, mask: Any) -> Any:
        return called(nnx.merge(graphdef, params, rest), ids, positions, mask)

    return Made(fn, params, (rest, IDS, positions, mask), rule(r".*(kernel|/w|embedding|_proj)"))


ROUNDING = (
    "gradients through RMS norms of small features round more; in double precision both agree to "
)


def _cases(
    model: str, weights: int, module: str, name: str, doubles: str = "", **sizes: Any
) -> tuple[Case, Case]:
    """Returns a model's cases.

    Args:
      model, weights: see `Case`.
      module, name: module and class of the model.
      doubles: largest error in double precision, where single precision rounds more than elsewhere.
      **sizes: further sizes of the model.
    """
    make = lambda wrap: _made(wrap, module, name, **sizes)  # noqa: E731
    why, tolerance = (ROUNDING + doubles, 1e-4) if doubles else ("", 1e-5)
    return both("google-tunix", model, "merge", weights, make, why=why, tolerance=tolerance)


QWEN = {"vocab_size": 37, "rope_theta": 10_000, "norm_eps": 1e-6}
CASES = (
    *_cases("Llama 3, two layers", 16, "llama3", "Llama3", **QWEN),
    *_cases("Qwen 3, two layers", 16, "qwen3", "Qwen3", "2e-14", **QWEN),
    *_cases(
        "Qwen 3, two layers of three experts, tied",
        17,
        "qwen3",
        "Qwen3",
        **QWEN,
        num_experts=3,
        num_experts_per_tok=2,
        use_tied_embedding=True,
    ),
    *_cases(
        "Gemma 3, two layers, tied",
        13,
        "gemma3",
        "Gemma3",
        "1e-6 (parts of it stay in fp32)",
        num_embed=37,
        sliding_window_size=3,
        param_dtype=jnp.float32,
    ),
)
