"""The site is built strictly, of pages, docstrings and options; all that it links to is there.

It needs the extra 'docs'.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

from train import command
from train.options.scripts.sft import Config

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("mkdocs"), reason="the extra 'docs' is not installed"),
]


def build(root, folder):
    """Builds the site of a checkout; returns the process. (With --quiet, --strict sees nothing.)"""
    line = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*line, "-f", str(root / ".docs/mkdocs.yml"), "-d", str(folder)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, and the texts of its pages by their names there."""
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")
    }


def dead_links(folder, texts):
    """Returns the links within a site that lead to no file, or to no place in it."""
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in texts.items()}
    found = []
    for name, text in texts.items():
        for link in re.findall(r'(?:href|src)="([^"]*)"', text):
            address, _, place = unquote(link).partition("#")
            if re.match(r"\w+:|/", address) or name == "404.html":
                continue
            target = os.path.normpath(os.path.join(os.path.dirname(name), address))
            target = target if address else name
            is_there = (folder / target).is_file()
            if not is_there or place and target in ids and place not in {*ids[target], "__search"}:
                found.append((name, link))
    return found


def test_all_links_of_the_site_lead_somewhere(site):
    folder, texts = site
    assert len(texts) > 80 and dead_links(folder, texts) == []
    name, text = "index.html", texts["index.html"]
    broken = text + '<a href="train/sft.html#no-such-place"></a><a href="nowhere.html"></a>'
    found = [link for _, link in dead_links(folder, texts | {name: broken})]
    assert found == ["train/sft.html#no-such-place", "nowhere.html"], "the judge sees both"


def test_a_notebook_is_there_to_download(site):
    folder, texts = site
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert (folder / "notebooks" / path.name).read_bytes() == path.read_bytes()
        assert f'href="{path.name}" download' in texts[f"notebooks/{path.stem}.html"]


