"""`train.rollouts`: the page that a browser reads, the text of a terminal, and bad inputs."""

import base64
import hashlib
import html.parser
import json
import re
import zlib

import pytest

from train.rollouts.__main__ import main
from train.rollouts.terminal import readable

SCRIPT = "</pre></script><script>alert('<b>')</script>\u2028 \x85 end"
LOST = "row 3: look took longer than 30 seconds. Increase --tool-timeout"
TURNS = [
    {"role": "environment", "text": "A gate."},
    {"role": "assistant", "text": '<tool_call>{"name": "look"}</tool_call>'},
    {"role": "tool", "name": "look", "text": "It is \x1b[31mclosed."},
    {"role": "assistant", "text": SCRIPT},
]


def sample(step, group, place, *, prompt="Why?", **facts):
    """A line of samples.jsonl as `train.grpo` writes it."""
    line = {"step": step, "prompt": prompt, "answer": f"{step}.{group}.{place}", "time": 1.0}
    return line | {"row": f"rows.jsonl, line {group + 1}", "group": group, "place": place} | facts


def first_run():
    """Two steps of a run, with everything that may happen to a completion."""
    system = [{"role": "system", "text": "Be brief."}]
    rewards = {"polite": 1.0, "brief": 0.0}
    known = {"reward": 0.25, "rewards": rewards, "advantage": 0.0, "cut": False, "masked": False}
    return [
        sample(1, 0, 0, turns=TURNS, context=system, **known),
        sample(1, 0, 1, lost=LOST, cut=False, masked=True, rewards={}),
        sample(1, 1, 0, prompt="Who?", reward=0.0, rewards={"polite": 0.0}, redrawn=True),
        sample(1, 1, 1, prompt="Who?", reward=1.0, cut=True, extra={"polite/words": 3}),
        sample(2, 0, 0, prompt="Where?", reward=0.5),
    ]


def write_run(folder, lines):
    folder.mkdir()
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    (folder / "samples.jsonl").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "grpo", first_run())


class Page(html.parser.HTMLParser):
    """The elements of a page, and the texts of its scripts as a browser would find them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.policy = [], [], ""
        self.text = path.read_text()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        if tag == "script":
            self.scripts.append((attributes.get("id"), ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts[-1][1] == "":
            self.scripts[-1] = (self.scripts[-1][0], data)

    @property
    def embedded(self):
        """The embedded values by their ids, unpacked as the page's script unpacks them."""
        return {
            name: json.loads(zlib.decompress(base64.b64decode(text)))
            for name, text in self.scripts
            if name is not None
        }

    @property
    def code(self):
        (code,) = [text for name, text in self.scripts if name is None]
        return code


def page_of(tmp_path, *args):
    path = tmp_path / "page.html"
    main([*map(str, args), "--output", str(path), "--overwrite"])
    return Page(path)


def test_a_page_holds_the_completions_of_each_step(run, tmp_path):
    embedded = page_of(tmp_path, run).embedded
    assert [*embedded] == ["index", "step-0", "step-1"]
    index = embedded["index"]
    assert index["runs"] == ["grpo"] and index["rewards"] == ["polite", "brief"]
    assert index["steps"] == [
        {"step": 1, "completions": 4, "means": [pytest.approx(1.25 / 3)]},
        {"step": 2, "completions": 1, "means": [0.5]},
    ]
    why, who = embedded["step-0"]
    assert (why["prompt"], why["row"], who["prompt"]) == ("Why?", "rows.jsonl, line 1", "Who?")
    assert why["context"] == [{"role": "system", "text": "Be brief."}] and who["context"] == []
    first, lost = why["groups"][0]["completions"]
    assert first["turns"] == TURNS and first["rewards"] == {"polite": 1.0, "brief": 0.0}
    assert (first["reward"], first["advantage"]) == (0.25, 0.0), "0 is known"
    assert lost["lost"] == LOST and "reward" not in lost and lost["masked"] is True
    redrawn, cut = who["groups"][0]["completions"]
    assert redrawn["reward"] == 0.0 and redrawn["redrawn"] is True
    assert cut["cut"] is True and cut["extra"] == {"polite/words": 3}
    assert cut["turns"] == [{"role": "assistant", "text": "1.1.1"}], "an older line has no turns"


