"""The log of a run: a line of JSON for every step, and TensorBoard if installed."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

# What the same run gives again, bit for bit; the others are times.
TIMES = ("seconds", "tokens_per_second")


class MetricLog:
    """Appends lines to `metrics.jsonl`; each has a `"step"`.

    **Arguments:** `folder`; `step`, the number of steps that the run has: lines of
    later ones, and one that was cut by a crash, are dropped. `tensorboard`, whether to
    write TensorBoard's files too, where `tensorboardX` is installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = True):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(fresh, self.path)
        self._file = self.path.open("a")
        self._board = _open_board(folder, step) if tensorboard else None

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

    **Raises:** `ValueError` if another than the last line is no JSON.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    *complete, _ = path.read_text().split("\n")
    try:
        return [json.loads(line) for line in complete]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} has a line that is no JSON: {error}. Was it edited by hand?"
        ) from error


def _open_board(folder: Path, step: int):
    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ImportError:
        return None
    return tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
