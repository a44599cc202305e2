"""Switching costs nothing: a merged model runs what was compiled for the base; samplers agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.bank import Tenant, Together, mixed
from lora_jax.models import from_pretrained
from lora_jax.training.layout import Layout, make_mesh
from tests.models import tiny
from tests.support import assert_close, lorafied, with_random_factors

RULE = lj.LoraRule(targets=["q_proj", "down_proj", "embed_tokens"], rank=3, alpha=5.0)
IDS = np.random.default_rng(0).integers(0, 61, (4, 8))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16", "sharded fp32"])
def test_merged_models_run_what_was_compiled_for_the_base(case, tmp_path):
    """Also when they are written, and read again; with an embedding that is the head as well."""
    dtype = "bfloat16" if case == "bf16" else "float32"
    tiny.write_folder(tmp_path / "base", "smollm2", tiny.decoder("smollm2")[1])
    how = {}
    if case == "sharded fp32":
        config = models.read_config(tiny.fields("smollm2"))
        layout = Layout.of(make_mesh(jax.devices()[:4], fsdp=2, tensor=2), config)
        how["sharding"] = layout.of_parameter
    model, params = from_pretrained(tmp_path / "base", dtype=dtype, **how)
    forward = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    plain = forward(params, IDS)
    tree = with_random_factors(lorafied(params, [RULE]))
    merged = lj.merge(tree)
    found = forward(merged, IDS)
    models.save_pretrained(tmp_path / "merged", model, merged)
    _, again = from_pretrained(tmp_path / "merged", dtype=dtype, **how)
    np.testing.assert_array_equal(forward(again, IDS), found)
    assert forward._cache_size() == 1
    assert np.abs(np.asarray(found) - np.asarray(plain)).max() > 0.1
    forward(params, IDS[:2])  # the control
    assert forward._cache_size() == 2


@pytest.mark.slow
def test_log_probabilities_of_sampler_and_trainer_agree():
    """Over 1,000 tokens, after each of three steps, without a compilation."""
    model, params = tiny.decoder("qwen3")
    tenants = {}
    for seed in range(2):
        rule = lj.LoraRule(targets=["q_proj", "down_proj"], rank=3, alpha=5.0 + seed)
        tree = with_random_factors(lorafied(params, [rule]), seed=seed)
        tenants[f"{seed}"] = Tenant(params=tree, schedule=optax.constant_schedule(1e-3), steps=9)
    trainer = lj.adapt(model.apply)
    together = Together(trainer, params)
    together.add(tenants)

    def log_probabilities(apply):
        def of(tree, ids):
            chosen = jnp.expand_dims(ids[:, 1:], -1)
            logits = jax.nn.log_softmax(apply({"params": tree}, ids)[:, :-1])
            return jnp.take_along_axis(logits, chosen, -1)

        return jax.jit(of)

    sampled, trained = log_probabilities(mixed(model.apply)), log_probabilities(trainer)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 61, (20, 52)).astype(np.int32)
    names = [f"{n % 2}" for n in range(20)]
    shape = (1, 2, 8)
    at = np.broadcast_to(np.arange(8, dtype=np.int32), shape)
    for _ in range(3):
        batch = {"ids": rng.integers(0, 61, shape).astype(np.int32), "positions": at}
        batch |= {"predict_at": at, "targets": batch["ids"]}
        batch |= dict.fromkeys(("segment_ids", "weights"), np.ones(shape, np.int32))
        with jax.numpy_dtype_promotion("standard"):
            together.step({"0": batch, "1": batch})
        found = np.asarray(sampled(together.choose(names), ids))
        for n in range(2):
            expected = trained(together.tree(f"{n}"), ids[n::2])
            assert expected.size > 500
            assert_close(found[n::2], expected, 1e-5)
    assert sampled._cache_size() == 1
