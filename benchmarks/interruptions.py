"""Training runs that are killed at random moments and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pararnn.training import read_metrics
from pararnn.training._metrics import TIMES

from ._case import Case, Settings

TABLES = {
    "interruptions": "A small language model (ParaGRU, Newton's method) trained by "
    "examples/train_lm.py, a checkpoint every 5 steps, killed by SIGKILL at random "
    "moments and resumed each time. Broken: checkpoints that could not be restored. "
    "Most lost: steps that were logged and had to be taken again. Lines that differ: "
    "of the log, except for times, from that of a run that was never killed.",
}
SCRIPT = Path(__file__).parents[1] / "examples" / "train_lm.py"
OPTIONS = (
    *("--model.d-model", "32", "--model.d-hidden", "64"),
    *("--model.solver", "newton", "--model.segments", "16"),
    *("--data.length", "256", "--data.batch", "2", "--data.validation-batches", "2"),
    *("--optimiser.warmup", "10", "--checkpoint-every", "5", "--validate-every", "20"),
)


def cases(settings: Settings) -> Iterator[Case]:
    kills = 2 if settings.quick else 20
    yield Case("interruptions", {"kills": kills}, lambda: measure(kills))


def measure(kills: int, seed: int = 0) -> dict[str, int]:
    """Train once without and once with this many kills, and compare the logs."""
    # One kill for about every 15 steps, most of them between two checkpoints.
    steps = 15 * (kills + 1)
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        _start(whole, steps).wait()
        lost = []
        for _ in range(kills):
            process = _start(killed, steps)
            _wait_for_steps(process, killed, chance.randint(1, 14))
            time.sleep(chance.uniform(0, 0.2))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            lost.append(_last_step(killed) - _last_checkpoint(killed))
        code = _start(killed, steps).wait()
        expected, got = _curve(whole), _curve(killed)
    return {
        "steps": steps,
        "broken": int(code != 0),
        "most lost": max(lost),
        "lines": len(expected),
        "lines that differ": sum(a != b for a, b in zip(expected, got, strict=False))
        + abs(len(expected) - len(got)),
    }


def _start(folder: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--out", folder, "--resume", *OPTIONS]
    return subprocess.Popen(
        [*map(str, command), "--steps", str(steps)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Wait until the run has logged this many new steps, or has ended."""
    log, start = folder / "metrics.jsonl", None
    while process.poll() is None:
        # The log appears, or is rewritten without the lost steps, when the loop starts.
        fresh = log.exists() and time.time() - log.stat().st_mtime < 0.5
        if fresh and start is None:
            start = _last_step(folder)
        if start is not None and _last_step(folder) >= start + count:
            return
        time.sleep(0.002)


def _last_step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder)), default=0)


def _last_checkpoint(folder: Path) -> int:
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _curve(folder: Path) -> list[str]:
    return [
        json.dumps({k: v for k, v in line.items() if k not in TIMES})
        for line in read_metrics(folder)
    ]
