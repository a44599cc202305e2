"""Tiny Qwen3.5s that read images, and rows with several images of different sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.hf.keys import nest_leaves
from tests.models import tiny, tiny_encoders
from tests.support import array

VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 36,
    "intermediate_size": 31,
    "num_heads": 3,
    "in_channels": 3,
    "patch_size": 5,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 9,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 60.0},
}
IMAGE, VIDEO, START, END = 57, 58, 55, 56
GRIDS = [[(4, 6), (2, 2)], [(6, 2)]]  # rows and columns of patches of each row's images
# Six pairs: three go by time, two by rows, one by columns.
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75}
ROPE |= {"mrope_section": [3, 2, 1], "mrope_interleaved": True}


def fields(case: str = "qwen3_5", **changes: Any) -> dict[str, Any]:
    """The config.json."""
    name = {"qwen3_5": "qwen3.5", "qwen3_5_moe": "qwen3.5 moe"}[case]
    text = {**tiny.fields(name), "rope_parameters": ROPE}
    return {
        "model_type": case,
        "text_config": text | {"num_hidden_layers": 4, "full_attention_interval": 2},
        "vision_config": {**VISION, "out_hidden_size": text["hidden_size"]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        **changes,
    }


def made(case: str = "qwen3_5", **changes: Any) -> tuple[Any, Any]:
    """A model and random parameters."""
    config = models.read_config(fields(case, **changes), images=True)
    rng = np.random.default_rng(5)

    def drawn(row: Any) -> jax.Array:
        if row.kind == "patches" and len(row.shape) == 5:
            return array(rng.standard_normal(row.shape) / 9, jnp.float32)
        return array(tiny_encoders.draw(rng, row.path, row.stacked_shape))

    rows = models.key_table(config)
    return models.QwenVL(config), nest_leaves((row.path, drawn(row)) for row in rows)


def inputs() -> dict[str, np.ndarray]:
    """Two images of different sizes in the first row; one, and padding, in the second."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1, START, (2, 17))
    ids[0, [1, 8, 10, 12]] = START, END, START, END
    ids[0, [2, 3, 4, 5, 6, 7, 11]] = IMAGE
    ids[1, [3, 7]] = START, END
    ids[1, [4, 5, 6]] = IMAGE
    mask = np.ones_like(ids)
    mask[1, 14:] = 0
    pixels = rng.standard_normal((2, 28, 3, 5, 5)).astype(np.float32)
    grids = np.zeros((2, 2, 2), np.int32)
    for row, sizes in enumerate(GRIDS):
        grids[row, : len(sizes)] = sizes
    return {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_grids": grids,
    }


def as_theirs(given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns inputs as transformers takes them: one row of patches, with each frame twice."""
    import torch

    patches, sizes = [], []
    for row, grids in zip(given["pixel_values"], given["image_grids"].tolist(), strict=True):
        n = sum(high * wide for high, wide in grids)
        patches.append(np.repeat(row[:n, :, None], VISION["temporal_patch_size"], axis=2))
        sizes += [(1, *grid) for grid in grids if grid[0]]
    types = (given["input_ids"] == IMAGE).astype(int)
    return {
        "input_ids": torch.from_numpy(given["input_ids"]),
        "attention_mask": torch.from_numpy(given["attention_mask"]),
        "pixel_values": torch.from_numpy(np.concatenate(patches)).flatten(1),
        "image_grid_thw": torch.tensor(sizes),
        "mm_token_type_ids": torch.from_numpy(types),
    }
