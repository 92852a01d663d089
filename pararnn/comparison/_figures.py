"""The drawings of the report, as SVG."""

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .._jsonl import Record
from ._compare import Results

STYLES = ("-", "--", ":", "-.")
COST_PANELS = {
    "forward_seconds": ("forward", "seconds", 1.0),
    "backward_seconds": ("forward and gradient", "seconds", 1.0),
    "forward_bytes": ("forward", "MB allocated", 2.0**-20),
    "backward_bytes": ("forward and gradient", "MB allocated", 2.0**-20),
}


def draw_task(results: Results, task: str) -> str:
    """Draw the score over the length, and the loss over steps and seconds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    about = results.describe(task)
    for style, record in _best_runs(results, task):
        rows = [results.scores(record, task, row) for row in record["curve"]]
        left.plot(record["curve_lengths"], np.median(rows, 1), **style)
        losses = _median_losses(record)
        # A loss of zero cannot be drawn on a logarithmic axis.
        losses = np.where(losses > 0, losses, np.nan)
        middle.plot(record["steps"], losses, **style)
        right.plot(record["seconds"], losses, **style)
    if about["metric"].endswith("accuracy"):
        # The whole range, so that noise around guessing looks small.
        left.set_ylim(-0.05, 1.05)
    left.axvspan(*about["train"], color="0.9", lw=0)
    left.axhline(about["guessing"], color="0.6", lw=0.8)
    left.set(xlabel="steps read (shaded: lengths in training)", ylabel=about["metric"])
    middle.set(xlabel="step of the optimiser", ylabel="training loss")
    right.set(xlabel="seconds, without compiling", ylabel="training loss")
    for axes in (middle, right):
        if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
            axes.set_yscale("log")
    _add_legend(figure, left)
    return _as_svg(figure)


def draw_costs(results: Results) -> str:
    """Draw time and memory over the length."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (name, panel) in zip(
        figure.subplots(2, 2).flat, COST_PANELS.items(), strict=True
    ):
        title, unit, factor = panel
        for layer, record in results.costs.items():
            if record["status"] == "finished" and None not in record[name]:
                values = np.array(record[name]) * factor
                style = _style(results, layer)
                axes.plot(record["lengths"], values, marker="o", ms=3, **style)
        if axes.has_data():
            axes.set(xscale="log", yscale="log")
            lengths = results.header["protocol"]["cost_lengths"]
            axes.set_xticks(lengths, list(map(str, lengths)))
            axes.set_xticks([], minor=True)
        axes.set(title=title, xlabel="T", ylabel=unit)
    _add_legend(figure, figure.axes[0])
    return _as_svg(figure)


def draw_newton(results: Results) -> str | None:
    """Draw Newton's steps over training; `None` if no layer is nonlinear."""
    runs = [
        (task, style, record)
        for task in results.tasks
        for style, record in _best_runs(results, task)
        if record["newton_steps"]
    ]
    tasks = list(dict.fromkeys(task for task, *_ in runs))
    if not runs:
        return None
    figure = Figure(figsize=(4.5 * len(tasks) + 1, 4), layout="constrained")
    panels = dict(
        zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True)
    )
    for task, style, record in runs:
        steps = np.median(record["newton_steps"], 1)
        panels[task].plot(record["steps"], steps, **style)
    for task, axes in panels.items():
        axes.set(title=task, xlabel="step of the optimiser", ylabel="Newton's steps")
        axes.set_ylim(bottom=0)
    _add_legend(figure, figure.axes[0])
    return _as_svg(figure)


def _best_runs(results: Results, task: str):
    for layer in results.layers:
        if (record := results.best(layer, task)) is not None:
            yield _style(results, layer), record


def _style(results: Results, layer: str) -> dict[str, str]:
    place = results.layers.index(layer)
    line = STYLES[place // 10 % len(STYLES)]
    return {"color": f"C{place % 10}", "linestyle": line, "label": layer}


def _median_losses(record: Record) -> np.ndarray:
    """Take the median over the seeds that have not diverged yet; NaN if all have."""
    rows = [[v for v in row if v is not None] for row in record["losses"]]
    return np.array([np.median(row) if row else np.nan for row in rows])


def _add_legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place = "outside lower center"
        figure.legend(handles, labels, loc=place, ncols=6, frameon=False)


def _as_svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    # The salt and no date, so that the same results make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "pararnn"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
