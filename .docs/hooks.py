"""Assembles the site: pages that stand beside the code, notebooks, the API, options of commands.

MkDocs calls the functions by their names.
"""

import functools
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402
import sources  # noqa: E402

ROOT = HERE.parent
FENCE = re.compile(r"^```python[ \w]+$", re.MULTILINE)  # `slow`, `continued`: for the tests
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


@functools.cache
def made_pages():
    """Returns the pages that are written here, by their addresses: the reference and notebooks."""
    return reference.pages() | sources.notebooks(ROOT)


def on_config(config):
    """Fills the navigation in with the pages of the folders that it names."""
    config.nav = filled(config.nav)
    return config


def filled(entries):
    """Returns entries of the navigation, with the pages of "folder/" in the place of its name."""
    made = []
    for entry in entries:
        if isinstance(entry, dict):
            made += [
                {title: filled(inner) if isinstance(inner, list) else inner}
                for title, inner in entry.items()
            ]
        else:
            made += pages_in(entry) if entry.endswith("/") else [entry]
    return made


def pages_in(folder):
    """Returns the pages that lie in a folder itself, its README.md first."""
    names = [name for name in (*sources.pages(ROOT), *made_pages()) if name.endswith(".md")]
    inside = [name for name in names if posixpath.dirname(name) + "/" == folder]
    return sorted(inside, key=lambda name: not name.endswith("README.md"))


def on_files(files, config):
    """Adds all pages, their pictures, and the code that they link to."""
    for name in sources.pages(ROOT):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
        for link in sources.linked_files(ROOT, name):
            if link.endswith(".png"):
                files.append(File.generated(config, link, abs_src_path=str(ROOT / link)))
            else:
                code = sources.code_page(ROOT, link)
                files.append(File.generated(config, code_name(link), content=code))
    for name, content in made_pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def code_name(path):
    """Returns the address of the page that shows a file of code."""
    return f"source/{path}.md"


def on_page_markdown(markdown, page, config, files):
    """Leads links to code and notebooks to their pages; drops words that are for the tests."""
    here = posixpath.dirname(page.file.src_uri)
    page.meta["search"] = search_weight(page.file.src_uri)

    def led(match):
        before, link, after = match.groups()
        if "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(here, link))
        if target.endswith(".ipynb"):
            link = link.removesuffix(".ipynb") + ".md"
        elif files.get_file_from_path(code_name(target)):
            link = posixpath.relpath(code_name(target), here or ".")
        return before + link + after

    return LINK.sub(led, FENCE.sub("```python", markdown))


def search_weight(name):
    """Returns a page's weight in the search: pages of tasks first, code and what changed last."""
    if name.startswith(("source/", "tests/hf/")):
        return {"exclude": True}
    behind = {"CHANGELOG.md": 0.1, "reference/lora_jax": 0.5, "tests/": 0.5, "train/findings/": 0.7}
    first = {"lora_jax/faq.md": 2, "train/faq.md": 2, "train/sft.md": 1.5, "notebooks/1_": 1.5}
    weights = [w for start, w in (behind | first).items() if name.startswith(start)]
    return {"boost": weights[0] if weights else 1}


def on_post_build(config):
    """Writes llms.txt: the pages by the navigation, with the first sentence of each."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for entry in config.nav:
        ((title, inner),) = entry.items()
        lines += [f"## {title}", "", *map(line_of_page, names_in(inner)), ""]
    (Path(config.site_dir) / "llms.txt").write_text("\n".join(lines))


def names_in(entry):
    """Yields the pages below an entry of the navigation."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for inner in entry.values():
            yield from names_in(inner)
    else:
        for inner in entry:
            yield from names_in(inner)


def line_of_page(name):
    """Returns a page's line of llms.txt."""
    text = made_pages().get(name) or (ROOT / name).read_text(encoding="utf-8")
    title, about = sources.title_and_sentence(text)
    address = re.sub(r"(^|/)README\.md$", r"\1index.html", name).replace(".md", ".html")
    return f"- [{title}]({address})" + (f": {about}" if about else "")