def test_no_text_of_a_run_becomes_markup(tmp_path):
    """Completions, prompts, names of rewards and of the run are `<script>`s."""
    evil = "<script>alert(1)<script>"
    line = sample(1, 0, 0, prompt=SCRIPT, turns=[{"role": evil, "text": SCRIPT}])
    line |= {"answer": SCRIPT, "lost": SCRIPT, "reward": 1.0, "rewards": {SCRIPT: 1.0}}
    named = page_of(tmp_path, write_run(tmp_path / evil, [line | {"extra": {SCRIPT: SCRIPT}}]))
    plain = page_of(tmp_path, write_run(tmp_path / "plain", [sample(1, 0, 0)]))
    assert named.tags == plain.tags and named.code == plain.code
    assert "&lt;script&gt;alert(1)" in named.text and "alert('<b>')" not in named.text
    (view,) = named.embedded["step-0"]
    assert view["groups"][0]["completions"][0]["turns"][0]["text"] == SCRIPT


def test_a_browser_may_run_the_pages_own_script_alone(run, tmp_path):
    page = page_of(tmp_path, run)
    policy = dict(part.split(" ", 1) for part in page.policy.split("; "))
    digest = base64.b64encode(hashlib.sha256(page.code.encode()).digest()).decode()
    assert policy["default-src"] == "'none'" and policy["script-src"] == f"'sha256-{digest}'"
    assert policy["style-src"].startswith("'sha256-")
    assert "//" not in re.sub(r"^\s*//.*$", "", page.code, flags=re.M), "no address"
    makes_markup = re.compile(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|srcdoc")
    assert not makes_markup.search(page.code) and makes_markup.search("x.innerHTML = y")
    assert "link" not in page.tags and "img" not in page.tags


def test_two_runs_share_the_prompts_that_both_have(run, tmp_path):
    """The first draw of a prompt stands beside the other run's first draw of it."""
    other = write_run(
        tmp_path / "other",
        [
            sample(5, 0, 0, prompt="Who?", reward=2.0),
            sample(6, 0, 0, prompt="When?", reward=3.0),
            sample(7, 0, 0, prompt="Who?", reward=4.0),
        ],
    )
    embedded = page_of(tmp_path, run, other).embedded
    assert embedded["index"]["runs"] == ["grpo", "other"]
    assert [step["step"] for step in embedded["index"]["steps"]] == [1, 7]
    assert embedded["index"]["steps"][0]["means"] == [0.5, 2.0]
    (both,), (second,) = embedded["step-0"], embedded["step-1"]
    assert both["prompt"] == second["prompt"] == "Who?"
    assert [group["step"] for group in both["groups"]] == [1, 5]
    assert second["groups"][0] is None and second["groups"][1]["step"] == 7


def test_a_prompt_with_other_turns_before_it_is_another_prompt(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", [sample(1, 0, 0)])  # "Why?" without a system prompt
    assert "have no prompt in common" in fails(capsys, run, other)


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (["--steps", 2, 2], [(2, 0)]),
        (["--rewards", 0.25, 0.75], [(1, 0), (2, 0)]),
        (["--rewards", 0, 0], [(1, 0)]),
        (["--words", "GATE", "closed"], [(1, 0)]),
        (["--words", "brief"], [(1, 0), (1, 1)]),
        (["--words", "who"], [(1, 0), (1, 1)]),
    ],
)
def test_filters_leave_the_completions_that_fit(run, tmp_path, options, places):
    embedded = page_of(tmp_path, run, *options).embedded
    found = [
        (group["step"], completion["place"])
        for name, views in embedded.items()
        if name != "index"
        for view in views
        for group in view["groups"]
        for completion in group["completions"]
    ]
    assert found == places


