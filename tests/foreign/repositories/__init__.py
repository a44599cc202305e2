"""The repositories that the page `lora_jax/adapt/repos.md` knows. None is imported by naming it."""

from tests.foreign.repositories import (
    big_vision,
    easydel,
    gemma,
    levanter,
    maxdiffusion,
    maxtext,
    octo,
    openpi,
    weathernext,
)

REPOSITORIES = (
    openpi.REPOSITORY,
    octo.REPOSITORY,
    big_vision.REPOSITORY,
    weathernext.REPOSITORY,
    gemma.REPOSITORY,
    maxdiffusion.REPOSITORY,
    levanter.REPOSITORY,
    maxtext.REPOSITORY,
    easydel.REPOSITORY,
)
