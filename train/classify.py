"""Text classification: `python -m train.classify` teaches MiniLM which words are positive.

`python -m train.classify --help` lists the options. A head on an encoder trains in full, the
encoder through LoRA, or in full as well, or not at all.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

import lora_jax as lj
from lora_jax.training.batches import Order
from lora_jax.training.data.chats import Row
from lora_jax.training.data.labelled import Labelled, classification_loss, predict
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.processes import is_first, write_json
from lora_jax.training.stop import Stop
from train.data.labelled import (
    encode,
    label_names,
    read_labelled,
)
from train.run import hosts
from train.run.adapter import peft_fields, rules
from train.run.classify_options import HEAD, Config, check, settled
from train.run.errors import reported
from train.run.fit import (
    Run,
    adapted,
    check_rules,
    doing,
    fit,
    number_of_steps,
    print_adapter,
    start,
)
from train.run.log import duration
from train.run.mesh import make_mesh
from train.run.output import CONFUSION, REPORT, SCORES, check_output
from train.run.pretrained import read_classifier, read_classifier_outline
from train.run.report import print_costs, tree_bytes
from train.tasks.classes import (
    draw_confusion,
    print_classes,
    print_mistakes,
    print_scores,
    scores_of,
)
from train.tasks.vader import PREFIX, look_up_prefixes


def parse(args: Sequence[str] | None = None) -> Config:
    """The settled options of a command line, by default this process's."""
    flat = tyro.conf.OmitArgPrefixes[tyro.conf.FlagCreatePairsOff[Config]]
    return settled(tyro.cli(flat, args=args, prog="python -m train.classify"))


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

    # What can be wrong is found first: options and output folder, then rows, then texts and
    # targets against the model's configuration. Only then are weights read.
    with hosts.together():
        mesh = make_mesh(config.run.mesh, config.optim.batch_size)
        config = with_head(config)
        rules(config.adapter)
        folder = check_output(config)
        data, optim = config.data, config.optim
        rows, test_rows = read_labelled(data)
        names = label_names(data, rows)
        outline = read_classifier_outline(data.model, len(names))
        outline.check_length(data.seq_len, f"--seq-len {data.seq_len}")
        hosts.check_alike(config, rows=rows, held_out=test_rows, model=outline.config)
        examples = encode(data, rows, names, outline.tokenizer, data.dataset)
        test = encode(data, test_rows, names, outline.tokenizer, data.test or "the held-out rows")
        order = Order(optim.seed, len(examples), optim.batch_size, optim.grad_accum)
        check_rules(config, outline)
        layout = Layout.of(mesh, outline.config)
        of_run = Run(
            script="train.classify",
            config=config,
            folder=folder,
            console=console,
            stop=stop,
            examples=examples,
            order=order,
            steps=number_of_steps(optim, order),
            layout=layout,
            name=lambda row: repr(rows[row][data.text]),
        )
    print_data(console, rows, test_rows, data.label)

    # The model, its head and its adapter.
    param_dtype = "float32" if config.adapter.full else optim.dtype
    with hosts.together():
        model, plain = read_classifier(
            data.model,
            len(names),
            dtype=optim.dtype,
            param_dtype=param_dtype,
            remat=optim.remat_policy,
            sharding=layout.of_parameter,
        )
    base_bytes = tree_bytes(plain)
    key = jax.random.key(optim.seed)
    params = adapted(config, outline, plain, folder, jax.random.fold_in(key, 0))
    facts = {"labels": names, "sequence_length": examples.ids.shape[1]}
    begun = start(of_run, optim, params, jax.random.fold_in(key, 1), facts)
    del params, plain

    # Training, and what is left of it.
    trained, report = fit(
        of_run,
        begun,
        begun.setup.forward(model),
        Loss(classification_loss, unit="text"),
        held_out=test,
        tokens=lambda batch: int(batch["attention_mask"].sum()),
    )
    report["base_bytes"] = base_bytes
    write_json(folder / REPORT, report)
    print_adapter(of_run, report)

    # What it makes of the texts that it has not seen.
    with doing(console, f"classifying {len(test)} texts"):
        probabilities = predict(model, lj.merge(trained), test, 4 * optim.batch_size)
    ways = baselines(config, rows, test_rows, test, names)
    scores = scores_of(test.labels, probabilities.argmax(-1), names)
    ways["fine-tuned"] = scores
    write_json(folder / SCORES, ways)
    if is_first():
        draw_confusion(folder / CONFUSION, scores["confusion"], names)
    texts = [row[data.text] for row in test_rows]
    print_mistakes(console, texts, test.labels, probabilities, names)
    print_classes(console, scores)
    print_scores(console, ways, len(test))
    print_costs(console, report)
    console.print(report["summary"], highlight=False, soft_wrap=True)
    console.print(f"all of it took {duration(time.monotonic() - began)}; see {folder}")


def with_head(config: Config) -> Config:
    """The options with the head among what trains in full."""
    adapter = config.adapter
    if adapter.full or adapter.init_adapter or HEAD in adapter.train:
        return config
    if adapter.peft_config and HEAD in (peft_fields(adapter.peft_config)["modules_to_save"] or ()):
        return config
    adapter = dataclasses.replace(adapter, train=(HEAD, *adapter.train))
    return dataclasses.replace(config, adapter=adapter)


def baselines(
    config: Config,
    rows: Sequence[Row],
    test_rows: Sequence[Row],
    test: Labelled,
    names: Sequence[str],
) -> dict[str, Any]:
    """The scores of what needs no model: the commonest label; of words, their first letters."""
    index = {name: i for i, name in enumerate(names)}
    usual = Counter(str(row[config.data.label]) for row in rows).most_common(1)[0][0]
    always = np.full(len(test), index[usual])
    ways = {"always the commonest label": scores_of(test.labels, always, names)}
    if config.is_vader:
        labels, found = look_up_prefixes(list(rows), [row["text"] for row in test_rows])
        way = f"look-up of {PREFIX}-letter prefixes ({100 * found:.0f}% found)"
        looked_up = np.array([index[label] for label in labels])
        ways[way] = scores_of(test.labels, looked_up, names)
    return ways


def print_data(console: Console, rows: Sequence[Row], test_rows: Sequence[Row], label: str) -> None:
    """How many texts there are of each label."""
    for what, part in (("to train on", rows), ("to test on", test_rows)):
        counts = Counter(str(row[label]) for row in part)
        shares = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        console.print(f"{len(part)} texts {what}: {shares}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
