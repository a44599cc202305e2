"""Pages out of the files of the project: Markdown, notebooks, and the code that pages link to."""

import base64
import json
import posixpath
import re
from pathlib import Path

FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINKS = re.compile(r"\]\(([^)\s#]+)")
_SHOWN = 60  # lines of a cell's output


def pages(root):
    """Returns the addresses of all pages of Markdown, which are their paths."""
    folders = [root / name for name in ("lora_jax", "train", "tests", "notebooks")]
    paths = [*root.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path.relative_to(root).as_posix() for path in paths)


def linked_files(root, page):
    """Yields the paths of files that a page links to and that are no pages: pictures, code."""
    text = FENCES.sub("", (root / page).read_text(encoding="utf-8"))
    for link in sorted(set(LINKS.findall(text))):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
        if "://" not in link and not path.endswith((".md", ".ipynb")) and (root / path).is_file():
            yield path


def code_page(root, path):
    """Returns a page that shows a file."""
    text = (root / path).read_text(encoding="utf-8")
    return f"# `{path}`\n\n{fenced(text, Path(path).suffix[1:])}"


def fenced(text, language):
    """Returns a block of code, whose fence is longer than those within it."""
    longest = max(map(len, re.findall(r"^`{3,}", text, re.MULTILINE)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def notebooks(root):
    """Returns all notebooks, their pages with outputs, and the pictures, by their addresses."""
    made = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        title, _, rest = text.partition("\n")
        download = f'<a href="{path.name}" download>Download this notebook</a>'
        made[f"notebooks/{path.stem}.md"] = f"{title}\n\n{download}\n{rest}"
        made[f"notebooks/{path.name}"] = path.read_bytes()
        made |= {f"notebooks/{name}": content for name, content in pictures.items()}
    return made


def notebook_page(notebook, stem):
    """Returns a notebook as Markdown, and its pictures by their names."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("<details>", '<details markdown="1">'))
            continue
        parts.append(fenced(source, "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}/{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above drew]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                lines = text.splitlines()
                parts.append(fenced("\n".join(lines[:_SHOWN]), "text"))
    return "\n\n".join(parts), pictures


def title_and_sentence(text):
    """Returns the title of a page and its first sentence, without Markdown's marks."""
    text = FENCES.sub("", text)
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    paragraphs = (part for part in text.split("\n\n") if part[:1].isalnum() or part[:1] in "[`")
    sentence = re.split(r"(?<=[.:]) ", " ".join(next(paragraphs, "").split()))[0]
    return tuple(plain(part) for part in (title[1] if title else "", sentence))


def plain(text):
    """Returns a text without links and marks of code."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
