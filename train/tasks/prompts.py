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

_HELD_OUT_STREAM = 2**32 + 2  # random stream of held-out rows; differs from all other streams


def check(config: Config) -> None:
    """Raises a UserError if there is no reward."""
    if not config.data.reward and config.data.environment is None:
        raise UserError(
            f"--dataset {config.data.dataset} has no reward. Pass --reward file.py:function, or an "
            "--environment with a `get_reward`."
        )


def check_own_rows(config: Any) -> None:
    """Raises a UserError for options about a user's own rows, which a task ignores."""
    for name in ("fields", "eval_dataset"):
        if getattr(config.data, name):
            raise UserError(
                f"{flag(name)} only applies to your own rows, not to a built-in task. Remove "
                f"{flag(name)}, or pass your rows with --dataset."
            )


def check_prompts(rows: Sequence[Row], source: str) -> None:
    """Raises a TrainingError for the first row without a prompt."""
    for number, row in enumerate(rows, start=1):
        question(row, name_of(row, source, number))


def read_rows(config: Config) -> TaskRows:
    """Reads the rows, and holds some out or reads the rows of --eval-dataset."""
    data = config.data

    def read_dataset(name: str, **options: Any) -> list[Row]:
        dataset = find_dataset(
            name, subset=data.subset, fields=data.fields, check=check_prompts, **options
        )
        return dataset.rows()

    rows = read_dataset(data.dataset, split=data.split, rows=data.rows)
    if data.eval_dataset is not None:
        return TaskRows(rows, read_dataset(data.eval_dataset, split=data.eval_split))
    return hold_out_rows(config, rows)


def hold_out_rows(config: Config, rows: Sequence[Row]) -> TaskRows:
    """Splits rows at random into rows to train on and --eval-questions held-out rows."""
    seed = config.optim.seed if config.data.held_out_seed is None else config.data.held_out_seed
    n_held_out = min(config.run.eval_questions or 0, _max_held_out_rows(len(rows)))
    order = np.random.Generator(np.random.PCG64([seed, _HELD_OUT_STREAM])).permutation(len(rows))
    held_out_indices = np.sort(order[:n_held_out])
    train_indices = np.sort(order[n_held_out:])
    return TaskRows(
        train=[rows[index] for index in train_indices],
        held_out=[rows[index] for index in held_out_indices],
    )


def _max_held_out_rows(n_rows: int) -> int:
    """Returns the maximum number of rows to hold out: a tenth."""
    return n_rows // 10


def most_questions(config: Config, rows: TaskRows) -> int | None:
    """Returns the maximum number of rows to hold out; None for an --eval-dataset."""
    if config.data.eval_dataset is not None:
        return None
    return _max_held_out_rows(len(rows.train) + len(rows.held_out))


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the prompts, and the feed that draws and rewards their completions."""
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
    """Returns the result of `examples`, for completions that may call tools."""
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
    # The feed, and the lines of the log about it.
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
    """Returns the number of parts into which --mesh splits a row, or a multiple of it."""
    parts = parse_mesh(mesh).get("sequence", 1)
    # sequence=-1 takes the remaining devices, whose number divides the number of all devices.
    return parts if parts > 0 else len(all_devices())


def replayed_routing(config: Any, outline: ModelInfo) -> tuple[int, int] | None:
    """Returns the layers and experts per token whose routing is replayed; None without replay.

    Raises:
      UserError: --no-replay-routing has no effect, because there is nothing to replay.
    """
    n_active_experts = outline.active_experts
    obstacle: str | None = None
    if n_active_experts is None:
        obstacle = f"the model {outline.name} has no experts"
    elif getattr(config.data, "sampler", None) is not None:
        obstacle = "the server of --sampler does not report its experts"
    if obstacle and not config.data.replay_routing and not config.run.resume:
        raise UserError(
            f"--no-replay-routing has no effect, because {obstacle}. Remove --no-replay-routing."
        )
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
                columns = ", ".join(held_out.columns) or "no column besides the prompt"
                raise UserError(
                    f"--eval-dataset {data.eval_dataset}: the reward {name} needs the column "
                    f"{column!r}, but the rows have {columns}. Add this column to the rows."
                )


def read_prompts(
    data: RolloutDataConfig, rows: TaskRows, outline: ModelInfo, tools: Sequence[Any] = ()
) -> tuple[TokenizedPrompts, TokenizedPrompts | None]:
    """Returns the tokenised prompts to train on, and the held-out prompts or None.

    Args:
      data: the options.
      rows: the rows.
      outline: the model's outline, with its tokenizer.
      tools: schemas of the tools that the prompts show.

    Raises:
      UserError: there is no prompt, or a prompt leaves no room for a completion.
    """
    if not rows.train:
        raise UserError(
            f"--dataset {data.dataset} has no row to train on. Pass data with at least one row."
        )
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
      longest: the number of tokens of the longest of all prompts.
    """
    max_prompt_tokens = data.seq_len - data.max_new_tokens
    long_rows = [row for row, ids in enumerate(prompts.tokens) if len(ids) > max_prompt_tokens]
    if long_rows:
        first_row = long_rows[0]
        first_name = name_of(prompts.rows[first_row], data.dataset, first_row + 1)
        raise UserError(
            f"--seq-len {data.seq_len} is too small: {len(long_rows)} prompts have more than "
            f"{max_prompt_tokens} tokens and leave no room for --max-new-tokens "
            f"{data.max_new_tokens}. The first one is {first_name}, and the longest has {longest} "
            f"tokens. Pass --seq-len {longest + data.max_new_tokens}, or remove these rows."
        )


