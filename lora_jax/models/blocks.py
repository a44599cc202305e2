"""The layers that BERT, RoBERTa and GPT-2 are made of.

Each function makes a layer for ``module``, with its dtypes and its configuration's options.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn


def dense(module: Any, features: int, *, dtype: Any = None, **kwargs: Any) -> nn.Dense:
    """xW + b, drawn with the configuration's initializer_range."""
    return nn.Dense(
        features,
        dtype=module.dtype if dtype is None else dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.initializers.normal(module.config.initializer_range),
        **kwargs,
    )


def layer_norm(module: Any, **kwargs: Any) -> nn.LayerNorm:
    """LayerNorm with the configuration's epsilon; statistics in fp32."""
    return nn.LayerNorm(
        epsilon=module.config.layer_norm_eps,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        use_fast_variance=False,  # E[x²] - E[x]² cancels
        **kwargs,
    )


def embed(module: Any, rows: int, **kwargs: Any) -> nn.Embed:
    """A table of ``rows`` vectors as wide as the model."""
    return nn.Embed(
        rows,
        module.config.hidden_size,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        embedding_init=nn.initializers.normal(module.config.initializer_range),
        **kwargs,
    )
