"""The log of a run: a line of JSON for every step, and TensorBoard if installed."""

import importlib
import json
from pathlib import Path
from typing import Any

from .._records import read_records, write_records

LOG = "metrics.jsonl"

# What the same run gives again, bit for bit; the others are times.
TIMES = ("seconds", "tokens_per_second")


class MetricLog:
    """Appends lines to `metrics.jsonl`; each has a `"step"`.

    **Arguments:** `folder`; `step`, the number of steps that the run has: lines of
    later ones, and one that was cut by a crash, are dropped. TensorBoard's files are
    written too where `tensorboardX` is installed.
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
    """The lines of a run's log, without one that was cut by a crash.

    **Raises:** `ValueError` if a complete line is no JSON object.
    """
    return read_records(folder / LOG)


def _open_board(folder: Path, step: int):
    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ImportError:
        return None
    return tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
