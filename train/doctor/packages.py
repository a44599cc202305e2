"""The versions of the packages that are installed, and those that are missing or too old."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from typing import Any

from train.doctor.troubles import Trouble

# Those that a report names, if they are installed. Plugins tell JAX of accelerators.
_NAMED = (
    *("lora_jax", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("jax-rocm7-plugin", "jax-rocm60-plugin", "jax-triton", "triton", "flax", "optax"),
    *("orbax-checkpoint", "transformers", "tokenizers", "huggingface_hub", "datasets"),
    *("safetensors", "gguf", "tyro", "numpy"),
)
_EXTRAS = ("", "train")  # what the scripts need


def installed() -> dict[str, str]:
    """Returns the versions of the packages that a report names, by their names."""
    versions = ((name, version_of(name)) for name in _NAMED)
    return {name: version for name, version in versions if version is not None}


def version_of(name: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_packages() -> tuple[dict[str, Any], list[Trouble]]:
    """Returns the versions of Python and the packages, and the troubles with them."""
    facts = {"Python": platform.python_version(), **installed()}
    return facts, [*requirement_troubles("lora_jax"), *plugin_troubles(facts)]


def requirement_troubles(package: str) -> list[Trouble]:
    """Returns a trouble that lists missing and outdated requirements; [] if there are none."""
    wrong = []
    if importlib.util.find_spec("packaging") is None:  # reads requirements; comes with the scripts'
        wrong.append("packaging (not installed)")
    else:
        for requirement in sorted(set(_requirements(package, _EXTRAS))):
            if not _is_met(requirement):
                wrong.append(f"{requirement} ({_installed_version(requirement)})")
    if not wrong:
        return []
    remedy = f'pip install "{package}[train]"'
    return [Trouble(f"the scripts need other packages: {', '.join(wrong)}", remedy)]


def plugin_troubles(versions: dict[str, str]) -> list[Trouble]:
    """Returns a trouble for each JAX plugin whose minor version differs from jaxlib's."""
    troubles = []
    plugins = [name for name in versions if name.startswith("jax-") and name.endswith("-plugin")]
    jaxlib = versions.get("jaxlib")
    for name in plugins:
        if jaxlib and _minor(versions[name]) != _minor(jaxlib):
            extra = name.removeprefix("jax-").removesuffix("-plugin")
            troubles.append(
                Trouble(
                    f"{name} {versions[name]} is not of jaxlib {jaxlib}, so JAX does not use it",
                    f'pip install -U "jax[{extra}]=={versions.get("jax", jaxlib)}"',
                )
            )
    if len(cuda := [name for name in plugins if "cuda" in name]) > 1:
        troubles.append(
            Trouble(
                f"{' and '.join(cuda)} are both installed, but they disturb each other",
                "pip uninstall one of them with its -pjrt package",
            )
        )
    return troubles


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _requirements(package: str, extras: tuple[str, ...]) -> Iterator[str]:
    """Yields the requirements of a package with its extras, including extras of extras."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        if requirement.name.replace("-", "_") == package.replace("-", "_"):
            yield from _requirements(package, tuple(requirement.extras))
        else:
            yield f"{requirement.name}{requirement.specifier}"


def _is_met(requirement: str) -> bool:
    from packaging.requirements import Requirement

    needed, version = Requirement(requirement), _installed_version(requirement)
    return needed.specifier.contains(version, prereleases=True) if version[0].isdigit() else False


def _installed_version(requirement: str) -> str:
    from packaging.requirements import Requirement

    return version_of(Requirement(requirement).name) or "not installed"
