"""Positions of patches in their images, and of image tokens in a row of text.

A row's images are described by their grids alone, [batch, images, 2] int32: rows and columns of
patches; (0, 0) stands for no image, behind those that there are. Patches lie a square of
merge x merge after the other, since such a square becomes one token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PatchPlaces(NamedTuple):
    """The position of each patch in a row of images.

    Attributes:
      image: [batch, n] int32, the number of the patch's image; behind the last patch the number of
        grids.
      coordinates: [batch, n, 2] int32, its row and column in the image.
      sizes: [batch, n, 2] int32, the rows and columns of its image, 1 at least.
    """

    image: jax.Array
    coordinates: jax.Array
    sizes: jax.Array


class _ImageCells(NamedTuple):
    """Cells (patches or tokens) of a row of images, with the image of each.

    Attributes:
      image: [batch, n] int32, the number of the cell's image.
      indices_in_image: [batch, n] int32, the number of the cell in its image.
      sizes: [batch, n, 2] int32, the rows and columns of the image.
    """

    image: jax.Array
    indices_in_image: jax.Array
    sizes: jax.Array


def patch_places(grids: jax.Array, n_patches: int, merge: int) -> PatchPlaces:
    """Returns the positions of each row's patches.

    Args:
      grids: [batch, images, 2] int32.
      n_patches: the patches of each row, padding included.
      merge: the patches along a side of a square that becomes one token.
    """
    patch_indices = jnp.arange(n_patches, dtype=jnp.int32)[None]
    cells = _image_cells(patch_indices, grids)
    sizes = jnp.maximum(cells.sizes, 1)
    square_index, index_in_square = jnp.divmod(cells.indices_in_image, merge**2)
    squares_per_row = jnp.maximum(sizes[..., 1] // merge, 1)
    square_row, square_column = jnp.divmod(square_index, squares_per_row)
    row_in_square, column_in_square = jnp.divmod(index_in_square, merge)
    row = square_row * merge + row_in_square
    column = square_column * merge + column_in_square
    coordinates = jnp.stack([row, column], axis=-1)
    return PatchPlaces(image=cells.image, coordinates=coordinates, sizes=sizes)


def token_places(is_image: jax.Array, present: jax.Array, grids: jax.Array) -> jax.Array:
    """Returns the RoPE coordinates (time, row, column) of each token, [batch, seq, 3] int32.

    They are equal for a text's token: one more than the largest before it. Those of an image begin
    there: its tokens have one time, and its rows and columns are counted from it on.

    Args:
      is_image: [batch, seq] bool, True where an image's token stands.
      present: [batch, seq] bool, False at padding.
      grids: [batch, images, 2] int32, rows and columns of tokens.

    Source: Qwen2-VL (Wang et al. 2024), section 2.1, as transformers' ``get_rope_index`` has it.
    """
    is_image_token = is_image & present
    is_text_token = present & ~is_image
    n_image_tokens = _count_before(is_image_token)
    n_text_tokens = _count_before(is_text_token)
    cells = _image_cells(n_image_tokens, grids)
    # An image moves the positions behind it on by the longer of its sides.
    image_lengths = jnp.cumsum(jnp.max(grids, axis=2), axis=1)
    image_starts = jnp.pad(image_lengths, ((0, 0), (1, 0)))
    image_start = jnp.take_along_axis(image_starts, cells.image, axis=1)
    start = (n_text_tokens + image_start)[..., None]
    n_columns = jnp.maximum(cells.sizes[..., 1], 1)
    row, column = jnp.divmod(cells.indices_in_image, n_columns)
    place_in_image = jnp.stack([jnp.zeros_like(row), row, column], axis=-1)
    return start + jnp.where(is_image_token[..., None], place_in_image, 0)


def _count_before(mask: jax.Array) -> jax.Array:
    """Returns the number of True values before each position of a row, [batch, seq] int32."""
    counts = mask.astype(jnp.int32)
    return jnp.cumsum(counts, axis=1) - counts


def _image_cells(cell_indices: jax.Array, grids: jax.Array) -> _ImageCells:
    """Returns the image and the position of each cell of a row.

    Args:
      cell_indices: [batch or 1, n] int32; behind the last cell, the image is one of no cells.
      grids: [batch, images, 2] int32.
    """
    ends = jnp.cumsum(grids[..., 0] * grids[..., 1], axis=1)
    is_behind_image = cell_indices[..., None] >= ends[:, None, :]
    image = jnp.sum(is_behind_image, axis=2, dtype=jnp.int32)
    starts = jnp.pad(ends, ((0, 0), (1, 0)))
    image_start = jnp.take_along_axis(starts, image, axis=1)
    padded_grids = jnp.pad(grids, ((0, 0), (0, 1), (0, 0)))
    sizes = jnp.take_along_axis(padded_grids, image[..., None], axis=1)
    return _ImageCells(image=image, indices_in_image=cell_indices - image_start, sizes=sizes)
