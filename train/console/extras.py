"""Names the extra that installs a missing package, in one line in place of a traceback."""

import sys
import traceback
from pathlib import Path
from types import TracebackType

_ROOT = Path(__file__).resolve().parents[2]  # of `train` and `lora_jax`
_MISSING = 2  # the exit code of bad input


def install_command(extra: str) -> str:
    """Returns the command that installs an extra; in a checkout, the one of its folder."""
    if not (_ROOT / "pyproject.toml").is_file():
        return f"pip install 'lora_jax[{extra}]'"
    folder = "" if Path.cwd() == _ROOT else f" in {_ROOT}"
    return f"pip install -e '.[{extra}]'{folder}"


def missing_package(error: BaseException) -> str | None:
    """Returns a line about a missing package that a file of this project imports.

    Args:
      error: any error. The line is None for all but a ModuleNotFoundError of this kind.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    frames = traceback.walk_tb(error.__traceback__)
    files = [Path(frame.f_code.co_filename).resolve() for frame, _ in frames]
    importing_file = files[-1]
    is_imported_here = any(
        importing_file.is_relative_to(_ROOT / folder) for folder in ("train", "lora_jax")
    )
    is_module_of_ours = error.name.split(".")[0] in ("train", "lora_jax")
    if not is_imported_here or is_module_of_ours:
        return None
    is_server = any(file.is_relative_to(_ROOT / "train/serve") for file in files)
    remedy = install_command("serve" if is_server else "train")
    return f"error: {error.name} is not installed. Run {remedy}"


def report_missing_package(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints the line of `missing_package` and exits with code 2: a `sys.excepthook`.

    Other errors get Python's own traceback.
    """
    message = missing_package(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        return
    print(message, file=sys.stderr, flush=True)
    sys.exit(_MISSING)
