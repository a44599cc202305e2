"""Supervised fine-tuning: `python -m train.sft` teaches SmolLM2 to answer questions in SQL.

`python -m train.sft --help` lists the options. The script reads from top to bottom: check, load,
adapt, train, save, report.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

import lora_jax as lj
from lora_jax.fingerprint import base_fingerprint, differing
from train.batches import Order, Packs, pack
from train.checkpoints import Checkpoints
from train.config import SQL_STEPS, Config, OptimConfig, check, learning_rate, settled
from train.data import Row, check_lengths, conversation, read_rows, tokenize
from train.errors import UserError, as_user_errors, reported
from train.evaluate import (
    ADAPTED,
    FEW_SHOT,
    ZERO_SHOT,
    Scores,
    answer,
    draw_questions,
    longest_prompt,
)
from train.log import Log, draw_curve, duration, read_metrics
from train.loop import Hooks, train
from train.methods import make_optimizer, rules, takes_from_base
from train.output import (
    ADAPTER,
    CHECKPOINTS,
    REPORT,
    SCORES,
    START,
    begin,
    check_output,
    folder_bytes,
    read_json,
    write_json,
)
from train.pretrained import Outline, read_model, read_outline
from train.report import (
    compiled_bytes,
    megabytes,
    peak_bytes,
    print_costs,
    print_examples,
    print_scores,
    tree_bytes,
    versions,
)
from train.sql import training_examples
from train.step import State, init_state, make_evaluation, make_step
from train.stop import Stop


def parse(args: Sequence[str] | None = None) -> Config:
    """The settled options of a command line, by default this process's."""
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Config]]
    return settled(tyro.cli(flat, args=args, prog="python -m train.sft"))


def main(args: Sequence[str] | None = None) -> None:
    """The command line; bad input ends it with the exit code 2, a signal with its own."""
    config = parse(args)
    stop = Stop()
    with reported(), stop.listening():
        run(config, stop)


