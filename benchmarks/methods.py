"""Every method on cells from contractive to chaotic: steps, time, error."""

from collections.abc import Iterator

import pararnn

from ._case import Case, Settings
from ._peers import scan_states
from ._problems import forward, make_diagonal_gru, make_elman
from ._timing import compile_all, relative_error, time_in_turn

TABLES = {
    "methods": "Each method alone, one segment a step or 16, until it is certified; "
    "float64, inputs of unit variance. `gain` scales the recurrent matrix of the "
    "Elman cell. As many steps as segments always suffice, and chaotic cells need them."
}
METHODS = {
    "Newton": pararnn.Newton,
    "QuasiNewton": pararnn.QuasiNewton,
    "QuasiNewton(probes=4)": lambda s: pararnn.QuasiNewton(s, probes=4),
    "DampedNewton": pararnn.DampedNewton,
    "ELK": pararnn.ELK,
    "ELK(diagonal=True)": lambda s: pararnn.ELK(s, diagonal=True),
    "Picard": pararnn.Picard,
    "Jacobi": pararnn.Jacobi,
}
PROBLEMS = {
    "diagonal GRU 8": make_diagonal_gru(8),
    "dense Elman 8, gain 0.5": make_elman(8),
    "dense Elman 8, gain 1.5": make_elman(8, 1.5),
    "dense Elman 8, gain 3": make_elman(8, 3.0),
}


def cases(settings: Settings) -> Iterator[Case]:
    steps = settings.steps(512)[0]
    for cell in PROBLEMS:
        for name in METHODS:
            for segments in (steps, 16):
                yield Case(
                    "methods",
                    {"cell": cell, "T": steps, "method": name, "segments": segments},
                    lambda c=cell, m=name, s=segments: _measure(
                        PROBLEMS[c], steps, METHODS[m](s), settings
                    ),
                    x64=True,
                )


def _measure(problem, steps, method, settings):
    def solve(f, xs, h0):
        sol = pararnn.solve(f, xs, h0, solver=method, throw=False)
        stats = sol.stats
        return sol.states, stats["num_steps"], stats["residual"], stats["nonfinite"]

    args = problem.make(steps, dtype=float)
    runs = {"scan": forward(problem, scan_states), "method": forward(problem, solve)}
    programs = compile_all(runs, *args)
    states, num_steps, residual, nonfinite = programs["method"](*args)
    error = relative_error(states, programs["scan"](*args))
    times = time_in_turn(programs, *args, quick=True)
    return {
        "steps": int(num_steps),
        "residual": float(residual),
        "overflows": int(nonfinite),
        "max rel. error": error,
        "ratio to scan": times.ratio("method", "scan"),
    }
