"""Fills in the rows of a batch of completions: tokens, positions, targets, experts."""

from collections.abc import Sequence

import numpy as np

from lora_jax.training.data.batches import HostBatch


def fill(
    row: HostBatch, prompt: Sequence[int], completions: Sequence[np.ndarray], counts: np.ndarray
) -> None:
    """Fills in the arrays of a row: a prompt, then completions, each of which goes on from it.

    Args:
      row: the arrays of zeros; `branches` where there are several completions.
      prompt: its tokens.
      completions: the tokens of each.
      counts: [completions, n] bool, whether to learn from each token.
    """
    targets = {
        name: row[name].reshape(len(completions), -1)
        for name in ("predict_at", "targets", "weights")
    }
    before, end = len(prompt), len(prompt)
    row["ids"][:before], row["positions"][:before] = prompt, np.arange(before)
    for at, ids in enumerate(completions):
        n = len(ids)
        here, end = slice(end, end + n), end + n
        row["ids"][here], row["positions"][here] = ids, np.arange(before, before + n)
        if "branches" in row:
            row["branches"][here] = at + 1
        targets["predict_at"][at, :n] = np.arange(here.start - 1, end - 1)
        targets["predict_at"][at, : min(n, 1)] = before - 1  # the prompt's last token predicts
        targets["targets"][at, :n], targets["weights"][at, :n] = ids, counts[at, :n]
    row["segment_ids"][:end] = 1


def fill_routing(
    row: np.ndarray, before: int, lengths: np.ndarray, routing: np.ndarray, new: int
) -> None:
    """Fills in the experts of a row's tokens, as far as the sampler ran these.

    Args:
      row: [tokens, layers, k], -1 each.
      before: the tokens of the prompt.
      lengths: [completions], the tokens of each.
      routing: [completions, slots, layers, k]; see `train.live.prompts.GroupedCompletions`.
      new: the maximum number of tokens of a completion.
    """
    end, first = before, routing.shape[1] - (new - 1)
    row[:before] = routing[:, first - before : first].max(axis=0)  # -1 where one did not begin
    for n, experts in zip(lengths.tolist(), routing, strict=True):
        run = max(n - 1, 0)  # the last token of a completion was drawn, and not run
        row[end : end + run] = experts[first : first + run]
        end += n
