"""Losses of models that make images from noise: flow matching, and predictions of ε and of v.

A model sees latents x that are mixed with noise ε, and predicts one of three targets. Each loss is
a function of (prediction, latents, noise, time, schedule), and returns a value for each image.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Weighting = Literal["none", "sigma_sqrt", "cosmap"]
WEIGHTINGS: tuple[Weighting, ...] = ("none", "sigma_sqrt", "cosmap")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Schedule of flow matching, which mixes (1 - t) x + t ε at times t in (0, 1].

    The times, their shift and the weights are those of Esser et al., "Scaling Rectified Flow
    Transformers for High-Resolution Image Synthesis" (2024), sections 3.1 and 5.3.2.

    Attributes:
      mean, deviation: parameters of the normal distribution whose sigmoid is a time before the
        shift. Scripts of diffusers use 1 minus this time, so their mean has the opposite sign.
      shift: moves times towards noise: t becomes s·t / (1 + (s - 1)·t). With 1, times stay as they
        are. SD3 has 3; see `resolution_shift` for Flux and Qwen-Image.
      weighting: weights of the loss by time: "none"; "sigma_sqrt" for 1 / t²; "cosmap" for
        2 / (π (1 - 2t + 2t²)).

    Raises:
      ValueError: a value is out of its range.
    """

    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            names = ", ".join(WEIGHTINGS)
            raise ValueError(f"weighting is {self.weighting!r}. Pass one of {names}.")
        for name in ("deviation", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}. Pass a positive number.")

    def sample_times(self, key: jax.Array, n_images: int) -> jax.Array:
        """Returns random times of images, shifted: fp32 [n_images]."""
        normal = jax.random.normal(key, (n_images,), jnp.float32)
        return self.shift_times(jax.nn.sigmoid(self.mean + self.deviation * normal))

    def shift_times(self, time: jax.Array) -> jax.Array:
        """Returns times of any shape after the shift."""
        return self.shift * time / (1 + (self.shift - 1) * time)

    def add_noise(self, latents: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """Returns latents mixed with noise, which a model sees at a time: [batch, …].

        Args:
          latents, noise: [batch, …].
          time: [batch].
        """
        time = _expand(time, latents)
        return ((1 - time) * latents + time * noise).astype(latents.dtype)

    def weights(self, time: jax.Array) -> jax.Array:
        """Returns the weight of each image's loss, fp32 [batch]."""
        time = time.astype(jnp.float32)
        if self.weighting == "sigma_sqrt":
            return time**-2
        if self.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * time + 2 * time**2))
        return jnp.ones_like(time)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionSchedule:
    """Schedule of diffusion, which mixes √ᾱ x + √(1 - ᾱ) ε at integer times.

    Attributes:
      signal: ᾱ of each time, the share of the signal's variance, [steps].
      min_snr: γ of min-SNR weights, which limit the weight of times with little noise (Hang et al.,
        "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023); None for weights of 1.
    """

    signal: np.ndarray
    min_snr: float | None = None

    def sample_times(self, key: jax.Array, n_images: int) -> jax.Array:
        """Returns random times of images, all equally likely: int32 [n_images]."""
        return jax.random.randint(key, (n_images,), 0, len(self.signal), jnp.int32)

    def rates(self, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns √ᾱ and √(1 - ᾱ) of each time, fp32 [batch]."""
        signal = jnp.asarray(self.signal, jnp.float32)[time]
        return jnp.sqrt(signal), jnp.sqrt(1 - signal)

    def add_noise(self, latents: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """Returns latents mixed with noise, which a model sees at a time: [batch, …].

        Args:
          latents, noise: [batch, …].
          time: int32 [batch].
        """
        signal_rate, noise_rate = self.rates(time)
        noisy = _expand(signal_rate, latents) * latents + _expand(noise_rate, latents) * noise
        return noisy.astype(latents.dtype)

    def velocity(self, latents: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """Returns v = √ᾱ ε - √(1 - ᾱ) x, fp32 [batch, …] (Salimans and Ho, 2022, appendix D)."""
        signal_rate, noise_rate = self.rates(time)
        return _expand(signal_rate, latents) * noise - _expand(noise_rate, latents) * latents


def diffusion_schedule(
    kind: Literal["linear", "scaled_linear"] = "scaled_linear",
    *,
    start: float = 0.00085,
    end: float = 0.012,
    n_steps: int = 1000,
    min_snr: float | None = None,
) -> DiffusionSchedule:
    """Returns the schedule of a model's scheduler_config.json.

    Args:
      kind: `beta_schedule`: whether β or its square root rises linearly.
      start, end: `beta_start` and `beta_end`; the defaults are those of Stable Diffusion.
      n_steps: `num_train_timesteps`.
      min_snr: see `DiffusionSchedule`.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind == "linear":
        betas = np.linspace(start, end, n_steps)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, n_steps) ** 2
    else:
        raise ValueError(f'kind is {kind!r}. Pass "linear" or "scaled_linear".')
    return DiffusionSchedule(signal=np.cumprod(1 - betas), min_snr=min_snr)


