"""`Diagnosis`: what `diagnose` returns, its text and its figure."""

import dataclasses
import importlib
import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..recurrence import Structure
from ..solver import AbstractMethod, Sequential
from ._growth import Growth
from ._measure import MethodReport, name_of

CAVEAT = (
    "A negative exponent alone does not promise few steps: it describes the solution,",
    "not the trajectories that a method passes on its way there. The steps below are",
    "measured.",
)
MARKERS = "osDv^P*Xhd"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """The result of [`pararnn.diagnose`][], in numbers. Prints as a report.

    **Attributes:**

    - `structure`: the [`pararnn.Structure`][] of the cell's Jacobian.
    - `width`: the number of real numbers in the state.
    - `length`: T.
    - `dtype`: the dtype of the state, as text.
    - `platform`: where memory and times were measured.
    - `trajectory`, `at_h0`: growth of perturbations along the solution, and with every
        Jacobian taken at `h0` instead. Each has `exponent`, `log_growth`, and the
        indices `first` and `last` of the states between which the growth was largest.
    - `methods`: by name, for each method: `solver`, `lengths`, `steps`, `converged`,
        `history` (largest residual before each step, at T), `serial_steps`, `memory`
        (bytes of temporary memory of the compiled forward solve) and `seconds`.
    - `sequential`: the same for the loop.
    - `max_steps`: the number of steps at which methods were stopped.
    - `recommended`: the solver to pass to [`pararnn.solve`][].
    - `reasons`: why, in sentences.
    """

    structure: Structure
    width: int
    length: int
    dtype: str
    platform: str
    trajectory: Growth
    at_h0: Growth
    methods: dict[str, MethodReport]
    sequential: MethodReport
    max_steps: int
    recommended: AbstractMethod | Sequential
    reasons: tuple[str, ...]

    @property
    def exponent(self) -> float:
        """The largest Lyapunov exponent along the solution, per step."""
        return self.trajectory.exponent

    @property
    def log_pl_bound(self) -> float:
        r"""The natural logarithm of an upper bound on $\sqrt\mu$, at most 0.

        $\mu$ is the Polyak-Łojasiewicz constant of the residual; see
        [`pararnn.diagnose`][].
        """
        return -max(0.0, self.trajectory.log_growth, self.at_h0.log_growth)

    def __repr__(self) -> str:
        title = (
            f"Diagnosis of T = {self.length} steps, width {self.width}, {self.dtype}, "
            f"{self.structure!r} Jacobian, on {self.platform}"
        )
        lines = [
            title,
            "=" * len(title),
            "",
            *_describe_growth(self.trajectory, self.at_h0, self.log_pl_bound),
            "",
            *_describe_methods(self.methods, self.sequential, self.max_steps),
            "",
            *_describe_recommendation(self.recommended, self.reasons),
        ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw each method's residuals by step at T, and its steps against T.

        **Arguments:** `path`, a file to write; its suffix says the format.

        **Returns:** the `matplotlib.figure.Figure`.

        **Raises:** `ImportError` without matplotlib, which is not a dependency of this
        library.
        """
        figure = _draw(self.methods, self.sequential.lengths, self.max_steps)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _describe_growth(
    trajectory: Growth, at_h0: Growth, log_pl_bound: float
) -> list[str]:
    return [
        "Growth of perturbations",
        f"  {'along the solution':<19} {_growth_line(trajectory)}",
        f"  {'at h0':<19} {_growth_line(at_h0)}",
        f"  {'conditioning':<19} sqrt(PL constant) at most "
        f"{format_power(log_pl_bound)}; 1 is best",
        *(f"  {line}" for line in CAVEAT),
    ]


def _describe_methods(
    methods: dict[str, MethodReport], sequential: MethodReport, max_steps: int
) -> list[str]:
    return [
        f"Steps until certified, of at most {max_steps}; at T: depth (evaluations",
        "one after the other), temporary memory and time of a forward solve",
        *(f"  {line}" for line in _table(methods, sequential)),
    ]


def _describe_recommendation(
    solver: AbstractMethod | Sequential, reasons: Sequence[str]
) -> list[str]:
    name = name_of(solver) if isinstance(solver, AbstractMethod) else "Sequential()"
    return [f"Recommended: {name}", *_bullets(reasons)]


def _growth_line(growth: Growth) -> str:
    text = f"Lyapunov exponent {growth.exponent:+.3g} a step; "
    if growth.log_growth == 0:
        return text + "no growth between any two states"
    return (
        f"{text}largest growth {format_power(growth.log_growth)}, "
        f"from state {growth.first} to {growth.last}"
    )


def _table(methods: dict[str, MethodReport], sequential: MethodReport) -> list[str]:
    lengths = sequential.lengths
    rows = [["T =", *map(str, lengths), "depth", "memory", "time"]]
    for name, report in methods.items():
        steps = [format_steps(report, i) for i in range(len(lengths))]
        depth = str(report.serial_steps) if report.converged[-1] else "-"
        rows.append([name, *steps, depth, *_costs(report)])
    unmeasured = ["-"] * len(lengths)
    depth = str(sequential.serial_steps)
    rows.append(["Sequential()", *unmeasured, depth, *_costs(sequential)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _costs(report: MethodReport) -> list[str]:
    return [_format_bytes(report.memory), format_duration(report.seconds)]


# Numbers and sentences as text.


def format_steps(report: MethodReport, at: int) -> str:
    mark = "" if report.converged[at] else "> "
    return f"{mark}{report.steps[at]}"


def plural(count: int) -> str:
    return f"{count} step" + "s" * (count != 1)


def format_power(logarithm: float) -> str:
    """Return `exp(logarithm)` as text, however large or small it is."""
    if not math.isfinite(logarithm):
        return f"{math.exp(logarithm) if logarithm < 0 else logarithm:g}"
    if abs(logarithm) < 600:
        return f"{math.exp(logarithm):.3g}"
    return f"1e{logarithm / math.log(10):+.0f}"


def _format_bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    units = ("B", "KiB", "MiB", "GiB")
    power = min(len(units) - 1, int(math.log2(max(1, count)) // 10))
    return f"{count / 1024**power:.3g} {units[power]}"


def format_duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _bullets(sentences: Sequence[str], width: int = 86) -> list[str]:
    """Wrap sentences at spaces, with a dash in front of each."""
    lines = []
    for sentence in sentences:
        lines.append("  -")
        for word in sentence.split(" "):
            if len(lines[-1]) + 1 + len(word) > width:
                lines.append("   ")
            lines[-1] += f" {word}"
    return lines


# The figure.


def _draw(
    methods: dict[str, MethodReport], lengths: tuple[int, ...], max_steps: int
) -> Any:
    try:
        Figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "Diagnosis.plot draws with matplotlib, which is not installed: "
            "`pip install pararnn[examples]`, or `pip install matplotlib`."
        ) from error
    # pyplot would keep the figure, and may open a window.
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
    # A logarithmic axis cannot show a residual of zero.
    residuals = np.where(residuals > 0, residuals, np.nan)
    number = np.arange(1, len(residuals) + 1)
    every = max(1, len(residuals) // 12)
    axes.plot(number, residuals, markevery=every, markersize=4, linewidth=1, **style)


def _label_history(axes, reports: Collection[MethodReport], steps: int) -> None:
    if any(np.any(report.history > 0) for report in reports):
        axes.set(xscale="log", yscale="log")
    else:
        # A logarithmic axis needs a positive number.
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
    """Let diverging residuals leave the panel, so that they do not flatten others."""
    first = [r.history[0] for r in reports if len(r.history)]
    low, high = axes.get_ylim()
    if first and math.isfinite(max(first)) and max(first) > 0:
        axes.set_ylim(low, min(high, 1e6 * max(first)))


def _draw_steps(axes, report: MethodReport, style: dict[str, Any], below: int) -> None:
    """Draw the steps, wide enough to be seen around the `below` lines on top."""
    steps = np.maximum(report.steps, 1)
    size = 4.5 + 0.9 * below
    width = 0.8 + 0.4 * below
    axes.plot(report.lengths, steps, markersize=size, linewidth=width, **style)
    stopped = ~np.asarray(report.converged)
    # Hollow where it did not converge: the true number is larger.
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
