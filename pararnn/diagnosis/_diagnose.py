"""`diagnose`: the choice of methods and lengths, the runs, and the recommendation."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._checks import check_count, is_count
from ..recurrence import Structure, find_structure
from ..solver import (
    ELK,
    AbstractMethod,
    Jacobi,
    Newton,
    Picard,
    QuasiNewton,
    Sequential,
)
from ._growth import Growth, measure_growth
from ._measure import (
    WHERE,
    CheckedProblem,
    MethodReport,
    Progress,
    check_problem,
    compile_solves,
    measure,
    name_of,
    refuse_tracers,
)
from ._report import Diagnosis, format_duration, format_power, format_steps, plural

# The bytes of Jacobians, of all steps together, from which the default methods are
# cheaper ones, and from which they leave out `Newton()`. Beside 256 KiB of Jacobians,
# ELK took 5.4 MiB and `Newton()` 0.9 MiB. For a GRU of width 64 over 2048 steps (32
# MiB), the diagonal took 1.6 s a step on two cores, and 4 probes 0.1 s.
LARGE, VERY_LARGE = 2**24, 2**28

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


def diagnose(
    f: Callable[[PyTree, PyTree], PyTree],
    xs: PyTree,
    h0: PyTree,
    *,
    reset: Bool[Array, " T"] | None = None,
    reset_state: PyTree | None = None,
    methods: Sequence[AbstractMethod] | None = None,
    lengths: Sequence[int] | None = None,
    max_steps: int = 100,
    progress: bool = True,
) -> Diagnosis:
    r"""Test which parallel methods converge on $h_t = f(h_{t-1}, x_t)$, and how fast.

    Runs the loop and a few methods on the recurrence, for several lengths, and measures
    how perturbations grow. Use it on a cell and data that are typical of a training
    run, before and after training: whether a method converges may change with the
    parameters. It takes seconds for narrow cells, mostly for compilation. `print` the
    result.

    ```python
    diagnosis = pararnn.diagnose(cell, xs, h0)
    print(diagnosis)
    diagnosis.plot("diagnosis.png")
    pararnn.solve(cell, xs, h0, solver=diagnosis.recommended)
    ```

    **Growth of perturbations.** With $J_t = \partial f / \partial h$ at $h_{t-1}$,
    random unit tangents $v$ are pushed along, $v_t = J_t v_{t-1} / \|J_t v_{t-1}\|$, in
    one pass that keeps only them. The largest Lyapunov exponent is estimated as

    $$\lambda = \max_v \frac{1}{T - 1} \sum_{t=2}^{T} \log \|J_t v_{t-1}\| \le
        \frac{1}{T - 1} \log \|J_T \cdots J_2\|,$$

    over the steps that no reset interrupts. The largest growth is the largest factor by
    which one of the tangents grew between any two states. It is at least 1, and a lower
    bound of $\max_{s \le t} \|J_t \cdots J_s\|$. Half of the tangents are redrawn
    wherever they have shrunk. Both are also computed with every Jacobian at
    $h_{t-1} = h_0$, since methods start from states that are not on the solution.

    **What they imply.** In the terms of Gonzalez et al. 2025, methods minimise
    $\tfrac12 \|r\|^2$ for the residual $r_t = f(h_{t-1}, x_t) - h_t$. With
    $R = \partial r / \partial h$ it satisfies the Polyak-Łojasiewicz condition with the
    constant $\mu = \inf_h \sigma_{\min}(R)^2$; a larger one is better. $-R$ has the
    identity on its block diagonal and $-J_t$ below, so the blocks of its inverse are
    the identity and all $J_t \cdots J_s$. The norm of a block is at most that of the
    whole. Hence, at any trajectory $h$,

    $$\sqrt\mu \le \sigma_{\min}(R) = \|R^{-1}\|^{-1} \le
        \min(1, \|J_t \cdots J_s\|^{-1}),$$

    and the report bounds $\sqrt\mu$ by this (`log_pl_bound`), from the two trajectories
    above. Where perturbations grow at the rate $\lambda > 0$, the bound is
    exponentially small in T: the recurrence is not predictable, and unless it is nearly
    linear, about as many steps are needed as there are segments. Conversely, *if*
    $\|J_{t+k-1} \cdots J_t\| \le a e^{\lambda k}$ for all $t$, $k$ and at all
    trajectories, then the $k$-th diagonal of blocks of $R^{-1}$ is at most that large.
    Summing these,

    $$\sqrt\mu \ge \frac{1}{a} \Big(\sum_{k=0}^{T-1} e^{\lambda k}\Big)^{-1}
        = \frac{1}{a} \cdot \frac{1 - e^\lambda}{1 - e^{\lambda T}},$$

    which for $\lambda < 0$ does not fall with T. It is not computed here, since a few
    trajectories show neither $a$ nor what holds at all of them.

    **A negative exponent alone does not promise few steps.** Measured for
    $\tanh(g W h + x)$ with normal $W$ of variance 1/8, width 8, T = 512, g = 4 in
    float64: for four $W$, exponents of -0.20 to -0.09 along the solution, and 359 to
    432 steps of `Newton()`. The exponents at $h_0 = 0$ tell the difference: they are
    0.85 to 1.16 there, but -0.54 to -0.23 for g = 1, where 5 to 9 steps suffice.

    **Steps.** Each method is given up to `max_steps` steps, and has converged once the
    residual is certified as in [`pararnn.solve`][]. One compiled program serves all
    lengths: to measure a shorter one, the recurrence is reset at every later step,
    which costs those states one step.

    **The recommendation** counts the evaluations that follow one after the other on
    hardware that takes all of time at once. The method with the fewest is recommended
    if it needs at most a quarter of T, and the loop otherwise. This is about the
    forward pass. The times in the report were measured once, on this machine: on a CPU
    the loop mostly wins.

    **Arguments:**

    - `f`, `xs`, `h0`, `reset`, `reset_state`: as for [`pararnn.solve`][], with T of at
        least 16. Concrete arrays: this runs programs, and cannot be part of one.
    - `methods`: the methods to try, each an [`pararnn.AbstractMethod`][]. Defaults to
        `Newton()`, `Newton(segments=T // 16)`, `QuasiNewton()`, `ELK()`, `Jacobi()`
        and `Picard()`. If the Jacobians of all steps together take 16 MiB or more,
        these become `QuasiNewton(probes=4)` and no `ELK()`; from 256 MiB on, also no
        `Newton()`. `[]` measures only the loop and the growth of perturbations.
    - `lengths`: how many steps to cut the recurrence to, besides T itself. Defaults to
        T/16 and T/4.
    - `max_steps`: limit on the steps of each method. A recurrence of T steps never
        needs more than T.
    - `progress`: show a progress bar on a terminal, if `rich` is installed and it takes
        longer than a second.

    **Returns:** a [`pararnn.Diagnosis`][].

    **Raises:** `TypeError` under `jax.jit`, `vmap` or `grad`, and if `methods` holds
    anything else; `ValueError` for T below 16, lengths or limits that do not fit, and
    states that are not finite; otherwise as [`pararnn.solve`][].

    ??? cite "Source"

        Gonzalez, Kozachkov, Zoltowski, Clarkson and Linderman, "Predictability enables
        parallelization of nonlinear state space models" (2025), 2508.16817: $\mu$ and
        the smallest singular value, and the bounds by the Lyapunov exponent (Theorem
        2, under the condition (10) on products of Jacobians). The published text was
        not available: the numbering is taken from summaries, the lower bound agrees
        with the authors' code (`log_mu_numerically_stable`), and both bounds are
        derived above. Upper bounds from two trajectories, and the exponent at `h0`,
        are this library's own.
    """
    refuse_tracers((f, xs, h0, reset, reset_state))
    problem = check_problem(f, xs, h0, reset, reset_state)
    chosen = _choose_methods(methods, problem)
    lengths = _choose_lengths(lengths, problem.length)
    check_count(WHERE, "max_steps", max_steps, least=1)
    solvers = {"Sequential()": Sequential(), **chosen}
    with Progress(2 * len(solvers) + 1, progress) as bar:
        programs = compile_solves(problem, solvers, max_steps, bar)
        measured = {}
        for name, solver in solvers.items():
            bar.advance(f"run {name}")
            measured[name] = measure(problem, solver, programs[name], lengths)
        sequential = measured.pop("Sequential()")
        bar.advance("growth of perturbations")
        trajectory, at_h0 = measure_growth(problem)
    recommended, reasons = _recommend(measured, sequential, trajectory, at_h0)
    recurrence = problem.recurrence
    return Diagnosis(
        structure=find_structure(recurrence),
        width=recurrence.width,
        length=problem.length,
        dtype=", ".join(sorted({str(s.dtype) for s in recurrence.state_leaves})),
        platform=jax.default_backend(),
        trajectory=trajectory,
        at_h0=at_h0,
        methods=measured,
        sequential=sequential,
        max_steps=max_steps,
        recommended=recommended,
        reasons=reasons,
    )


def default_methods(
    structure: Structure, steps: int, itemsize: int
) -> list[AbstractMethod]:
    jacobians = steps * len(structure.blocks) * structure.size**2 * itemsize
    large = jacobians >= LARGE
    return [
        *([Newton()] if jacobians < VERY_LARGE else []),
        Newton(max(2, steps // 16)),
        QuasiNewton(probes=4 if large else None),
        *([] if large else [ELK()]),
        Jacobi(),
        Picard(),
    ]


def _choose_methods(methods: Any, problem: CheckedProblem) -> dict[str, AbstractMethod]:
    if methods is None:
        recurrence = problem.recurrence
        itemsize = np.dtype(recurrence.dtype).itemsize
        structure = find_structure(recurrence)
        methods = default_methods(structure, problem.length, itemsize)
    if not isinstance(methods, Iterable) or isinstance(methods, str):
        methods = [methods]
    chosen = {}
    for method in methods:
        if not isinstance(method, AbstractMethod):
            raise TypeError(
                f"{WHERE}: `methods` holds {method!r:.80}; expected methods such as "
                "pararnn.Newton(segments=...) or pararnn.Jacobi(). The sequential loop "
                "is always measured; `Auto`, `Ladder` and `Windows` are made of methods"
                " and loops: diagnose those one by one."
                + (" Did you forget to call the class?" * isinstance(method, type))
            )
        name = name_of(method)
        if name in chosen:
            raise ValueError(f"{WHERE}: `methods` holds {name} twice.")
        chosen[name] = method
    return chosen


def _choose_lengths(lengths: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    if lengths is None:
        lengths = [max(4, steps // 16), max(4, steps // 4)]
    wrong = [n for n in lengths if not (is_count(n, 2) and n <= steps)]
    if wrong:
        raise ValueError(
            f"{WHERE}: `lengths` holds {wrong[0]!r}; expected whole numbers from 2 to "
            f"T = {steps}, the number of steps of `xs`."
        )
    return tuple(sorted({*map(int, lengths), steps}))


# The recommendation: which solver, and why.


def _recommend(
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
