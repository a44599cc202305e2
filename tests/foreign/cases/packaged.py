"""Whole models from PyPI: a language model in Linen (nano-moe-jax), a ViT in NNX (jaxnn)."""

import jax

from tests.foreign.case import Case, Made, rule
from tests.foreign.nnx_modules import Wrap, both
from tests.support import draw


def _nano_moe() -> Made:
    """Embeddings, attention, experts with a top-k router, a head."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    config = NanoMoEConfig(
        vocab_size=37, n_layers=2, n_heads=2, d_model=14, d_ff=22, n_experts=3, block_size=13
    )
    model = NanoMoE(config)
    ids = jax.random.randint(jax.random.key(0), (2, 11), 0, 37)
    params = model.init(jax.random.key(1), ids)["params"]
    every = rule(r".*(kernel|embedding)")  # the look-up table and the head too
    return Made(lambda p, ids: model.apply({"params": p}, ids), params, (ids,), every)


def _vision_transformer(wrap: Wrap) -> Made:
    """A convolution into patches, two blocks of attention and MLP, a head."""
    from flax import nnx
    from jax.experimental import checkify
    from jaxnn.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**sizes, num_classes=5, rngs=nnx.Rngs(1))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    called = wrap(lambda model, x: model(x, deterministic=True))

    def fn(params, rest, x):  # type: ignore[no-untyped-def]  # the model checks its input
        run = checkify.checkify(
            lambda params, rest, x: called(nnx.merge(graphdef, params, rest, copy=True), x)
        )
        return run(params, rest, x)[1]

    return Made(fn, params, (rest, draw(9, (2, 8, 8, 3))), rule(r".*kernel"))


CASES = (
    Case("nano-moe-jax", "NanoMoE, two blocks of three experts", "apply", 20, _nano_moe),
    *both(
        "jaxnn", "VisionTransformer, two blocks", "merge under checkify", 10, _vision_transformer
    ),
)
