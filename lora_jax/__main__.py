"""The command `lora-jax NAME …`: runs the scripts that are installed beside this package.

It stands here, not in `train`: a folder may hold a `train` of its own, which PYTHONPATH puts first.
"""

import importlib
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Runs the command line of this process; see `train.command`."""
    folder = Path(__file__).parents[1] / "train"
    spec = importlib.util.spec_from_file_location("train", folder / "__init__.py")
    if spec is None or spec.loader is None or not folder.is_dir():
        sys.exit(
            f"error: The scripts of lora_jax are not installed, because the folder {folder} does "
            "not exist. Reinstall lora_jax."
        )
    package = importlib.util.module_from_spec(spec)
    sys.modules["train"] = package  # imports of `train` find this package before any on the path
    spec.loader.exec_module(package)
    importlib.import_module("train.command").main(sys.argv[1:])


if __name__ == "__main__":
    main()