def test_older_and_other_runs_have_the_facts_that_they_have(tmp_path):
    """An older run of rewards, answers to sample prompts, and a run whose last line broke off."""
    older = [
        {"step": 1, "prompt": "a", "answer": text, "reward": reward, "time": 1.0}
        for text, reward in (("x", 1.0), ("y", 0.0))
    ]
    answers = [{"step": 4, "prompt": p, "answer": "z", "time": 1.0} for p in ("a", "b")]
    folder = write_run(tmp_path / "older", [*older, *answers])
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 5, "prompt": "a", "ans')
    embedded = page_of(tmp_path, folder).embedded
    (view,) = embedded["step-0"]
    assert view["row"] is None and [x["place"] for x in view["groups"][0]["completions"]] == [0, 1]
    assert [view["prompt"] for view in embedded["step-1"]] == ["a", "b"]
    assert embedded["index"]["steps"][1]["means"] == [None], "no reward is not a reward of 0"
    completion = embedded["step-1"][0]["groups"][0]["completions"][0]
    assert completion == {"place": 0, "turns": [{"role": "assistant", "text": "z"}]}


def test_the_text_for_a_terminal(run, capsys):
    main([str(run), "--text"])
    text = capsys.readouterr().out
    assert text.startswith("step 1 · rows.jsonl, line 1\n")
    first = "completion 1  reward 0.25  polite 1  brief 0  advantage +0"
    for words in ("system: Be brief.", "prompt: Why?", first, "environment: A gate.", "cut off"):
        assert words in text
    assert "tool look: It is \\x1b[31mclosed." in text and "\x1b" not in text
    assert "lost: row 3: look took longer" in " ".join(text.split()) and "drawn again" in text
    assert text.index("Who?") < text.index("step 2") < text.index("Where?")


def test_two_runs_stand_side_by_side_in_a_terminal(run, tmp_path, capsys):
    other = write_run(tmp_path / "other", [sample(5, 0, 0, prompt="Who?", reward=2.0)])
    main([str(run), str(other), "--text"])
    text = capsys.readouterr().out
    assert re.search(r"grpo, step 1 +other, step 5", text) and "Why?" not in text
    assert re.search(r"completion 1  reward 0 .*completion 1  reward 2", text)


def test_the_text_may_go_to_a_file(run, tmp_path):
    path = tmp_path / "out.txt"
    main([str(run), "--text", "--output", str(path)])
    assert "prompt: Why?" in path.read_text()


def test_characters_that_a_terminal_would_obey_are_written_out():
    assert readable("a\x1b]0;t\x07\r\u202eb\ud800\n\tc é 字") == (
        "a\\x1b]0;t\\x07\\r\\u202eb\\ud800\n\tc é 字"
    )


def fails(capsys, *args):
    """The message of a command that ends with bad input, which has one line."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, args)])
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_bad_inputs_have_messages_of_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} contains no run. Pass the folder of a run" in fails(capsys, empty)
    assert "none contains no run" in fails(capsys, "none")
    (empty / "config.yaml").write_text("steps: 3")
    assert f"{empty} has no completions in samples.jsonl. Pass" in fails(capsys, empty)
    other = write_run(tmp_path / "other", [sample(1, 0, 0, prompt="When?")])
    assert f"The runs {run} and {other} have no prompt in common." in fails(capsys, run, other)
    (tmp_path / "rollouts.html").write_text("mine")
    assert "--output rollouts.html exists already. Pass another" in fails(capsys, run)
    assert (tmp_path / "rollouts.html").read_text() == "mine"
    assert "names 0. Pass the folder of a run" in fails(capsys)
    assert "names 3. Pass" in fails(capsys, run, other, empty)
    assert f"The run {run} is named twice" in fails(capsys, run, f"{run}/")
    assert "--steps 3 1 contains no number" in fails(capsys, run, "--steps", 3, 1)
    assert "--overwrite replaces the file" in fails(capsys, run, "--text", "--overwrite")
    missing = ["--words", "nowhere", "--text"]
    assert "No completion fits --steps, --rewards and --words" in fails(capsys, run, *missing)
