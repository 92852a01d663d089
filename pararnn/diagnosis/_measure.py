"""Steps, memory and time of each solver on one recurrence."""

import dataclasses
import importlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from ..recurrence import Recurrence, check_resets, count_steps, make_recurrence
from ..solver import ELK, RESULTS, AbstractMethod, Jacobi, Sequential, solve
from ..solver._methods import chosen_options, options_of

WHERE = "diagnose"

# Below this, a sixteenth of T is a single step.
SHORTEST = 16

# The scans over the segments that follow each other in one step of a method. Methods
# that are not listed need one. ELK filters covariances, then means, then smooths.
SCANS_PER_STEP = {Jacobi: 0, ELK: 3}


@dataclasses.dataclass(frozen=True, eq=False)
class MethodReport:
    """What one method did. Lengths ascend; the last one is T.

    **Attributes:**

    - `solver`: the method.
    - `lengths`: the numbers of steps n. The recurrence is cut after its n-th step.
    - `steps`: the method's steps for each length. Where `converged` is false, this is
        the limit at which it was stopped.
    - `converged`: for each length whether the residual was certified.
    - `history`: the largest residual before each of the method's steps, at T.
    - `serial_steps`: how many evaluations follow one after the other, at T: for each
        step of the method the length of a segment and the rounds of its scans over
        the segments, plus the last pass.
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


class CheckedProblem(NamedTuple):
    """A recurrence with its inputs and its first state, checked.

    `fresh` is the state that a reset starts from. `reset` is never `None`: resets cut
    the recurrence to shorter lengths.
    """

    f: Callable
    xs: PyTree
    h0: PyTree
    reset: Bool[Array, " T"]
    fresh: PyTree
    recurrence: Recurrence
    constants: tuple[Array, ...]

    @property
    def length(self) -> int:
        return self.reset.shape[0]


def refuse_tracers(tree: PyTree) -> None:
    """Raise a `TypeError` inside `jax.jit`, `vmap` and `grad`."""
    # Inside `jit` even a value that depends on no argument is traced.
    leaves = [*jtu.tree_leaves(tree), jnp.zeros(()) + 1.0]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            f"{WHERE}: called with traced arrays. It runs programs and reports their "
            "numbers, so it cannot be part of one: call it outside of `jax.jit`, "
            "`jax.vmap` and `jax.grad`, with concrete arrays, one sequence at a time."
        )


def check_problem(f, xs, h0, reset, reset_state) -> CheckedProblem:
    recurrence = make_recurrence(WHERE, f, xs, h0)
    steps = count_steps(WHERE, xs)
    if steps < SHORTEST:
        raise ValueError(
            f"{WHERE}: `xs` has {steps} steps; expected at least {SHORTEST}. Fewer "
            "cannot show how the number of steps grows with T, and the loop is the "
            "solver for them."
        )
    fresh = check_resets(WHERE, recurrence, reset, reset_state, steps)
    constants = recurrence.take_constants()
    refuse_tracers(constants)
    xs, h0 = (jtu.tree_map(jnp.asarray, tree) for tree in (xs, h0))
    if fresh is None:
        # Only the steps that are cut off are reset; any finite state will do for them.
        reset, fresh = jnp.zeros(steps, bool), jtu.tree_leaves(h0)
    fresh = jtu.tree_unflatten(recurrence.state_tree, fresh)
    return CheckedProblem(f, xs, h0, jnp.asarray(reset), fresh, recurrence, constants)


def name_of(method: AbstractMethod) -> str:
    """Return a method's `repr` on one line, without `history`."""
    options = ", ".join(
        f"{name}={value!r}"
        for name, value in chosen_options(method).items()
        if name != "history"
    )
    return f"{type(method).__name__}({options})"


def _with_history(method: Any, count: int) -> Any:
    """Return the method with its residual history kept, if its class allows that."""
    if not isinstance(method, AbstractMethod) or method.history:
        return method
    options = options_of(method)
    if "history" not in options:
        return method
    return type(method)(**{**options, "history": count})


class Progress:
    """A progress bar that appears after a second, on a terminal and with `rich`."""

    def __init__(self, total: int, wanted: bool):
        self.total, self.wanted, self.done = total, wanted, 0
        self.started = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, text: str) -> None:
        """Show what begins now; everything shown before is done."""
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


class _Outcome(NamedTuple):
    steps: int
    converged: bool
    history: np.ndarray
    first_nonfinite: int
    seconds: float


class Program(NamedTuple):
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

    def temporary_bytes(self) -> int | None:
        analysis = self.compiled.memory_analysis()
        return getattr(analysis, "temp_size_in_bytes", None)


def compile_solves(
    problem: CheckedProblem, solvers: dict[str, Any], max_steps: int, bar: Progress
) -> dict[str, Program]:
    """Compile all programs, two at a time, before any of them is timed."""
    # The arrays of a module are arguments, since XLA would fold constants.
    f = problem.f if isinstance(problem.f, eqx.Module) else None
    arguments = f, problem.xs, problem.h0, problem.reset, problem.fresh
    dynamic, static = eqx.partition(arguments, eqx.is_array)
    compiled = {}
    with ThreadPoolExecutor(2) as pool:
        for name, solver in solvers.items():
            bar.advance(f"compile {name}")
            lowered = _lower(problem, solver, max_steps, dynamic, static)
            compiled[name] = pool.submit(lowered.compile)
    return {name: Program(c.result(), dynamic) for name, c in compiled.items()}


def _lower(problem: CheckedProblem, solver: Any, max_steps: int, dynamic, static):
    """Lower the solve as a function of the arrays and of the length."""
    watched = _with_history(solver, max_steps)

    def program(dynamic, length):
        f, xs, h0, reset, fresh = eqx.combine(dynamic, static)
        cut_off = jnp.arange(problem.length, dtype=jnp.int32) >= length
        solution = solve(
            problem.f if f is None else f,
            xs,
            h0,
            solver=watched,
            reset=reset | cut_off,
            reset_state=fresh,
            max_steps=max_steps,
            throw=False,
        )
        good = solution.result == RESULTS.successful
        # The states are returned so that every solver has to write them.
        return solution.states, solution.stats, good

    return jax.jit(program).lower(dynamic, jnp.asarray(problem.length, jnp.int32))


def measure(
    problem: CheckedProblem, solver: Any, program: Program, lengths: tuple[int, ...]
) -> MethodReport:
    outcomes = [program.run(length) for length in lengths]
    if isinstance(solver, Sequential):
        _refuse_nonfinite(outcomes[-1].first_nonfinite, problem.length)
    seconds = outcomes[-1].seconds
    if seconds < 0.1:
        # A single short time is unreliable; a long one is not worth taking twice.
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
    """Raise a `ValueError` if the loop found states that are not finite."""
    if first < steps:
        raise ValueError(
            f"{WHERE}: the states are not finite from step {first} on (counted from "
            "0), so there is nothing to converge to. Likely causes: (a) `xs`, `h0` or "
            "a parameter holds a NaN or an infinity; (b) the recurrence grows without "
            "bound."
        )


def _count_serial_steps(solver: Any, steps: int, iterations: int) -> int:
    """Count the evaluations that follow one after the other in a solve of `steps`."""
    if not isinstance(solver, AbstractMethod):
        return steps
    length = math.ceil(steps / min(solver.segments or steps, steps))
    count = math.ceil(steps / length)
    scans = SCANS_PER_STEP.get(type(solver), 1)
    rounds = scans * math.ceil(math.log2(count))
    return iterations * (length + rounds) + length
