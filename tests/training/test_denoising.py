"""Losses of image models, beside diffusers' training utilities, schedulers and pipelines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import losses

SHAPE = (5, 3, 4, 6)
parity = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def _arrays(n):
    rng = np.random.default_rng(3)
    return [rng.normal(size=SHAPE).astype(np.float32) for _ in range(n)]


def _close(ours, theirs, tol=2e-6):
    theirs = np.asarray(theirs, np.float64)
    bound = tol * max(1, np.abs(theirs).max())
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=bound, rtol=0)


def _mean_of_images(weights, squares):
    return (weights * squares).reshape(SHAPE[0], -1).mean(1)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
class TestFlow:
    pytestmark = parity

    def test_flow_matching_is_that_of_the_scripts_of_diffusers(self, weighting):
        torch = pytest.importorskip("torch")
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.training_utils import compute_loss_weighting_for_sd3

        prediction, latents, noise = _arrays(3)
        theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
        indices = torch.tensor([3, 100, 500, 900, 998])
        sigmas, timesteps = theirs.sigmas[indices], theirs.timesteps[indices]
        schedule = losses.FlowSchedule(shift=3.0, weighting=weighting)
        times = schedule.shift_times(jnp.asarray(1 - indices.numpy() / 1000, jnp.float32))
        _close(times, sigmas)
        noisy = theirs.scale_noise(torch.tensor(latents), timesteps, torch.tensor(noise))
        _close(schedule.add_noise(latents, noise, times), noisy)
        weights = compute_loss_weighting_for_sd3(weighting, sigmas)[:, None, None, None]
        squares = (torch.tensor(prediction) - torch.tensor(noise - latents)) ** 2
        ours = losses.flow_loss(prediction, latents, noise, times, schedule)
        _close(ours, _mean_of_images(weights, squares), tol=1e-5)


@pytest.mark.parametrize("min_snr", [None, 5.0])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
class TestDiffusion:
    pytestmark = parity

    def test_predictions_of_noise_and_of_velocity(self, predicts, min_snr):
        torch = pytest.importorskip("torch")
        from diffusers import DDPMScheduler
        from diffusers.training_utils import compute_snr

        prediction, latents, noise = _arrays(3)
        theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        times = np.array([0, 7, 300, 700, 999], np.int32)
        t, x, e = torch.tensor(times).long(), torch.tensor(latents), torch.tensor(noise)
        schedule = losses.diffusion_schedule(min_snr=min_snr)
        _close(schedule.add_noise(latents, noise, jnp.asarray(times)), theirs.add_noise(x, e, t))
        is_noise = predicts == "epsilon"
        target = e if is_noise else theirs.get_velocity(x, e, t)
        weights = torch.ones(len(times))
        if min_snr is not None:
            snr = compute_snr(theirs, t)
            weights = torch.clamp(snr, max=min_snr) / (snr if is_noise else snr + 1)
        squares = (torch.tensor(prediction) - target) ** 2
        loss = losses.noise_loss if is_noise else losses.velocity_loss
        ours = loss(prediction, latents, noise, jnp.asarray(times), schedule)
        _close(ours, _mean_of_images(weights[:, None, None, None], squares), tol=2e-5)


class TestLatents:
    pytestmark = parity

    def test_packing_and_shift_are_those_of_the_pipelines(self):
        torch = pytest.importorskip("torch")
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
        from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline

        (latents,) = _arrays(1)
        height, width = SHAPE[2:]
        tokens = losses.pack_latents(latents)
        for pipeline in (FluxPipeline, QwenImagePipeline):
            _close(tokens, pipeline._pack_latents(torch.tensor(latents), *SHAPE[:2], height, width))
        positions = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", None)
        _close(losses.token_positions(height, width), positions)
        for n_tokens in (256, 1024, 4096):
            _close(losses.resolution_shift(n_tokens), np.exp(calculate_shift(n_tokens)))


def test_unpacking_inverts_packing():
    (latents,) = _arrays(1)
    unpacked = losses.unpack_latents(losses.pack_latents(latents), *SHAPE[2:])
    np.testing.assert_array_equal(unpacked, latents)


def test_times_have_the_distribution_of_the_paper():
    schedule = losses.FlowSchedule(mean=0.4, deviation=1.3, shift=3.0)
    times = np.asarray(schedule.sample_times(jax.random.key(0), 20_000), np.float64)
    before = times / (3 - 2 * times)  # the inverse of the shift
    normal = np.log(before / (1 - before))
    assert abs(normal.mean() - 0.4) < 0.04 and abs(normal.std() - 1.3) < 0.03
    counts = np.bincount(
        losses.diffusion_schedule(n_steps=10).sample_times(jax.random.key(1), 20_000), minlength=10
    )
    assert len(counts) == 10 and counts.min() > 1800


def test_losses_are_sums_in_fp32_and_compile():
    prediction, latents, noise = (jnp.asarray(x, jnp.bfloat16) for x in _arrays(3))
    schedule = losses.FlowSchedule()
    loss = jax.jit(lambda *args: losses.flow_loss(*args, schedule))
    value = loss(prediction, latents, noise, jnp.full(SHAPE[0], 0.5))
    assert value.shape == SHAPE[:1] and value.dtype == jnp.float32
    squares = (np.float64(prediction) - (np.float64(noise) - np.float64(latents))) ** 2
    _close(value, squares.reshape(SHAPE[0], -1).mean(1), tol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.FlowSchedule(weighting="cosine"), "weighting is 'cosine'"),
        (lambda: losses.FlowSchedule(shift=0.0), "shift is 0.0"),
        (lambda: losses.diffusion_schedule("cosine"), "kind is 'cosine'"),
        (lambda: losses.pack_latents(jnp.zeros((1, 4, 3, 2))), "latents of 3 x 2"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
