"""The places of patches in their images, and of images' tokens in a row of text.

A row's images are described by their grids alone, [batch, images, 2] int32: rows and columns of
patches; (0, 0) stands for no image, behind those that there are. Patches lie a square of
merge x merge after the other, since such a square becomes one token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PatchPlaces(NamedTuple):
    """The place of each patch of a row of images.

    Attributes:
      image: [batch, n] int32, the number of the patch's image; behind the last patch the number of
        grids.
      at: [batch, n, 2] int32, its row and column in the image.
      sizes: [batch, n, 2] int32, the rows and columns of its image, 1 at least.
    """

    image: jax.Array
    at: jax.Array
    sizes: jax.Array


def patch_places(grids: jax.Array, n: int, merge: int) -> PatchPlaces:
    """Returns the places of n patches a row.

    Args:
      grids: [batch, images, 2] int32.
      n: the patches of each row, padding included.
      merge: the patches along a side of a square that becomes one token.
    """
    patch_indices = jnp.arange(n, dtype=jnp.int32)[None]
    image, start, sizes = _image_of_cells(patch_indices, grids)
    sizes = jnp.maximum(sizes, 1)
    square, patch_in_square = jnp.divmod(patch_indices - start, merge**2)
    squares_per_row = jnp.maximum(sizes[..., 1] // merge, 1)
    row = square // squares_per_row * merge + patch_in_square // merge
    column = square % squares_per_row * merge + patch_in_square % merge
    return PatchPlaces(image, jnp.stack([row, column], axis=-1), sizes)


def token_places(is_image: jax.Array, present: jax.Array, grids: jax.Array) -> jax.Array:
    """Returns the time, row and column of each token, [batch, seq, 3] int32, by which RoPE goes.

    They are equal for a text's token: one more than the largest before it. Those of an image begin
    there: its tokens have one time, and its rows and columns are counted from it on.

    Args:
      is_image: [batch, seq] bool, True where an image's token stands.
      present: [batch, seq] bool, False at padding.
      grids: [batch, images, 2] int32, rows and columns of tokens.

    Source: Qwen2-VL (Wang et al. 2024), section 2.1, as transformers' ``get_rope_index`` has it.
    """
    is_image = is_image & present
    n_image_tokens = _count_before(is_image)
    n_text_tokens = _count_before(present & ~is_image)
    image, start, sizes = _image_of_cells(n_image_tokens, grids)
    # An image moves the positions behind it on by the longer of its sides.
    image_lengths = jnp.cumsum(jnp.max(grids, axis=2), axis=1)
    length_before = jnp.take_along_axis(jnp.pad(image_lengths, ((0, 0), (1, 0))), image, axis=1)
    row, column = jnp.divmod(n_image_tokens - start, jnp.maximum(sizes[..., 1], 1))
    places = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
    base = (n_text_tokens + length_before)[..., None]
    return base + jnp.where(is_image[..., None], places, 0)


def _count_before(mask: jax.Array) -> jax.Array:
    """Returns the number of True values before each one of a row, [batch, seq] int32."""
    counts = mask.astype(jnp.int32)
    return jnp.cumsum(counts, axis=1) - counts


def _image_of_cells(
    cell_indices: jax.Array, grids: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the image of each cell of a row's grids, the image's first cell, and its sizes.

    Args:
      cell_indices: [batch or 1, n] int32; behind the last cell, the image is one of no cells.
      grids: [batch, images, 2] int32.
    """
    ends = jnp.cumsum(grids[..., 0] * grids[..., 1], axis=1)
    image = jnp.sum(cell_indices[..., None] >= ends[:, None, :], axis=2, dtype=jnp.int32)
    starts = jnp.pad(ends, ((0, 0), (1, 0)))
    start = jnp.take_along_axis(starts, image, axis=1)
    padded_grids = jnp.pad(grids, ((0, 0), (0, 1), (0, 0)))
    return image, start, jnp.take_along_axis(padded_grids, image[..., None], axis=1)
