"""The default `pararnn.solve` against `lax.scan` of the same cell."""

from collections.abc import Iterator

import pararnn

from ._case import Case, Settings, too_large
from ._peers import scan_states
from ._problems import FIVE, forward, value_and_gradient
from ._timing import (
    compile_all,
    megabytes,
    memory_ratio,
    relative_error,
    time_in_turn,
)

TABLES = {
    "solve": "`pararnn.solve` with its defaults against `lax.scan` of the same cell, "
    "float32; batches by `vmap`. `v&g`: value and gradient of the mean of the squares "
    "with respect to parameters, inputs and initial state; its memory is what XLA "
    "allocates beside arguments and results."
}


def cases(settings: Settings) -> Iterator[Case]:
    for problem in FIVE:
        for steps in settings.steps(1024, 16384, 131072):
            for batch in (1, 16):
                yield Case(
                    "solve",
                    {"cell": str(problem), "T": steps, "batch": batch},
                    lambda p=problem, t=steps, b=batch: _measure(p, t, b, settings),
                    left_out=too_large(problem.input_bytes(steps, batch)),
                )


def _measure(problem, steps, batch, settings):
    def solve(f, xs, h0):
        return pararnn.solve(f, xs, h0).states

    def solve_silently(f, xs, h0):
        return pararnn.solve(f, xs, h0, throw=False).states

    args = problem.make(steps, batch)
    methods = {"scan": scan_states, "solve": solve, "silent": solve_silently}
    runs = {name: forward(problem, method, batch) for name, method in methods.items()}
    programs = compile_all(runs, *args)
    error = relative_error(programs["solve"](*args), programs["scan"](*args))
    times = time_in_turn(programs, *args, quick=settings.quick)
    del runs["silent"]
    gradients = {name: value_and_gradient(run) for name, run in runs.items()}
    programs = compile_all(gradients, *args)
    gradient_times = time_in_turn(programs, *args, quick=settings.quick)
    return {
        "scan ms": times.ms("scan"),
        "solve ms": times.ms("solve"),
        "ratio": times.ratio("solve", "scan"),
        "ratio with throw=False": times.ratio("silent", "scan"),
        "v&g scan ms": gradient_times.ms("scan"),
        "v&g solve ms": gradient_times.ms("solve"),
        "v&g ratio": gradient_times.ratio("solve", "scan"),
        "v&g scan MB": megabytes(programs["scan"]),
        "v&g solve MB": megabytes(programs["solve"]),
        "v&g memory ratio": memory_ratio(programs["solve"], programs["scan"]),
        "max rel. error": error,
    }
