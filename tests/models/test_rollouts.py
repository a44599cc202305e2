"""Samples: their distribution and log-probabilities, by models that saw each answer whole."""

import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import lora_jax as lj
from lora_jax.models import GPT2, Samples, generate, read_config, sample
from lora_jax.training.layout import Layout, make_mesh
from tests.models import tiny, tiny_encoders
from tests.support import assert_close, lorafied, over, thorough, variables_of, with_random_factors

PROGRAM = importlib.import_module("lora_jax.models.sampling.rollouts")._sample
LENGTHS = np.array([6, 2, 5])
MASK = (np.arange(6) >= 6 - LENGTHS[:, None]).astype(np.int32)
IDS = tiny.tokens(2, 3, 6)
NEW, N = 7, 2
EOS = [5, 29, 35, 44]
NO_EOS = [-1, -2, -3, -4]  # no token is; as many, so that one program serves all tests


@cache
def drawing_key() -> jax.Array:
    return jax.random.key(3)


def adapted(case: str) -> tuple[Any, Any, Any]:
    """(model, tree, the adapted apply)."""
    model, plain = tiny_encoders.model("gpt2") if case == "gpt2" else tiny.decoder(case)
    targets = ["c_attn", "c_fc"] if case == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    rules = [lj.LoraRule(targets=targets, rank=3, alpha=5)]
    return model, with_random_factors(lorafied(plain, rules)), lj.adapt(model.apply)


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted("llama3")


def drawn(made: Any, **options: Any) -> Samples:
    """Two answers to each of three prompts, in NumPy."""
    model, params, apply = made
    options = {"n": N, "max_new_tokens": NEW, "key": drawing_key(), "eos_token_id": EOS} | options
    found = sample(model, params, IDS, MASK, apply=apply, **options)
    return Samples(*map(np.asarray, found))


