"""Plans of a tiny decoder, whose step is traced and compiled once for all tests that ask alike."""

import dataclasses
import functools
import json
from unittest import mock

import jax

from tests.train.tiny import CONFIG
from train.plan import __main__ as plan
from train.plan import compile as planned

FIELDS = CONFIG | {"num_hidden_layers": 3, "hidden_size": 32, "head_dim": 16, "rms_norm_eps": 1e-5}
FIELDS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 56}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURE |= {"tie_word_embeddings": False}
ON_FOUR = ("--grad-accum", 2, "--topology", "cpu:4", "--mesh", "fsdp=2,tensor=2")


def write(folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return str(path)


@functools.cache
def asked(model, *options):
    args = ["--model", model, "--topology", "cpu:1", "--batch-size", "4", "--seq-len", "24"]
    return plan.parse([*args, "--rank", "3", "--dtype", "float32", *map(str, options)])


@dataclasses.dataclass(eq=False)
class CompiledOnce:
    """A lowered step that is compiled where it is first needed."""

    lowered: jax.stages.Lowered

    @functools.cached_property
    def compiled(self):
        return self.lowered.compile()

    def compile(self, compiler_options=None):
        assert not compiler_options
        return self.compiled


@functools.cache
def prepared(options):
    """The step that is asked for: the same for all tests that ask alike."""
    job, optim = plan.make_job(options.plan)
    step = planned.prepare(job, plan.variants_to_plan(options)[0], optim)
    between = {
        name: program._replace(lowered=CompiledOnce(program.lowered))
        for name, program in step.between.items()
    }
    return dataclasses.replace(step, lowered=CompiledOnce(step.lowered), between=between)


def planned_for(model, *options):
    """(the job, the first variant, its plan, made anew of a step that may be another test's)"""
    options = asked(model, *options)
    plan.check_options(options)
    job, optim = plan.make_job(options.plan)
    variant, step = plan.variants_to_plan(options)[0], prepared(options)
    with mock.patch.object(planned, "prepare", lambda *_: step):
        return job, variant, planned.plan(job, variant, optim)
