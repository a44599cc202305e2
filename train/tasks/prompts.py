"""The task of training on rewards: a user's prompts, whose completions are rewarded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.data.batches import pack
from lora_jax.training.data.rows import Row, name_of, question
from lora_jax.training.data.sequences import TokenSequence
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, rollout_loss
from train.console.errors import UserError, flag
from train.data.dataset import find_dataset
from train.live import reinforcement
from train.live.external.sampler import find_server
from train.live.prompts import PromptFeed, TokenizedPrompts
from train.live.reference import reference_line
from train.live.turns.use import ToolUse, tokenize_with_tools
from train.options.defaults import Defaults
from train.options.scripts.grpo import Config
from train.options.scripts.rollouts import RolloutDataConfig
from train.processes.mesh import all_devices, parse_mesh
from train.rewards.find import Rewards, find_rewards
from train.run.pretrained import ModelInfo
from train.run.shared_prompts import SHARED, PromptRows, choose_sharing
from train.run.task import Data, Task, TaskRows
from train.tasks import chats, sums
from train.tasks.reward_scores import (
    BASE,
    REWARD,
    evaluation,
    question_scores,
    standard_error,
)
from train.tasks.tool_use import OPENS_EACH, check_fields, earned_name, use_tools

_HELD_OUT = 2**32 + 2  # no epoch's number, and no other draw's


def check(config: Config) -> None:
    """Raises a UserError for a task that has no reward."""
    if not config.data.reward and config.data.environment is None:
        raise UserError(
            f"--dataset {config.data.dataset}: say what rewards a completion, by --reward "
            "file.py:function, or by an --environment with a reward of its own"
        )


def check_own_rows(config: Any) -> None:
    """Raises a UserError for options about a user's own rows, which a task with rows ignores."""
    for name in ("fields", "eval_dataset"):
        if getattr(config.data, name):
            raise UserError(f"{flag(name)} is about rows of your own: name them with --dataset")


def check_prompts(rows: Sequence[Row], source: str) -> None:
    """Raises a TrainingError for the first row that asks nothing."""
    for number, row in enumerate(rows, start=1):
        question(row, name_of(row, source, number))


def read_rows(config: Config) -> TaskRows:
    """Reads the rows; holds some out, or reads those of --eval-dataset."""
    data = config.data

    def read(name: str, **options: Any) -> list[Row]:
        dataset = find_dataset(
            name, subset=data.subset, fields=data.fields, check=check_prompts, **options
        )
        return dataset.rows()

    rows = read(data.dataset, split=data.split, rows=data.rows)
    if data.eval_dataset is not None:
        return TaskRows(rows, read(data.eval_dataset, split=data.eval_split))
    return held_out(config, rows)


def held_out(config: Config, rows: Sequence[Row]) -> TaskRows:
    """Returns the rows in two parts, drawn by --seed: to train on, and --eval-questions others."""
    seed = config.optim.seed if config.data.held_out_seed is None else config.data.held_out_seed
    n_held_out = min(config.run.eval_questions or 0, _most_held_out(len(rows)))
    order = np.random.Generator(np.random.PCG64([seed, _HELD_OUT])).permutation(len(rows))
    held_out_indices = np.sort(order[:n_held_out])
    train_indices = np.sort(order[n_held_out:])
    return TaskRows(
        train=[rows[index] for index in train_indices],
        held_out=[rows[index] for index in held_out_indices],
    )


def _most_held_out(n_rows: int) -> int:
    return n_rows // 10


