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
    """A heading of a level from 1. Its text is plain, not Markdown."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """A paragraph: plain, a note in small print, or the verdict of the document."""

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
    """Pictures, side by side if the width allows it."""

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
    """Returns a block in Markdown."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text, kind):
            return f"**{escape_markdown(text)}**" if kind == "verdict" else escape_markdown(text)
        case Lines(items):
            return "\n".join(f"- {escape_markdown(item)}" for item in items)
        case Code(text):
            longest_fence = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, 1 + longest_fence)
            return f"{fence}text\n{text}\n{fence}"
        case Gallery(pictures):
            return "\n\n".join(_markdown_picture(picture) for picture in pictures)
        case Grid():
            return _markdown_table(block)


def _markdown_picture(picture: Picture) -> str:
    title = escape_markdown(picture.title)
    return f"![{title}]({picture.file})\n\n**{title}.** {escape_markdown(picture.said)}"


def _markdown_table(grid: Grid) -> str:
    """Returns a table in Markdown, with the marked row in bold."""
    ruler = [":---", *["---:"] * (len(grid.header) - 1)]
    rows = [[escape_markdown(name) for name in grid.header], ruler]
    for index, cells in enumerate(grid.body):
        row = [escape_markdown(cell) for cell in cells]
        if index == grid.marked:
            row = [f"**{cell}**" for cell in row]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _html_block(block: Block, folder: Path) -> str:
    """Returns a block in HTML."""
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
            figures = "\n".join(_figure(picture, folder) for picture in pictures)
            return f'<div class="gallery">\n{figures}\n</div>'
        case Grid():
            return _grid(block)


def _safe(text: str) -> str:
    """Returns plain text as HTML, without line breaks in option names and numbers like 3e-05."""
    option_or_number = r"--[a-z][a-z-]*|\b\d[\d.]*e-\d+"
    return re.sub(option_or_number, r'<span class="whole">\g<0></span>', html.escape(text))


def _figure(picture: Picture, folder: Path) -> str:
    """Returns an HTML figure that embeds a picture, with its title and caption."""
    png = base64.b64encode((folder / picture.file).read_bytes()).decode()
    title = html.escape(picture.title)
    caption = _safe(picture.said)
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{png}">'
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
    )


def _grid(grid: Grid) -> str:
    """Returns a table in HTML, whose first column names its rows."""
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in grid.header)
    body: list[str] = []
    for index, row in enumerate(grid.body):
        cells = f'<th scope="row">{_safe(row[0])}</th>'
        cells += "".join(f"<td>{_safe(cell)}</td>" for cell in row[1:])
        attribute = " class=best" if index == grid.marked else ""
        body.append(f"<tr{attribute}>{cells}</tr>")
    return (
        '<p class="cue" aria-hidden="true">The table scrolls sideways →</p>'
        '<div class="table" role="region" aria-label="table" tabindex="0"><table>'
        f"<thead><tr>{header}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
