"""The log of a run, and its curves as a picture."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .._jsonl import read_records, write_records

LOG = "metrics.jsonl"

# Metrics that differ when a run is repeated; all others are the same bit for bit.
TIMES = ("seconds", "tokens_per_second")


class MetricLog:
    """Appends lines to `metrics.jsonl`; each has a `"step"`.

    TensorBoard's files are written too if `tensorboardX` is installed.

    **Arguments:** `folder`; `step`, how many steps the run has taken: lines of later
    steps, and a line that was cut off by a crash, are dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / LOG
        write_records(
            path, (line for line in read_metrics(folder) if line["step"] <= step)
        )
        self._file = path.open("a")
        self._board = _open_board(folder, step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line. **Raises:** `OSError` if the disk is full."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log, without one that was cut off by a crash.

    **Raises:** `ValueError` if a complete line is not a JSON object.
    """
    return read_records(folder / LOG)


def _open_board(folder: Path, step: int):
    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ImportError:
        return None
    return tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def draw_curves(folder: str | Path) -> Path:
    """Draw bits per byte, Newton steps and the gradient's norm over the steps.

    **Arguments:** `folder` of the run.

    **Returns:** the path of the picture, `curves.png` in the folder.

    **Raises:** `ValueError` if the log is broken.
    """
    folder = Path(folder)
    lines = read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation_bits_per_byte" in line]
    newton = any("newton_steps" in line for line in steps)
    figure = Figure(figsize=(7, 6 if newton else 4), layout="constrained")
    heights = [3, 1, 1] if newton else [3, 1]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _curve(axes[0], steps, "bits_per_byte", "training", "0.6")
    axes[0].plot(
        [line["step"] for line in checks],
        [line["validation_bits_per_byte"] for line in checks],
        "o-",
        color="tab:blue",
        markersize=3,
        label="validation",
    )
    if steps:
        # The first steps, at eight bits, would make the rest look flat.
        values = [line["bits_per_byte"] for line in steps]
        axes[0].set_ylim(0.95 * min(values), np.quantile(values, 0.98) * 1.05)
        axes[0].legend(frameon=False)
    axes[0].set_ylabel("bits per byte")
    _curve(axes[1], steps, "gradient_norm", None, "tab:red")
    axes[1].set_ylabel("gradient norm")
    axes[1].set_yscale("log")
    if newton:
        _curve(axes[2], steps, "newton_steps", None, "tab:green")
        axes[2].set_ylabel("Newton steps")
        axes[2].set_ylim(bottom=0)
    axes[-1].set_xlabel("optimiser step")
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    return path


def _curve(axis, lines, name: str, label: str | None, colour: str) -> None:
    known = [line for line in lines if name in line]
    axis.plot(
        [line["step"] for line in known],
        [line[name] for line in known],
        color=colour,
        linewidth=1,
        label=label,
    )
    axis.spines[["top", "right"]].set_visible(False)
