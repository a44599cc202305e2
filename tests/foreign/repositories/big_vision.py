"""big_vision (Linen): SigLIP's two towers, PaliGemma."""

from typing import Any

import jax

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn

VISION = {"width": 12, "depth": 2, "mlp_dim": 20, "num_heads": 2, "patch_size": (4, 4)}
VOCABULARY = 37


def _siglip_lines(model: Any, params: Any, images: Any, texts: Any) -> Made:
    def embeddings(params, images, texts):
        image, text, _ = model.apply({"params": params}, images, texts)
        return image, text

    return Made(embeddings, params, (images, texts))


def _paligemma_lines(model: Any, params: Any, images: Any, texts: Any, mask_ar: Any) -> Made:
    def logits(params, images, texts, mask_ar):
        return model.apply({"params": params}, images, texts, mask_ar)[0]

    return Made(logits, params, (images, texts, mask_ar))


def _initialized(model: Any, *inputs: Any) -> tuple[Any, ...]:
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    return model, drawn(params), *inputs


def _images_and_texts() -> tuple[Any, Any]:
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1.0)
    return images, jax.random.randint(jax.random.key(2), (2, 5), 0, VOCABULARY)


def _siglip() -> tuple[Any, ...]:
    from big_vision.models.proj.image_text import two_towers

    text = {"width": 12, "depth": 2, "mlp_dim": 20, "num_heads": 2, "vocab_size": VOCABULARY}
    model = two_towers.Model(
        image={**VISION, "pool_type": "map", "scan": True},
        text={**text, "scan": True},
        out_dim=(None, 12),
        bias_init=-10.0,
    )
    return _initialized(model, *_images_and_texts())


def _paligemma() -> tuple[Any, ...]:
    import ml_collections
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    sizes = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1}
    sizes |= {"head_dim": 8, "norm_eps": 1e-6, "vocab_size": VOCABULARY}
    gemma.get_config = lambda variant: ml_collections.ConfigDict({"variant": variant, **sizes})
    model = paligemma.Model(
        img={**VISION, "pool_type": "none", "scan": True, "head_zeroinit": False},
        llm={"vocab_size": VOCABULARY, "variant": "gemma_2b"},
    )
    images, texts = _images_and_texts()
    return _initialized(model, images, texts, jax.numpy.ones_like(texts))


REPOSITORY = Repository(
    name="big_vision",
    title="big_vision",
    address="https://github.com/google-research/big_vision",
    pins="no version of JAX",
    requirements=("einops", "ml_collections", "absl-py", "scipy"),
    absent=("tensorflow",),
    models=(
        Model("SigLIP: both towers", _siglip_lines, _siglip),
        Model("PaliGemma", _paligemma_lines, _paligemma),
    ),
    notes=(
        "BiT, which is not in the table, standardizes its kernels: each one is merged where its "
        "mean square is computed, and is factored in the convolution. Octo's stem does the same.",
    ),
)
