"""Newton on different numbers of segments against `lax.scan`."""

from collections.abc import Iterator

import pararnn

from ._case import Case, Settings
from ._peers import scan_states
from ._problems import forward, make_diagonal_gru
from ._timing import compile_all, relative_error, time_in_turn

TABLES = {
    "segments": "`pararnn.Newton(segments=S)` against `lax.scan`; forward, float32."
}


def cases(settings: Settings) -> Iterator[Case]:
    for problem in map(make_diagonal_gru, (1, 16)):
        for steps in settings.steps(16384):
            for segments in (1, 8, 64, 512, steps):
                if segments > steps:
                    continue
                yield Case(
                    "segments",
                    {"cell": str(problem), "T": steps, "segments": segments},
                    lambda p=problem, t=steps, s=segments: _measure(p, t, s, settings),
                )


def _measure(problem, steps, segments, settings):
    def newton(f, xs, h0):
        solver = pararnn.Newton(segments=segments)
        sol = pararnn.solve(f, xs, h0, solver=solver, throw=False)
        return sol.states, sol.stats["num_steps"]

    args = problem.make(steps)
    runs = {
        "scan": forward(problem, scan_states),
        "newton": forward(problem, newton),
    }
    programs = compile_all(runs, *args)
    states, num_steps = programs["newton"](*args)
    error = relative_error(states, programs["scan"](*args))
    times = time_in_turn(programs, *args, quick=settings.quick)
    return {
        "scan ms": times.ms("scan"),
        "Newton ms": times.ms("newton"),
        "ratio": times.ratio("newton", "scan"),
        "iterations": int(num_steps),
        "max rel. error": error,
    }
