"""Pages of the documentation: their code runs and prints what it says, their links lead somewhere.

A block ``python`` begins a program, ``python continued`` goes on with it; ``python slow`` begins
one that needs a pretrained model. The fast suite runs the first page's alone.
(``tests/adapt/test_guide.py`` runs the guides in lora_jax/adapt/guides.)
"""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
BLOCKS = re.compile(r"^```python( \w+)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
ANY_PYTHON = re.compile(r"^```(?:python|py)\b.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for top in (".", "lora_jax", "train", "tests", "notebooks")
    for path in (ROOT / top).glob("*.md" if top == "." else "**/*.md")
)
# These have tests of their own, which judge their code as well.
ELSEWHERE = ("lora_jax/adapt/guides/", "lora_jax/torch/")
WITH_CODE = [p for p in PAGES if p.startswith("lora_jax/") and not p.startswith(ELSEWHERE)]
# The pages that were one each: all of their anchors lead on to what stands elsewhere by now.
CONTENTS = {
    "lora_jax/README.md": """
        a-pretrained-model what-you-want-to-do how-adapt-works a-base-or-a-variant-of-your-own
        an-exported-program fine-tuning-from-python preferences-and-rewards a-quantised-base
        many-adapters-over-one-base training-many-adapters-at-once adding-and-subtracting-adapters
        variants a-random-subspace coming-from-peft coming-from-tunix-or-qwix""",
    "train/README.md": """
        fine-tuning-from-the-command-line data what-trains-and-how
        a-run-from-its-first-step-to-its-last memory-and-speed
        files-of-options-reports-and-the-best-adapter many-runs-over-one-base
        preferences-and-rewards pairs-traindpo rewards-traingrpo a-reward-model
        a-teacher-traindistill lora-or-full-fine-tuning what-early-stopping-saves
        many-devices-many-hosts on-a-gpu what-is-here-and-what-is-wrong
        before-you-rent-does-it-fit-and-what-will-it-cost the-ladder-of---remat-auto
        asking-a-model serving fields-of-chats-and-completions classifying-texts
        classifying-images chats-with-images ship-it""",
}


def programs(page):
    """The programs of a page, each as (whether it is slow, its blocks)."""
    found = []
    for says, code in BLOCKS.findall((ROOT / page).read_text()):
        if says == " continued":
            found[-1][1].append(code)
        else:
            found.append((says == " slow", [code]))
    return found


PROGRAMS = [
    pytest.param(blocks, id=f"{page}-{i}", marks=pytest.mark.slow)
    for page in WITH_CODE
    for i, (_, blocks) in enumerate(programs(page))
]


def expected_lines(code):
    return re.findall(r"print\(.*\)(?:  |\n)# (.*)", code)


def run(blocks, capsys):
    """Runs a program, block by block, and returns its names; each prints what the page says."""
    names = {}
    for code in blocks:
        with jax.numpy_dtype_promotion("standard"):
            exec(compile(code, "the page's program", "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line in expected_lines(code)] == expected_lines(code)
    return names


def test_python_of_all_pages_compiles():
    """Also the code that needs a machine, a hub or a package of others, which no test runs."""
    codes = [code for page in PAGES for code in ANY_PYTHON.findall((ROOT / page).read_text())]
    assert len(codes) > 60
    for code in codes:
        compile(code, code[:100], "exec")
    with pytest.raises(IndentationError):
        compile("def f():\n    'A control.'\n        return 1\n", "control", "exec")


@pytest.mark.parametrize("blocks", PROGRAMS)
def test_code_runs(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(blocks, capsys)


@pytest.mark.slow
def test_code_of_the_first_page_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ((_, blocks),) = programs("README.md")
    assert 20 <= sum(bool(line.strip()) for line in blocks[0].splitlines()) <= 26
    names = run(blocks, capsys)
    lj = names["lj"]
    rules = [lj.LoraRule(targets="all-linear", rank=4)]
    start = names["loss"](lj.split(lj.lorafy(lj.strip(names["params"]), rules))[0])
    assert names["loss"](names["adapter"]) < 0.5 * start
    assert (tmp_path / "adapter").is_dir()


def test_the_first_page_is_short_and_has_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 190
    commands = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [c.count("\n") for c in commands] == [1, 1]
    assert all(c.startswith("python3 -m venv .venv && ") for c in commands)


def prose(path):
    """The text of a page or of a notebook's cells, without code."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return FENCES.sub("", text)


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)}


def anchor(heading):
    heading = re.sub(r"\]\([^)]*\)", "]", heading)  # of a link, its text
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def dead_links(path):
    """The links of a page that lead to no file, or to no heading of one; not those elsewhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_a_page_is_read_in_minutes(page):
    """Beside its code and its tables, which are looked into, it has 900 words or so."""
    lines = prose(ROOT / page).splitlines()
    words = sum(len(line.split()) for line in lines if not line.startswith("|"))
    assert words <= 950, "split it by purpose, or cut what nobody needs"


@pytest.mark.parametrize("page", CONTENTS)
def test_a_contents_page_is_short_and_keeps_its_anchors(page):
    text = prose(ROOT / page)
    assert set(CONTENTS[page].split()) <= anchors(ROOT / page)
    assert len(text.split()) <= 900
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)[2:]
    assert [section for section in sections if "](" not in section] == []


def test_contents_list_all_sections():
    text = prose(ROOT / "tests/README.md")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    contents = text.partition("Contents:")[2].partition("\n\n")[0]
    listed = re.findall(r"\]\(#([^)]*)\)", contents)
    assert set(map(anchor, sections)) <= set(listed)


def test_the_page_of_tests_lists_what_runs_by_hand_alone():
    page = (ROOT / "tests/proofs.md").read_text()
    marks = re.compile(r"\b(thorough|THOROUGH|but_rarely|over_families)\b|\brare=")
    files = {
        path.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if marks.search(path.read_text()) and path.name != "test_docs.py"
    }
    assert files == set(
        re.findall(r"`((?:\w+/)*test_\w+\.py)`", page.partition("alone, each with")[2])
    )


def test_the_judge_sees_dead_links(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[a](#one-two) [b](#two) [c](other.md) [d](page.md#one-two)")
    assert dead_links(page) == ["#two", "other.md"]


def test_each_page_stands_in_the_navigation_of_the_site():
    """`not_in_nav` names the others. (``tests/test_site.py`` builds the site.)"""
    text = (ROOT / ".docs/mkdocs.yml").read_text()
    named = re.findall(r"[\w/]+\.md\b", text)
    assert sorted(set(named)) == sorted(named)
    folders = set(re.findall(r"([\w/]+)/\]", text))  # [folder/]: all pages of a folder
    shown = [p for p in PAGES if not p.startswith("tests/hf/")]
    omitted = [p for p in shown if p not in named and str(Path(p).parent) not in folders]
    assert omitted == [], "give each of these a line in .docs/mkdocs.yml"


def test_each_page_is_three_steps_from_the_first():
    def linked(page):
        links = re.findall(r"\]\(([^)\s#:]+\.md)", prose(ROOT / page))
        return {
            ((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix() for link in links
        }

    reached = {"README.md"}
    for _ in range(3):
        reached |= set().union(*map(linked, reached))
    assert set(PAGES) <= reached
