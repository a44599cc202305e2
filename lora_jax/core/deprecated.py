"""Earlier names of public functions and classes."""

import warnings
from collections.abc import Mapping


def renamed(module: str, name: str, names: Mapping[str, object]) -> object:
    """Returns the value of an earlier name, for a module's `__getattr__`.

    Args:
      module: the module's name.
      name: the attribute that was asked for.
      names: by earlier name, the class or function of another name.

    Raises:
      AttributeError: the name is none of these.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    value = names[name]
    now = getattr(value, "__name__", "")
    warnings.warn(f"{module}.{name} is now {module}.{now}", DeprecationWarning, stacklevel=3)
    return value


def warn_of_name(earlier: str, name: str) -> None:
    """Warns the caller of a method's earlier name."""
    warnings.warn(f"{earlier} is now {name}", DeprecationWarning, stacklevel=3)
