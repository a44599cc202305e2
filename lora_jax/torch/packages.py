"""Imports the packages that run torch modules, with explanations if an import fails."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator

from lora_jax.hf.fields import ConfigError

_PACKAGES = ("torch", "torchax", "transformers", "accelerate")
_REMEDY = "pip install 'lora_jax[torch]'"


class TorchModelError(ConfigError):
    """A torch module cannot run as a JAX function, or not with these options."""


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports the packages within a block.

    Raises:
      ImportError: a package is not installed.
      TorchModelError: all packages are installed, but one of them cannot be imported.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a broken package may raise any error
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                "lora_jax.torch needs packages that are not installed: "
                f"{' and '.join(missing)}. Run {_REMEDY}",
                name=missing[0],
            ) from error
        installed = ", ".join(map(_release, _PACKAGES))
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise TorchModelError(
            f"torch modules cannot run, because importing the installed packages ({installed}) "
            f"raises {reason}. Install versions that work together: {_REMEDY}"
        ) from error


def _release(package: str) -> str:
    """Returns a package's name, with its version if known."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
