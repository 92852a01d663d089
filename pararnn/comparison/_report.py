"""The report of a comparison: a page of HTML, and Markdown."""

import base64
import html
import json
import os
from pathlib import Path
from typing import NamedTuple

from . import _figures as figures, _tables as tables
from ._compare import RESULTS_FILE, Results, load_results
from ._protocol import COUNTED_SEQUENCES
from ._tables import Table, compare_with_published
from ._train import NEWTON_LIMIT

PICTURES = "figures"
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


class Heading(NamedTuple):
    """A heading; the first of a document is its title."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Code(NamedTuple):
    """Text to be copied as it is."""

    text: str


class Picture(NamedTuple):
    """A drawing in SVG, the name of its file, and what it shows."""

    name: str
    svg: str
    shows: str


Part = Heading | Text | Code | Table | Picture


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write the report of the last call of `compare` in a folder.

    Beside it are `report.md`, with its pictures in `figures/`, and two tables to be
    included elsewhere: `scores.md`, the first one, and `costs.md`, time and memory at
    the longest length. The same results make the same files.

    **Arguments:** `folder`, that of [`pararnn.comparison.compare`][]. An interrupted
    comparison is reported as far as it came.

    **Returns:** the path of `report.html`, which needs no other file.

    **Raises:** `ValueError` if the folder has no results, or a line is broken.
    """
    folder = Path(folder)
    results = load_results(folder / RESULTS_FILE)
    parts = _parts(results)
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    for part in parts:
        if isinstance(part, Picture):
            (pictures / f"{part.name}.svg").write_text(part.svg, "utf-8")
    (folder / "report.md").write_text(to_markdown(parts, PICTURES), "utf-8")
    alone = {
        "scores": tables.overview(results),
        "costs": tables.costs(results, longest=True),
    }
    for name, table in alone.items():
        text = to_markdown([table], PICTURES)
        (folder / f"{name}.md").write_text(text, "utf-8")
    page = folder / "report.html"
    page.write_text(to_html(parts), "utf-8")
    return page


def _parts(results: Results) -> list[Part]:
    return [
        Heading("Recurrences compared", 1),
        *_scores(results),
        *(part for task in results.tasks for part in _task(results, task)),
        *_costs(results),
        *_newton(results),
        *_published(results),
        *_conditions(results),
    ]


def _scores(results: Results) -> list[Part]:
    return [
        Text(
            "Median over the seeds, the best seed in brackets, at lengths beyond those "
            "of training if the task has any. Scaled accuracy is 0 for guessing and 1 "
            "for always right. The learning rate is the one whose validation loss, at "
            "the lengths of training, has the lowest median. A seed that diverged "
            "counts as guessing."
        ),
        tables.overview(results),
    ]


def _task(results: Results, task: str) -> list[Part]:
    about = results.describe(task)
    low, high = about["train"]
    lengths = f"{low}" if low == high else f"{low} to {high}"
    trained = f"Trained on lengths {lengths}, tested on {_listed(about['test'])}. "
    if not about["published_lengths"]:
        trained += "These lengths are shorter than the source's. "
    differs = f" Different from it: {about['differs']}" if about["differs"] else ""
    return [
        Heading(task),
        Text(
            f"{about['summary']} {trained}Score: {about['metric']}, "
            f"{tables.number(about['guessing'])} for guessing. Source: "
            f"{about['source']}.{differs}"
        ),
        tables.by_length(results, task),
        Picture(
            "".join(c if c.isalnum() else "-" for c in task),
            figures.draw_task(results, task),
            f"{task}: score against length, loss against steps and seconds",
        ),
    ]


def _costs(results: Results) -> list[Part]:
    batch = results.header["protocol"]["cost_batch"]
    return [
        Heading("Time and memory against length"),
        Text(
            f"The layer alone, without norm and MLP, on {batch} sequences: the least "
            "of several calls, and what the compiled program allocates besides its "
            "arguments. The gradient is that of the parameters."
        ),
        Picture("costs", figures.draw_costs(results), "time and memory against length"),
        tables.costs(results),
    ]


def _newton(results: Results) -> list[Part]:
    drawing = figures.draw_newton(results)
    if drawing is None:
        return []
    return [
        Heading("Newton's steps over training"),
        Text(
            "How many steps Newton's method needs, with a segment for every time "
            f"step, on {COUNTED_SEQUENCES} training sequences; {NEWTON_LIMIT} stands "
            "for that many or more. In training, the library chooses the solver."
        ),
        Picture("newton", drawing, "Newton's steps over training"),
    ]


def _published(results: Results) -> list[Part]:
    table = compare_with_published(results)
    if not table.rows:
        return []
    return [
        Heading("Beside published numbers"),
        Text(
            "The published models differ from ours in size and training, and perhaps "
            "in the score. Our setting is written below; theirs stands beside the "
            "number as far as it is known."
        ),
        table,
    ]


def _conditions(results: Results) -> list[Part]:
    header = results.header
    return [
        Heading("Protocol"),
        Text(
            "AdamW with clipping, a linear warm-up, then a cosine to a tenth; the same "
            "data, in the same order, for every layer. A block is a layer and a gated "
            "MLP, each after a norm. The width is the greatest at which the model, "
            "with MLPs of twice the width, stays within the parameters; the MLPs take "
            "up the rest. If the protocol has a `state`, each layer has the largest "
            "state with no more numbers, at every width."
        ),
        Code(json.dumps(header["protocol"], indent=1)),
        Heading("Sizes", 3),
        tables.sizes(results),
        Heading("All runs", 3),
        tables.sweep(results),
        Heading("Command and machine"),
        Code(header["command"] or "called from Python"),
        Code(json.dumps(header["machine"], indent=1)),
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def to_markdown(parts: list[Part], folder: str) -> str:
    """Write Markdown, with the pictures in files of a folder beside it."""
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
    """Write one page that needs no other file."""
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
            # As a separate image, so that the names inside cannot collide.
            data = base64.b64encode(svg.encode()).decode()
            source = f"data:image/svg+xml;base64,{data}"
            return f'<img alt="{html.escape(shows)}" src="{source}">'


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"
