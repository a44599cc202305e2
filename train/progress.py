"""Measures of a run on its way: the score of its task, and answers to a few fixed prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.training.errors import Dropped, TrainingError
from lora_jax.training.processes import Agreement
from lora_jax.training.run.stop import Stop
from train.console.errors import UserError, as_user_errors
from train.data.text_files import parsed
from train.options.paths import check_local
from train.options.scripts.sft import SftRunConfig
from train.reporters.contract import Sample
from train.run.complete import Chat, answer_prompts, tokenize_chats
from train.run.pretrained import ModelInfo
from train.run.task import Evaluation

_SUFFIXES = (".txt", ".jsonl")


class _Cut(Exception):
    """A signal came."""


def score(
    evaluation: Evaluation, model: Any, tree: Any, forward: Callable[..., Any], stop: Stop
) -> dict[str, float] | None:
    """Returns a task's score; None after a signal, which cuts the measurement short.

    Args:
      evaluation: scores the model.
      model: the model.
      tree: the adapted tree.
      forward: the model's ``apply`` on an adapted tree.
      stop: tells of a signal.
    """
    agreement = Agreement()

    def progress(done: int, total: int) -> None:
        if stop.agreed(agreement):
            raise _Cut

    try:
        return evaluation.score(model, tree, forward, progress)
    except (_Cut, Dropped):
        return None


class SamplePrompts:
    """Holds the prompts of --sample-prompts, and their tokens.

    Attributes:
      texts: the prompts as a person reads them.
      tokens: as the model gets them, up to the start of its answer.
    """

    def __init__(self, run: SftRunConfig, outline: ModelInfo) -> None:
        """Reads and tokenises the prompts.

        Raises:
          UserError: the file cannot be read, a prompt is empty, or the model does not take one.
        """
        chats = _read(run.sample_prompts)
        self.texts = [str(chat[-1]["content"]) for chat in chats]
        if outline.tokenizer.chat_template is not None:
            with as_user_errors(TrainingError, prefix="--sample-prompts: "):
                self.tokens = tokenize_chats(outline, chats)
        elif any(len(chat) > 1 for chat in chats):
            raise UserError(
                f"--sample-prompts: {outline.name} has no chat template, and a prompt has several "
                "messages: give texts"
            )
        else:
            self.tokens = outline.tokenizer(self.texts)["input_ids"]
        if not all(self.tokens):
            raise UserError("--sample-prompts: a prompt has no tokens")
        outline.check_length(
            max(map(len, self.tokens)) + run.sample_tokens, "--sample-prompts and --sample-tokens"
        )


def sample(
    prompts: SamplePrompts, new_tokens: int, outline: ModelInfo, model: Any, tree: Any, forward: Any
) -> list[Sample]:
    """Returns the model's greedy answers to prompts.

    Args:
      prompts: the prompts.
      new_tokens: the most tokens of an answer.
      outline: the model's outline.
      model: a decoder.
      tree: the adapted tree.
      forward: the model's ``apply`` on an adapted tree; see `complete.answer_prompts`.
    """
    answers = answer_prompts(
        model, tree, outline, prompts.tokens, new_tokens=new_tokens, forward=forward
    )
    return [Sample(*pair) for pair in zip(prompts.texts, answers, strict=True)]


def _read(given: Sequence[str]) -> list[Chat]:
    """Returns the chats that --sample-prompts gives as texts, or as the rows of one file."""
    files = [text for text in given if text.lower().endswith(_SUFFIXES)]
    if files and len(given) > 1:
        raise UserError(
            f"--sample-prompts: {files[0]} is a file, and stands alone: leave the other prompts out"
        )
    if not files:
        return [_chat(text, f"prompt {number}") for number, text in enumerate(given, start=1)]
    check_local("sample_prompts", files)
    path = Path(files[0]).expanduser()
    unreadable = f"--sample-prompts: {path} cannot be read: "
    with as_user_errors(OSError, UnicodeDecodeError, prefix=unreadable):
        lines = path.read_text(encoding="utf-8").splitlines()
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"--sample-prompts: {path} is empty")
    is_json = path.suffix.lower() == ".jsonl"
    return [
        _chat_of_row(path, number, line) if is_json else _chat(line, str(path))
        for number, line in rows
    ]


def _chat(text: str, where: str) -> Chat:
    if not text.strip():
        raise UserError(f"--sample-prompts: {where} is empty")
    return [{"role": "user", "content": text}]


def _chat_of_row(path: Path, number: int, line: str) -> Chat:
    where = f"{path}, line {number}"
    row = parsed(line, path, f"line {number}")
    if isinstance(row.get("prompt"), str):
        return _chat(row["prompt"], where)
    chat = row.get("messages")
    is_chat = isinstance(chat, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), str) and "role" in turn
        for turn in chat
    )
    if not is_chat or not chat or chat[-1]["role"] != "user":
        raise UserError(
            f"--sample-prompts: {where}: a `prompt` is needed, or `messages` that end with a user's"
        )
    return chat