def judged(made: Any, tokens: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities of answers after their prompts: merged, uncached, without padding."""
    model, params, _ = made
    found = []
    for row, answer in enumerate(tokens):
        n = LENGTHS[row // N]
        ids = np.zeros((1, 6 + NEW), np.int32)
        ids[0, : n + NEW] = np.concatenate([IDS[row // N, 6 - n :], answer])
        logits = np.asarray(tiny.run(model, lj.merge(params), ids), np.float64)[0]
        scores = logits[n - 1 : n - 1 + NEW] / temperature
        log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        found.append(np.take_along_axis(log_probs, answer[:, None], axis=-1)[:, 0])
    return np.stack(found)


@over("case", ["llama3", "gpt2", "gpt-oss"], often=[])
def test_log_probabilities_are_those_of_the_whole_vocabulary(case: str) -> None:
    """Whatever the tokens were drawn from; at temperature 0 it is 1."""
    made = adapted(case)
    for limits in ({}, {"top_p": 0.6}, {"top_k": 3}, {"temperature": 0.0}):
        options: dict[str, Any] = {"temperature": 0.7} | limits
        found = drawn(made, eos_token_id=NO_EOS, **options)
        right, wrong = (0.7, 1.0) if options["temperature"] else (1.0, 0.7)
        assert_close(found.logps, judged(made, found.tokens, right), 1e-5)
        assert np.abs(found.logps - judged(made, found.tokens, wrong)).max() > 0.1


@pytest.mark.slow
def test_without_temperature_it_is_greedy(llama: Any) -> None:
    model, params, apply = llama
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": EOS, "apply": apply}
    want = np.asarray(generate(model, params, IDS, MASK, **options))
    np.testing.assert_array_equal(drawn(llama, temperature=0.0).tokens, want.repeat(N, axis=0))


@pytest.mark.slow
def test_a_row_depends_on_its_own_key_alone(llama: Any) -> None:
    model, params, apply = llama
    together = drawn(llama)
    assert len(np.unique(together.tokens, axis=0)) == 3 * N
    for row in range(3 * N):
        prompt, key = [row // N], jax.random.fold_in(drawing_key(), row)[None]
        alone = sample(
            *(model, params, IDS[prompt], MASK[prompt]),
            **{"max_new_tokens": NEW, "key": key, "eos_token_id": EOS, "apply": apply},
        )
        for one, of_all in zip(alone[:4], together[:4], strict=True):
            np.testing.assert_allclose(one[0], of_all[row], atol=1e-5)


@pytest.mark.slow
def test_keys_of_either_kind_and_for_each_row(llama: Any) -> None:
    want = drawn(llama).tokens
    each = jax.vmap(jax.random.fold_in, (None, 0))(drawing_key(), jnp.arange(3 * N))
    np.testing.assert_array_equal(drawn(llama, key=each).tokens, want)
    np.testing.assert_array_equal(drawn(llama, key=jax.random.PRNGKey(3)).tokens, want)
    assert not np.array_equal(drawn(llama, key=each[::-1]).tokens, want)


@pytest.mark.parametrize("pad", [EOS[0], 60])
def test_answers_end_with_the_first_eos(llama: Any, pad: int) -> None:
    """Also where padding is EOS; what no EOS ends goes on as before."""
    free = drawn(llama, eos_token_id=NO_EOS)
    assert (free.lengths == NEW).all() and not free.ended.any()
    found = drawn(llama, pad_token_id=pad)
    for row, whole in enumerate(free.tokens):
        ends = np.flatnonzero(np.isin(whole, EOS))
        n = ends[0] + 1 if len(ends) else NEW
        assert (found.lengths[row], found.ended[row]) == (n, len(ends) > 0)
        np.testing.assert_array_equal(found.tokens[row, :n], whole[:n])
        np.testing.assert_allclose(found.logps[row, :n], free.logps[row, :n], atol=1e-5)
        assert (found.tokens[row, n:] == pad).all() and (found.logps[row, n:] == 0).all()
    assert len(np.unique(found.lengths)) > 2 and not found.ended.all()


@pytest.mark.slow
def test_nothing_compiles_anew_for_other_values(llama: Any) -> None:
    model, params, apply = llama
    first = drawn(llama)
    compiled = PROGRAM._cache_size()
    others = [
        drawn((model, jax.tree.map(lambda x: x * jnp.asarray(1.5, x.dtype), params), apply)),
        drawn(llama, temperature=0.7, top_p=0.9, top_k=5, pad_token_id=3),
        drawn(llama, key=jax.random.key(4), eos_token_id=[1, 2, 3, 4]),
    ]
    assert all(not np.array_equal(first.tokens, other.tokens) for other in others)
    assert PROGRAM._cache_size() == compiled
    drawn(llama, n=1)
    assert PROGRAM._cache_size() == compiled + 1, "the control"


def test_a_prompt_runs_once_for_its_answers() -> None:
    model, params = tiny.decoder("llama3")

    def rows_of_prompts(prompts: int, n: int) -> list[bool]:
        """Returns whether 5 rows of 11 tokens run through the model, and whether 15 do."""
        ids = jnp.zeros((prompts, 11), jnp.int32)
        options = {"n": n, "max_new_tokens": 4, "key": drawing_key()}
        run = lambda params: sample(model, params, ids, **options)  # noqa: E731
        text = str(jax.make_jaxpr(run)(params))
        return [f"f32[{rows},11,{tiny.SIZES['intermediate_size']}]" in text for rows in (5, 15)]

    assert rows_of_prompts(5, 3) == [True, False]
    assert rows_of_prompts(15, 1) == [False, True], "the control"


@pytest.mark.slow
def test_pairs_of_tokens_follow_the_models_distribution() -> None:
    """Compares 10,000 answers with the model by χ², which refuses another temperature."""
    fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 7}
    model = GPT2(read_config(fields | {"n_positions": 8}))
    prompt, eos, n = [1, 4, 2], 3, 10_000
    params = jax.tree.map(lambda x: x / 2, variables_of(model, jnp.array([prompt]))["params"])

    def log_probs(ids: Any) -> np.ndarray:
        logits = np.asarray(model.apply({"params": params}, jnp.asarray(ids))[:, -1], np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    first = np.exp(log_probs([prompt])[0])
    pairs = first[:, None] * np.exp(log_probs([[*prompt, token] for token in range(7)]))
    pairs[eos] = [first[eos], *np.zeros(6)]  # it ends the answer, and padding is 0
    assert pairs.sum() == pytest.approx(1) and np.ptp(pairs) > 0.02

    def p_value(temperature: float) -> float:
        options: dict[str, Any] = {"max_new_tokens": 2, "eos_token_id": eos, "pad_token_id": 0}
        options |= {"temperature": temperature, "key": drawing_key(), "n": n}
        tokens = np.asarray(sample(model, params, np.array([prompt]), **options).tokens)
        counts = np.bincount(tokens[:, 0] * 7 + tokens[:, 1], minlength=49)
        possible = pairs.reshape(-1) > 0
        assert not counts[~possible].any() and (n * pairs.reshape(-1)[possible]).min() > 5
        found: float = stats.chisquare(counts[possible], n * pairs.reshape(-1)[possible]).pvalue
        return found

    right, wrong = p_value(1.0), p_value(1.25)
    print(right, wrong)
    assert right > 0.01 and wrong < 1e-6


def same_on_a_mesh(case: str, n_devices: int, **sizes: int) -> None:
    """Asserts that devices in two orders give what one gives."""
    model, params, apply = adapted(case)
    ids, lengths = tiny.tokens(1, 8, 6), np.array([6, 2, 5, 3, 4, 6, 1, 5])
    mask = (np.arange(6) >= 6 - lengths[:, None]).astype(np.int32)
    options: dict[str, Any] = {"n": 3, "max_new_tokens": 7, "temperature": 0.7}
    options |= {"key": drawing_key(), "eos_token_id": EOS}
    one = sample(model, params, ids, mask, apply=apply, **options)
    assert len(np.unique(one.tokens, axis=0)) > 12
    devices = jax.devices()
    assert len(devices) == n_devices
    for order in (devices, [*devices[3:], *devices[2::-1]]):
        layout = Layout.of(make_mesh(order, **sizes), model.config)
        there, placed = layout.constrained(model), layout.placed(params)
        prompts = layout.batch({"ids": ids, "mask": mask}, parts=False)
        with jax.set_mesh(layout.mesh):
            options["apply"] = lj.adapt(there.apply)
            spread = sample(there, placed, prompts["ids"], prompts["mask"], **options)
        assert spread.logps.addressable_shards[0].data.size < one.logps.size
        assert_close(spread, one, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "sizes"),
    [("llama3", "data=2, fsdp=4"), pytest.param("gpt2", "fsdp=4, tensor=2", marks=thorough)],
)
def test_eight_devices_in_any_order_draw_the_same(case: str, sizes: str) -> None:
    code = (
        "import jax; jax.config.update('jax_num_cpu_devices', 8)\n"
        "from tests.models.test_rollouts import same_on_a_mesh\n"
        f"same_on_a_mesh({case!r}, 8, {sizes})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_refusals(llama: Any) -> None:
    with pytest.raises(ValueError, match="number of answers to each prompt, is 0"):
        drawn(llama, n=0)
    with pytest.raises(ValueError, match=r"shape \(3,\), but there are 6 rows"):
        drawn(llama, key=jax.random.split(drawing_key(), 3))
