"""Reconstructions as pictures, and their measures as a table."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._jsonl import Record
from ._measures import Symbols, power_spectrum

COLOURS = matplotlib.colormaps["tab10"](range(10))[:, :3]
# Further regions are drawn in grey: a graph of more would be unreadable.
MOST_SYMBOLS = 8
# The number of points drawn of a trajectory.
POINTS = 5_000
HEADER = (
    "System",
    "Cell",
    "Forcing",
    "Divergence",
    "Spectrum",
    "Lyapunov exponent",
    "Seconds a run",
)


def draw_reconstruction(
    path: str | Path,
    true: Float[np.ndarray, "T N"],
    generated: Float[np.ndarray, "T N"],
    symbols: Symbols | None = None,
    *,
    title: str = "",
    plane: tuple[int, int] = (0, 2),
    smoothing: float = 20.0,
) -> Path:
    """Draw both attractors, their spectra, and the graph of the symbols.

    **Arguments:** `path`, of a PNG or SVG; `true` and `generated`, `[T, N]`; `symbols`
    of `generated`, from [`pararnn.dynamics.find_symbols`][], which colour it; `title`;
    `plane`, the two variables that are drawn; `smoothing`, of the spectra.

    **Returns:** `path`.
    """
    count = 3 if symbols is None else 4
    figure = Figure(figsize=(3.6 * count, 3.6), layout="constrained")
    axes = list(figure.subplots(1, count))
    colours = _colours(symbols, len(generated))
    _trajectory(axes[0], true, plane, np.zeros((len(true), 3)) + 0.25, "system")
    _trajectory(axes[1], generated, plane, colours, "reconstruction")
    axes[1].set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    if symbols is not None:
        _graph(axes[2], symbols, generated[:, plane], axes[0])
    _spectra(axes[-1], true, generated, smoothing)
    figure.suptitle(title)
    path = Path(path)
    figure.savefig(path, dpi=130)
    return path


def _colours(symbols: Symbols | None, steps: int) -> np.ndarray:
    if symbols is None:
        return np.tile(COLOURS[0], (steps, 1))
    palette = np.full((len(symbols.regions), 3), 0.7)
    known = min(len(palette), MOST_SYMBOLS)
    palette[:known] = COLOURS[:known]
    return palette[symbols.code]


def _trajectory(axis: Axes, points, plane, colours, title: str) -> None:
    x, y = (points[:POINTS, i] for i in plane)
    axis.scatter(x, y, c=colours[:POINTS], s=0.6, linewidths=0, rasterized=True)
    _name_axes(axis, plane, title)


def _name_axes(axis: Axes, plane, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(f"variable {plane[0] + 1}, in standard deviations")
    axis.set_ylabel(f"variable {plane[1] + 1}")


def _graph(axis: Axes, symbols: Symbols, points, like: Axes) -> None:
    """Draw each region at the mean of its states, with the steps between regions."""
    known = min(len(symbols.regions), MOST_SYMBOLS)
    places = np.stack([points[symbols.code == n].mean(0) for n in range(known)])
    for start in range(known):
        for end in range(known):
            fraction = symbols.transitions[start, end]
            if start == end or fraction == 0:
                continue
            axis.annotate(
                "",
                xy=places[end],
                xytext=places[start],
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": COLOURS[start],
                    "linewidth": 0.8 + 2.2 * np.sqrt(fraction),
                    "shrinkA": 15,
                    "shrinkB": 15,
                    "connectionstyle": "arc3,rad=0.25",
                },
            )
    visits = np.bincount(symbols.code, minlength=known)[:known] / len(symbols.code)
    for n, (x, y) in enumerate(places):
        axis.plot(x, y, "o", color=COLOURS[n], markersize=28)
        signs = "".join("+" if positive else "−" for positive in symbols.regions[n])
        text = f"{signs}\n{100 * visits[n]:.0f} %"
        axis.annotate(text, (x, y), ha="center", va="center", color="w", fontsize=7)
    axis.set(xlim=like.get_xlim(), ylim=like.get_ylim(), xticks=[], yticks=[])
    rest = len(symbols.regions) - known
    more = f", {rest} more not drawn" if rest else ""
    axis.set_title(f"linear regions{more}", fontsize=10)


def _spectra(axis: Axes, true, generated, smoothing: float) -> None:
    for points, colour, label in (
        (true, "0.25", "system"),
        (generated, COLOURS[0], "reconstruction"),
    ):
        if not np.all(np.isfinite(points)):
            continue
        power = power_spectrum(points, smoothing)[:, 0]
        frequencies = np.arange(1, len(power) + 1) / len(points)
        axis.loglog(frequencies, power, color=colour, label=label, linewidth=1)
    axis.set_title("power spectrum of variable 1", fontsize=10)
    axis.set_xlabel("frequency, per step")
    axis.legend(frameon=False, fontsize=8)


def write_table(records: Sequence[Record], path: Path) -> None:
    """Write the medians of the runs, with the best run in brackets, as Markdown.

    The first row of a system compares two trajectories of the system itself. No
    reconstruction can be better than that, except by chance.
    """
    rows = [HEADER, ("---",) * len(HEADER)]
    for record in records:
        if record["kind"] == "system":
            rows.append(_system_row(record))
            rows += [_row(r) for r in records if _belongs(r, record)]
    lines = ("| " + " | ".join(row) + " |" for row in rows)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _belongs(record: Record, system: Record) -> bool:
    same = ("system", "units", "runs", "observations", "seed", "recipe", "solver")
    return record["kind"] == "reconstruction" and all(
        record[name] == system[name] for name in same
    )


def _system_row(record: Record) -> tuple[str, ...]:
    return (
        record["system"],
        "the system itself",
        "",
        f"{record['divergence']:.2f}",
        f"{record['spectrum']:.2f}",
        _number(record["exponent"]),
        "",
    )


def _row(record: Record) -> tuple[str, ...]:
    best = record["measured"][record["best"]]

    def cell(name: str) -> str:
        values = [found[name] for found in record["measured"]]
        middle = None if None in values else statistics.median(values)
        return f"{_number(middle)} ({_number(best[name])})"

    return (
        record["system"],
        record["cell"],
        record["forcing"],
        cell("divergence"),
        cell("spectrum"),
        cell("exponent"),
        f"{record['seconds'] / record['runs']:.0f}",
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"