def most_questions(config: Config, rows: TaskRows) -> int | None:
    """Returns the most rows that may be held out; None for an --eval-dataset, which is whole."""
    if config.data.eval_dataset is not None:
        return None
    return _most_held_out(len(rows.train) + len(rows.held_out))


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the prompts, and the batches that rewards of their completions make."""
    tools, tool_lines = use_tools(config, outline)
    try:
        return _examples_with_tools(config, rows, outline, tools, tool_lines)
    except BaseException:
        if tools is not None:
            tools.host.close()
        raise


def _examples_with_tools(
    config: Config,
    rows: TaskRows,
    outline: ModelInfo,
    tools: ToolUse | None,
    tool_lines: Sequence[str],
) -> Data:
    """Returns the prompts as `examples` does, for completions that call these tools."""
    data = config.data
    schemas = () if tools is None else tools.host.tools
    train, held_out = read_prompts(data, rows, outline, schemas)
    if tools is not None:
        sources = {f"--dataset {data.dataset}": rows.train}
        if data.eval_dataset is not None:
            sources[f"--eval-dataset {data.eval_dataset}"] = rows.held_out
        check_fields(config, tools, sources)
    rewards = find_rewards(
        data.reward,
        data.reward_weights or None,
        columns=train.columns,
        max_tokens=data.max_new_tokens,
        seconds=data.reward_timeout,
        workers=data.reward_workers,
        earned=earned_name(config, tools),
    )
    check_columns(config, rewards, held_out)
    feed = PromptFeed(
        config,
        train,
        outline,
        per_token=reinforcement.arrays_per_token(config),
        rewards=rewards,
        tools=tools,
        server=find_server(data, several_turns=tools is not None),
        sequence_parts=sequence_parts(config.run.mesh),
        routing=replayed_routing(config, outline),
    )
    feed, sharing_lines = share_prompts(feed, [outline])
    reward_line = f"completions are rewarded by {', '.join(rewards.names)}"
    lines = [reward_line, *tool_lines, *sharing_lines]
    if config.optim.beta:
        lines.append(reference_line(config))
    if held_out is not None:
        lines.append(f"{len(held_out.rows)} prompts are held out")
    return data_of(feed, lines)


def sequence_parts(mesh: str | None) -> int:
    """Returns a number of parts that the mesh of --mesh can split a row into."""
    parts = parse_mesh(mesh).get("sequence", 1)
    return parts if parts > 0 else len(all_devices())


def replayed_routing(config: Any, outline: ModelInfo) -> tuple[int, int] | None:
    """Returns the layers and experts of a token whose choice is replayed; None where none is.

    Raises:
      UserError: --no-replay-routing, and there is nothing to replay.
    """
    n_active_experts = outline.active_experts
    obstacle: str | None = None
    if n_active_experts is None:
        obstacle = f"the model {outline.name} has no experts"
    elif getattr(config.data, "sampler", None) is not None:
        obstacle = "a server tells nothing of its experts; leave it out"
    if obstacle and not config.data.replay_routing and not config.run.resume:
        raise UserError(f"--no-replay-routing: {obstacle}")
    if n_active_experts is None or obstacle or not config.data.replay_routing:
        return None
    return outline.config.num_hidden_layers, n_active_experts


def check_columns(config: Config, rewards: Rewards, held_out: TokenizedPrompts | None) -> None:
    """Raises a UserError if --eval-dataset has no row with a column that a reward needs."""
    data = config.data
    if held_out is None or data.eval_dataset is None:
        return
    for name, needed_columns in rewards.needs.items():
        for column in needed_columns:
            if column not in held_out.columns:
                rewards.close()
                raise UserError(
                    f"--eval-dataset {data.eval_dataset}: the reward {name} needs the column "
                    f"{column!r}; the rows have "
                    f"{', '.join(held_out.columns) or 'none beside the prompt'}"
                )


def read_prompts(
    data: RolloutDataConfig, rows: TaskRows, outline: ModelInfo, tools: Sequence[Any] = ()
) -> tuple[TokenizedPrompts, TokenizedPrompts | None]:
    """Returns the prompts to train on, and those that are held out; None for none.

    Args:
      data: the options.
      rows: the rows.
      outline: the model's, with its tokenizer.
      tools: schemas of the tools that the prompts show.

    Raises:
      UserError: there is none, or one leaves no room for a completion.
    """
    if not rows.train:
        raise UserError(f"--dataset {data.dataset} has no row to train on")
    train_ids = tokenize_with_tools(rows.train, tools, outline, data.dataset)
    train = TokenizedPrompts(rows.train, train_ids)
    held_out: TokenizedPrompts | None = None
    if rows.held_out:
        held_out_ids = tokenize_with_tools(rows.held_out, tools, outline, "the held-out rows")
        held_out = TokenizedPrompts(rows.held_out, held_out_ids)
    parts = [train] if held_out is None else [train, held_out]
    longest = max(len(ids) for prompts in parts for ids in prompts.tokens)
    for prompts in parts:
        _check_prompt_lengths(data, prompts, longest)
    return train, held_out


def _check_prompt_lengths(data: RolloutDataConfig, prompts: TokenizedPrompts, longest: int) -> None:
    """Raises a UserError for prompts that leave no room for a completion.

    Args:
      data: the options.
      prompts: the prompts.
      longest: tokens of the longest of all prompts.
    """
    most_tokens = data.seq_len - data.max_new_tokens
    long_rows = [row for row, ids in enumerate(prompts.tokens) if len(ids) > most_tokens]
    if long_rows:
        first_row = long_rows[0]
        first_name = name_of(prompts.rows[first_row], data.dataset, first_row + 1)
        raise UserError(
            f"--seq-len {data.seq_len}: {len(long_rows)} prompts have more than {most_tokens} "
            f"tokens, {first_name} the first, and leave no room for --max-new-tokens "
            f"{data.max_new_tokens}; the longest has {longest}. Give --seq-len "
            f"{longest + data.max_new_tokens}, or take these rows out"
        )


def share_prompts(
    feed: PromptFeed, outlines: Sequence[ModelInfo]
) -> tuple[PromptFeed, tuple[str, ...]]:
    """Returns a feed whose completions share their prompt, if they can, and lines that tell it."""
    config = feed.config
    group = config.data.group
    max_new_tokens = config.data.max_new_tokens
    if feed.tools is not None and feed.tools.opens:
        if not config.data.share_prompt and not config.run.resume:
            feed.close()
            raise UserError(f"--no-share-prompt has no effect: {OPENS_EACH}; leave it out")
        return feed, (f"each completion has a prompt of its own: {OPENS_EACH}",)
    rows = PromptRows(
        completions=group,
        share=feed.prompts.share(max_new_tokens),
        rows=config.optim.batch_size // group,
        shared=(1, feed.widths.sharing(group * max_new_tokens).rows[-1]),
        alone=(group, feed.length),
    )
    try:
        choice = choose_sharing(config, outlines, rows)
    except UserError:
        feed.close()
        raise
    return dataclasses.replace(feed, share_prompt=choice.shared), choice.lines


def data_of(feed: PromptFeed, lines: Sequence[str] = ()) -> Data:
    """Returns the prompts of a run as its data."""
    data = feed.config.data
    optim = feed.config.optim
    sequences = [
        TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), bool), number)
        for number, ids in enumerate(feed.prompts.tokens, start=1)
    ]
    n_prompts = feed.order.rows_a_step
    prompt_words = "one prompt" if n_prompts == 1 else f"each of {n_prompts} prompts"
    first_lines = [
        f"{len(sequences):,} prompts; a step has {data.group} completions of {prompt_words}"
    ]
    widths = feed.widths.rows
    if len(widths) > 1:
        first_lines.append(
            f"a batch is as wide as its longest prompt needs: {len(widths)} widths, "
            f"{', '.join(map(str, widths))} tokens; sampler and step are compiled for each when it "
            "comes"
        )

    def feed_of(steps: int) -> PromptFeed:
        feed.steps = steps or feed.steps
        return feed

    return Data(
        train=pack(sequences, data.seq_len, packing=False),
        held_out=None,
        name=lambda row: f"row {row + 1}",
        row=lambda _, number: f"prompt {number}",
        source=data.dataset,
        facts={
            "sequence_length": feed.length,
            "lengths": widths,
            SHARED: feed.share_prompt,
        },
        lines=(*first_lines, *lines),
        feed=feed_of,
        steps=lambda epochs: feed.order.steps(epochs) * optim.updates,
        watched={} if feed.server is None else OF_SERVER,
        close=feed.close,
    )


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of rollouts that --loss names."""
    optim, data = config.optim, config.data
    return rollout_loss(
        optim.online(data.max_new_tokens),
        temperature=data.sampling_temperature,
        entropy=optim.updates > 1,
        **layout.chunks(optim.loss_chunk),
    )


