"""The schedules of the gradient against back-propagation through `lax.scan`."""

from collections.abc import Iterator

import pararnn
from pararnn.solver._adjoint import ADJOINTS

from ._case import Case, Settings
from ._peers import scan_states
from ._problems import FIVE, forward, value_and_gradient
from ._timing import compile_all, megabytes, memory_ratio, time_in_turn

TABLES = {
    "adjoint": "Value and gradient of `pararnn.solve` by `adjoint`, against those of "
    "`lax.scan`; float32. Each cell of the table is a ratio to `lax.scan`, except for "
    "the columns with units."
}


def cases(settings: Settings) -> Iterator[Case]:
    for problem in FIVE:
        for steps in settings.steps(16384):
            yield Case(
                "adjoint",
                {"cell": str(problem), "T": steps},
                lambda p=problem, t=steps: _measure(p, t, settings),
            )


def _measure(problem, steps, settings):
    def by(adjoint):
        return lambda f, xs, h0: pararnn.solve(f, xs, h0, adjoint=adjoint).states

    methods = {"scan": scan_states, **{name: by(name) for name in ADJOINTS}}
    args = problem.make(steps)
    runs = {
        name: value_and_gradient(forward(problem, method))
        for name, method in methods.items()
    }
    programs = compile_all(runs, *args)
    times = time_in_turn(programs, *args, quick=settings.quick)
    scan = programs["scan"]
    return {
        "scan ms": times.ms("scan"),
        **{f"{name} ratio": times.ratio(name, "scan") for name in ADJOINTS},
        "scan MB": megabytes(scan),
        **{
            f"{name} memory ratio": memory_ratio(programs[name], scan)
            for name in ADJOINTS
        },
    }
