"""Keeps compiled programs for later runs in a folder of the user (JAX's persistent cache)."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.folders import cache_folder
from train.console.errors import UserError
from train.processes.mesh import all_devices

OFF = "off"
# Of the default folder, which is ours alone: the programs unused for longest make room. JAX then
# locks the folder while it reads or writes, so processes that share it see whole files.
_MAX_BYTES = 4 * 2**30
_CHANGED_SETTINGS: dict[
    str, tuple[Any, Any]
] = {}  # JAX's settings before and after this process's last run


def keep_compiled(option: str | None) -> str | None:
    """Sets the folder in which JAX keeps compiled programs, and returns a line for the log.

    JAX keeps those that took it longer than a second (JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS).

    Args:
      option: the option --compilation-cache: a folder, "off", or None for the user's cache folder.
        A folder that JAX was told of before (JAX_COMPILATION_CACHE_DIR) takes the default's place.
        Many processes have no default: if only some of them found a program, the others would
        compile it alone, and compilers for GPUs may wait for each other. For several CPU devices
        none are kept, wherever: collectives of a program that was read back may run in another
        order on each device, and wait for each other until XLA ends the process.

    Returns:
      A line for the log; None where the user wants no programs kept.

    Raises:
      UserError: the option contradicts JAX's own settings, or asks for what is not done.
    """
    names = ("compilation_cache_dir", "enable_compilation_cache")
    settings_before = [_setting(name) for name in names]
    _restore_settings()
    line = _choose_folder(option)
    if [_setting(name) for name in names] != settings_before:
        compilation_cache.reset_cache()  # JAX looks at the setting once
    return line


def _choose_folder(option: str | None) -> str | None:
    """Sets JAX's cache folder from the option; returns the line for the log."""
    jax_folder = _setting("compilation_cache_dir")
    if not _setting("enable_compilation_cache"):
        if option in (None, OFF):
            return None
        raise UserError(
            f"--compilation-cache {option} stores compiled programs, but "
            "JAX_ENABLE_COMPILATION_CACHE turns the cache off. Remove one of the two settings."
        )
    if jax_folder and option is not None:
        is_other_folder = option == OFF or _absolute(option) != _absolute(jax_folder)
        if is_other_folder:
            raise UserError(
                f"--compilation-cache {option} differs from JAX_COMPILATION_CACHE_DIR, which is "
                f"{jax_folder}. Remove one of the two settings."
            )
    if option == OFF:
        return None
    has_several_cpu_devices = jax.default_backend() == "cpu" and len(all_devices()) > 1
    if has_several_cpu_devices:
        reason = "On several CPU devices, a cached program may never end."
        if option is not None:
            raise UserError(f"--compilation-cache {option}: {reason} Remove the option.")
        _change_setting("enable_compilation_cache", False)
        return f"Compiled programs are not cached. {reason}"
    if jax_folder:
        return f"Compiled programs are cached in {jax_folder}"
    if option is None and jax.process_count() > 1:
        return (
            "Compiled programs are not cached. To cache them, pass --compilation-cache with a "
            "folder "
            "that all processes can reach."
        )
    return _keep_in_folder(option)


def _keep_in_folder(option: str | None) -> str:
    """Sets the option's folder, or the default folder; returns the line for the log."""
    folder = _absolute(str(option or cache_folder() / "jax"))
    is_in_bucket = "://" in folder  # which JAX opens itself
    problem = None if is_in_bucket else _folder_problem(Path(folder))
    if problem:
        return (
            f"warning: Compiled programs are not cached, because {folder} cannot be written "
            f"({problem}). Name another folder with --compilation-cache, or pass {OFF}."
        )
    if option is None and _setting("compilation_cache_max_size") == -1:
        _change_setting("compilation_cache_max_size", _MAX_BYTES)
    _change_setting("compilation_cache_dir", folder)
    return f"Compiled programs are cached in {folder}"


def _absolute(folder: str) -> str:
    """Returns the absolute path of a folder; leaves the address of a bucket unchanged."""
    return folder if "://" in folder else str(Path(folder).expanduser().absolute())


def _change_setting(name: str, value: Any) -> None:
    """Changes a setting of JAX, and notes its earlier value for `_restore_settings`."""
    _CHANGED_SETTINGS[name] = (_setting(name), value)
    jax.config.update(f"jax_{name}", value)


def _restore_settings() -> None:
    """Restores settings that an earlier call changed and nobody has changed since."""
    for name, (earlier_value, our_value) in _CHANGED_SETTINGS.items():
        if _setting(name) == our_value:
            jax.config.update(f"jax_{name}", earlier_value)
    _CHANGED_SETTINGS.clear()


def _setting(name: str) -> Any:
    """Returns a setting of JAX, from its environment variable or from `jax.config.update`."""
    return getattr(jax.config, f"jax_{name}")


def _folder_problem(folder: Path) -> str | None:
    """Makes a folder; returns the reason why it cannot be written to, or None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)
