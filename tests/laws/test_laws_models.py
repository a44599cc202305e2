"""The laws, on BERT, RoBERTa and GPT-2: factored equals merged, and no kernel is ever formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from lora_jax.models.families import family_of
from tests.models import tiny_encoders
from tests.support import assert_close, dots_of_size, lorafied, over, with_random_factors

# Sizes whose products tell kernels from activations by the number of elements alone.
pytestmark = pytest.mark.filterwarnings("ignore::lora_jax.LeftOutWarning")  # classifiers
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 22,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 37,
}
CONFIGS = {
    "bert, classification": ({"model_type": "bert", **ENCODER}, {"head": "classification"}),
    "bert, masked_lm": ({"model_type": "bert", **ENCODER}, {"head": "masked_lm"}),
    "roberta, classification": ({"model_type": "roberta", **ENCODER}, {"head": "classification"}),
    "roberta, masked_lm": ({"model_type": "roberta", **ENCODER}, {"head": "masked_lm"}),
    "bert, embedding": ({"model_type": "bert", **ENCODER}, {"head": "embedding"}),
    "gpt2": (
        {
            "model_type": "gpt2",
            "vocab_size": 61,
            "n_embd": 22,
            "n_inner": 29,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 37,
        },
        {},
    ),
}
# The table of words, where it is the output layer as well.
TIED = {"bert, masked_lm": "word_embeddings", "gpt2": "wte"}
IDS = np.random.default_rng(5).integers(2, 61, (5, 17), np.int32)
MASK = np.arange(17) < np.array([[17], [13], [11], [7], [5]])
LAYER = {
    "attention/self/query",
    "attention/self/key",
    "attention/self/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
}
GPT2_LAYER = {"attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"}
# What PEFT's "all-linear" adapts (test_parity_peft_targets.py asks it): all but the output head.
ADAPTED = {
    "bert, classification": {f"bert/encoder/layer/{x}" for x in LAYER} | {"bert/pooler/dense"},
    "bert, masked_lm": {f"bert/encoder/layer/{x}" for x in LAYER}
    | {"cls/predictions/transform/dense"},
    "roberta, classification": {f"roberta/encoder/layer/{x}" for x in LAYER},
    "roberta, masked_lm": {f"roberta/encoder/layer/{x}" for x in LAYER} | {"lm_head/dense"},
    "bert, embedding": {f"bert/encoder/layer/{x}" for x in LAYER},
    "gpt2": {
        f"transformer/h/{x}" for x in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    },
}


@functools.cache
def model_of(case, dtype=jnp.float32):
    fields, options = CONFIGS[case]
    config = models.read_config(fields, **options)
    return family_of(config.model_type).module(config, dtype, dtype, remat=True)


@functools.cache
def shapes_of(case, dtype=jnp.float32):
    return jax.eval_shape(model_of(case, dtype).init, jax.random.key(0), IDS)["params"]


def adapted_tree(case, dtype=jnp.float32):
    leaves, treedef = flatten_with_paths(shapes_of(case, dtype))
    rng = np.random.default_rng(3)
    values = [
        jnp.asarray(tiny_encoders.draw(rng, path, leaf.shape), dtype) for path, leaf in leaves
    ]
    params = jax.tree.unflatten(treedef, values)
    rules = [lj.LoraRule(targets="all-linear", rank=4, alpha=3, dtype=dtype)]
    if case in TIED:
        rules.append(lj.LoraRule(targets=[TIED[case]], rank=2, alpha=3, dtype=dtype))
    return with_random_factors(lorafied(params, rules))


@pytest.mark.parametrize("case", list(CONFIGS))
def test_all_linear_is_every_layer_but_the_output(case):
    tree = lj.lorafy(shapes_of(case), [lj.LoraRule(targets="all-linear")])
    assert set(lj.split(tree)[0]) == {f"{path}/kernel" for path in ADAPTED[case]}


@over("case", CONFIGS, often=[])
@pytest.mark.usefixtures("float64")
def test_factored_is_merged(case):
    model, tree = model_of(case, jnp.float64), adapted_tree(case, jnp.float64)
    got = jax.jit(lj.adapt(model.apply, strict=True))({"params": tree}, IDS, MASK)
    plain = jax.jit(model.apply)
    want, base = (
        np.asarray(plain({"params": params}, IDS, MASK))
        for params in (lj.merge(tree), lj.strip(tree))
    )
    assert got.dtype == jnp.float64
    assert_close(got, want, 1e-9)
    assert np.abs(want - base).max() > 1e-2


@pytest.mark.slow
@over("case", ["roberta, masked_lm", "gpt2"], often=["gpt2"])
def test_no_product_has_a_kernels_shape(case):
    model = model_of(case)
    adapter, base = lj.split(adapted_tree(case))
    kernels = {tuple(leaf.shape[-2:]) for leaf in kernel_leaves(lj.join(adapter, base))}
    shapes = [*kernels, *((3, *kernel) for kernel in kernels)]
    assert len(kernels) >= 3

    def kernel_products(run):
        def loss(adapter, base):
            return jnp.sum(run({"params": lj.join(adapter, base)}, IDS, MASK) ** 2)

        hlo = jax.jit(jax.grad(loss)).lower(adapter, base).compile().as_text()
        return [line for shape in shapes for line in dots_of_size(hlo, shape)]

    def on_merged(variables, *args):
        return model.apply({"params": lj.merge(variables["params"])}, *args)

    assert kernel_products(lj.adapt(model.apply, strict=True)) == []
    assert kernel_products(on_merged), "the judge must see naive merging"


def kernel_leaves(tree):
    leaves = jax.tree.leaves_with_path(lj.strip(tree))
    adapted = set(lj.split(tree)[0])
    for path, leaf in leaves:
        if jax.tree_util.keystr(path, simple=True, separator="/") in adapted:
            yield leaf
