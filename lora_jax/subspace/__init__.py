"""Training in a random subspace of few dimensions: intrinsic dimension (DID and SAID)."""

from lora_jax.subspace.hadamard import hadamard_transform as hadamard_transform
from lora_jax.subspace.saving import FACTS as FACTS
from lora_jax.subspace.saving import base_of as base_of
from lora_jax.subspace.saving import facts_of as facts_of
from lora_jax.subspace.saving import load as load
from lora_jax.subspace.saving import merge as merge
from lora_jax.subspace.saving import save as save
from lora_jax.subspace.saving import theta_of as theta_of
from lora_jax.subspace.saving import tree_of as tree_of
from lora_jax.subspace.space import Subspace as Subspace
from lora_jax.subspace.space import make as make
