"""The tables of the report."""

import json
import math
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from .._jsonl import Record
from .._registry import parse_spec
from ._compare import Results, validation_loss


class Table(NamedTuple):
    """Rows of texts under a header."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def number(value: float | None) -> str:
    """Write a score or a loss."""
    if value is None or not math.isfinite(value):
        return "-"
    # No minus sign before a rounded zero.
    return f"{value:.3f}".replace("-0.000", "0.000")


def overview(results: Results) -> Table:
    """Return the median score of every layer on every task, and the best seed's."""
    rows = []
    for layer in results.layers:
        cells = [_score_cell(results, layer, task) for task in results.tasks]
        rows.append((layer, *cells))
    headings = [f"{t} ({results.describe(t)['metric']})" for t in results.tasks]
    return Table(("layer", *headings), rows)


def _score_cell(results: Results, layer: str, task: str) -> str:
    record = results.best(layer, task)
    if record is None:
        return _missing(results, layer, task)
    scores = results.scores(record, task, record["score"])
    best = results.best_of(scores, task)
    text = f"{number(float(np.median(scores)))} ({number(best)})"
    return f"{text}, {lost} diverged" if (lost := _diverged(record)) else text


def _missing(results: Results, layer: str, task: str) -> str:
    records = results.trainings[layer, task]
    return f"failed: {records[-1]['error']}" if records else "not run"


def _diverged(record: Record) -> str:
    count = sum(step is not None for step in record["diverged"])
    return f"{count} of {len(record['diverged'])}" if count else ""


def by_length(results: Results, task: str) -> Table:
    """Return the score at every length of the test: the median over the seeds."""
    edges, rows = results.describe(task)["test"], []
    for layer in results.layers:
        record = results.best(layer, task)
        if record is None:
            cells = (_missing(results, layer, task), *["-"] * len(edges))
            rows.append((layer, *cells))
            continue
        medians = [
            number(float(np.median(results.scores(record, task, row))))
            for row in record["by_length"]
        ]
        rows.append((layer, f"{record['learning_rate']:g}", *medians))
    return Table(("layer", "rate", *(f"to {n}" for n in edges)), rows)


def sweep(results: Results) -> Table:
    """Return every run: validation loss, score, divergence and time."""
    header = (
        "task",
        "layer",
        "rate",
        "validation loss",
        "score",
        "seeds",
        "diverged at step",
        "seconds",
        "compiling",
    )
    rows = []
    for task in results.tasks:
        for layer in results.layers:
            for record in results.trainings[layer, task]:
                start = (task, layer, f"{record['learning_rate']:g}")
                rows.append(start + _sweep_cells(results, task, record))
    return Table(header, rows)


def _sweep_cells(results: Results, task: str, record: Record) -> tuple[str, ...]:
    if record["status"] == "failed":
        return ("-", "-", "-", f"failed: {record['error']}", "-", "-")
    scores = results.scores(record, task, record["score"])
    steps = [str(step) for step in record["diverged"] if step is not None]
    return (
        number(validation_loss(record)),
        number(float(np.median(scores))),
        " ".join(map(number, record["score"])),
        ", ".join(steps) or "never",
        f"{record['seconds'][-1]:.1f}",
        f"{record['compile_seconds']:.1f}",
    )


def sizes(results: Results) -> Table:
    """Return widths, parameters, and numbers in the state."""
    rows = []
    for task in results.tasks:
        for layer in results.layers:
            for record in results.trainings[layer, task][:1]:
                names = ("parameters", "d_model", "d_hidden", "state")
                values = (f"{record[name]:,}" for name in names if name in record)
                rows.append((task, layer, record.get("spec", layer), *values))
    header = ("task", "layer", "in full", "parameters", "width", "MLP", "state")
    return Table(header, rows)


def costs(results: Results, longest: bool = False) -> Table:
    """Return time and memory of the layer alone, at every length or the longest."""
    header = (
        "layer",
        "width",
        "T",
        "forward, ms",
        "with gradient, ms",
        "forward, MB",
        "with gradient, MB",
    )
    rows = []
    for layer, record in results.costs.items():
        width = str(record["d_model"])
        if record["status"] == "failed":
            rows.append((layer, width, "-", f"failed: {record['error']}", *["-"] * 3))
            continue
        for i, length in list(enumerate(record["lengths"]))[-1 if longest else 0 :]:
            times = [record[f"{name}_seconds"][i] * 1e3 for name in PASSES]
            memory = [record[f"{name}_bytes"][i] for name in PASSES]
            rows.append(
                (
                    layer,
                    width,
                    str(length),
                    *(f"{t:.3g}" for t in times),
                    *("-" if m is None else f"{m / 2**20:.3g}" for m in memory),
                )
            )
    return Table(header, rows)


PASSES = ("forward", "backward")


def load_published() -> list[dict[str, Any]]:
    """Load the entries of `published.json`.

    Each has `task` and `layers` (our names of the published layer, as from
    `expand_layer`, with no option except the range of eigenvalues), `published` (its
    published name, or what was proved), `value` (`None` for a proof), `metric`,
    `setting`, `source`, and `read_at`, the page it was read from.
    """
    text = files(__package__ or "").joinpath("published.json").read_text("utf-8")
    return json.loads(text)


def compare_with_published(results: Results) -> Table:
    """Return published numbers of these layers and tasks beside ours."""
    rows = [
        _row(results, entry, layer, record)
        for entry in load_published()
        if entry["task"] in results.tasks
        for layer in results.layers
        if (record := results.best(layer, entry["task"])) is not None
        and _kind(record["spec"]) in map(_kind, entry["layers"])
    ]
    header = ("task", "published", "ours, median", "metric published", "setting")
    return Table(header, rows)


def _row(results: Results, entry, layer: str, record: Record) -> tuple[str, ...]:
    task, value = entry["task"], entry["value"]
    published = "" if value is None else f": {number(value)}"
    scores = results.scores(record, task, record["score"])
    return (
        task,
        entry["published"] + published,
        f"{layer}: {number(float(np.median(scores)))}",
        entry["metric"],
        f"{entry['setting']}; {entry['source']}, read at {entry['read_at']}",
    )


def _kind(layer: str) -> tuple[str, Any]:
    """Return what decides in theory: the layer, and its range of eigenvalues."""
    name, options = parse_spec("_kind", layer)
    return name, options.get("eigenvalues")