def test_a_broken_link_fails(tmp_path):
    """In a copy whose first page has one."""
    root = tmp_path / "copy"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".git", ".docs", "README.md"):
            (root / path.name).symlink_to(path)
    shutil.copytree(ROOT / ".docs", root / ".docs", ignore=shutil.ignore_patterns("site"))
    links = "[one](train/nowhere.md) [two](train/sft.md#nowhere)"
    (root / "README.md").write_text((ROOT / "README.md").read_text() + f"\n{links}\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0
    for link in ("train/nowhere.md", "train/sft.md#nowhere"):
        assert f"'{link}'" in done.stdout + done.stderr


def test_the_reference_has_the_names_and_the_options(site):
    _, texts = site
    names = re.findall(r'id="(lora_jax\.[\w.]+)"', texts["reference/lora_jax.html"])
    assert {"lora_jax.lorafy.lorafy", "lora_jax.rules.LoraRule"} <= set(names)
    assert "&gt;&gt;&gt;" in texts["reference/lora_jax.html"]
    options = re.findall(r"<dt><code>--([\w-]+)", texts["reference/commands/sft.html"])
    assert {"model", "rank", "targets", "eval-every"} <= set(options) and len(options) > 60
    assert len(options) == len(set(options)) and Config.HELP.example.split()[1] in str(
        texts["reference/commands/sft.html"]
    )
    for name in command.COMMANDS:
        assert f"reference/commands/{name}.html" in texts


def test_its_search_and_its_list_for_machines_know_all_pages(site):
    folder, texts = site
    listed = re.findall(r"\]\(([^)]*)\)", (folder / "llms.txt").read_text())
    shown = {name for name in texts if not name.startswith(("source/", "tests/hf/", "404"))}
    assert sorted(listed) == sorted(shown)
    indexed = json.loads((folder / "search/search_index.json").read_text())["docs"]
    boosts = {d["location"].partition("#")[0] or "index.html": d.get("boost", 1) for d in indexed}
    assert shown <= boosts.keys() and not any(name.startswith("source/") for name in boosts)
    assert boosts["lora_jax/faq.html"] == boosts["train/faq.html"] > boosts["train/dpo.html"]
    assert boosts["train/dpo.html"] > boosts["CHANGELOG.html"]


# Questions of visitors, with the pages that answer them, or the sections: the address begins so.
CHATS, CODE = "train/faq.html#", "lora_jax/faq.html#"
SERVE, EXPORT, DATA = (f"train/{name}/index.html" for name in ("serve", "export", "data"))
QUESTIONS = {
    "how big should r be": [CHATS + "hyperparameters"],
    "talk to the model after training": [CHATS + "inference", "train/generate/index.html"],
    "learn only from the answers": [CHATS + "does-it-train-on-answers-only"],
    "save to google drive": [CHATS + "my-computer", CODE + "how-do-i-use-my-own-data"],
    "slow compile": [CHATS + "compilation-is-slow"],
    "several loras in production": [CHATS + "several-loras", SERVE],
    "cite": ["index.html#licence-and-citation"],
    "is it faster than pytorch": [CODE + "how-fast", "tests/benchmarks/index.html"],
    "my gpu is not found": [CHATS + "my-gpu", "train/doctor/index.html"],
    "out of memory": [CHATS + "out-of-memory", "train/memory.html"],
    "which data format do i need": [CHATS + "which-format", DATA],
    "fine tune on a csv file": [CHATS + "which-format", DATA],
    "merge the adapter into the model": [CODE + "how-do-i-merge", EXPORT],
    "run it in ollama": [CHATS + "ollama", EXPORT],
    "convert to gguf": [EXPORT],
    "freeze the base model": [CODE + "how-do-i-freeze"],
    "what is alpha": [CHATS + "hyperparameters", CODE + "what-is-lora"],
    "stop when it overfits": [CHATS + "overfitting", "train/run/index.html"],
    "my computer crashed during training": [CHATS + "my-computer"],
    "train with two gpus": [CHATS + "several-gpus", "train/processes/index.html"],
    "lora for my own flax model": [CODE + "does-it-work-with-flax", "lora_jax/index.html"],
    "does it work on a mac": [CODE + "how-do-i-install"],
    "load a peft adapter": ["lora_jax/peft/index.html"],
    "how long will training take": [CHATS + "how-long"],
    "is my fine-tuned model better than the base": [CHATS + "how-do-i-evaluate"],
}


class Search:
    """The search of the site's theme: lunr, with the theme's own weights and groups by page."""

    def __init__(self, index):
        from lunr.builder import Builder
        from lunr.stop_word_filter import stop_word_filter

        config = index["config"]
        assert config["pipeline"] == ["stopWordFilter"], "the words of queries have no stems"
        self.separator = re.compile(config["separator"])
        self.counts = stop_word_filter
        builder = Builder()
        builder.b(0)
        builder.ref("location")
        builder.pipeline.add(stop_word_filter)
        for name, settings in config["fields"].items():
            builder.field(name, settings["boost"], lambda page, name=name: self.words(page, name))
        for page in index["docs"]:
            builder.add(page, {"boost": page.get("boost", 1)})
        self.index = builder.build()

    def words(self, page, name):
        """A field's words, without tags."""
        text = html.unescape(re.sub(r"<[^>]*>", " ", page.get(name, "")))
        return " ".join(filter(None, self.separator.split(text)))

    def results(self, question):
        """The addresses of three pages, each with that of its best section."""
        terms = [word for word in self.separator.split(question) if word]
        scores = {}
        for result in self.index.search(" ".join(terms)):
            matched = list(result["match_data"].metadata)
            hits = {term for term in terms if any(word.startswith(term) for word in matched)}
            needed = hits | {term for term in terms if self.counts(term)}
            page, _, section = result["ref"].partition("#")
            boost = len(hits) / len(needed) + (not section)
            score = result["score"] * (1 + boost**2)
            scores.setdefault(page, []).append((score, result["ref"]))
        best = sorted(scores, key=lambda page: max(scores[page]), reverse=True)[:3]
        sections = [max([s for s in scores[p] if "#" in s[1]], default=(0, p))[1] for p in best]
        return {page or "index.html" for page in best} | {*sections}


def answered(search, questions):
    """The questions that one of the first three results answers."""
    found = []
    for question, answers in questions.items():
        pages = search.results(question)
        sections = tuple(answer for answer in answers if "#" in answer)
        if pages & {*answers} or any(page.startswith(sections) for page in pages if sections):
            found.append(question)
    return found


def test_its_search_answers_what_visitors_ask(site):
    pytest.importorskip("lunr", reason="the extra 'docs' is not installed")
    folder, texts = site
    search = Search(json.loads((folder / "search/search_index.json").read_text()))
    places = {
        f"{name}#{place}"
        for name, text in texts.items()
        for place in re.findall(r'\bid="([^"]+)"', text)
    }
    for answer in {answer for answers in QUESTIONS.values() for answer in answers}:
        assert answer in texts or any(place.startswith(answer) for place in places), answer
    assert len(QUESTIONS) == 25
    missed = QUESTIONS.keys() - {*answered(search, QUESTIONS)}
    assert len(missed) <= 3, missed
    elsewhere = dict.fromkeys(QUESTIONS, ["train/plan/figures.html"])
    assert len(answered(search, elsewhere)) < 5, "another page does not answer"