def run(config: Config, stop: Stop) -> None:
    """One run, from its options to its report."""
    console = Console()
    began = time.monotonic()

    # What can be wrong is found first: options and output folder, then rows, then lengths and
    # targets against the model's configuration. Only then are weights read.
    check(config)
    rules(config, active_experts=1)
    folder = check_output(config)
    rows = training_rows(config)
    questions = draw_questions(config.run.eval_questions) if asks_questions(config) else None
    outline = read_outline(config.data.model)
    outline.check_length(config.data.seq_len, f"--seq-len {config.data.seq_len}")
    if questions:
        outline.check_length(longest_prompt(outline, questions), "--eval-questions")
        held_out_rows = chats(next(iter(questions.values())))
    else:
        rows, held_out_rows = hold_out(config, rows)
    packs = packed(config, rows, outline.tokenizer, config.data.dataset)
    held_out = None
    if held_out_rows:
        held_out = packed(config, held_out_rows, outline.tokenizer, "the held-out rows")
    optim = config.optim
    order = Order(optim.seed, len(packs), optim.batch_size, optim.grad_accum)
    steps = number_of_steps(config, order)
    optim = with_learning_rate(config, outline, steps)
    if not config.adapter.init_adapter:
        with as_user_errors(ValueError):
            lj.lorafy(outline.params, rules(config, outline.active_experts))

    # The model and its adapter. Full fine-tuning keeps its weights in fp32, whatever computes.
    param_dtype = "float32" if config.adapter.full else optim.dtype
    model, plain = read_model(
        config.data.model, dtype=optim.dtype, param_dtype=param_dtype, remat=optim.remat
    )
    key = jax.random.key(optim.seed)
    with as_user_errors(ValueError):
        params = adapted(config, outline, plain, folder, jax.random.fold_in(key, 0))
    summary = lj.summary(params)
    console.print(summary, highlight=False, soft_wrap=True)
    base_bytes = tree_bytes(plain)
    adapter, base = lj.split(params)

    # The state: new, or where an earlier run stopped.
    schedule = learning_rate(optim, steps)
    optimizer = make_optimizer(config, schedule, params)
    state = init_state(adapter, optimizer, jax.random.fold_in(key, 1))
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.run.keep)
    facts = {"data": packs.digest(), "base": base_fingerprint(base)}
    if config.run.resume:
        state = resumed(checkpoints, state, facts, order, steps, console)
    begin(
        folder,
        config,
        {
            "resolved": {
                "steps": steps,
                "rows": len(rows),
                "sequences": len(packs),
                "lr": optim.lr,
            },
            "sequence_length": packs.ids.shape[1],
            "summary": summary,
            "versions": versions(),
        },
    )
    if takes_from_base(config) and not (folder / START).exists():
        lj.save_adapter(folder / START, params)  # so that --resume decomposes nothing again
    del params

    # The base's answers, for comparison.
    scores = Scores(questions) if questions else None
    if scores and not scores.recall(read_json(folder / SCORES)):
        for way, few_shot in ((ZERO_SHOT, False), (FEW_SHOT, True)):
            with doing(console, f"{way}: answering {2 * scores.n} questions"):
                scores.add(way, answer(model, plain, outline, scores.questions, few_shot=few_shot))
        write_json(folder / SCORES, scores.as_json())
    del plain, adapter

    # Training.
    forward = lj.adapt(model.apply)
    step = make_step(forward, optimizer, schedule, dropout=config.adapter.dropout > 0)
    with doing(console, "compiling the step"):
        compile_began = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, base, batch(packs, order, 0))
        compiled = lowered.compile()
        compile_seconds = time.perf_counter() - compile_began
    evaluation = jax.jit(make_evaluation(forward))
    hooks = Hooks(
        batch=lambda number: batch(packs, order, number),
        save=lambda state: checkpoints.save(
            state, {**facts, "cursor": order.cursor(int(state.step))}
        ),
        evaluate=lambda state: held_out_loss(evaluation, state, base, held_out, optim.batch_size),
        resume_hint=f"Go on with: {resume_command()}",
    )
    stop.message = f"interrupted. {hooks.resume_hint}"
    with Log(folder, console, first=int(state.step), last=steps) as log:
        state, step_seconds = train(compiled, state, base, steps, config.run, hooks, log, stop)
    checkpoints.close()

    # What is left of it: the adapter on its own, the curve, and what it cost.
    trained = lj.join(state.adapter, base)
    lj.save_adapter(folder / ADAPTER, trained, overwrite=True)
    draw_curve(folder, read_metrics(folder))
    report: dict[str, Any] = {
        "summary": summary,
        "steps": steps,
        "compile_seconds": compile_seconds,
        "median_step_seconds": step_seconds,
        "compiled_bytes": compiled_bytes(compiled),
        "peak_bytes": peak_bytes(),
        "adapter_bytes": folder_bytes(folder / ADAPTER),
        "base_bytes": base_bytes,
    }
    write_json(folder / REPORT, report)
    console.print(
        f"adapter saved in {folder / ADAPTER}: {megabytes(report['adapter_bytes'])} beside the "
        f"base's {megabytes(base_bytes)}",
        highlight=False,
        soft_wrap=True,
    )

    # Its answers.
    stop.message = f"interrupted; the adapter is in {folder / ADAPTER}"
    stop.check()
    if scores:
        merged = lj.merge(trained)
        del trained, state, base
        with doing(console, f"{ADAPTED}: answering {2 * scores.n} questions"):
            scores.add(ADAPTED, answer(model, merged, outline, scores.questions))
        write_json(folder / SCORES, scores.as_json())
        print_examples(console, scores.examples())
        print_scores(console, scores.accuracies())
    print_costs(console, report)
    console.print(summary, highlight=False, soft_wrap=True)
    console.print(f"all of it took {duration(time.monotonic() - began)}; see {folder}")


@contextmanager
def doing(console: Console, what: str) -> Iterator[None]:
    """Says what takes a while and, afterwards, how long it took."""
    began = time.monotonic()
    with console.status(what):
        yield
    console.print(f"{what}: {duration(time.monotonic() - began)}", highlight=False)


def asks_questions(config: Config) -> bool:
    """Whether the run measures how well questions are answered."""
    return config.is_sql and config.run.eval_questions > 0


def training_rows(config: Config) -> list[Row]:
    """The rows of the dataset, each with the fields that are needed; UserError otherwise."""
    data = config.data
    if config.is_sql:
        examples = training_examples(
            data.rows or SQL_STEPS * config.optim.batch_size * config.optim.grad_accum,
            seed=config.optim.seed,
            shuffle_schemas=data.shuffle_schemas,
        )
        return chats(examples)
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    for number, row in enumerate(rows, start=1):
        conversation(row, f"{data.dataset}, row {number}")
    return rows


