"""The figure of a diagnosis."""

import importlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from ._results import MethodReport

MARKERS = "osDv^P*Xhd"


def draw(
    methods: dict[str, MethodReport], lengths: tuple[int, ...], max_steps: int
) -> Any:
    try:
        Figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "Diagnosis.plot draws with matplotlib, which is not installed: "
            "`pip install pararnn[examples]`, or `pip install matplotlib`."
        ) from error
    # Not by pyplot, which would keep the figure and may want a window.
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, report) in enumerate(methods.items()):
        style = {
            "color": f"C{number % 10}",
            "marker": MARKERS[number % len(MARKERS)],
            "label": name,
        }
        _draw_history(left, report, style)
        _draw_steps(right, report, style, len(methods) - number)
    _label_history(left, methods.values(), lengths[-1])
    _label_steps(right, lengths, max_steps)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_history(axes, report: MethodReport, style: dict[str, Any]) -> None:
    residuals = report.history
    # A residual of zero has no place on a logarithmic axis.
    residuals = np.where(residuals > 0, residuals, np.nan)
    number = np.arange(1, len(residuals) + 1)
    every = max(1, len(residuals) // 12)
    axes.plot(number, residuals, markevery=every, markersize=4, linewidth=1, **style)


def _label_history(axes, reports: Collection[MethodReport], steps: int) -> None:
    if any(np.any(report.history > 0) for report in reports):
        axes.set(xscale="log", yscale="log")
    else:
        # A logarithmic axis without a positive number is an error.
        axes.set(xticks=[], yticks=[])
        middle = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "no residual above zero", **middle)
    axes.set(
        xlabel="step of the method",
        ylabel="largest residual before the step",
        title=f"Residuals at T = {steps}",
    )
    _limit_residuals(axes, reports)
    axes.grid(True, which="major", alpha=0.3)


def _limit_residuals(axes, reports: Collection[MethodReport]) -> None:
    """Let what diverges leave the panel, so that it does not flatten the others."""
    first = [r.history[0] for r in reports if len(r.history)]
    low, high = axes.get_ylim()
    if first and math.isfinite(max(first)) and max(first) > 0:
        axes.set_ylim(low, min(high, 1e6 * max(first)))


def _draw_steps(axes, report: MethodReport, style: dict[str, Any], below: int) -> None:
    """`below`: how many are drawn on top, around which this one stays visible."""
    steps = np.maximum(report.steps, 1)
    size = 4.5 + 0.9 * below
    width = 0.8 + 0.4 * below
    axes.plot(report.lengths, steps, markersize=size, linewidth=width, **style)
    stopped = ~np.asarray(report.converged)
    # Not converged: hollow, for the true number is above.
    axes.plot(
        np.asarray(report.lengths)[stopped],
        steps[stopped],
        linestyle="none",
        marker=style["marker"],
        markersize=size + 1,
        markerfacecolor="white",
        markeredgecolor=style["color"],
        zorder=3,
    )


def _label_steps(axes, lengths: tuple[int, ...], max_steps: int) -> None:
    axes.plot(lengths, lengths, color="0.5", linestyle="--", label="steps = T")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="T",
        ylabel="steps until certified",
        title=f"Steps (hollow: more than {max_steps})",
    )
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="major", alpha=0.3)
