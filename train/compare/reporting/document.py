"""A document of headings, sentences, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from train.compare.reporting.pictures import Picture
from train.console.markdown import escape_markdown


class Heading(NamedTuple):
    """A heading of a level from 1; text is plain, as everywhere here."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """A paragraph: plain, a note in small print, or the verdict that the document is about."""

    text: str
    kind: Literal["", "note", "verdict"] = ""


class Lines(NamedTuple):
    """A list of sentences."""

    items: Sequence[str]


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


Block = Heading | Paragraph | Lines | Grid | Code | Gallery


def markdown(blocks: Sequence[Block]) -> str:
    """Returns a document in GitHub's Markdown; pictures are links to files beside it."""
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


def page(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Returns a document as one HTML file, without scripts and without the network.

    Args:
      title: title of the window.
      blocks: the document.
      folder: where the pictures' files lie; the page holds their content.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = "\n".join(_html_block(block, folder) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text, kind):
            return f"**{escape_markdown(text)}**" if kind == "verdict" else escape_markdown(text)
        case Lines(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}text\n{text}\n{fence}"
        case Gallery(pictures):
            shown = [(file, escape_markdown(t), escape_markdown(s)) for file, t, s in pictures]
            return "\n\n".join(f"![{t}]({file})\n\n**{t}.** {below}" for file, t, below in shown)
        case Grid(header, body, marked):
            first, *rest = [[escape_markdown(cell) for cell in row] for row in (header, *body)]
            if marked is not None:
                rest[marked] = [f"**{cell}**" for cell in rest[marked]]
            ruler = [":---", *["---:"] * (len(header) - 1)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (first, ruler, *rest))


def _html_block(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_safe(text)}</h{level}>"
        case Paragraph(text, kind):
            opening = f'<p class="{kind}">' if kind else "<p>"
            return f"{opening}{_safe(text)}</p>"
        case Lines(items):
            return "<ul>" + "".join(f"<li>{_safe(item)}</li>" for item in items) + "</ul>"
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
    title, caption = html.escape(picture.title), _safe(picture.said)
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{png}">'
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
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
