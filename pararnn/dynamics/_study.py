"""Training and measuring every combination of systems, cells and forcings."""

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._jsonl import Record, Records, describe_machine
from .._parameters import check_size
from .._progress import Progress
from .._registry import make_by_name, parse_spec
from ..cells import ALRNNCell, make_cell
from ..solver import AbstractSolver, Auto, check_solver
from ._fit import (
    Forcing,
    GeneralisedForcing,
    Recipe,
    Reconstruction,
    SparseForcing,
    fit,
)
from ._measures import (
    find_symbols,
    largest_exponent,
    spectrum_distance,
    state_space_divergence,
)
from ._report import draw_reconstruction, write_table
from ._systems import SYSTEMS, Series, System, flow_map, simulate

RESULTS_FILE, TABLE_FILE = "results.jsonl", "results.md"
FORCINGS = {"sparse": SparseForcing, "generalised": GeneralisedForcing}
# Steps over which a Lyapunov exponent is averaged.
EXPONENT_STEPS = 50_000


@dataclasses.dataclass(frozen=True)
class Study:
    """What is the same for all combinations.

    **Raises:** `ValueError` on a value outside of its range, `TypeError` if `solver` is
    not a solver.
    """

    units: int = 20
    """Units of a state."""
    runs: int = 3
    """Independent runs, trained side by side."""
    observations: int = 100_000
    """Observations to train on; the test has as many."""
    seed: int = 0
    """Seed of everything that is drawn."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """How long, and on what sequences."""
    solver: AbstractSolver = dataclasses.field(default_factory=Auto)
    """Solver of the forced recurrence."""

    def __post_init__(self):
        for name in ("units", "runs", "observations"):
            check_size("Study", name, getattr(self, name))
        check_size("Study", "seed", self.seed, least=0)
        check_solver("Study", self.solver)


def make_forcing(spec: str) -> Forcing:
    """Make a forcing by its name and options: `"sparse:interval=16"`, `"generalised"`.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist.
    """
    name, options = parse_spec("make_forcing", spec)
    return make_by_name("make_forcing", "forcing", FORCINGS, name, {}, options)


def reconstruct(
    systems: Sequence[str],
    cells: Sequence[str],
    forcings: Sequence[str],
    folder: str | os.PathLike[str],
    study: Study = Study(),
    *,
    visible: bool = True,
) -> Path:
    """Train every cell on every system, and compare how they run freely.

    Every combination adds a line to `results.jsonl` in the folder, and a picture of the
    best of its runs. Combinations that the file has from an earlier call of the same
    study are not run again. `results.md` shows all of them as a table.

    **Arguments:**

    - `systems`: names of `pararnn.dynamics.SYSTEMS`.
    - `cells`: `"alrnn"`, `"plrnn"` or any other cell that needs no input, with options
        after colons: `"alrnn:rectified=2"`.
    - `forcings`: as for [`pararnn.dynamics.make_forcing`][].
    - `folder`: created if it does not exist.
    - `study`: what is the same for all combinations.
    - `visible`: show a progress bar, and a line for each result.

    **Returns:** the path of the results.

    **Raises:** `ValueError` on unknown names or options, before anything is trained;
    `OSError` if results cannot be written.
    """
    for name in systems:
        if name not in SYSTEMS:
            raise ValueError(
                f"reconstruct: unknown system {name!r}; there are {', '.join(SYSTEMS)}."
            )
    made = {spec: make_forcing(spec) for spec in forcings}
    for name, cell in itertools.product(systems, cells):
        observed = len(SYSTEMS[name].start)
        eqx.filter_eval_shape(lambda: _make_models(cell, study, observed, jr.key(0)))
    records = Records(Path(folder) / RESULTS_FILE)
    runs = len(systems) * len(cells) * len(forcings)
    with Progress(visible, runs) as progress:
        for name in systems:
            data = _observe(SYSTEMS[name], study)
            run = _Run(records, data, study, Path(folder), progress)
            run.add_system()
            for cell in cells:
                for spec, forcing in made.items():
                    run.add(cell, spec, forcing)
    write_table(records.records, Path(folder) / TABLE_FILE)
    return records.path


class _Data(NamedTuple):
    """Observations of one system: for training, for the test, and another series."""

    system: System
    series: Series
    test: Series
    another: Series
    key: PRNGKeyArray


def _observe(system: System, study: Study) -> _Data:
    keys = jr.split(jr.key(study.seed), 4)
    series = simulate(system, study.observations, key=keys[0])
    test, another = (
        simulate(system, study.observations, like=series, key=key) for key in keys[1:3]
    )
    return _Data(system, series, test, another, keys[3])


def _make_models(
    cell: str, study: Study, observed: int, key: PRNGKeyArray
) -> Reconstruction:
    """Make the models of all runs, leaves stacked."""
    name, options = parse_spec("make_cell", cell)

    def make(key: PRNGKeyArray) -> Reconstruction:
        inner, outer = jr.split(key)
        made = make_cell(name, 0, study.units, key=inner, **options)
        return Reconstruction(made, observed, key=outer)

    return eqx.filter_vmap(make)(jr.split(key, study.runs))


class _Run:
    """Runs all combinations with one system."""

    def __init__(self, records: Records, data: _Data, study: Study, folder, progress):
        self.records, self.data, self.study = records, data, study
        self.folder, self.progress = folder, progress
        self.about = {
            "system": data.system.name,
            "units": study.units,
            "runs": study.runs,
            "observations": study.observations,
            "seed": study.seed,
            "recipe": dataclasses.asdict(study.recipe),
            "solver": repr(study.solver),
            "jax": jax.__version__,
        }

    def add_system(self) -> None:
        """Measure how two trajectories of the system itself differ."""
        fields = {"kind": "system", **self.about}
        if self.records.find(**fields):
            return
        data = self.data
        start = data.test.values[0] * data.test.scale + data.test.mean
        rate = _exponent_rate(
            flow_map(data.system), jnp.asarray(start, float), data.system
        )
        found = _compare(data.test.values, data.another.values) | {"exponent": rate}
        self.records.append(fields | found | {"machine": describe_machine()})

    def add(self, cell: str, spec: str, forcing: Forcing) -> None:
        """Train, measure and draw one combination, if it is not recorded yet."""
        what = f"{self.data.system.name}, {cell}, {spec}"
        fields = {"kind": "reconstruction", **self.about, "cell": cell, "forcing": spec}
        if self.records.find(**fields):
            self.progress.finish(f"{what}: there already")
            return
        first, second = jr.split(self.data.key)
        self.progress.begin(what, self.study.recipe.steps)
        fitted = fit(
            _make_models(cell, self.study, self.data.series.values.shape[1], first),
            self.data.series,
            forcing,
            self.study.recipe,
            solver=self.study.solver,
            key=second,
            on_point=lambda step, loss: self.progress.show_step(
                step, f"{what}, loss {loss:.4f}"
            ),
        )
        each = _separate(fitted.models, self.study.runs)
        values = self.data.test.values
        first_seen = jnp.asarray(values[0], float)
        states = [np.asarray(_generate(m, first_seen, len(values))) for m in each]
        measured = [self._measure(*pair) for pair in zip(each, states, strict=True)]
        best = int(np.argmin([found["divergence"] for found in measured]))
        self._draw(each[best], states[best], what, cell, spec)
        curves = fitted._asdict()
        del curves["models"]
        self.records.append(fields | curves | {"measured": measured, "best": best})
        self.progress.finish(f"{what}: {_outcome(measured)}")

    def _measure(self, model: Reconstruction, states: np.ndarray) -> Record:
        found = _compare(self.data.test.values, states[:, : model.observed])
        first = jnp.asarray(self.data.test.values[0], float)
        rate = _exponent_rate(model.step, model.start(first), self.data.system)
        return found | {"exponent": rate}

    def _draw(self, model, states, what: str, cell: str, spec: str) -> None:
        symbols = None
        if isinstance(model.cell, ALRNNCell):
            symbols = find_symbols(model.cell, states)
        name = "-".join((self.data.system.name, cell, spec))
        draw_reconstruction(
            self.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.png",
            self.data.test.values,
            states[:, : model.observed],
            symbols,
            title=f"{what}: the best of {self.study.runs} runs",
            plane=self.data.system.plane,
        )


# Compiled once for all runs.
@eqx.filter_jit
def _generate(model: Reconstruction, x: Array, steps: int) -> Array:
    return model.generate(x, steps)


def _separate(models: Reconstruction, runs: int) -> list[Reconstruction]:
    arrays, static = eqx.partition(models, eqx.is_array)
    return [
        eqx.combine(jax.tree.map(lambda v: v[n], arrays), static) for n in range(runs)
    ]


def _compare(test: np.ndarray, free: np.ndarray) -> Record:
    return {
        "divergence": state_space_divergence(test, free),
        "spectrum": spectrum_distance(test, free),
    }


def _exponent_rate(step, start, system: System) -> float | None:
    """Return the largest Lyapunov exponent per unit of time; `None` if not finite."""
    rate = largest_exponent(step, start, EXPONENT_STEPS) / system.interval
    return rate if math.isfinite(rate) else None


def _outcome(measured: list[dict[str, Any]]) -> str:
    divergences = " ".join(f"{found['divergence']:.2f}" for found in measured)
    spectra = " ".join(f"{found['spectrum']:.2f}" for found in measured)
    return f"divergence {divergences}, spectrum {spectra}"
