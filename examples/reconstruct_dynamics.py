"""Reconstruct chaotic systems from observations, and see what the networks found.

    python examples/reconstruct_dynamics.py --out runs/dynamics
    python examples/reconstruct_dynamics.py --systems lorenz63 --steps 100000

diffrax makes the observations. AL-RNN and PLRNN are trained on windows of them, forced
sparsely or by generalised teacher forcing, all runs side by side. Then each network
runs free, and is compared with a trajectory that it has not seen: where it spends its
time, its power spectrum, its largest Lyapunov exponent. Results go to results.jsonl in
the folder as they come, each with a picture, and in the end to the table results.md.
Run the same command again after an interruption, and only what is missing is run.
"""

import dataclasses
import pathlib
import sys
from typing import Literal

import tyro

import pararnn
from pararnn.dynamics import SYSTEMS, Recipe, Study, reconstruct

SOLVERS = {
    "auto": pararnn.Auto(),
    "newton": pararnn.Newton(),
    "sequential": pararnn.Sequential(),
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to reconstruct, and with what."""

    systems: tuple[str, ...] = tuple(SYSTEMS)
    """Names of systems. Defaults to all."""
    cells: tuple[str, ...] = ("alrnn:rectified=2", "plrnn")
    """Names of cells, with options after colons."""
    forcings: tuple[str, ...] = ("sparse:interval=16", "generalised")
    """Names of forcings, with options after colons."""
    out: pathlib.Path = pathlib.Path("runs/dynamics")
    """Folder for results and pictures."""
    units: int = 20
    """Units in a state."""
    runs: int = 3
    """Independent runs."""
    observations: int = 100_000
    """Observations to train on; the test has as many."""
    steps: int = 60_000
    """Steps of the optimiser."""
    length: int = 200
    """Predictions in a window."""
    solver: Literal["auto", "newton", "sequential"] = "auto"
    """Solver of the forced recurrence."""
    seed: int = 0
    """Seed of everything that is drawn."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        study = Study(
            units=arguments.units,
            runs=arguments.runs,
            observations=arguments.observations,
            seed=arguments.seed,
            recipe=Recipe(steps=arguments.steps, length=arguments.length),
            solver=SOLVERS[arguments.solver],
        )
        what = arguments.systems, arguments.cells, arguments.forcings
        print(reconstruct(*what, arguments.out, study))
    except (ValueError, OSError) as error:
        print(f"reconstruct_dynamics.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
