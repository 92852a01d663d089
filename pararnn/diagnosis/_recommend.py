"""The recommendation: which solver, and why."""

import jax

from ..solver import ELK, Jacobi, Newton, Picard, QuasiNewton, Sequential
from ._growth import Growth
from ._measure import MethodReport
from ._report import format_duration, format_power, format_steps, plural

# The loop is recommended unless a method needs fewer serial steps by this factor. This
# is a judgement: a method's step also pushes tangents, and a method takes more memory.
MIN_SPEEDUP = 4

STRENGTH = {
    Newton: "It converges quadratically, with the exact Jacobian.",
    QuasiNewton: (
        "The diagonal of the Jacobian is enough here, and its scan is elementwise."
    ),
    ELK: "Its damping keeps corrections bounded where Newton's overshoot.",
    Jacobi: (
        "Evaluating the cell everywhere at once, without a Jacobian or a scan, is "
        "enough here."
    ),
    Picard: "Sums of residuals, without a Jacobian, are enough here.",
}


def recommend(
    methods: dict[str, MethodReport],
    sequential: MethodReport,
    trajectory: Growth,
    at_h0: Growth,
):
    """Return the solver with the fewest serial steps, if far fewer than T, and why."""
    converged = {n: m for n, m in methods.items() if m.converged[-1]}
    best = min(converged, key=lambda n: converged[n].serial_steps, default=None)
    steps = sequential.serial_steps
    if best is None or MIN_SPEEDUP * converged[best].serial_steps > steps:
        solver = Sequential()
        reasons = [
            _why_no_method(best, methods, steps),
            _why_unpredictable(trajectory, at_h0, steps),
            "`Auto()` gives the same answer, after a few steps of a method at most.",
        ]
    else:
        report = converged[best]
        solver = report.solver
        reasons = [
            f"{best} takes {plural(report.steps[-1])} at T = {steps}: about "
            f"{report.serial_steps} evaluations one after the other; the loop takes "
            f"{steps}.",
            _strength(best, methods),
            _trend(report, trajectory),
        ]
        reasons.append(_compare_times(best, report, sequential))
    return solver, tuple(reason for reason in reasons if reason)


def _why_no_method(
    best: str | None, methods: dict[str, MethodReport], steps: int
) -> str:
    if not methods:
        return "No method was tried."
    if best is None:
        return "No method was certified within the limit on its steps."
    return (
        f"No method is much shorter than the loop: the best, {best}, needs "
        f"{plural(methods[best].steps[-1])}, about {methods[best].serial_steps} "
        f"evaluations one after the other; the loop needs {steps}."
    )


def _why_unpredictable(trajectory: Growth, at_h0: Growth, steps: int) -> str:
    if trajectory.is_positive(steps):
        return (
            "Perturbations grow by a factor of "
            f"{format_power(trajectory.exponent)} a step along the solution: the "
            "recurrence is not predictable, and parallel methods then need about as "
            "many steps as there are segments."
        )
    if at_h0.is_positive(steps):
        return (
            "Perturbations do not grow along the solution, but grow by a factor of "
            f"{format_power(at_h0.exponent)} a step with the Jacobians at h0: away "
            "from the solution, where methods start, the recurrence is not predictable."
        )
    return ""


def _strength(best: str, methods: dict[str, MethodReport]) -> str:
    solver = methods[best].solver
    if isinstance(solver, Newton) and solver.segments is not None:
        whole = methods.get("Newton()")
        needs = f" (Newton() takes {format_steps(whole, -1)} steps)" if whole else ""
        return f"Over a segment it predicts from a state that it has stepped to{needs}."
    return STRENGTH.get(type(solver), "")


def _trend(report: MethodReport, trajectory: Growth) -> str:
    if trajectory.is_positive(report.lengths[-1]):
        return (
            "But perturbations grow along the solution: it may take more steps for "
            "larger T, and its errors may be far larger than its residual."
        )
    first, last = report.steps[0], report.steps[-1]
    shortest = report.lengths[0]
    if not report.converged[0] or last > 2 * first:
        return (
            f"Its steps grow with T (from {format_steps(report, 0)} at {shortest}): "
            "diagnose again for a longer sequence."
        )
    return f"Its steps hardly grow with T ({first} at {shortest})."


def _compare_times(best: str, report: MethodReport, sequential: MethodReport) -> str:
    ratio = sequential.seconds / report.seconds
    times = (
        f"{format_duration(sequential.seconds)} and {format_duration(report.seconds)}"
    )
    if ratio >= 1:
        return f"On this {jax.default_backend()} the loop and {best} took {times}."
    return (
        f"On this {jax.default_backend()} the loop is faster: it and {best} took "
        f"{times}. `Auto()` chooses by platform and size."
    )
