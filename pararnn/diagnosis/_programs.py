"""A solve with each solver, compiled for every length at once."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..solver import RESULTS, solve
from ._options import with_history
from ._problem import Posed
from ._progress import Progress


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
    problem: Posed, solvers: dict[str, Any], max_steps: int, bar: Progress
) -> dict[str, Program]:
    """All programs, two at a time, and before any of them is timed."""
    # Arrays of a module are arguments: as constants, XLA would fold them.
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


def _lower(problem: Posed, solver: Any, max_steps: int, dynamic, static):
    """The solve as a function of the arrays and of where it is cut."""
    watched = with_history(solver, max_steps)

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
