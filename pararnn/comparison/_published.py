"""What others have published, beside ours."""

import json
from importlib.resources import files
from typing import Any

import numpy as np

from .._records import Record
from .._specs import parse_spec
from ._document import Table
from ._results import Results
from ._tables import number


def load_published() -> list[dict[str, Any]]:
    """The entries of `published.json`.

    Each has `task` and `layers` (names as of `expand_layer`, with no option but the
    range of eigenvalues, that are the published one here), `published` (its name
    there, or what was proved), `value` (none for a proof) and `metric`, `setting`,
    `source`, and `read_at`, the page on which it was read.
    """
    text = files(__package__ or "").joinpath("published.json").read_text("utf-8")
    return json.loads(text)


def compare_with_published(results: Results) -> Table:
    """Published numbers of the layers and tasks of this comparison, and ours."""
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
    """What decides in theory: the layer, and its range of eigenvalues."""
    name, options = parse_spec("_kind", layer)
    return name, options.get("eigenvalues")
