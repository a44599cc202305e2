"""A mixture of experts against all experts on every token, and the FLOPs that it takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import DecoderConfig
from lora_jax.models.decoder.experts import assign_rows_to_blocks
from lora_jax.models.decoder.moe import SparseMLP, route
from lora_jax.models.layers.blocks import ACTIVATION
from tests.models import tiny
from train.plan.clock.work import work_of


def layer(case: str, **kwargs: Any) -> tuple[SparseMLP, dict[str, Any], np.ndarray]:
    """A layer's experts, their parameters, and an input [2, 5, d_model]."""
    config = tiny.config(case)
    module = SparseMLP(config, jnp.float32, jnp.float32, **kwargs)
    _, params = tiny.decoder(case)
    params = jax.tree.map(
        lambda x: np.asarray(x)[1], params["model"]["layers"][config.family.mlp_name]
    )
    return module, params, normal(0, (2, 5, config.hidden_size))


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def all_experts(params: dict[str, Any], x: jax.Array, config: DecoderConfig) -> jax.Array:
    """Every expert on every token, then the weighted sum of the chosen ones."""
    kernels = [params["experts"][name]["kernel"] for name in config.family.expert_names]
    probs = jax.nn.softmax(x @ params["gate"]["kernel"], axis=-1)
    least = jnp.sort(probs, axis=-1)[..., -config.num_experts_per_tok, None]
    weights = jnp.where(probs >= least, probs, 0.0)
    if config.norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    gate, up = (jnp.einsum("bsd,edf->bsef", x, kernel) for kernel in kernels[:2])
    hidden = ACTIVATION[config.hidden_act](gate) * up
    return jnp.einsum("bsef,efd,bse->bsd", hidden, kernels[2], weights)


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3 moe"])
def test_values_and_gradients(case: str) -> None:
    module, params, x = layer(case)

    weights = normal(1, x.shape)
    # As drawn, and all tokens alike: groups without a token, and some with all of them.
    for tokens in (x, np.broadcast_to(x[:1, :1], x.shape)):
        got = _values_and_gradients(module, params, tokens, weights)
        want = _values_and_gradients(module, params, tokens, weights, all_experts)
        jax.tree.map(lambda a, b: tiny.assert_close(a, b, 1e-5), got, want)


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=tiny.FAST_COMPILE)
def _values_and_gradients(
    module: SparseMLP, params: Any, x: jax.Array, weights: jax.Array, other: Any = None
) -> Any:
    def loss(params: Any, x: jax.Array) -> Any:
        if other is None:
            out, _ = module.apply({"params": params}, x)
        else:
            out = other(params, x, module.config)
        return jnp.sum(out * weights), out

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("n_experts", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_only_the_chosen_experts_are_multiplied(n_experts: int) -> None:
    """FLOPs: k products a token, and less than a third as much for blocks that are not full."""
    fields = tiny.fields("mixtral") | {"num_local_experts": n_experts, "num_experts_per_tok": 2}
    config = DecoderConfig.from_hf(fields)
    module = SparseMLP(config, jnp.float32, jnp.float32)
    x = jax.ShapeDtypeStruct((4, 128, config.hidden_size), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    flops = work_of(jax.jit(module.apply).lower(params, x).compile().as_text()).flops
    pair = 3 * 2 * config.hidden_size * config.moe_intermediate_size
    router = 2 * 512 * config.hidden_size * n_experts
    needed = 512 * 2 * pair
    assert needed <= flops - router <= 1.3 * needed
    assert 512 * n_experts * pair > 1.3 * needed, "all experts would be seen"


@pytest.mark.slow
def test_the_kernels_of_blocks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has its expert's kernels; all of them at once would be more than the experts'."""
    module, params, _ = layer("mixtral")
    x = jax.ShapeDtypeStruct((2, 20, 24), jnp.float32)
    n_blocks = 2 * 20 * 2 // 8 + 5

    def gradient() -> str:
        def loss(x: jax.Array, params: Any) -> jax.Array:
            return jnp.sum(module.apply({"params": params}, x)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(x, params).compile().as_text()

    of_blocks = f"f32[{n_blocks},24,37]"
    assert of_blocks not in gradient()
    monkeypatch.setattr(jax, "checkpoint", lambda fn, **_: fn)
    assert of_blocks in gradient(), "the control"


@pytest.mark.slow
def test_any_choice_has_its_blocks() -> None:
    """All tokens for one expert, one pair in all, and what is between: no pair is lost."""
    rng = np.random.default_rng(0)
    choices = [np.full(50, 4), np.array([3]), np.arange(7), *rng.integers(0, 7, (40, 61))]
    laid_out = jax.jit(assign_rows_to_blocks, static_argnums=1)
    for chosen in choices:
        blocks = jax.tree.map(np.asarray, laid_out(chosen, 7))
        assert len(set(blocks.slots.tolist())) == len(chosen)
        np.testing.assert_array_equal(blocks.experts[blocks.slots // blocks.rows], chosen)


def test_route() -> None:
    logits = np.log(np.float32([[0.5, 0.1, 0.4], [0.2, 0.3, 0.5]]))
    weights, chosen = jax.jit(route, static_argnums=(1, 2))(logits, 2, False)
    np.testing.assert_array_equal(chosen, [[0, 2], [2, 1]])
    tiny.assert_close(weights, [[0.5, 0.4], [0.5, 0.3]], 1e-6)
    tiny.assert_close(
        jax.jit(route, static_argnums=(1, 2))(logits, 2, True)[0],
        [[5 / 9, 4 / 9], [5 / 8, 3 / 8]],
        1e-6,
    )


def test_the_router_is_computed_in_fp32() -> None:
    """In bf16, probabilities as close as these would tie, and the first expert win."""
    module, params, _ = layer("mixtral")
    module = SparseMLP(module.config, jnp.bfloat16, jnp.bfloat16)
    x = np.ones((1, 1, 24), jnp.bfloat16)
    gate = np.zeros((24, 5))
    gate[:, :2], gate[0, 1] = 1, 1.0625
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    params["gate"]["kernel"] = gate.astype(jnp.bfloat16)
    run = functools.partial(module.apply, capture_intermediates=lambda m, _: m.name == "gate")
    _, state = jax.jit(run, compiler_options=tiny.FAST_COMPILE)({"params": params}, x)
    logits = state["intermediates"]["gate"]["__call__"][0]
    assert logits.dtype == jnp.float32
    assert np.argmax(logits) == 1
