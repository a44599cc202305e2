"""The tools and an episode of a run, shown before it begins."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax.training.data.rows import Row
from train.tools.contract import EpisodeHost


def episode_lines(host: EpisodeHost, row: Row) -> Iterator[str]:
    """Yields lines about the tools, and about an episode that is opened for a row and closed."""
    yield "the tools that a completion may call:"
    for tool in host.tools:
        yield f"  {_signature(tool['function'])}"
    if not host.name:
        return
    (opening,) = host.open([row], rehearsed=True)
    episode = opening.result()
    try:
        if episode.lost is not None:
            yield f"warning: no episode of the first prompt: {episode.lost}"
        elif episode.opening:
            yield f"{host.name} opens an episode of the first prompt with {episode.opening!r}"
        else:
            yield f"{host.name} opens an episode of the first prompt without a text of its own"
        if episode.changed:
            yield (
                f"warning: an episode changes {', '.join(episode.changed)}. Other episodes do not "
                "see the change, since each begins with the values of the import. Keep the state "
                "of an episode in the environment, and what differs between episodes in their rows"
            )
    finally:
        episode.close()


def _signature(function: Mapping[str, Any]) -> str:
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    arguments = ", ".join(
        f"{name}: {schema.get('type', 'any')}{'' if name in required else ' = …'}"
        for name, schema in (parameters.get("properties") or {}).items()
    )
    about = " ".join(str(function.get("description", "")).split())
    return f"{function['name']}({arguments}): {about[:100]}"
