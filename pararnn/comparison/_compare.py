"""Compare every layer on every task, and read the results back, sorted."""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._jsonl import Record, Records, describe_machine, find, read_records
from .._progress import Progress
from ._measure import Evaluator, measure_costs
from ._model import expand_layer, needs_images
from ._protocol import Data, Protocol
from ._sizes import Size, fit_size
from ._train import Trainer
from .tasks import IMAGE_TASKS, Task, make_task

RESULTS_FILE = "results.jsonl"


def compare(
    layers: Sequence[str],
    tasks: Sequence[str],
    folder: str | os.PathLike[str],
    protocol: Protocol = Protocol(),
    *,
    command: str = "",
    visible: bool = True,
) -> Path:
    """Train every layer on every task, and record the results.

    After every layer, task and learning rate, a line is added to `results.jsonl` in the
    folder. A run whose line is already there, from the same protocol, kind of device
    and version of JAX, is not repeated. The same seed gives the same scores. If a layer
    diverges, or its solver fails, its line says so.

    **Arguments:**

    - `layers`: names with options, as for [`pararnn.comparison.expand_layer`][].
    - `tasks`: names with options, as for [`pararnn.comparison.make_task`][].
    - `folder`: created if it does not exist.
    - `protocol`: what is the same for all of them.
    - `command`: the command that called this, for the report.
    - `visible`: whether to show a progress bar, and a line for each result.

    **Returns:** the path of the results, for
    [`pararnn.comparison.write_report`][].

    **Raises:** before anything is trained, `ValueError` on unknown layers, tasks or
    options, listing those that exist, on a layer of images with a task that is not one
    of images, or on a model that cannot be as small as the protocol asks; `OSError` if
    results cannot be written.
    """
    _check_given("layers", layers)
    _check_given("tasks", tasks)
    specs = {layer: expand_layer(layer) for layer in layers}
    made = {task: make_task(task) for task in tasks}
    for layer, task in itertools.product(specs, made):
        _check_pair(layer, specs[layer], task, made[task])
    sizes = {
        (layer, task): fit_size(made[task], specs[layer], protocol)
        for task in made
        for layer in specs
    }
    records = Records(Path(folder) / RESULTS_FILE)
    records.append(_header(specs, made, protocol, command))
    runs = len(specs) * (len(made) * len(protocol.learning_rates) + 1)
    with Progress(visible, runs) as progress:
        for layer in specs:
            _add_costs(records, layer, sizes[layer, tasks[0]], protocol, progress)
        for name, task in made.items():
            data = Data(task, protocol)
            for layer in specs:
                run = _Run(records, layer, name, data, sizes[layer, name])
                run.add_trainings(protocol, progress)
    return records.path


def _check_given(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str) or not values:
        raise ValueError(
            f"compare: `{name}` is {values!r}, expected a sequence of at least one "
            'name, such as ["lru", "gru"].'
        )
    twice = sorted({value for value in values if list(values).count(value) > 1})
    if twice:
        raise ValueError(f"compare: `{name}` has {', '.join(twice)} more than once.")


def _check_pair(layer: str, spec: str, name: str, task: Task) -> None:
    if needs_images(spec) and not task.image:
        raise ValueError(
            f"compare: {layer!r} takes images, and {name!r} has none. Give it tasks of "
            f"images: {', '.join(IMAGE_TASKS)}."
        )


def _header(specs, tasks, protocol: Protocol, command: str) -> Record:
    return {
        "kind": "run",
        "command": command,
        "layers": list(specs),
        "tasks": list(tasks),
        "learning_rates": list(protocol.learning_rates),
        "fingerprints": {name: protocol.fingerprint(t) for name, t in tasks.items()},
        "cost_fingerprint": protocol.fingerprint(),
        "protocol": vars(protocol),
        "descriptions": {
            name: _describe(task, protocol) for name, task in tasks.items()
        },
        "machine": describe_machine(),
    }


def _describe(task: Task, protocol: Protocol) -> dict[str, Any]:
    lengths = protocol.lengths(task)
    return {
        "summary": task.summary,
        "source": task.source,
        "differs": task.differs,
        "metric": task.metric.kind,
        "higher_is_better": task.metric.higher_is_better,
        "guessing": task.metric.guessing,
        "train": list(lengths.train),
        "test": list(lengths.test),
        "published_lengths": lengths == task.lengths,
    }


def _add_costs(
    records: Records, layer: str, size: Size, protocol: Protocol, progress: Progress
) -> None:
    what = f"{layer}: time and memory"
    fields = {
        "kind": "cost",
        "layer": layer,
        "spec": size.layer,
        "d_model": size.d_model,
        "fingerprint": protocol.fingerprint(),
    }
    if records.find(**fields):
        progress.finish(f"{what}: already there")
        return
    progress.begin(what, 1)
    try:
        found = {
            "status": "finished",
            **measure_costs(size.layer, size.d_model, protocol),
        }
    except RuntimeError as error:
        found = {"status": "failed", "error": _first_line(error)}
    records.append(fields | found)
    progress.finish(what)


class _Run:
    """A layer on a task, compiled only if a result is missing."""

    def __init__(self, records, layer: str, name: str, data: Data, size: Size):
        self.records, self.layer, self.name = records, layer, name
        self.data, self.size = data, size

    def add_trainings(self, protocol: Protocol, progress: Progress) -> None:
        """Train with the learning rates whose results are missing."""
        programs = None
        for rate in protocol.learning_rates:
            what = f"{self.layer} on {self.name}, rate {rate:g}"
            fields = {
                "kind": "training",
                "layer": self.layer,
                "task": self.name,
                "learning_rate": rate,
                "fingerprint": protocol.fingerprint(self.data.task),
            }
            if self.records.find(**fields):
                progress.finish(f"{what}: already there")
                continue
            if programs is None:
                trainer = Trainer(self.data, self.size)
                programs = trainer, Evaluator(self.data)
            progress.begin(what, protocol.steps)
            found = self._train(*programs, rate, what, progress)
            self.records.append(fields | found)
            progress.finish(f"{what}: {_outcome(found)}")

    def _train(self, trainer, evaluator, rate: float, what, progress) -> Record:
        sizes = self.size._asdict()
        record: Record = {"spec": sizes.pop("layer"), **sizes}
        try:
            training = trainer.run(
                rate,
                lambda step, loss: progress.show_step(step, f"{what}, loss {loss:.4f}"),
            )
            evaluation = evaluator.run(training.models, training.diverged)
        except RuntimeError as error:
            # A solver raises on states that are not finite, for all seeds at once.
            return record | {"status": "failed", "error": _first_line(error)}
        curves = training._asdict()
        del curves["models"]
        return record | {"status": "finished", **curves, **evaluation._asdict()}


def _outcome(record: Record) -> str:
    if record["status"] == "failed":
        return f"failed, {record['error']}"
    scores = ["-" if s is None else f"{s:.3f}" for s in record["score"]]
    return f"scores {' '.join(scores)} in {record['seconds'][-1]:.0f} s"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


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
