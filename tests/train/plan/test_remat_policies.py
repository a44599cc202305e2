"""Policies of rematerialisation: the FLOPs that each recomputes in a traced step, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.families import module_of, read_config
from tests.train.plan.closed_form import batch_flops
from tests.train.plan.tiny_plans import FIELDS, asked, write
from train.plan import __main__ as plan
from train.plan.compile import prepare
from train.plan.flops.checked import count_traced

POLICIES = ("none", "products", "projections", "full")
MODELS = {
    "Llama": FIELDS,
    "norms of heads": FIELDS | {"model_type": "qwen3"},
    "GPT-2": {
        "model_type": "gpt2",
        "vocab_size": 259,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 64,
    },
}


@functools.cache
def flops_of(path, remat):
    """FLOPs of a step, traced and in closed form."""
    options = asked(path, "--targets", "all-linear", "--remat", remat)
    job, optim = plan.make_job(options.plan)
    (variant, *_) = plan.variants_to_plan(options)
    step = prepare(job, variant, optim)
    return count_traced(step.traced.jaxpr).flops, batch_flops(job, variant, step.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_policies_keep_what_they_say(name, tmp_path):
    """In closed form, by the names of products; a policy that keeps more computes less."""
    path = write(tmp_path, MODELS[name])
    counts = [flops_of(path, remat) for remat in POLICIES]
    for traced, by_hand in counts:
        np.testing.assert_allclose(traced, by_hand, rtol=0.01)
    traced = [count for count, _ in counts]
    assert traced == sorted(traced) and len({*traced}) == len(POLICIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_policies_change_no_gradient(name):
    config = read_config(MODELS[name])
    ids = jnp.arange(48).reshape(2, 24) % 250

    def gradient(remat):
        model = module_of(config, jnp.float32, jnp.float32, remat=remat)

        def loss(params):
            return jnp.sum(jnp.tanh(model.apply({"params": params}, ids)))

        params = model.init(jax.random.key(0), ids)["params"]
        return jax.jit(jax.grad(loss))(params)

    kept = gradient(False)
    for remat in ("products", "projections"):
        for one, other in zip(*map(jax.tree.leaves, (gradient(remat), kept)), strict=True):
            scale = max(1.0, float(jnp.max(jnp.abs(other))))
            np.testing.assert_allclose(one, other, atol=1e-5 * scale)