def flow_loss(
    prediction: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    time: jax.Array,
    schedule: FlowSchedule,
) -> jax.Array:
    """Returns the weighted squared error of a predicted flow, whose target is ε - x.

    Args:
      prediction, latents, noise: [batch, …].
      time: [batch], in (0, 1].
      schedule: the schedule that mixed the latents with noise.

    Returns:
      The mean over each image, fp32 [batch].
    """
    return schedule.weights(time) * _squared_error(prediction, _wide(noise) - _wide(latents))


def noise_loss(
    prediction: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    time: jax.Array,
    schedule: DiffusionSchedule,
) -> jax.Array:
    """Returns the squared error of predicted noise, with the weight min(SNR, γ) / SNR.

    Args:
      prediction, latents, noise: [batch, …].
      time: int32 [batch].
      schedule: the schedule that mixed the latents with noise.

    Returns:
      The mean over each image, fp32 [batch].
    """
    del latents
    return _snr_weights(schedule, time, 0) * _squared_error(prediction, _wide(noise))


def velocity_loss(
    prediction: jax.Array,
    latents: jax.Array,
    noise: jax.Array,
    time: jax.Array,
    schedule: DiffusionSchedule,
) -> jax.Array:
    """Returns the squared error of a predicted v, with the weight min(SNR, γ) / (SNR + 1).

    Args:
      prediction, latents, noise: [batch, …].
      time: int32 [batch].
      schedule: the schedule that mixed the latents with noise.

    Returns:
      The mean over each image, fp32 [batch].
    """
    target = schedule.velocity(latents, noise, time)
    return _snr_weights(schedule, time, 1) * _squared_error(prediction, target)


def resolution_shift(
    n_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Returns the shift of times for a size of image, `FlowSchedule.shift`.

    Args:
      n_tokens: the number of packed latents of an image.
      base_tokens, max_tokens: `base_image_seq_len` and `max_image_seq_len` of a model's
        scheduler_config.json; the defaults are those of Flux.
      base_shift, max_shift: the logarithms of the shift at these two sizes.

    >>> from lora_jax.training import losses
    >>> round(losses.resolution_shift(4096), 3)
    3.158
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (n_tokens - base_tokens))


def pack_latents(latents: jax.Array) -> jax.Array:
    """Packs squares of 2 x 2 latents into tokens, as Flux and Qwen-Image read them.

    Args:
      latents: [batch, channels, height, width]; height and width are even.

    Returns:
      [batch, height / 2 · width / 2, 4 · channels].

    Raises:
      ValueError: the height or the width is odd.
    """
    batch, channels, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"latents of {height} x {width} have no whole squares of 2 x 2. Pass an even height "
            "and width."
        )
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack_latents(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """Inverts `pack_latents`.

    Args:
      tokens: [batch, height / 2 · width / 2, 4 · channels].
      height, width: size of the latents.

    Returns:
      [batch, channels, height, width].
    """
    batch, _, width_of_token = tokens.shape
    channels = width_of_token // 4
    squares = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return squares.transpose(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def token_positions(height: int, width: int) -> np.ndarray:
    """Returns Flux's ``img_ids`` of packed latents: 0, row and column, fp32 [tokens, 3].

    Args:
      height, width: size of the latents before they are packed.
    """
    rows, columns = np.indices((height // 2, width // 2), np.float32)
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _expand(values: jax.Array, images: jax.Array) -> jax.Array:
    """Returns a value for each image, fp32, with axes of size 1 for the axes of the images."""
    return _wide(values).reshape(-1, *[1] * (images.ndim - 1))


def _squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean squared error of each image, fp32 [batch]."""
    return jnp.mean((_wide(prediction) - target) ** 2, axis=tuple(range(1, prediction.ndim)))


def _snr_weights(schedule: DiffusionSchedule, time: jax.Array, addend: int) -> jax.Array:
    """Returns the weights min(SNR, γ) / (SNR + addend), or ones without γ; fp32 [batch]."""
    if schedule.min_snr is None:
        return jnp.ones(time.shape, jnp.float32)
    signal_rate, noise_rate = schedule.rates(time)
    snr = (signal_rate / noise_rate) ** 2
    return jnp.minimum(snr, schedule.min_snr) / (snr + addend)
