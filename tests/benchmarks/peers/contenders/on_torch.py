"""The frame of all contenders on torch: the model, loss and optimiser of the JAX ones."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders.settings import (
    BETAS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    checked,
)
from tests.benchmarks.peers.inputs import data_of

Wrap = Callable[[Any, Path], Any]  # (model, adapter's folder) -> the model that trains or decodes


class Program:
    """A model on torch, and its optimiser."""

    def __init__(
        self, case: Case, base: Path, adapter: Path, wrap: Wrap, *, compiled: bool = False
    ) -> None:
        began = time.perf_counter()
        self.case = case
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(case, base).to(self.device)
        vocab_size = model.config.vocab_size
        if case.remat:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.attach(wrap(model, adapter), vocab_size)
        self.run_once = torch.compile(self.model) if compiled else self.model
        self.load_s = time.perf_counter() - began

    def attach(self, model: Any, vocab_size: int) -> None:
        """Takes the model that trains, and makes its optimiser and data."""
        self.model = model
        data = data_of(self.case, vocab_size)
        self.data = {n: torch.from_numpy(x).long().to(self.device) for n, x in data.items()}
        if self.case.kind == "decode":
            self.model.eval()
            self.model.generation_config.eos_token_id = None
            self.model.generation_config.pad_token_id = 0
            self.tokens_a_run = self.case.batch * self.case.new_tokens
            return
        self.model.train()
        self.model.config.use_cache = False
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )
        self.tokens_a_run = self.case.batch * self.case.seq

    def compile(self) -> dict[str, Any]:
        """Returns seconds and the device; ``torch.compile`` compiles in the first step."""
        cuda = self.device == "cuda"
        return {
            "load_s": self.load_s,
            "tokens": self.tokens_a_run,
            "device": "gpu" if cuda else "cpu",
            "device_kind": torch.cuda.get_device_name() if cuda else "cpu",
        }

    def check(self, steps: int) -> dict[str, Any]:
        """Runs the program for what has to agree; see ``checked``."""
        return checked(self.case.kind, self._run, steps)

    def time(self, runs: int) -> float:
        """Returns the seconds of that many runs."""
        began = time.perf_counter()
        for _ in range(runs):
            out = self._run()
        out.cpu()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def device_peak(self) -> int | None:
        """Returns the peak of device memory in bytes, on a GPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _run(self) -> Any:
        data = self.data
        if self.case.kind == "decode":
            out = self.model.generate(
                input_ids=data["ids"],
                attention_mask=torch.ones_like(data["ids"]),
                do_sample=False,
                max_new_tokens=self.case.new_tokens,
            )
            return out[:, self.case.seq :]
        if self.case.kind == "classify":
            out = self.run_once(
                input_ids=data["ids"], attention_mask=data["mask"], labels=data["labels"]
            )
        else:
            out = self.run_once(input_ids=data["ids"], labels=data["ids"])
        self.optimizer.zero_grad()
        out.loss.backward()
        self.optimizer.step()
        return out.loss.detach()


def load_model(case: Case, base: Path) -> Any:
    """Loads a model by transformers, without dropout: the other side has none."""
    options: dict[str, Any] = {"dtype": getattr(torch, case.dtype), "attn_implementation": "sdpa"}
    if case.kind != "classify":
        return transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        base, **options, **dropout
    )
