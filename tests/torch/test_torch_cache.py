"""Generation by torch modules: keys and values go in and out of the function, or whole rows do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from tests.support import dots_of_size
from tests.torch.checks import VOCAB, distance, random_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import from_torch  # noqa: E402
from lora_jax.torch.cache import Tokens  # noqa: E402

IDS = np.random.default_rng(0).integers(3, VOCAB, (3, 11)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[0, :4] = 0
NEW = 9  # longer than the windows, with the prompt

# Grouped heads, windows in turns with none, a stack behind a layer of its own, latent
# attention and experts; layers one by one; and a memory that is no keys and values.
KINDS = {
    **{"llama": True, "gemma2": True, "deepseek_v3": True, "smollm3": True},
    "lfm2_moe": False,
}


@pytest.mark.parametrize("model_type", KINDS)
def test_answers_are_those_of_transformers(model_type):
    module = random_model(model_type)
    fn, params = from_torch(module)
    assert ("cached keys and values" in fn.config.cache_line()) == KINDS[model_type]
    drawn = models.generate(fn, params, IDS, MASK, max_new_tokens=NEW, eos_token_id=[])
    ids, mask = torch.tensor(IDS, dtype=torch.long), torch.tensor(MASK)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = module.generate(ids, attention_mask=mask, **options)
    np.testing.assert_array_equal(drawn, theirs[:, IDS.shape[1] :])


def test_a_token_computes_nothing_of_the_row_before_it():
    """No product of its program has a result for each slot, but for the scores of heads."""
    fn, params = from_torch(random_model("gemma2"))

    def products(cache):
        def step(params, ids, cache):
            return fn.apply({"params": params}, ids, cache=cache)

        program = jax.jit(step).lower(params, IDS[:, :1], cache).compile().as_text()
        return [dots_of_size(program, (3, 37, width)) for width in (32, 48)]

    assert products(fn.config.empty_cache(3, 37)) == [[], []]
    assert all(products(Tokens.empty(3, 37))), "the judge must see whole rows"


def test_rows_go_on_by_themselves():
    """Rows of a cache may be of different age, repeated, and run a few tokens at once."""
    fn, params = from_torch(random_model("gemma2"))
    variables = {"params": params}
    whole = jax.jit(fn.apply)(variables, IDS)
    run = jax.jit(lambda ids, cache: fn.apply(variables, ids, cache=cache))
    logits, cache = run(IDS[:, :4], fn.config.empty_cache(3, 16))
    assert distance(logits, whole[:, :4]) <= 1e-5
    logits, cache = run(IDS[:, 4:8], cache)
    assert distance(logits, whole[:, 4:8]) <= 1e-5
    cache, rows = cache.repeated(2), np.repeat(np.arange(3), 2)
    length = jnp.array([7, 8, 4, 7, 8, 6])
    seen = jnp.where(cache.positions < length[:, None], cache.positions, -1)
    logits, _ = run(
        IDS[rows, length][:, None], cache._replace(filled=None, length=length, positions=seen)
    )
    assert distance(logits[:, 0], whole[rows, length]) <= 1e-5
    assert distance(logits[:, 0], whole[rows, length - 1]) > 1e-2


def test_a_state_in_a_modules_attributes_is_seen_and_left_nowhere():
    fn, params = from_torch(random_model("recurrent_gemma"))
    assert "other state than keys and values" in fn.config.cache_line()
    jax.eval_shape(lambda p: fn(p, IDS, use_cache=True), params)
    blocks = [layer.temporal_block for layer in fn.built.module.model.layers]
    states = [block.conv1d_state for block in blocks if hasattr(block, "conv1d_state")]
    assert states and set(states) == {None}
