"""``scaled_dot_product_attention`` and positions in fp64 within torch modules, beside torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.torch.checks import distance

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.models.layers.kernels.splash import Splash  # noqa: E402
from lora_jax.torch import from_torch  # noqa: E402
from lora_jax.torch.backend import run_with_jax, to_torch  # noqa: E402
from train import plan  # noqa: E402

_RNG = np.random.default_rng(0)
_TORCH = torch.nn.functional.scaled_dot_product_attention


def _normal(*shape):
    return _RNG.normal(size=shape).astype(np.float32)


class Attention(torch.nn.Module):
    """Attention of (q, k, v, mask) with fixed options."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return _TORCH(q, k, v, attn_mask=mask, **self.options)


def _compare(shapes, mask=None, attention="auto", **options):
    """Asserts that values and gradients equal torch's."""
    arrays = [_normal(*shape) for shape in shapes]
    module = Attention(**options)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    theirs = module(*tensors, *([] if mask is None else [torch.tensor(mask)]))
    cotangent = _normal(*theirs.shape)
    theirs.backward(torch.tensor(cotangent))
    fn, params = from_torch(module, attention=attention)

    @jax.jit
    def ours(*arrays):
        out, pull = jax.vjp(
            lambda *qkv: fn(params, *qkv, *([] if mask is None else [mask])), *arrays
        )
        return out, *pull(jnp.asarray(cotangent))

    expected = [theirs, *(tensor.grad for tensor in tensors)]
    for mine, other in zip(ours(*arrays), expected, strict=True):
        assert distance(mine, other.detach().numpy()) <= 1e-5


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 4, 600, 16)] * 3, {}),
        ([(2, 4, 520, 16), (2, 4, 77, 16), (2, 4, 77, 24)], {"scale": 0.4}),
        ([(2, 4, 520, 16), (2, 2, 520, 16), (2, 2, 520, 16)], {"enable_gqa": True}),
        ([(1, 2, 520, 16), (1, 2, 700, 16), (1, 2, 700, 16)], {"is_causal": True}),
        ([(4, 30, 16), (4, 7, 16), (4, 7, 8)], {}),
    ],
    ids=["whole", "other keys", "groups", "causal", "one row"],
)
def test_attention_without_a_mask(shapes, options):
    _compare(shapes, **options)


@pytest.mark.parametrize(
    ("queries", "shape"),
    [
        (520, (2, 1, 1, 77)),
        (520, (1, 77)),
        (30, (2, 1, 30, 77)),
        (30, (2, 4, 1, 77)),
        (30, (30, 77)),
    ],
)
def test_attention_with_a_mask_of_bools(queries, shape):
    shapes = [(2, 4, queries, 16), (2, 4, 77, 16), (2, 4, 77, 16)]
    _compare(shapes, _RNG.random(shape) > 0.3)


def test_attention_with_a_bias():
    _compare([(2, 4, 30, 16), (2, 4, 77, 16), (2, 4, 77, 16)], _normal(4, 30, 77))


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_runs(masked):
    """Queries that are padding see the same keys as the other queries, as in torch."""
    shapes = [(2, 2, 600, 64)] * 3
    mask = _RNG.random((2, 1, 1, 600)) > 0.3
    _compare(shapes, mask if masked else None, attention=Splash(interpret=True))


@pytest.mark.parametrize(("attention", "holds"), [("auto", False), ("dense", True)])
def test_scores_of_long_rows_are_not_held(attention, holds):
    shape = jax.ShapeDtypeStruct((1, 4, 2048, 64), np.float32)
    fn, params = from_torch(Attention(), attention=attention)

    def loss(*arrays):
        return jnp.sum(fn(params, *arrays))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    scores = 4 * 4 * 2048**2
    assert (compiled.memory_analysis().temp_size_in_bytes > scores) == holds


@pytest.mark.parametrize("known", [True, False])
def test_positions_of_flux_are_those_of_torch(known):
    """Angles are computed in fp64, whether the program knows positions or gets them."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    positions = functools.partial(
        embeddings.get_1d_rotary_pos_embed, 56, use_real=True, freqs_dtype=torch.float64
    )
    ids = np.arange(4096, dtype=np.float32)
    theirs = positions(torch.tensor(ids))

    def ours(ids):
        with run_with_jax("flux"):
            return [x.jax() for x in positions(to_torch(ids))]

    found = ours(jnp.asarray(ids)) if known else jax.jit(ours)(ids)
    for mine, other in zip(found, theirs, strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-6, rtol=0)
    angles = ids[:, None] / 10000 ** (np.arange(0, 56, 2, dtype=np.float32) / 56)
    assert np.abs(np.cos(angles) - theirs[0][:, ::2].numpy()).max() > 1e-5  # fp32 is not enough


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, None),
        (np.ones((1, 1, 1, 640), bool), None),
        (np.ones((640, 640), bool), "its mask differs between queries or heads"),
        (np.ones((1, 1, 640, 640), np.float32), "it adds numbers to the scores"),
    ],
)
def test_a_plan_says_which_calls_hold_all_scores(mask, reason):
    fn, params = from_torch(Attention())
    x = jax.ShapeDtypeStruct((1, 2, 640, 8), jnp.float32)
    masks = [] if mask is None else [mask]

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(fn(params, x, x, x, *masks)))(x)

    notes = [
        note for note in plan.function(gradient, x, topology="cpu:1").notes if "scores" in note
    ]
    assert len(notes) == (reason is not None)
    assert all(reason in note and "640, 640]" in note for note in notes)
