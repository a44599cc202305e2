"""Registry of the contenders: each has a file in this folder, and runs in a process of its own."""

import dataclasses
import importlib.util


@dataclasses.dataclass(frozen=True)
class Contender:
    """One library, or way to write the step, that takes part.

    Attributes:
      title: the name in tables.
      module: its file in this folder; it defines ``make(case, base, adapter)``.
      needs: modules that have to be importable; the last is what the case "import" imports.
      install: the line that brings them.
      group: contenders of one group train alike, so that all their losses have to agree. Between
        groups only the first loss is compared: full fine-tuning starts at W + s·AB.
      devices: the devices on which it runs.
    """

    title: str
    module: str
    needs: tuple[str, ...]
    install: str
    group: str = "LoRA"
    devices: tuple[str, ...] = ("cpu", "gpu")

    def missing(self) -> str:
        """Returns the reason why it cannot take part, with the remedy; "" if it can."""
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if lacking:
            return f"not installed ({', '.join(lacking)}): {self.install}"
        return ""


_BENCH = 'pip install -e ".[bench]"'
_JAX = ("jax", "lora_jax")
_TORCH = ("torch", "transformers")

CONTENDERS = {
    "lora_jax": Contender("lora_jax", "ours", _JAX, "pip install -e ."),
    "peft": Contender("PEFT", "peft_eager", (*_TORCH, "peft"), _BENCH),
    "peft-compiled": Contender("PEFT, torch.compile", "peft_compiled", (*_TORCH, "peft"), _BENCH),
    "qwix": Contender("qwix", "qwix_lora", (*_JAX, "qwix"), _BENCH),
    "quax": Contender("quax", "quax_lora", (*_JAX, "equinox", "quax"), _BENCH),
    "naive": Contender("W + s·AB in JAX", "naive", _JAX, "pip install -e ."),
    "full": Contender("full, JAX", "full", _JAX, "pip install -e .", group="full"),
    "torch-full": Contender("full, torch", "torch_full", _TORCH, _BENCH, group="full"),
    "unsloth": Contender(
        "Unsloth", "unsloth_lora", (*_TORCH, "unsloth"), "pip install unsloth", devices=("gpu",)
    ),
    "merged": Contender("lora_jax, merged", "merged", _JAX, "pip install -e ."),
    "base": Contender("JAX, base", "base", _JAX, "pip install -e .", group="base"),
    "torch-base": Contender("torch, base", "torch_base", _TORCH, _BENCH, group="base"),
    # For the case "import" alone.
    "jax": Contender("jax", "", ("jax",), "pip install -e ."),
    "optax": Contender("optax", "", ("optax",), "pip install -e ."),
}
