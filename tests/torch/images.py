"""Tiny image models of diffusers, and inputs of theirs."""

import numpy as np
import torch

TEXT_TOKENS = 5


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def sd3():
    """The first two blocks have a second attention, and the last one has no text's part."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def inputs_of_unet(batch=2):
    """Returns arguments of a UNet by name, as NumPy's arrays."""
    rng = np.random.default_rng(1)
    return {
        "sample": rng.normal(size=(batch, 4, 8, 8)).astype(np.float32),
        "timestep": np.linspace(100, 900, batch, dtype=np.float32),
        "encoder_hidden_states": rng.normal(size=(batch, TEXT_TOKENS, 24)).astype(np.float32),
        "return_dict": False,
    }


def inputs_of(module, height, width, batch=2):
    """Returns arguments by name for latents of a size, as NumPy's arrays."""
    rng = np.random.default_rng(height)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    config = module.config
    arguments = {
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, config.joint_attention_dim),
        "timestep": np.linspace(0.2, 0.9, batch, dtype=np.float32),
        "return_dict": False,
    }
    name = type(module).__name__
    if name == "SD3Transformer2DModel":
        arguments["hidden_states"] = normal(batch, config.in_channels, height, width)
    else:
        n_tokens = height * width // 4
        arguments["hidden_states"] = normal(batch, n_tokens, config.in_channels)
    if name == "QwenImageTransformer2DModel":
        arguments["img_shapes"] = [[(1, height // 2, width // 2)]] * batch
    else:
        arguments["pooled_projections"] = normal(batch, config.pooled_projection_dim)
    if name == "FluxTransformer2DModel":
        rows, columns = np.indices((height // 2, width // 2), np.float32)
        positions = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
        arguments["img_ids"] = positions.reshape(-1, 3)
        arguments["txt_ids"] = np.zeros((TEXT_TOKENS, 3), np.float32)
        arguments["guidance"] = np.full(batch, 3.5, np.float32)
    return arguments


MODELS = {"flux": flux, "sd3": sd3, "qwen": qwen_image}
