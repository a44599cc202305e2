"""The beginnings of the tasks of `train.grpo`, which are made where they are not there yet."""

import dataclasses
from pathlib import Path

import jax

from lora_jax.hf.packaged import cache_folder
from train.console.errors import UserError
from train.console.output import tell
from train.findings.making.arithmetic import arithmetic_base
from train.finetune import RunPart, finetune
from train.options.defaults import fill_defaults
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.options.scripts.sft import Config as SftConfig
from train.processes import hosts
from train.processes.session import Session
from train.run.lifecycle import resume_hint
from train.run.output import ADAPTER, CONFIG
from train.tasks import sums
from train.tasks.sql import task as sql

_FIRST = "sft"  # the folder, in the run's, of the run that makes the adapter
_READ = ("model", "tokenizer", "chat_template")
_SHARED = ("mesh", "compilation_cache", "report_to")


def started(config: Config, session: Session) -> Config:
    """Returns the options with what the task begins with.

    Raises:
      UserError: it cannot be made here.
    """
    if config.data.dataset == "sql":
        return _writing_sql(config, session)
    if config.data.model == sums.MODEL:
        _check_alone(config, "a small model; run this command in one process first")
        session.stop.remedy = resume_hint("train.grpo")
        folder = cache_folder() / "arithmetic"
        folder.mkdir(parents=True, exist_ok=True)
        return replace_options(config, {"model": str(arithmetic_base(folder, session))})
    return config


def _writing_sql(config: Config, session: Session) -> Config:
    """Returns the options with an adapter that writes SQL, trained in the run's folder."""
    if config.adapter.init_adapter or config.adapter.full:
        return config
    folder = Path(config.run.output).expanduser() / _FIRST
    if config.run.dry_run:
        tell(hosts.console(), f"the run begins with an adapter in {folder}, which learns SQL first")
        return config
    if not (folder / ADAPTER).exists():
        remedy = "make it by python -m train.sft, and name its folder with --init-adapter"
        _check_alone(config, f"an adapter that writes SQL; {remedy}")
        tell(hosts.console(), f"first, {folder} learns to write SQL, as `train.sft` does")
        own = {name: getattr(config.optim, name) for name in ("seed", "dtype", "quantize")}
        own |= {name: getattr(config.run, name) for name in _SHARED}
        own |= {name: getattr(config.data, name) for name in _READ}
        own |= {"output": str(folder), "eval_questions": 0}
        going_on = {"resume": (folder / CONFIG).exists()}
        first = dataclasses.replace(
            replace_options(SftConfig(), own | going_on), adapter=config.adapter
        )
        part = RunPart(hint=resume_hint("train.grpo"))
        with session.part():
            finetune("train.sft", fill_defaults(first, sql.TASK.defaults), sql.TASK, session, part)
        session.stop.check()
        jax.clear_caches()  # its programs take memory
    return replace_options(config, {"init_adapter": str(folder.absolute())})


def _check_alone(config: Config, what: str) -> None:
    if config.run.distributed or config.run.coordinator:
        raise UserError(f"--dataset {config.data.dataset}: one process alone makes {what}")