def chats(examples: Any) -> list[Row]:
    """Examples of the SQL task as rows."""
    return [{"messages": example.messages} for example in examples]


def hold_out(config: Config, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to measure the loss on): the last ones, at most a tenth."""
    if not config.run.eval_every:
        return rows, []
    n = min(config.run.eval_questions, len(rows) // 10)
    if n == 0:
        raise UserError(
            f"--eval-every {config.run.eval_every} needs rows to hold out: --eval-questions is "
            f"{config.run.eval_questions} and a tenth of the {len(rows)} rows may be taken"
        )
    return rows[:-n], rows[-n:]


def packed(config: Config, rows: list[Row], tokenizer: Any, source: str) -> Packs:
    """Rows as sequences of one length."""
    data = config.data
    sequences = tokenize(rows, tokenizer, source)
    kept = check_lengths(sequences, data.seq_len, truncate=data.truncate)
    if left_out := len(sequences) - len(kept):
        print(f"{source}: left out {left_out} rows, cut off before their completion began")
    return pack(kept, data.seq_len, packing=data.packing)


def number_of_steps(config: Config, order: Order) -> int:
    """--steps, or what --epochs comes to, or the default."""
    if config.optim.steps is not None:
        return config.optim.steps
    if config.optim.epochs is None and config.is_sql:
        return SQL_STEPS
    return order.steps(config.optim.epochs or 1)


def with_learning_rate(config: Config, outline: Outline, steps: int) -> OptimConfig:
    """The optimisation's options with the learning rate that --lr-rule gives for this run."""
    optim = config.optim
    if optim.lr_rule is None:
        return optim
    rate = lj.optim.learning_rate(
        outline.config.hidden_size, family=optim.lr_rule, steps=steps, full=config.adapter.full
    )
    return dataclasses.replace(optim, lr=rate)


def adapted(config: Config, outline: Outline, plain: Any, folder: Path, key: jax.Array) -> Any:
    """The parameters with a new adapter, with the one to go on from, or with this run's first."""
    start = config.adapter.init_adapter
    if start is None and config.run.resume and (folder / START).exists():
        start = str(folder / START)
    if start is None:
        return lj.lorafy(plain, rules(config, outline.active_experts), key=key)
    return lj.load_adapter(start, plain, allow_base_mismatch=config.adapter.allow_base_mismatch)


def batch(packs: Packs, order: Order, number: int) -> dict[str, Any]:
    """The batch of the step that has `number` steps before it."""
    return packs.take(order.rows(number))


def resumed(
    checkpoints: Checkpoints,
    state: State,
    facts: dict[str, Any],
    order: Order,
    steps: int,
    console: Console,
) -> State:
    """The state of the newest checkpoint; UserError where it is not of this run."""
    if not checkpoints.steps():
        console.print("no checkpoint yet: beginning at step 0")
        return state
    state, saved = checkpoints.restore(state)
    done = int(state.step)
    if saved["data"] != facts["data"] or saved["cursor"] != order.cursor(done):
        raise UserError("--resume: the training data are not those that the run began with")
    if wrong := differing(saved["base"], facts["base"]):
        raise UserError(
            f"--resume: the base is not the one that the run began with; {len(wrong)} of its "
            f"weights differ, {wrong[0]} among them"
        )
    if done > steps:
        raise UserError(f"--resume: {done} steps are done, more than the {steps} asked for")
    console.print(f"going on after step {done}", highlight=False)
    return state


def held_out_loss(
    evaluation: Any, state: State, base: Any, held_out: Packs | None, batch_size: int
) -> float:
    """The mean loss over the tokens of the held-out rows that count."""
    assert held_out is not None
    loss = tokens = 0.0
    for part in held_out.parts(batch_size):
        sums = evaluation(state.adapter, base, part)
        loss += float(sums["loss"])
        tokens += float(sums["tokens"])
    return loss / tokens


def resume_command() -> str:
    """The command line of this run, with --resume."""
    options = [arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--resume")]
    return shlex.join(["python", "-m", "train.sft", *options, "--resume"])


if __name__ == "__main__":
    main()
