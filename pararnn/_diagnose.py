"""`diagnose`: will a parallel method converge on a recurrence, how fast, and which."""

import dataclasses
import importlib
import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from .solver import (
    ELK,
    RESULTS,
    AbstractMethod,
    Jacobi,
    Newton,
    Picard,
    QuasiNewton,
    Sequential,
    Structure,
    solve,
)
from .solver._inputs import check_resets, count_steps, make_recurrence
from .solver._recurrence import Recurrence
from .solver._structure import find_structure
from .solver.methods import is_count

WHERE = "diagnose"

# Below this, a sixteenth of T is a single step.
SHORTEST = 16

# Tangents that are pushed along: as many from the first state on, and as many that
# start anew wherever they have shrunk. The exact maximum over all pairs of steps is 1.1
# to 5.6 times what these find, at the median 1.7 times (32 tanh cells of width 8, T =
# 512, growth 2 to 5e8).
TANGENTS = 8

# From how many bytes of Jacobians, of all steps together, on the default methods are
# cheaper ones, and from how many on `Newton()` is none of them. Beside 256 KiB of
# Jacobians, ELK took 5.4 MiB and `Newton()` 0.9 MiB. Of a GRU of width 64 over 2048
# steps (32 MiB), the diagonal took 1.6 s a step on two cores, and 4 probes 0.1 s.
LARGE, VERY_LARGE = 2**24, 2**28

# How many scans over the segments follow each other in one step of a method; one for
# all that are not listed. ELK filters covariances, then means, then smooths.
ROUNDS = {Jacobi: 0, ELK: 3}

# The loop is recommended unless a method needs fewer serial steps by this factor. A
# judgement: a step of a sweep evaluates the cell and pushes tangents besides, so a
# method that saves less than this has nothing to show for its memory.
GAIN = 4

STRENGTH = {
    Newton: "It converges quadratically, with the exact Jacobian.",
    QuasiNewton: (
        "The diagonal of the Jacobian is enough here, and its scan is elementwise."
    ),
    ELK: "Its damping keeps corrections bounded where Newton's overshoot.",
    Jacobi: (
        "Evaluating the cell everywhere at once, without Jacobian and scan, is enough "
        "here."
    ),
    Picard: "Sums of residuals, without Jacobian, are enough here.",
}

