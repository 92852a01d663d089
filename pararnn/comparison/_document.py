"""A report as a list of parts, written as Markdown or as one page of HTML."""

import base64
import html
from typing import NamedTuple


class Heading(NamedTuple):
    """A heading; the first of a document is its title."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Code(NamedTuple):
    """Something to be copied as it is."""

    text: str


class Table(NamedTuple):
    """Rows of texts under a header."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Picture(NamedTuple):
    """A drawing in SVG, the name of its file, and what it shows."""

    name: str
    svg: str
    shows: str


Part = Heading | Text | Code | Table | Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; margin-top: 2em; }
h1 { margin-top: 0; }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left;
         white-space: nowrap; }
td:last-child { white-space: normal; }
img { max-width: 100%; height: auto; margin-top: 1rem; }
"""


def to_markdown(parts: list[Part], folder: str) -> str:
    """Markdown, with the pictures in files of a folder beside it."""
    return "\n".join(_as_markdown(part, folder) for part in parts)


def _as_markdown(part: Part, folder: str) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}\n"
        case Text(text):
            return f"{text}\n"
        case Code(text):
            return f"```\n{text}\n```\n"
        case Table(header, rows):
            lines = [header, ("---",) * len(header), *rows]
            return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)
        case Picture(name, _, shows):
            return f"![{shows}]({folder}/{name}.svg)\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_html(parts: list[Part]) -> str:
    """One page that needs no other file."""
    title = next((part.text for part in parts if isinstance(part, Heading)), "")
    body = "\n".join(map(_as_html, parts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _as_html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(header, rows):
            lines = [_row("th", header), *(_row("td", row) for row in rows)]
            return f'<div class="wide"><table>{"".join(lines)}</table></div>'
        case Picture(_, svg, shows):
            # As an image of its own, so that the names inside cannot collide.
            data = base64.b64encode(svg.encode()).decode()
            source = f"data:image/svg+xml;base64,{data}"
            return f'<img alt="{html.escape(shows)}" src="{source}">'


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"
