"""The results of a comparison: the records of its last call, sorted."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from .._jsonl import Record, find, read_records


@dataclasses.dataclass(frozen=True)
class Results:
    """The records that belong to the last call of `compare` in a file.

    **Attributes:** `header`, the arguments of the call and the machine; `trainings`,
    the records of all learning rates for each layer and task, as far as there are any;
    `costs`, the record of each layer, if there is one.
    """

    header: Record
    trainings: dict[tuple[str, str], list[Record]]
    costs: dict[str, Record]

    @property
    def layers(self) -> list[str]:
        """In the order of the call."""
        return self.header["layers"]

    @property
    def tasks(self) -> list[str]:
        """In the order of the call."""
        return self.header["tasks"]

    def describe(self, task: str) -> dict[str, Any]:
        """Return the task's summary, source, metric and lengths."""
        return self.header["descriptions"][task]

    def best(self, layer: str, task: str) -> Record | None:
        """Return the run whose learning rate has the lowest median validation loss;
        `None` if none has finished."""
        finished = [
            record
            for record in self.trainings[layer, task]
            if record["status"] == "finished"
        ]
        return min(finished, key=validation_loss, default=None)

    def scores(self, record: Record, task: str, values: list[float | None]):
        """Return the scores of the seeds; one that diverged counts as guessing.

        **Returns:** float `[seeds]`; NaN where nothing was asked.
        """
        guessing = self.describe(task)["guessing"]
        lost = [step is not None for step in record["diverged"]]
        return np.array(
            [
                guessing if gone else (math.nan if value is None else value)
                for value, gone in zip(values, lost, strict=True)
            ]
        )

    def best_of(self, scores: np.ndarray, task: str) -> float:
        """Return the best of the seeds' scores."""
        higher = self.describe(task)["higher_is_better"]
        return float(np.max(scores) if higher else np.min(scores))


def validation_loss(record: Record) -> float:
    """Return the median over the seeds; one that diverged has an infinite loss."""
    losses = [math.inf if v is None else v for v in record["validation"]]
    return float(np.median(losses))


def load_results(path: Path) -> Results:
    """Load the results from a file of `compare`.

    **Raises:** `ValueError` if there are none, or a line is broken.
    """
    records = read_records(path)
    header = find(records, kind="run")
    if header is None:
        raise ValueError(
            f"load_results: no comparison has begun in {path}. Likely cause: another "
            "folder than that of the comparison. Pass the `folder` of `compare`."
        )
    trainings = {
        (layer, task): _runs(records, header, layer, task)
        for task in header["tasks"]
        for layer in header["layers"]
    }
    costs = {
        layer: record
        for layer in header["layers"]
        if (
            record := find(
                records,
                kind="cost",
                layer=layer,
                fingerprint=header["cost_fingerprint"],
            )
        )
    }
    return Results(header, trainings, costs)


def _runs(records: list[Record], header: Record, layer: str, task: str) -> list[Record]:
    """Return the runs of a layer on a task, in the order of the learning rates."""
    fields = {"kind": "training", "layer": layer, "task": task}
    fields["fingerprint"] = header["fingerprints"][task]
    rates = header["learning_rates"]
    found = [find(records, learning_rate=rate, **fields) for rate in rates]
    return [record for record in found if record]
