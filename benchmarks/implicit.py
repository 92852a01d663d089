"""Implicit recurrences: one system for all states, or whole steps of the cell."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pararnn

from ._case import Case, Settings
from ._peers import scan_states
from ._timing import compile_all, relative_error, time_in_turn

TABLES = {
    "implicit": "`F(h_new, h, x) = 0`, float64, by `pararnn.Newton()`, one segment a "
    "step. Joint: given the cell `pararnn.Implicit(F)` itself, every Newton step takes "
    "one round of the cell's iteration. Whole: given a function that calls the cell, "
    "every step takes all of them. Scan: `lax.scan` of the cell. The error is that of "
    "joint steps, to the scan."
}


class Equation(NamedTuple):
    F: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    width: int

    def make(self, steps: int):
        """Inputs, and a state to start from."""
        rng = np.random.default_rng(steps)
        xs = rng.standard_normal((steps, self.width))
        return jnp.asarray(xs), jnp.zeros(self.width)


def make_layer(width: int) -> Equation:
    """`z = tanh(W z + U h + x)`, W of norm 0.6."""
    rng = np.random.default_rng(width)
    W = jnp.asarray(0.6 * np.linalg.qr(rng.standard_normal((width, width)))[0])
    U = jnp.asarray(0.5 * np.linalg.qr(rng.standard_normal((width, width)))[0])

    def F(z, h, x):
        return z - jnp.tanh(W @ z + U @ h + x)

    return Equation(F, width)


def make_reactions(width: int) -> Equation:
    """Backward Euler of `h' = x - h^3 - h`, each number by itself."""

    def F(z, h, x):
        return z - h - 0.5 * (x - z**3 - z)

    return Equation(F, width)


EQUATIONS = {
    "implicit layer, width 4": make_layer(4),
    "implicit layer, width 16": make_layer(16),
    "backward Euler, diagonal, width 16": make_reactions(16),
}


def cases(settings: Settings) -> Iterator[Case]:
    for name in EQUATIONS:
        for steps in settings.steps(1024, 16384):
            yield Case(
                "implicit",
                {"equation": name, "T": steps},
                lambda e=EQUATIONS[name], t=steps: _measure(e, t, settings),
                x64=True,
            )


def _measure(equation: Equation, steps: int, settings: Settings):
    cell = pararnn.Implicit(equation.F)

    def whole_steps(h, x):
        return cell(h, x)

    def newton(step):
        def run(xs, h0):
            sol = pararnn.solve(step, xs, h0, solver=pararnn.Newton())
            return sol.states, sol.stats["num_steps"]

        return run

    args = equation.make(steps)
    runs = {
        "scan": lambda xs, h0: scan_states(cell, xs, h0),
        "joint": newton(cell),
        "whole": newton(whole_steps),
    }
    programs = compile_all(runs, *args)
    expected = programs["scan"](*args)
    states, joint_steps = programs["joint"](*args)
    times = time_in_turn(programs, *args, quick=settings.quick)
    return {
        "scan ms": times.ms("scan"),
        "joint ms": times.ms("joint"),
        "ratio to whole": times.ratio("joint", "whole"),
        "ratio to scan": times.ratio("joint", "scan"),
        "joint steps": int(joint_steps),
        "whole steps": int(programs["whole"](*args)[1]),
        "max rel. error": relative_error(states, expected),
    }
