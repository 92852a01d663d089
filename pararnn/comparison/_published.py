"""What others have published, beside ours."""

import json
from importlib.resources import files
from typing import Any

import numpy as np

from ._document import Table
from ._results import Results
from ._tables import number


def load_published() -> list[dict[str, Any]]:
    """The entries of `published.json`.

    Each has `task` and `layers` (names in full, as of `expand_layer`, that are the
    published one here), `published` (its name there), `value` and `metric`, `setting`,
    `source`, and `read_at`, the page on which the number was read.
    """
    text = files(__package__ or "").joinpath("published.json").read_text("utf-8")
    return json.loads(text)


def compare_with_published(results: Results) -> Table:
    """Published numbers of the layers and tasks of this comparison, and ours."""
    rows = []
    for entry in load_published():
        for layer in results.layers:
            record = (
                results.best(layer, entry["task"])
                if entry["task"] in results.tasks
                else None
            )
            if record is not None and record["spec"] in entry["layers"]:
                scores = results.scores(record, entry["task"], record["score"])
                ours = f"{layer}: {number(float(np.median(scores)))}"
                rows.append(
                    (
                        entry["task"],
                        f"{entry['published']}: {number(entry['value'])}",
                        ours,
                        entry["metric"],
                        f"{entry['setting']}; {entry['source']}, read at "
                        f"{entry['read_at']}",
                    )
                )
    header = ("task", "published", "ours, median", "metric published", "setting")
    return Table(header, rows)
