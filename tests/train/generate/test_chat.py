"""A chat: its commands, its history, Ctrl-C; in a terminal, too."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import with_random_factors
from tests.surroundings import WITHOUT_TORCH
from tests.train.tiny import tokenizer, write_model
from train.generate import __main__ as generate
from train.generate import answers, chat

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a base and of a run on it."""
    folder = tmp_path_factory.mktemp("made")
    base = write_model(folder / "base-model", scale=1.5, max_position_embeddings=256)
    _, params = models.from_pretrained(base)
    rule = lj.LoraRule(targets=["q_proj", "down_proj"], rank=3, alpha=7)
    tree = with_random_factors(lj.lorafy(params, [rule]))
    lj.save_adapter(folder / "sql" / "adapter", tree, about={"model": str(base)})
    return base, folder / "sql"


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
    """All prompts are padded to one length: few programs are compiled."""
    monkeypatch.setattr(answers, "_PADDING_MULTIPLE", 256)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs a chat of these lines; returns what it says, and the turns before each answer."""

    def run(*args, lines):
        turns, rest = [], iter(lines)

        def typed(prompt):
            print(prompt, end="")
            line = next(rest, EOFError)
            if line in (EOFError, KeyboardInterrupt):
                raise line
            print(line)
            return line

        answered = chat._print_answer

        def recorded(state, *args):
            system = [{"role": "system", "content": state.system}] if state.system else []
            turns.append((state.name, [*system, *state.turns]))
            return answered(state, *args)

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(chat, "_print_answer", recorded)
        generate.main(["--interactive", "--max-new-tokens", "5", *map(str, args)])
        return capsys.readouterr().out.splitlines(), turns

    return run


def alone(capsys, *args):
    generate.main(["--max-new-tokens", "5", "--prompt", "3?", *map(str, args)])
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_conversation_goes_on_with_another_adapter(made, talk, capsys):
    base, sql = made
    lines = ["3?", "/adapter base", "and 4?", "/adapter x", "/system Be brief.", "/adapter sql"]
    said, turns = talk("--adapter", sql, lines=[*lines, "//5?", "/reset", "3?", "/what", "/quit"])
    assert said[:2] == [
        "sql answers; there are also base. Type /help for a list of the commands.",
        "sql> 3?",
    ]
    first = said[2]
    assert [first] == alone(capsys, "--adapter", sql) != alone(capsys, "--model", base)
    assert "There is no adapter x: base answers; there are also sql" in said
    assert any(line.startswith("There is no command /what. Type /help") for line in said)
    assert [name for name, _ in turns] == ["sql", "base", "sql", "sql"]
    asked = [[(turn["role"], turn["content"]) for turn in of_one] for _, of_one in turns]
    assert asked[1] == [("user", "3?"), ("assistant", first), ("user", "and 4?")]
    assert asked[2][0] == ("system", "Be brief.") and asked[2][-1] == ("user", "/5?")
    assert len(asked[2]) == 6 and asked[3] == [("system", "Be brief."), ("user", "3?")]


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_chat(made, talk, monkeypatch):
    stream, allowed, before = answers.stream, iter([3, 99, 0]), signal.getsignal(signal.SIGINT)

    def pressed(*args, **options):
        n = next(allowed)
        for i, new in enumerate(stream(*args, **options)):
            if i == n:
                signal.raise_signal(signal.SIGINT)
            yield new if n else np.array(tokenizer()("é")["input_ids"][:1])

    monkeypatch.setattr(answers, "stream", pressed)
    lines = [KeyboardInterrupt, "3?", "4?", "\n", "5?"]
    said, turns = talk("--model", made[0], "--stop", "nothing", lines=lines)
    assert "Type /quit or press Ctrl-D to end the chat." in said
    cut = said[said.index("base> 3?") + 1]
    assert said[said.index("base> 3?") + 2].startswith("(Stopped. The conversation keeps")
    assert turns[1][1][1] == {"role": "assistant", "content": cut}
    assert "(The answer was cut off at --max-new-tokens 5.)" in said
    assert any("(Stopped before the first word." in line for line in said)
    assert turns[1][1][2:] == [{"role": "user", "content": "4?"}] and len(turns) == 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_conversation_that_fills_the_models_positions(made, talk):
    lines = ["a" * 150, "b" * 40, "c", "/reset", "c"]
    said, turns = talk("--model", made[0], lines=lines)
    full = [line for line in said if "Type /reset to begin a new conversation" in line]
    assert len(turns) < 5 and len(full) > 0
    assert "The conversation has" in full[0] and "allows at most 256" in full[0]
    assert turns[-1][1] == [{"role": "user", "content": "c"}], "it begins anew"


def test_a_model_without_a_template_does_not_chat(tmp_path, capsys):
    model = write_model(tmp_path / "model", template=None)
    with pytest.raises(SystemExit):
        generate.main(["--interactive", "--model", str(model)])
    assert "has no chat template. Pass single texts" in capsys.readouterr().err


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *args):
        def begin():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.generate", *map(str, args)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": WITHOUT_TORCH},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=begin,
        )
        os.close(slave)

    def until(self, *what, again=None, seconds=90):
        """Waits until the process wrote all of this; sends keys again while it is silent."""
        seen, end = "", time.monotonic() + seconds
        while not all(one in seen for one in what):
            ready, _, _ = select.select([self.master], [], [], 2)
            assert time.monotonic() < end, f"after {seconds} s: {seen!r}"
            if ready:
                seen += os.read(self.master, 4096).decode(errors="replace")
            elif again:
                self.send(again)

    def send(self, keys):
        os.write(self.master, keys.encode())


@pytest.mark.slow
def test_in_a_terminal(tmp_path):
    """The answer appears as it is generated; Ctrl-C ends it, then Ctrl-D the chat."""
    base = write_model(tmp_path / "model", scale=1.5, eos_token_id=257)
    terminal = Terminal("--interactive", "--model", base, "--max-new-tokens", 4000)
    try:
        terminal.until("base> ")
        terminal.send("3 plus 4?\n")
        terminal.until("\x1b[K")  # the first text takes the place of the sign for waiting
        began = time.monotonic()
        terminal.send("\x03")
        terminal.until("^C", "(Stopped. The conversation keeps", "base> ")
        assert time.monotonic() - began < 20
        # A signal before readline waits for a key waits for one, too: then another one is sent.
        terminal.until("/quit or press Ctrl-D to end the chat", "base> ", again="\x03")
        terminal.send("/adapter\n")
        terminal.until("base answers", "base> ")
        terminal.send("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
