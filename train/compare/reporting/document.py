"""A document of headings, sentences, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from train.compare.reporting.pictures import Picture
from train.console.markdown import escape_markdown


class Heading(NamedTuple):
    """A heading of a level from 1; text is plain, as everywhere here."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str
    is_note: bool = False


class Lines(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


class Verdict(NamedTuple):
    """The sentence that the document is about."""

    text: str


class Grid(NamedTuple):
    """A table.

    Attributes:
      header: the columns' names.
      body: the rows' cells. The first column is text, the others are figures.
      marked: the index of the row that stands out, if any.
    """

    header: Sequence[str]
    body: Sequence[Sequence[str]]
    marked: int | None = None


class Code(NamedTuple):
    """Text that keeps its line breaks, such as a command or an error."""

    text: str


class Gallery(NamedTuple):
    """Pictures, side by side where there is room."""

    pictures: Sequence[Picture]


Block = Heading | Text | Lines | Verdict | Grid | Code | Gallery


def markdown(blocks: Sequence[Block]) -> str:
    """Returns a document in GitHub's Markdown; pictures are links to files beside it."""
    return "\n\n".join(map(_as_markdown, blocks)) + "\n"


def page(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Returns a document as one HTML file, without scripts and without the network.

    Args:
      title: title of the window.
      blocks: the document.
      folder: where the pictures' files lie; the page holds their content.
    """
    body = "\n".join(_as_html(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _as_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Text(text):
            return escape_markdown(text)
        case Verdict(text):
            return f"**{escape_markdown(text)}**"
        case Lines(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Gallery(pictures):
            shown = [(file, escape_markdown(t), escape_markdown(s)) for file, t, s in pictures]
            return "\n\n".join(f"![{t}]({file})\n\n**{t}.** {said}" for file, t, said in shown)
        case Grid(header, body, marked):
            first, *rest = [[escape_markdown(cell) for cell in row] for row in (header, *body)]
            if marked is not None:
                rest[marked] = [f"**{cell}**" for cell in rest[marked]]
            ruler = [":---", *["---:"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (first, ruler, *rest))


def _as_html(block: Block, folder: Path) -> str:
    safe = _safe
    match block:
        case Heading(text, level):
            return f"<h{level}>{safe(text)}</h{level}>"
        case Text(text, is_note):
            return f'<p class="note">{safe(text)}</p>' if is_note else f"<p>{safe(text)}</p>"
        case Verdict(text):
            return f'<p class="verdict">{safe(text)}</p>'
        case Lines(items):
            return "<ul>" + "".join(f"<li>{safe(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f'<pre tabindex="0">{html.escape(text)}</pre>'
        case Gallery(pictures):
            shown = "\n".join(_figure(picture, folder) for picture in pictures)
            return f'<div class="gallery">\n{shown}\n</div>'
        case Grid():
            return _grid(block)


def _safe(text: str) -> str:
    """Returns plain text as HTML; names of options and numbers like 3e-05 stay on one line."""
    whole = r"--[a-z][a-z-]*|\b\d[\d.]*e-\d+"
    return re.sub(whole, r'<span class="whole">\g<0></span>', html.escape(text))


def _figure(picture: Picture, folder: Path) -> str:
    png = base64.b64encode((folder / picture.file).read_bytes()).decode()
    title, said = html.escape(picture.title), _safe(picture.said)
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{png}">'
        f"<figcaption><b>{title}.</b> {said}</figcaption></figure>"
    )


def _grid(grid: Grid) -> str:
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in grid.header)
    body = []
    for index, row in enumerate(grid.body):
        first, *others = map(_safe, row)
        cells = f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f"<tr{' class=best' if index == grid.marked else ''}>{cells}</tr>")
    return (
        '<p class="cue" aria-hidden="true">The table scrolls sideways →</p>'
        '<div class="table" role="region" aria-label="table" tabindex="0"><table>'
        f"<thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff;
  --line: #d5dae0; --shade: #f3f5f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a0a9b4; --paper: #14171b;
  --line: #353c45; --shade: #1e232a; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { margin: .5rem 0; max-width: 44rem; }
ul { padding-left: 1.2rem; }
li { margin: .25rem 0; }
.whole { white-space: nowrap; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { font-size: 1.15rem; font-weight: 600; padding: .7rem .9rem; background: var(--shade);
  border-left: 4px solid var(--accent); border-radius: 4px; }
.cue { display: none; margin: .6rem 0 -.3rem; color: var(--soft); font-size: .8125rem; }
@media (max-width: 50rem) { .cue { display: block; } }
.table { overflow-x: auto; max-width: 100%; margin: .6rem 0; border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; white-space: nowrap;
  overflow-wrap: normal; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 600; }
tbody th:first-child { white-space: normal; min-width: 8.5rem; max-width: 22rem;
  position: sticky; left: 0; background: var(--paper); }
thead th { background: var(--shade); vertical-align: bottom; white-space: normal; }
thead th:first-child { position: sticky; left: 0; }
tbody tr:last-child > * { border-bottom: 0; }
tr.best > *, tr.best > th:first-child { background: var(--shade); font-weight: 600; }
@media (min-width: 50rem) { tbody th:first-child { min-width: 13rem; } }
.gallery { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; max-width: 36rem; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: 4px; }
figcaption { margin-top: .4rem; }
pre { overflow-x: auto; max-width: 100%; background: var(--shade); padding: .6rem .8rem;
  border-radius: 6px; font-size: .8125rem; white-space: pre-wrap; }
"""
