"""Full Newton, one segment a step, against a textbook DEER loop."""

import functools as ft
from collections.abc import Iterator

import pararnn

from ._case import Case, Settings
from ._peers import deer, newton_floor, scan_states
from ._problems import forward, make_dense_gru, make_diagonal_gru
from ._timing import (
    compile_all,
    compile_program,
    megabytes,
    memory_ratio,
    relative_error,
    time_in_turn,
)

TABLES = {
    "newton": "`pararnn.Newton()`, every step its own segment, against a loop written "
    "from the paper of DEER (Lim et al., 2309.12252); forward, float32. The errors are "
    "to `lax.scan`. Floor: one evaluation of the cell and one elementwise `lax.scan` "
    "for each of Newton's iterations, and one evaluation for the guess; no "
    "derivatives, no check."
}


def cases(settings: Settings) -> Iterator[Case]:
    problems = (
        *map(make_diagonal_gru, (4, 16)),
        *map(make_dense_gru, (4, 8)),
    )
    for problem in problems:
        for steps in settings.steps(1024, 4096, 16384):
            yield Case(
                "newton",
                {"cell": str(problem), "T": steps},
                lambda p=problem, t=steps: _measure(p, t, settings),
            )


def _measure(problem, steps, settings):
    def newton(f, xs, h0):
        # Without checks, as the loop that it is compared with has none.
        sol = pararnn.solve(f, xs, h0, solver=pararnn.Newton(), throw=False)
        return sol.states, sol.stats["num_steps"]

    args = problem.make(steps)
    runs = {
        "deer": forward(problem, deer),
        "newton": forward(problem, newton),
    }
    programs = compile_all(runs, *args)
    expected = compile_program(forward(problem, scan_states), *args)(*args)
    deer_states, iterations = programs["deer"](*args)
    newton_states, num_steps = programs["newton"](*args)
    floor = ft.partial(newton_floor, iterations=int(num_steps))
    programs["floor"] = compile_program(forward(problem, floor), *args)
    times = time_in_turn(programs, *args, quick=settings.quick)
    return {
        "DEER ms": times.ms("deer"),
        "Newton ms": times.ms("newton"),
        "ratio": times.ratio("newton", "deer"),
        "floor ratio": times.ratio("floor", "deer"),
        "DEER MB": megabytes(programs["deer"]),
        "Newton MB": megabytes(programs["newton"]),
        "memory ratio": memory_ratio(programs["newton"], programs["deer"]),
        "DEER iterations": int(iterations),
        "Newton iterations": int(num_steps),
        "DEER error": relative_error(deer_states, expected),
        "Newton error": relative_error(newton_states, expected),
    }