def share_prompts(
    feed: PromptFeed, outlines: Sequence[ModelInfo]
) -> tuple[PromptFeed, tuple[str, ...]]:
    """Returns the feed with shared prompts, if possible, and the lines of the log about it."""
    config = feed.config
    group = config.data.group
    max_new_tokens = config.data.max_new_tokens
    if feed.tools is not None and feed.tools.opens:
        if not config.data.share_prompt and not config.run.resume:
            feed.close()
            raise UserError(
                f"--no-share-prompt has no effect, because {OPENS_EACH}. Remove --no-share-prompt."
            )
        return feed, (f"the prompt is computed for each completion, because {OPENS_EACH}",)
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
    """Returns the data of a run that draws completions for prompts."""
    data = feed.config.data
    optim = feed.config.optim
    sequences = [
        TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), bool), number)
        for number, ids in enumerate(feed.prompts.tokens, start=1)
    ]
    n_prompts = feed.order.rows_a_step
    prompts_text = "one prompt" if n_prompts == 1 else f"each of {n_prompts} prompts"
    first_lines = [
        f"{len(sequences):,} prompts; a step has {data.group} completions of {prompts_text}"
    ]
    widths = feed.widths.rows
    if len(widths) > 1:
        first_lines.append(
            f"batches have {len(widths)} widths, {', '.join(map(str, widths))} tokens, by their "
            "longest prompt; sampler and step are compiled when a width first occurs"
        )

    def with_steps(steps: int) -> PromptFeed:
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
        feed=with_steps,
        steps=lambda epochs: feed.order.steps(epochs) * optim.updates,
        watched={} if feed.server is None else OF_SERVER,
        close=feed.close,
    )


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of --loss over drawn completions."""
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


# The metrics to watch if completions are drawn.
SAMPLER = {
    "entropy": "how varied completions are, in nats per token; near 0, nothing new is tried",
    "mismatch_max": "the largest difference of a token's log-probability between sampler and "
    "trainer: about 1e-6 in float32, 0.1 in bfloat16",
    "length": "tokens per completion; at --max-new-tokens, completions are cut off",
}
OF_SERVER = {
    "mismatch_mean": "the mean of these differences; it should not grow, and --max-mismatch limits "
    "it"
}
WATCHED = {
    "reward": "the mean over completions; it should rise",
    "zero_spread": "the share of prompts whose completions have equal rewards, so that nothing is "
    "learned; near 1, prompts are too hard or already learned",
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
    reads=lambda config: ("output",),  # a feed contains the completions of its run
    score=REWARD,
    watched=WATCHED,
    baselines=baselines,
    score_error=standard_error,
    question_scores=question_scores,
    most_questions=most_questions,
)
