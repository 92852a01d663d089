"""Steps, memory and time of one solver."""

import math
from typing import Any

from ..solver import ELK, AbstractMethod, Jacobi, Sequential
from ._problem import WHERE, Posed
from ._programs import Program
from ._results import MethodReport

# How many scans over the segments follow each other in one step of a method; one for
# all that are not listed. ELK filters covariances, then means, then smooths.
ROUNDS = {Jacobi: 0, ELK: 3}


def measure(
    problem: Posed, solver: Any, program: Program, lengths: tuple[int, ...]
) -> MethodReport:
    outcomes = [program.run(length) for length in lengths]
    if isinstance(solver, Sequential):
        _refuse_nonfinite(outcomes[-1].first_nonfinite, problem.length)
    seconds = outcomes[-1].seconds
    if seconds < 0.1:
        # A single short time may be anything; a long one is not worth taking twice.
        seconds = min(seconds, program.run(problem.length).seconds)
    return MethodReport(
        solver=solver,
        lengths=lengths,
        steps=tuple(outcome.steps for outcome in outcomes),
        converged=tuple(outcome.converged for outcome in outcomes),
        history=outcomes[-1].history,
        serial_steps=_count_serial_steps(solver, problem.length, outcomes[-1].steps),
        memory=program.temporary_bytes(),
        seconds=seconds,
    )


def _refuse_nonfinite(first: int, steps: int) -> None:
    """Refuse a recurrence whose states the loop finds to be not finite."""
    if first < steps:
        raise ValueError(
            f"{WHERE}: the states are not finite from step {first} on (counted from "
            "0), so there is nothing to converge to. Likely causes: (a) `xs`, `h0` or "
            "a parameter holds a NaN or an infinity; (b) the recurrence grows without "
            "bound."
        )


def _count_serial_steps(solver: Any, steps: int, iterations: int) -> int:
    """Evaluations that follow one after the other in a solve of `steps` steps."""
    if not isinstance(solver, AbstractMethod):
        return steps
    length = math.ceil(steps / min(solver.segments or steps, steps))
    count = math.ceil(steps / length)
    rounds = ROUNDS.get(type(solver), 1) * math.ceil(math.log2(count))
    return iterations * (length + rounds) + length
