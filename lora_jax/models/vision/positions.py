"""Resamples a table of positions for images of another size, as torch's bicubic mode does."""

import jax
import jax.numpy as jnp
import numpy as np

_A = -0.75  # torch's parameter of the cubic kernel (Keys 1981)


def resample(table: jax.Array, grid: tuple[int, int], wanted: tuple[int, int]) -> jax.Array:
    """Returns a table of positions for another grid of patches.

    Args:
      table: [1, 1 + rows * columns, d_model]; the first position is that of the whole image.
      grid: rows and columns of patches in the table.
      wanted: rows and columns to return.

    Returns:
      [1, 1 + rows * columns of `wanted`, d_model], in the table's dtype. It is computed in fp32.
    """
    if grid == wanted:
        return table
    patches = table[0, 1:].reshape(*grid, -1).astype(jnp.float32)
    rows, columns = (cubic_weights(old, new) for old, new in zip(grid, wanted, strict=True))
    out = jnp.einsum("yr,xc,rcd->yxd", rows, columns, patches)
    out = out.reshape(1, -1, table.shape[-1]).astype(table.dtype)
    return jnp.concatenate([table[:, :1], out], axis=1)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Returns the weights of cubic interpolation along an axis, [new, old] fp32.

    Source: torch's ``interpolate(mode="bicubic", align_corners=False)``, without antialiasing;
    places beyond an edge repeat it.
    """
    weights = np.zeros((new, old))
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    for offset in range(-1, 3):
        distance = np.abs(at - first - offset)
        near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        far = _A * (((distance - 5) * distance + 8) * distance - 4)
        place = np.clip(first + offset, 0, old - 1)
        np.add.at(weights, (np.arange(new), place), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)
