"""How time grows with the length, and how memory grows with iterations."""

from collections.abc import Iterator

import numpy as np

import pararnn

from ._case import Case, Row, Settings
from ._peers import scan_states
from ._problems import forward, make_diagonal_gru, value_and_gradient
from ._timing import compile_all, megabytes, memory_ratio, time_in_turn

TABLES = {
    "scaling": "`pararnn.solve` with its defaults and `lax.scan` of the diagonal GRU "
    "of width 16 over lengths; float32.",
    "exponents": "The slope of log(time) over log(T), fitted to the rows above.",
    "iterations": "Memory of value and gradient by `Newton(segments=64)`, compiled "
    "for different limits on its steps. `memory ratio` is to the lowest limit.",
}
PROBLEM = make_diagonal_gru(16)
TIMES = {
    "forward, lax.scan": "scan ms",
    "forward, solve": "solve ms",
    "value and gradient, lax.scan": "v&g scan ms",
    "value and gradient, solve": "v&g solve ms",
}
LIMITS = (1, 2, 4, 8, 16, 64)


def cases(settings: Settings) -> Iterator[Case]:
    for steps in settings.steps(*(2**k for k in range(10, 21))):
        yield Case("scaling", {"T": steps}, lambda t=steps: _measure(t, settings))
    steps = settings.steps(16384)[-1]
    for limit in LIMITS:
        yield Case(
            "iterations",
            {"T": steps, "max_steps": limit},
            lambda t=steps, m=limit: _measure_memory(t, m),
        )


def derive(rows: list[Row]) -> list[Row]:
    """Fit the exponents to the measured rows."""
    rows = [row for row in rows if row.table == "scaling" and row.values]
    if len(rows) < 2:
        return []
    steps = [row.key["T"] for row in rows]

    def fit(column):
        times = [row.values[column] for row in rows]
        return float(np.polyfit(np.log(steps), np.log(times), 1)[0])

    return [
        Row(
            "scaling",
            "exponents",
            {"time of": name},
            {"exponent": fit(column), "from T": min(steps), "to T": max(steps)},
        )
        for name, column in TIMES.items()
    ]


def _measure(steps, settings):
    def solve(f, xs, h0):
        return pararnn.solve(f, xs, h0).states

    args = PROBLEM.make(steps)
    runs = {
        "scan": forward(PROBLEM, scan_states),
        "solve": forward(PROBLEM, solve),
    }
    times = time_in_turn(compile_all(runs, *args), *args, quick=settings.quick)
    gradients = {name: value_and_gradient(run) for name, run in runs.items()}
    programs = compile_all(gradients, *args)
    gradient_times = time_in_turn(programs, *args, quick=settings.quick)
    return {
        "scan ms": times.ms("scan"),
        "solve ms": times.ms("solve"),
        "ratio": times.ratio("solve", "scan"),
        "v&g scan ms": gradient_times.ms("scan"),
        "v&g solve ms": gradient_times.ms("solve"),
        "v&g ratio": gradient_times.ratio("solve", "scan"),
    }


def _measure_memory(steps, limit):
    def newton(limit):
        def method(f, xs, h0):
            solver = pararnn.Newton(segments=64)
            sol = pararnn.solve(f, xs, h0, solver=solver, max_steps=limit, throw=False)
            return sol.states

        return value_and_gradient(forward(PROBLEM, method))

    runs = {
        "scan": value_and_gradient(forward(PROBLEM, scan_states)),
        "least": newton(LIMITS[0]),
        "this": newton(limit),
    }
    programs = compile_all(runs, *PROBLEM.make(steps))
    this = programs["this"]
    return {
        "MB": megabytes(this),
        "memory ratio": memory_ratio(this, programs["least"]),
        "memory ratio to lax.scan": memory_ratio(this, programs["scan"]),
    }