CAVEAT = (
    "A negative exponent alone does not promise few steps: it describes the solution,",
    "not the trajectories that a method passes on its way there. The steps below are",
    "measured.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class MethodReport:
    """What one method did. Lengths ascend; the last one is T.

    **Attributes:**

    - `solver`: the method.
    - `lengths`: the numbers of steps n; the recurrence is cut behind the n-th.
    - `steps`: the method's steps for each length; where `converged` is false, the
        limit at which it was stopped.
    - `converged`: for each length whether the residual was certified.
    - `history`: the largest residual before each of the method's steps, at T.
    - `serial_steps`: at T, how many evaluations follow one after the other: for each
        step of the method the length of a segment and the rounds of its scans over
        the segments, and the last pass.
    - `memory`: bytes of temporary memory of the compiled forward solve at T, without
        inputs and states; `None` where the compiler does not say.
    - `seconds`: wall-clock time of the forward solve at T, here.
    """

    solver: AbstractMethod | Sequential
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    converged: tuple[bool, ...]
    history: Float[np.ndarray, " steps"]
    serial_steps: int
    memory: int | None
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """How perturbations of the state grow under a sequence of Jacobians.

    **Attributes:**

    - `exponent`: the largest Lyapunov exponent, natural logarithm per step; minus
        infinity if every perturbation vanishes.
    - `log_growth`: natural logarithm of the largest factor by which a tangent grew
        between any two states: a lower bound of $\\max \\log \\|J_t \\cdots J_s\\|$,
        at least 0.
    - `first`, `last`: the indices, from 0, of the states between which it did.
    """

    exponent: float
    log_growth: float
    first: int
    last: int

    def is_positive(self, steps: int) -> bool:
        """Whether the exponent is above zero by more than its own uncertainty.

        Over `steps` steps the sign of one below `1 / steps` depends on the tangents.
        """
        return self.exponent * steps > 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What [`pararnn.diagnose`][] found, in numbers; prints as a report.

    **Attributes:**

    - `structure`: the [`pararnn.Structure`][] of the cell's Jacobian.
    - `width`: real numbers in the state.
    - `length`: T.
    - `dtype`: of the state, as text.
    - `platform`: where memory and times were measured.
    - `trajectory`, `at_h0`: growth of perturbations along the solution, and with every
        Jacobian taken at `h0` in place of the solution: each with `exponent`,
        `log_growth`, and the indices `first` and `last` of the states between which
        the growth was largest.
    - `methods`: by name, for each method: `solver`, `lengths`, `steps`, `converged`,
        `history` (largest residual before each step, at T), `serial_steps`, `memory`
        (bytes of temporary memory of the compiled forward solve) and `seconds`.
    - `sequential`: the same of the loop.
    - `max_steps`: where methods were stopped.
    - `recommended`: the solver to use, for [`pararnn.solve`][].
    - `reasons`: why, in sentences.
    """

    structure: Structure
    width: int
    length: int
    dtype: str
    platform: str
    trajectory: Growth
    at_h0: Growth
    methods: dict[str, MethodReport]
    sequential: MethodReport
    max_steps: int
    recommended: AbstractMethod | Sequential
    reasons: tuple[str, ...]

    @property
    def exponent(self) -> float:
        """The largest Lyapunov exponent along the solution, per step."""
        return self.trajectory.exponent

    @property
    def log_pl_bound(self) -> float:
        r"""Natural logarithm of an upper bound of $\sqrt\mu$, at most 0.

        $\mu$ is the Polyak-Łojasiewicz constant of the residual; see
        [`pararnn.diagnose`][].
        """
        return -max(0.0, self.trajectory.log_growth, self.at_h0.log_growth)

    def __repr__(self) -> str:
        return "\n".join(_report(self))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure: residuals by step at T, and steps against T, of each method.

        **Arguments:** `path`, a file to write, in the format of its ending.

        **Returns:** the `matplotlib.figure.Figure`.

        **Raises:** `ImportError` without matplotlib, which is not a dependency of this
        library.
        """
        figure = _draw(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


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
    r"""Will parallel methods converge on $h_t = f(h_{t-1}, x_t)$, and how fast?

    Runs the loop and a few methods on the recurrence, for several lengths, and measures
    how perturbations grow. Use it on a cell and data that are typical of a training
    run, before and after training: what parallelises may change with the parameters.
    Takes seconds, most of it compilation, for narrow cells. `print` the result.

    ```python
    diagnosis = pararnn.diagnose(cell, xs, h0)
    print(diagnosis)
    diagnosis.plot("diagnosis.png")
    pararnn.solve(cell, xs, h0, solver=diagnosis.recommended)
    ```

    **Growth of perturbations.** With $J_t = \partial f / \partial h$ at $h_{t-1}$,
    random unit tangents $v$ are pushed along, $v_t = J_t v_{t-1} / \|J_t v_{t-1}\|$, in
    one pass that keeps only them. The largest Lyapunov exponent is taken to be

    $$\lambda = \max_v \frac{1}{T - 1} \sum_{t=2}^{T} \log \|J_t v_{t-1}\| \le
        \frac{1}{T - 1} \log \|J_T \cdots J_2\|,$$

    over the steps that no reset interrupts. The largest growth is the largest factor by
    which one of the tangents grew between any two states, hence a lower bound of
    $\max_{s \le t} \|J_t \cdots J_s\|$, and at least 1; half of the tangents are drawn
    anew wherever they have shrunk. Both are also computed with every Jacobian at
    $h_{t-1} = h_0$: methods start from states that are not on the solution.

    **What they imply.** In the terms of Gonzalez et al. 2025, methods minimise
    $\tfrac12 \|r\|^2$ for the residual $r_t = f(h_{t-1}, x_t) - h_t$. With
    $R = \partial r / \partial h$ it satisfies the Polyak-Łojasiewicz condition with the
    constant $\mu = \inf_h \sigma_{\min}(R)^2$, the larger the better. $-R$ has the
    identity on its block diagonal and $-J_t$ below, so the blocks of its inverse are
    the identity and all $J_t \cdots J_s$. A block's norm is at most that of the whole,
    hence, at any trajectory $h$,

    $$\sqrt\mu \le \sigma_{\min}(R) = \|R^{-1}\|^{-1} \le
        \min(1, \|J_t \cdots J_s\|^{-1}),$$

    which is what the report bounds $\sqrt\mu$ by (`log_pl_bound`), from the two
    trajectories above. Where perturbations grow at the rate $\lambda > 0$, that
    is exponentially small in T: the recurrence is not predictable, and unless it is
    nearly linear, about as many steps are needed as there are segments. Conversely,
    *if* $\|J_{t+k-1} \cdots J_t\| \le a e^{\lambda k}$ for all $t$, $k$ and at all
    trajectories, then the $k$-th diagonal of blocks of $R^{-1}$ is at most that large,
    and summing them,

    $$\sqrt\mu \ge \frac{1}{a} \Big(\sum_{k=0}^{T-1} e^{\lambda k}\Big)^{-1}
        = \frac{1}{a} \cdot \frac{1 - e^\lambda}{1 - e^{\lambda T}},$$

    which for $\lambda < 0$ does not fall with T. It is not computed here: neither $a$
    nor "at all trajectories" can be had from a few of them.

    **A negative exponent alone does not promise few steps.** Measured for
    $\tanh(g W h + x)$ with normal $W$ of variance 1/8, width 8, T = 512, g = 4 in
    float64: for four $W$, exponents of -0.20 to -0.09 along the solution, and 359 to
    432 steps of `Newton()`. At $h_0 = 0$ the exponents are 0.85 to 1.16, which tells
    the difference: for g = 1 they are -0.54 to -0.23, and 5 to 9 steps suffice.

    **Steps.** Each method is given up to `max_steps` steps, and has converged once the
    residual is certified as in [`pararnn.solve`][]. To measure a shorter length the
    recurrence is reset everywhere behind it, which costs those states one step, so that
    one compiled program serves all lengths.

    **The recommendation** counts the evaluations that follow one after the other, as
    they do on hardware that takes all of time at once: the least wins, the loop unless
    another needs at most a quarter of T. It is for the forward pass. The times beside
    it are those of the machine that it runs on, once: on a CPU the loop mostly wins.

    **Arguments:**

    - `f`, `xs`, `h0`, `reset`, `reset_state`: as for [`pararnn.solve`][], with T of at
        least 16. Concrete arrays: this runs programs, and cannot be part of one.
    - `methods`: the methods to try, each an [`pararnn.AbstractMethod`][]. Default:
        `Newton()`, `Newton(segments=T // 16)`, `QuasiNewton()`, `ELK()`, `Jacobi()`
        and `Picard()`. Where the Jacobians of all steps together are large (16 MiB),
        `QuasiNewton(probes=4)` and no `ELK()`, and from 256 MiB on no `Newton()`. `[]`
        leaves the loop and the growth of perturbations.
    - `lengths`: how many steps to cut the recurrence to, besides T itself. Default:
        T/16 and T/4.
    - `max_steps`: limit on the steps of each method. A recurrence of T steps never
        needs more than T.
    - `progress`: show a progress bar on a terminal, if `rich` is installed and it takes
        longer than a second.

    **Returns:** a [`pararnn.Diagnosis`][].

    **Raises:** `TypeError` under `jax.jit`, `vmap` or `grad`, and for anything but
    methods; `ValueError` for T below 16, lengths or limits that do not fit, and states
    that are not finite; otherwise as [`pararnn.solve`][].

    ??? cite "Source"

        Gonzalez, Kozachkov, Zoltowski, Clarkson and Linderman, "Predictability enables
        parallelization of nonlinear state space models" (2025), 2508.16817: $\mu$ and
        the smallest singular value, and the bounds by the Lyapunov exponent (Theorem
        2, under the condition (10) on products of Jacobians). The published text was
        not at hand: its numbering is that of summaries, the lower bound agrees with
        the authors' code (`log_mu_numerically_stable`), and both bounds are derived
        above. Upper bounds from two trajectories, and the exponent at `h0`, are this
        library's own.
    """
    _refuse_tracers((f, xs, h0, reset, reset_state))
    problem = _pose(f, xs, h0, reset, reset_state)
    chosen = _choose_methods(methods, problem)
    lengths = _choose_lengths(lengths, problem.length)
    _check_max_steps(max_steps)
    solvers = {"Sequential()": Sequential(), **chosen}
    with _Progress(2 * len(solvers) + 1, progress) as bar:
        programs = _compile(problem, solvers, max_steps, bar)
        measured = {}
        for name, solver in solvers.items():
            bar.advance(f"run {name}")
            measured[name] = _measure(problem, solver, programs[name], lengths)
        sequential = measured.pop("Sequential()")
        bar.advance("growth of perturbations")
        trajectory, at_h0 = _measure_growth(problem)
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


# What is diagnosed.


class _Problem(NamedTuple):
    f: Callable
    xs: PyTree
    h0: PyTree
    reset: Bool[Array, " T"]
    fresh: PyTree
    recurrence: Recurrence
    constants: list[Array]

    @property
    def length(self) -> int:
        return self.reset.shape[0]


def _refuse_tracers(tree: PyTree) -> None:
    # Inside `jit` even what depends on no argument is traced.
    leaves = [*jtu.tree_leaves(tree), jnp.zeros(()) + 1.0]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            f"{WHERE}: called with traced arrays. It runs programs and reports their "
            "numbers, so it cannot be part of one: call it outside of `jax.jit`, "
            "`jax.vmap` and `jax.grad`, with concrete arrays, one sequence at a time."
        )


def _pose(f, xs, h0, reset, reset_state) -> _Problem:
    """The checked problem. Its resets always exist: they cut it to shorter lengths."""
    recurrence = make_recurrence(WHERE, f, xs, h0)
    steps = count_steps(WHERE, xs)
    if steps < SHORTEST:
        raise ValueError(
            f"{WHERE}: `xs` has {steps} steps; expected at least {SHORTEST}. How the "
            "number of steps grows with T cannot be seen on fewer, and the loop is "
            "the solver for them."
        )
    fresh = check_resets(WHERE, recurrence, reset, reset_state, steps)
    constants = recurrence.release_constants()
    _refuse_tracers(constants)
    xs, h0 = (jtu.tree_map(jnp.asarray, tree) for tree in (xs, h0))
    if fresh is None:
        # Nothing is reset but what is cut off, for which any good state will do.
        reset, fresh = jnp.zeros(steps, bool), jtu.tree_leaves(h0)
    fresh = jtu.tree_unflatten(recurrence.state_tree, fresh)
    return _Problem(f, xs, h0, jnp.asarray(reset), fresh, recurrence, constants)


def _default_methods(
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


def _choose_methods(methods: Any, problem: _Problem) -> dict[str, AbstractMethod]:
    if methods is None:
        recurrence = problem.recurrence
        itemsize = np.dtype(recurrence.dtype).itemsize
        structure = find_structure(recurrence)
        methods = _default_methods(structure, problem.length, itemsize)
    if not isinstance(methods, Iterable) or isinstance(methods, str):
        methods = [methods]
    chosen = {}
    for method in methods:
        if not isinstance(method, AbstractMethod):
            raise TypeError(
                f"{WHERE}: `methods` holds {method!r:.80}; expected methods such as "
                "pararnn.Newton(segments=...) or pararnn.Jacobi(). The sequential loop "
                "is always measured; `Auto`, `Ladder` and `Windows` are made of methods"
                " and loops, which are to be diagnosed one by one."
                + (" Did you forget to call the class?" * isinstance(method, type))
            )
        name = _name(method)
        if name in chosen:
            raise ValueError(f"{WHERE}: `methods` holds {name} twice.")
        chosen[name] = method
    return chosen


def _choose_lengths(lengths: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    if lengths is None:
        lengths = [max(4, steps // 16), max(4, steps // 4)]
    wrong = [n for n in lengths if not (is_count(n) and 2 <= n <= steps)]
    if wrong:
        raise ValueError(
            f"{WHERE}: `lengths` holds {wrong[0]!r}; expected whole numbers from 2 to "
            f"T = {steps}, the number of steps of `xs`."
        )
    return tuple(sorted({*map(int, lengths), steps}))


def _check_max_steps(max_steps: Any) -> None:
    if not (is_count(max_steps) and max_steps >= 1):
        raise ValueError(
            f"{WHERE}: `max_steps` is {max_steps!r}; expected a whole number >= 1."
        )


def _options(method: AbstractMethod) -> dict[str, Any]:
    """The arguments that a method was made with, as far as its attributes show them."""
    parameters = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in parameters if hasattr(method, name)}


def _name(method: AbstractMethod) -> str:
    """A method as it would be written, options that are the default left out."""
    parameters = inspect.signature(type(method)).parameters
    options = ", ".join(
        f"{name}={value!r}"
        for name, value in _options(method).items()
        if name != "history" and repr(value) != repr(parameters[name].default)
    )
    return f"{type(method).__name__}({options})"


def _with_history(method: Any, count: int) -> Any:
    """The method with its residual history kept, if it can be made anew with one."""
    if not isinstance(method, AbstractMethod) or method.history:
        return method
    options = _options(method)
    if "history" not in options:
        return method
    return type(method)(**{**options, "history": count})


# Steps, memory and time of one solver.


def _measure(
    problem: _Problem, solver: Any, program: "_Program", lengths: tuple[int, ...]
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
        memory=_temporary_bytes(program.compiled),
        seconds=seconds,
    )


class _Outcome(NamedTuple):
    steps: int
    converged: bool
    history: np.ndarray
    first_nonfinite: int
    seconds: float


class _Program(NamedTuple):
    """A compiled solve, for any length up to T."""

    compiled: Any
    arguments: Any

    def run(self, length: int) -> _Outcome:
        cut = jnp.asarray(length, jnp.int32)
        start = time.perf_counter()
        out = jax.block_until_ready(self.compiled(self.arguments, cut))
        seconds = time.perf_counter() - start
        _, stats, good = out
        steps = int(stats["num_steps"])
        history = np.asarray(stats.get("residual_history", np.zeros(0)), float)
        return _Outcome(
            steps=steps,
            converged=bool(good),
            history=history[:steps],
            first_nonfinite=int(stats["first_nonfinite"]),
            seconds=seconds,
        )


def _compile(
    problem: _Problem, solvers: dict[str, Any], max_steps: int, bar: "_Progress"
) -> dict[str, _Program]:
    """All programs, two at a time, and before any of them is timed."""
    # Arrays of a module are arguments: as constants, XLA would fold them.
    f = problem.f if isinstance(problem.f, eqx.Module) else None
    dynamic, static = eqx.partition((f, *problem[1:5]), eqx.is_array)
    compiled = {}
    with ThreadPoolExecutor(2) as pool:
        for name, solver in solvers.items():
            bar.advance(f"compile {name}")
            lowered = _lower(problem, solver, max_steps, dynamic, static)
            compiled[name] = pool.submit(lowered.compile)
    return {name: _Program(c.result(), dynamic) for name, c in compiled.items()}


def _lower(problem: _Problem, solver: Any, max_steps: int, dynamic, static):
    """The solve as a function of the arrays and of where it is cut."""
    watched = _with_history(solver, max_steps)

    def program(dynamic, length):
        f, xs, h0, reset, fresh = eqx.combine(dynamic, static)
        behind = jnp.arange(problem.length, dtype=jnp.int32) >= length
        solution = solve(
            problem.f if f is None else f,
            xs,
            h0,
            solver=watched,
            reset=reset | behind,
            reset_state=fresh,
            max_steps=max_steps,
            throw=False,
        )
        good = solution.result == RESULTS.successful
        # The states are returned so that no solver is spared writing them.
        return solution.states, solution.stats, good

    return jax.jit(program).lower(dynamic, jnp.asarray(problem.length, jnp.int32))


def _temporary_bytes(compiled) -> int | None:
    analysis = compiled.memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)


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


# Growth of perturbations.


class _Pushes(NamedTuple):
    """Tangents on their way; axes: the two kinds of Jacobians, the tangents."""

    tangents: Float[Array, "2 tangents width"]
    total: Float[Array, "2 tangents"]  # log of the growth since the first state
    rise: Float[Array, "2 tangents"]  # log of the growth since `start`
    start: Array
    best: Float[Array, "2 tangents"]  # the largest rise so far, and where it was
    first: Array
    last: Array


def _measure_growth(problem: _Problem) -> tuple[Growth, Growth]:
    """Along the solution, and with every Jacobian at `h0`."""

    def program(constants, fresh, inputs, h0):
        return _push(problem.recurrence, (constants, fresh), inputs, h0)

    trees = problem.fresh, problem.xs, problem.h0
    fresh, x_leaves, h0 = (tuple(jtu.tree_leaves(tree)) for tree in trees)
    inputs = (x_leaves, problem.reset)
    out = jax.jit(program)(problem.constants, fresh, inputs, h0)
    counted = problem.length - 1 - int(np.sum(problem.reset[1:]))
    total, best, first, last = (np.asarray(value) for value in out)

    def summary(kind: int) -> Growth:
        at = int(np.argmax(best[kind]))
        return Growth(
            exponent=float(total[kind].max() / counted) if counted else -math.inf,
            log_growth=float(best[kind, at]),
            first=int(first[kind, at]),
            last=int(last[kind, at]),
        )

    return summary(0), summary(1)


def _push(recurrence: Recurrence, parameters, inputs, h0_leaves):
    """Push tangents through the linearised steps; nothing is kept of them but sums."""
    h0 = recurrence.ravel(h0_leaves)
    shape = (2, 2 * TANGENTS)
    zero = jnp.zeros(shape, recurrence.dtype)
    nowhere = jnp.zeros(shape, jnp.int32)
    # A few directions do, over and over: drawn in the loop they would triple the time
    # that it takes to compile (0.5 s).
    pool = np.random.default_rng(0).standard_normal((64, *shape, recurrence.width))
    pool /= np.linalg.norm(pool, axis=-1, keepdims=True)
    pool = jnp.asarray(pool, recurrence.dtype)

    def draw(number):
        return lax.dynamic_index_in_dim(pool, number % len(pool), keepdims=False)

    def linearised(h, tangents, x):
        def step(v):
            return recurrence.vector_step(parameters, v, x, smooth=True)

        ahead, push = jax.linearize(step, h)
        return ahead, jax.vmap(push)(tangents)

    def body(carry, at_t):
        h, pushes = carry
        number, x = at_t
        states = jnp.stack([h, h0])
        ahead, pushed = jax.vmap(linearised, (0, 0, None))(states, pushes.tangents, x)
        # A perturbation of h0, which is known, is none of the solution's.
        stopped = x[1] | (number == 0)
        return (ahead[0], _follow(pushes, pushed, draw(number), stopped, number)), None

    start = _Pushes(pool[-1], zero, zero, nowhere, zero, nowhere, nowhere)
    numbers = jnp.arange(inputs[1].shape[0], dtype=jnp.int32)
    (_, end), _ = lax.scan(body, (h0, start), (numbers, inputs))
    # Where a tangent is drawn anew, its growth is none since the first state.
    return end.total[:, :TANGENTS], end.best, end.first, end.last


def _follow(pushes: _Pushes, pushed, drawn, stopped, number) -> _Pushes:
    """The tangents one step further, and what they have grown by.

    The largest growth between any two states is that of a path above its lowest point
    so far. From a new lowest point, half of the tangents are drawn anew: what has
    shrunk until here need not be what grows most from here on.
    """
    norms = jnp.linalg.norm(pushed, axis=-1)
    rate = jnp.where(stopped, 0, jnp.log(norms))
    rise = jnp.where(stopped, 0, jnp.maximum(pushes.rise + rate, 0))
    lowest = rise == 0
    start = jnp.where(lowest, number, pushes.start)
    higher = rise > pushes.best
    renewed = jnp.arange(2 * TANGENTS, dtype=jnp.int32) >= TANGENTS
    lost = stopped | ~((norms > 0) & jnp.isfinite(norms))
    anew = lost | (lowest & renewed[None])
    return _Pushes(
        tangents=jnp.where(anew[..., None], drawn, pushed / norms[..., None]),
        total=pushes.total + rate,
        rise=rise,
        start=start,
        best=jnp.where(higher, rise, pushes.best),
        first=jnp.where(higher, start, pushes.first),
        last=jnp.where(higher, number, pushes.last),
    )


# The recommendation.


def _recommend(
    methods: dict[str, MethodReport],
    sequential: MethodReport,
    trajectory: Growth,
    at_h0: Growth,
):
    """The solver with the fewest serial steps, if far fewer than T; and why."""
    converged = {n: m for n, m in methods.items() if m.converged[-1]}
    best = min(converged, key=lambda n: converged[n].serial_steps, default=None)
    steps = sequential.serial_steps
    if best is None or GAIN * converged[best].serial_steps > steps:
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
            f"{best} takes {_plural(report.steps[-1])} at T = {steps}: about "
            f"{report.serial_steps} evaluations one after the other, where the loop "
            f"takes {steps}.",
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
        f"{_plural(methods[best].steps[-1])}, about {methods[best].serial_steps} "
        f"evaluations one after the other, and the loop {steps}."
    )


def _why_unpredictable(trajectory: Growth, at_h0: Growth, steps: int) -> str:
    if trajectory.is_positive(steps):
        return (
            f"Perturbations grow by a factor of {_power(trajectory.exponent)} a step "
            "along the solution: it is not predictable, and parallel methods then "
            "need about as many steps as there are segments."
        )
    if at_h0.is_positive(steps):
        return (
            "Perturbations do not grow along the solution, but they do by a factor of "
            f"{_power(at_h0.exponent)} a step with the Jacobians at h0: away from the "
            "solution, where methods start, the recurrence is not predictable."
        )
    return ""


def _strength(best: str, methods: dict[str, MethodReport]) -> str:
    solver = methods[best].solver
    if isinstance(solver, Newton) and solver.segments is not None:
        whole = methods.get("Newton()")
        needs = f" (Newton() takes {_steps(whole, -1)} steps)" if whole else ""
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
            f"Its steps grow with T (from {_steps(report, 0)} at {shortest}): diagnose "
            "again for a longer sequence."
        )
    return f"Its steps hardly grow with T ({first} at {shortest})."


def _compare_times(best: str, report: MethodReport, sequential: MethodReport) -> str:
    ratio = sequential.seconds / report.seconds
    times = f"{_duration(sequential.seconds)} and {_duration(report.seconds)}"
    if ratio >= 1:
        return f"On this {jax.default_backend()} the loop and {best} took {times}."
    return (
        f"On this {jax.default_backend()} the loop is faster: it and {best} took "
        f"{times}. `Auto()` chooses by platform and size."
    )


# The report.


def _report(d: Diagnosis) -> list[str]:
    title = (
        f"Diagnosis of T = {d.length} steps, width {d.width}, {d.dtype}, "
        f"{d.structure!r} Jacobian, on {d.platform}"
    )
    lines = [title, "=" * len(title), "", "Growth of perturbations"]
    for name, growth in (("along the solution", d.trajectory), ("at h0", d.at_h0)):
        lines.append(f"  {name:<19} {_describe_growth(growth)}")
    lines += [
        f"  {'conditioning':<19} sqrt(PL constant) at most {_power(d.log_pl_bound)}; "
        "1 is best",
        *(f"  {line}" for line in CAVEAT),
        "",
        f"Steps until certified, of at most {d.max_steps}; at T: depth (evaluations",
        "one after the other), temporary memory and time of a forward solve",
        *(f"  {line}" for line in _table(d)),
        "",
        f"Recommended: {_solver_name(d)}",
        *_bullets(d.reasons),
    ]
    return lines


def _describe_growth(growth: Growth) -> str:
    text = f"Lyapunov exponent {growth.exponent:+.3g} a step; "
    if growth.log_growth == 0:
        return text + "no growth between any two states"
    return (
        f"{text}largest growth {_power(growth.log_growth)}, "
        f"from state {growth.first} to {growth.last}"
    )


def _table(d: Diagnosis) -> list[str]:
    lengths = d.sequential.lengths
    rows = [["T =", *map(str, lengths), "depth", "memory", "time"]]
    for name, report in d.methods.items():
        steps = [_steps(report, i) for i in range(len(lengths))]
        depth = str(report.serial_steps) if report.converged[-1] else "-"
        rows.append([name, *steps, depth, *_costs(report)])
    rows.append(
        ["Sequential()", *["-"] * len(lengths), str(d.length), *_costs(d.sequential)]
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _costs(report: MethodReport) -> list[str]:
    return [_bytes(report.memory), _duration(report.seconds)]


def _steps(report: MethodReport, at: int) -> str:
    mark = "" if report.converged[at] else "> "
    return f"{mark}{report.steps[at]}"


def _plural(count: int) -> str:
    return f"{count} step" + "s" * (count != 1)


def _solver_name(d: Diagnosis) -> str:
    solver = d.recommended
    return _name(solver) if isinstance(solver, AbstractMethod) else "Sequential()"


def _bullets(sentences: Sequence[str], width: int = 86) -> list[str]:
    """Wrapped at spaces, with a dash in front of each."""
    lines = []
    for sentence in sentences:
        lines.append("  -")
        for word in sentence.split(" "):
            if len(lines[-1]) + 1 + len(word) > width:
                lines.append("   ")
            lines[-1] += f" {word}"
    return lines


def _power(logarithm: float) -> str:
    """`exp(logarithm)`, however large or small."""
    if not math.isfinite(logarithm):
        return f"{math.exp(logarithm) if logarithm < 0 else logarithm:g}"
    if abs(logarithm) < 600:
        return f"{math.exp(logarithm):.3g}"
    return f"1e{logarithm / math.log(10):+.0f}"


def _bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    units = ("B", "KiB", "MiB", "GiB")
    power = min(len(units) - 1, int(math.log2(max(1, count)) // 10))
    return f"{count / 1024**power:.3g} {units[power]}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


# The figure.

MARKERS = "osDv^P*Xhd"


def _draw(d: Diagnosis) -> Any:
    try:
        Figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "Diagnosis.plot draws with matplotlib, which is not installed: "
            "`pip install pararnn[examples]`, or `pip install matplotlib`."
        ) from error
    # Not by pyplot, which would keep the figure and may want a window.
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, report) in enumerate(d.methods.items()):
        style = {
            "color": f"C{number % 10}",
            "marker": MARKERS[number % len(MARKERS)],
            "label": name,
        }
        _draw_history(left, report, style)
        _draw_steps(right, report, style, len(d.methods) - number)
    _label(d, left, right)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_history(axes, report: MethodReport, style: dict[str, Any]) -> None:
    residuals = report.history
    # A residual of zero has no place on a logarithmic axis.
    residuals = np.where(residuals > 0, residuals, np.nan)
    number = np.arange(1, len(residuals) + 1)
    every = max(1, len(residuals) // 12)
    axes.plot(number, residuals, markevery=every, markersize=4, linewidth=1, **style)


def _limit_residuals(axes, reports: Iterable[MethodReport]) -> None:
    """Let what diverges leave the panel, so that it does not flatten the others."""
    first = [r.history[0] for r in reports if len(r.history)]
    low, high = axes.get_ylim()
    if first and math.isfinite(max(first)) and max(first) > 0:
        axes.set_ylim(low, min(high, 1e6 * max(first)))


def _draw_steps(axes, report: MethodReport, style: dict[str, Any], below: int) -> None:
    """`below`: how many are drawn on top, around which this one stays visible."""
    steps = np.maximum(report.steps, 1)
    size = 4.5 + 0.9 * below
    width = 0.8 + 0.4 * below
    axes.plot(report.lengths, steps, markersize=size, linewidth=width, **style)
    stopped = ~np.asarray(report.converged)
    # Not converged: hollow, for the true number is above.
    axes.plot(
        np.asarray(report.lengths)[stopped],
        steps[stopped],
        linestyle="none",
        marker=style["marker"],
        markersize=size + 1,
        markerfacecolor="white",
        markeredgecolor=style["color"],
        zorder=3,
    )


def _label(d: Diagnosis, left, right) -> None:
    if any(np.any(report.history > 0) for report in d.methods.values()):
        left.set(xscale="log", yscale="log")
    else:
        # A logarithmic axis without a positive number is an error.
        left.set(xticks=[], yticks=[])
        middle = {"ha": "center", "va": "center", "transform": left.transAxes}
        left.text(0.5, 0.5, "no residual above zero", **middle)
    left.set(
        xlabel="step of the method",
        ylabel="largest residual before the step",
        title=f"Residuals at T = {d.length}",
    )
    lengths = np.asarray(d.sequential.lengths)
    right.plot(lengths, lengths, color="0.5", linestyle="--", label="steps = T")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="T",
        ylabel="steps until certified",
        title=f"Steps (hollow: more than {d.max_steps})",
    )
    _limit_residuals(left, d.methods.values())
    right.set_xticks(lengths, [str(n) for n in lengths])
    right.set_xticks([], minor=True)
    for axes in (left, right):
        axes.grid(True, which="major", alpha=0.3)


# The progress bar.


class _Progress:
    """A bar on the terminal from the second second on; nothing without `rich`."""

    def __init__(self, total: int, wanted: bool):
        self.total, self.wanted, self.done = total, wanted, 0
        self.started = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, text: str) -> None:
        """Say what is worked on now; everything said before is done."""
        if self.bar is None and time.perf_counter() - self.started > 1:
            self._open()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
        self.done += 1

    def _open(self) -> None:
        if not self.wanted:
            return
        try:
            console = importlib.import_module("rich.console").Console(stderr=True)
            make = importlib.import_module("rich.progress").Progress
        except ImportError:
            self.wanted = False
            return
        self.wanted = console.is_terminal
        if self.wanted:
            self.bar = make(console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
