"""The repositories that the page `lora_jax/adapt/repos.md` knows. None is imported by naming it."""

from tests.foreign.repositories import (
    big_vision,
    easydel,
    gemma,
    maxdiffusion,
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
    easydel.REPOSITORY,
)
