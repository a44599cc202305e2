"""The laws, on a scanned and rematerialised language model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from tests.models import tiny
from tests.support import (
    assert_close,
    assert_identical,
    dots_of_size,
    lorafied,
    with_random_factors,
)

# Sizes whose products tell kernels from activations by the number of elements alone.
CONFIG = models.DecoderConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 22,
        "intermediate_size": 29,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)
IDS = np.random.default_rng(5).integers(0, 61, (5, 17), np.int32)
RULES = [
    lj.LoraRule(targets=["q_proj", "down_proj", "lm_head"], rank=2, alpha=3),
    lj.LoraRule(targets="all-linear", rank=4, alpha=3),
]


@functools.cache
def model_and_params(remat=True):
    model = models.Decoder(CONFIG, remat=remat)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    leaves, treedef = flatten_with_paths(shapes)
    rng = np.random.default_rng(3)
    values = [jnp.asarray(tiny.draw(rng, path, leaf.shape)) for path, leaf in leaves]
    return model, jax.tree.unflatten(treedef, values)


@functools.cache
def adapted(remat=True):
    return lj.adapt(model_and_params(remat)[0].apply, strict=True)


@functools.cache
def halves():
    """(adapter, base), the factors random."""
    return lj.split(with_random_factors(lorafied(model_and_params()[1], RULES)))


def loss_of(run, tree):
    logits = run({"params": tree}, IDS)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()


def on_merged(variables, ids):
    return model_and_params()[0].apply({"params": lj.merge(variables["params"])}, ids)


@functools.cache
def compiled(how):
    """The loss and the adapter's gradient: merged, factored, or factored without recomputation."""
    run = on_merged if how == "merged" else adapted(remat=how != "kept")
    values = jax.value_and_grad(lambda adapter, base: loss_of(run, lj.join(adapter, base)))
    return jax.jit(values).lower(*halves()).compile()


@pytest.mark.slow
def test_identity_where_b_is_zero():
    model, params = model_and_params()
    tree = lj.lorafy(params, RULES)
    assert_identical(
        jax.jit(adapted())({"params": tree}, IDS), jax.jit(model.apply)({"params": params}, IDS)
    )


@pytest.mark.slow
def test_factored_equals_merged():
    ours, theirs = (compiled(how)(*halves()) for how in ("factored", "merged"))
    assert_close(ours, theirs, 1e-4)
    fresh = lj.split(lj.lorafy(model_and_params()[1], RULES))
    assert abs(ours[0] - compiled("factored")(*fresh)[0]) > 1e-2


@pytest.mark.slow
def test_no_product_has_a_kernels_shape():
    kernels = [(22, 42), (22, 14), (42, 22), (22, 29), (22, 61)]
    kernels += [(3, *kernel) for kernel in kernels[:-1]]

    def kernel_products(how):
        hlo = compiled(how).as_text()
        return [line for kernel in kernels for line in dots_of_size(hlo, kernel)]

    assert kernel_products("factored") == []
    assert kernel_products("merged"), "the judge must see naive merging"


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient_and_needs_less_memory():
    kept, remade = compiled("kept"), compiled("factored")
    assert_close(remade(*halves()), kept(*halves()), 1e-5)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (remade, kept)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.slow
def test_a_half_precision_base_with_fp32_factors():
    model, params = model_and_params()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    tree = with_random_factors(lorafied(half, RULES))
    run = lj.adapt(model.clone(dtype=jnp.bfloat16).apply, strict=True)
    grads = jax.jit(jax.grad(lambda ad, base: loss_of(run, lj.join(ad, base))))(*lj.split(tree))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
