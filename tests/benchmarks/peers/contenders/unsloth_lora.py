"""Unsloth on a GPU: its model and its own patches around PEFT."""

import unsloth  # first: it patches what the others import  # isort: skip
import time
from pathlib import Path
from typing import Any

import peft
import torch

from tests.benchmarks.peers.cases import Case
from tests.benchmarks.peers.contenders import on_torch


class Program(on_torch.Program):
    """A model of Unsloth, with the weights of the case's adapter."""

    def __init__(self, case: Case, base: Path, adapter: Path) -> None:
        began = time.perf_counter()
        self.case, self.device = case, "cuda"
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            str(base), max_seq_length=case.seq, dtype=getattr(torch, case.dtype), load_in_4bit=False
        )
        vocab_size = model.config.vocab_size
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=case.rank,
            lora_alpha=case.alpha,
            lora_dropout=0,
            bias="none",
            target_modules=case.target_modules,
            use_gradient_checkpointing="unsloth" if case.remat else False,
        )
        weights = peft.load_peft_weights(str(adapter), device=self.device)
        peft.set_peft_model_state_dict(model, weights)
        self.attach(model, vocab_size)
        self.run_once: Any = model
        self.load_s = time.perf_counter() - began


def make(case: Case, base: Path, adapter: Path) -> Program:
    return Program(case, base, adapter)
