"""The option --generation-config, of the scripts whose sampling a user chooses."""

import dataclasses

AUTO = "auto"  # the model's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOption:
    """The sampling that the makers of a model advise."""

    generation_config: str | None = None
    """Sample as a generation_config.json says, where no option or request says otherwise: auto for
    the model's own, or another folder or file. By default its temperature, top_p and top_k are
    shown, and not used. The tokens in it that end an answer count in any case."""