def baselines(scores: Mapping[str, Any]) -> dict[str, float]:
    """Returns the base's reward, from a run's scores.json; {} if it was not measured."""
    rewards = scores.get(REWARD, {})
    return {BASE: rewards[BASE]} if BASE in rewards else {}


SAMPLER = {  # what to watch where completions are drawn
    "entropy": "how varied completions are, in nats a token; near 0 nothing new is tried",
    "mismatch_max": "the most that a token's log-probability differs between sampler and trainer: "
    "about 1e-6 in fp32, 0.1 in bf16",
    "length": "tokens of a completion; at --max-new-tokens, completions are cut off",
}
OF_SERVER = {
    "mismatch_mean": "that difference in the mean; it should stay where it begins, and "
    "--max-mismatch bounds it"
}
WATCHED = {
    "reward": "the mean over completions; it should rise",
    "zero_spread": "the share of prompts whose completions have equal rewards, and teach nothing; "
    "near 1, they are too hard or learned",
    **SAMPLER,
}
TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=5e-5, full_lr=5e-6),
    check=check,
    begin=sums.begin,
    rows=read_rows,
    outline=chats.outline,
    examples=examples,
    loss=loss,
    evaluation=evaluation,
    prepare=reinforcement.prepare,
    reads=lambda config: ("output",),  # a feed holds what its run has drawn
    score=REWARD,
    watched=WATCHED,
    baselines=baselines,
    score_error=standard_error,
    question_scores=question_scores,
    most_questions=most_questions,
)
