"""Supervised fine-tuning: `python -m train.sft` teaches SmolLM2 to answer questions in SQL.

`python -m train.sft --help` lists the options. The script reads from top to bottom: check, load,
adapt, train, save, report.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import tyro

import lora_jax as lj
from lora_jax.training.batches import Order, Packs, pack
from lora_jax.training.data.chats import Row, check_lengths, conversation
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, summed_loss
from lora_jax.training.processes import write_json
from lora_jax.training.stop import Stop
from train.data.chats import tokenize
from train.data.files import read_rows
from train.run import hosts
from train.run.adapter import rules
from train.run.errors import UserError, reported
from train.run.fit import (
    Run,
    adapted,
    check_rules,
    doing,
    fit,
    number_of_steps,
    print_adapter,
    start,
    with_learning_rate,
)
from train.run.log import duration
from train.run.mesh import make_mesh
from train.run.options import OptimConfig
from train.run.output import REPORT, SCORES, check_output, read_json
from train.run.pretrained import read_model, read_outline
from train.run.report import print_costs, print_examples, print_scores, tree_bytes
from train.run.sft_options import SQL_STEPS, Config, check, settled
from train.tasks.sql.evaluate import (
    ADAPTED,
    FEW_SHOT,
    ZERO_SHOT,
    Scores,
    answer,
    draw_questions,
    longest_prompt,
)
from train.tasks.sql.examples import training_examples


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
    began = time.monotonic()
    check(config)
    hosts.join_hosts(config.run)
    console = hosts.console()

    # What can be wrong is found first: options and output folder, then rows, then lengths and
    # targets against the model's configuration. Only then are weights read.
    with hosts.together():
        mesh = make_mesh(config.run.mesh, config.optim.batch_size)
        rules(config.adapter)
        folder = check_output(config)
        rows = training_rows(config)
        questions = draw_questions(config.run.eval_questions) if asks_questions(config) else None
        outline = read_outline(config.data.model)
        outline.check_length(config.data.seq_len, f"--seq-len {config.data.seq_len}")
        hosts.check_alike(config, rows=rows, model=outline.config)
        if questions:
            outline.check_length(longest_prompt(outline, questions), "--eval-questions")
            held_out_rows = chats(next(iter(questions.values())))
        else:
            rows, held_out_rows = hold_out(config, rows)
        packs = packed(config, rows, outline.tokenizer, config.data.dataset)
        held_out = None
        if held_out_rows:
            held_out = packed(config, held_out_rows, outline.tokenizer, "the held-out rows")
        optim: OptimConfig = config.optim
        order = Order(optim.seed, len(packs), optim.batch_size, optim.grad_accum)
        steps = number_of_steps(optim, order, SQL_STEPS if config.is_sql else None)
        optim = with_learning_rate(config, outline, steps)
        check_rules(config, outline)
        layout = Layout.of(mesh, outline.config)
        of_run = Run(
            script="train.sft",
            config=config,
            folder=folder,
            console=console,
            stop=stop,
            examples=packs,
            order=order,
            steps=steps,
            layout=layout,
            name=lambda row: ", ".join(f"row {number}" for number in packs.sources[row]),
        )

    # The model and its adapter. Full fine-tuning keeps its weights in fp32, whatever computes.
    param_dtype = "float32" if config.adapter.full else optim.dtype
    with hosts.together():
        model, plain = read_model(
            config.data.model,
            dtype=optim.dtype,
            param_dtype=param_dtype,
            remat=optim.remat_policy,
            sharding=layout.of_parameter,
        )
    base_bytes = tree_bytes(plain)
    key = jax.random.key(optim.seed)
    params = adapted(config, outline, plain, folder, jax.random.fold_in(key, 0))
    facts = {"sequence_length": packs.ids.shape[1]}
    begun = start(of_run, optim, params, jax.random.fold_in(key, 1), facts)
    del params

    # The base's answers, for comparison.
    scores = Scores(questions) if questions else None
    if scores and not scores.recall(read_json(folder / SCORES)):
        for way, few_shot in ((ZERO_SHOT, False), (FEW_SHOT, True)):
            with doing(console, f"{way}: answering {2 * scores.n} questions"):
                scores.add(way, answer(model, plain, outline, scores.questions, few_shot=few_shot))
        write_json(folder / SCORES, scores.as_json())
    del plain

    # Training, and what is left of it: the adapter on its own, the curve, and what it cost.
    trained, report = fit(
        of_run,
        begun,
        begun.setup.forward(model),
        Loss(functools.partial(summed_loss, chunk=config.optim.loss_chunk * layout.batch_parts)),
        held_out=held_out,
        tokens=lambda batch: int((batch["segment_ids"] > 0).sum()),
    )
    report["base_bytes"] = base_bytes
    write_json(folder / REPORT, report)
    print_adapter(of_run, report)

    # Its answers.
    if scores:
        merged = lj.merge(trained)
        del trained, begun
        with doing(console, f"{ADAPTED}: answering {2 * scores.n} questions"):
            scores.add(ADAPTED, answer(model, merged, outline, scores.questions))
        write_json(folder / SCORES, scores.as_json())
        print_examples(console, scores.examples())
        print_scores(console, scores.accuracies())
    print_costs(console, report)
    console.print(report["summary"], highlight=False, soft_wrap=True)
    console.print(f"all of it took {duration(time.monotonic() - began)}; see {folder}")


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


if __name__ == "__main__":
    main()
