"""Says what a server sees of an adapter that was trained over a base in codes."""

# The quantization_config of transformers that makes the same codes.
_CONFIGS = {"nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'}


def loading_config(codes: str | None) -> str | None:
    """Returns the Python code that has transformers load a base in these codes; None for none.

    Args:
      codes: the value of --quantize that the adapter was trained with.
    """
    return _CONFIGS.get(codes) if codes else None


def of_merged(codes: str) -> str:
    """Returns the line about a merged model."""
    return (
        f"its kernels are the values of the base's {codes} codes, plus the update: a server sees "
        "the model that was trained"
    )


def of_adapter(codes: str, base: str) -> str:
    """Returns the line about an adapter of its own.

    Args:
      codes: the value of --quantize that it was trained with.
      base: the name of the base.
    """
    config = loading_config(codes)
    remedy = f"load it with quantization_config={config}, or " if config else ""
    return (
        f"it was trained over {codes} codes, and a server that loads {base} in floats sees other "
        f"kernels beneath it: {remedy}write the whole model with --merged"
    )
