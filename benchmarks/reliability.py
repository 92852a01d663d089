"""Whether an answer that is reported as successful is ever wrong."""

import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import pararnn
from pararnn import RESULTS

from ._case import Case, Settings
from ._flows import FLOWS, Flow, find_exponent, find_horizon, make_trajectory
from ._peers import scan_states
from ._random_cells import (
    SOLVERS,
    draw_instances,
    draw_program,
    entries,
    judge,
    worst_ratio,
)
from ._scales import SCALES, Scaled, draw_scaled
from ._timing import compile_all, relative_error, time_in_turn

TABLES = {
    "flows": "Chaotic flows, a Runge-Kutta step as the cell, float64. Exponent: the "
    "largest of Lyapunov's, per unit of time, over 50,000 steps. Horizon: steps until "
    "one rounding more at each step has grown to 1e-8 of the largest state. Ratio: "
    "time of the default solver over that of `lax.scan`.",
    "flow solvers": "Solvers on these flows; `Newton()` alone would need about T "
    "steps. Residual: the largest one-step residual over the steps that the solver "
    "certifies (after a success all of them), relative to the state. Difference: to "
    "the sequential loop, over the same steps up to the horizon.",
    "observers": "The same flows with the coordinates `measured` taken from a "
    "trajectory (Pecora and Carroll 1990), from a start of zeros, by "
    "`pararnn.Newton()`. Difference: to the sequential loop. Distance: to the "
    "trajectory that is followed, over the last eighth of the time.",
    "permutations": "The word problem of the group S5: products of random "
    "permutation matrices, by `pararnn.Newton()`, against integer arithmetic.",
    "random cells": "Random cells, widths 1 to 8, lengths 2 to 300 (for `Auto()` "
    "also 4096 and more), float32 and float64, with resets, missing inputs, batches "
    "and limits on some numbers of steps. Wrong: reported as successful, but with an "
    "entry further from the sequential loop than 100 times its tolerance plus 100 "
    "times the effect on the loop of two roundings, of either sign, in each state. "
    "Worst error: the largest difference of a success, relative to what is allowed.",
    "scales": "States of difficult sizes, float32: from 1e-30 to 1e30, denormal, 1e12 "
    "apart within a leaf, in two dtypes, beside a counter at 1e6, constants and exact "
    "zeros, from cancelling larger numbers, fading. Every other instance has a limit "
    "of 4 steps. Wrong: as for random cells, entry by entry, with the effect of "
    "roundings from the same cell in float64. False failures: not successful although "
    "without a limit.",
}
TRIES = 64
FLOW_SOLVERS: dict[str, Callable[[int], tuple[pararnn.AbstractSolver, int | None]]] = {
    "Auto()": lambda steps: (pararnn.Auto(), None),
    "Newton(), 64 steps": lambda steps: (pararnn.Newton(), TRIES),
    "Newton(T // 16), 16 steps": lambda steps: (pararnn.Newton(steps // 16), 16),
    "Ladder": lambda steps: (
        pararnn.Ladder((pararnn.Newton(16), pararnn.DampedNewton(16)), max_steps=4),
        None,
    ),
}


def cases(settings: Settings) -> Iterator[Case]:
    programs, instances = (2, 5) if settings.quick else (6, 13)
    for name in SOLVERS:
        yield Case(
            "random cells",
            {"solver": name},
            lambda s=name: measure_random(s, programs, instances),
            True,
        )
    for kind in SCALES:
        for name in SOLVERS:
            yield Case(
                "scales",
                {"states": kind, "solver": name},
                lambda s=name, k=kind: measure_scales(s, k, 2 if settings.quick else 4),
                True,
            )
    lengths = settings.steps(256, 1024, 4096)
    for flow in FLOWS.values():
        for steps in lengths:
            key = {"flow": str(flow), "T": steps}
            yield Case(
                "flows",
                key,
                lambda f=flow, t=steps: _measure_flow(f, t, settings),
                True,
            )
    for flow in FLOWS.values():
        for steps in lengths:
            for name in FLOW_SOLVERS:
                yield Case(
                    "flow solvers",
                    {"flow": str(flow), "T": steps, "solver": name},
                    lambda f=flow, t=steps, s=name: _measure_solver(f, t, s),
                    True,
                )
    for flow in FLOWS.values():
        for steps in lengths:
            yield Case(
                "observers",
                {"flow": str(flow), "T": steps, "measured": flow.coupling()},
                lambda f=flow, t=steps: _measure_observer(f, t),
                True,
            )
    for steps in settings.steps(64, 512, 4096):
        yield Case(
            "permutations", {"T": steps}, lambda t=steps: _measure_words(t), True
        )


def _measure_flow(flow: Flow, steps: int, settings: Settings):
    xs, h0, states = make_trajectory(flow, steps)
    programs = compile_all(
        {
            "scan": lambda xs, h0: scan_states(flow.cell, xs, h0),
            "auto": lambda xs, h0: pararnn.solve(flow.cell, xs, h0).states,
        },
        *(xs, h0),
    )
    times = time_in_turn(programs, xs, h0, quick=settings.quick)
    return {
        "dt": flow.dt,
        "exponent": find_exponent(flow, h0),
        "largest |h|": float(jnp.max(jnp.abs(states))),
        "horizon": find_horizon(flow, xs, h0, states),
        "scan ms": times.ms("scan"),
        "Auto ms": times.ms("auto"),
        "ratio": times.ratio("auto", "scan"),
    }


def _measure_solver(flow: Flow, steps: int, name: str):
    solver, max_steps = FLOW_SOLVERS[name](steps)
    xs, h0, expected = make_trajectory(flow, steps)
    sol = _solve(flow.cell, xs, h0, solver, max_steps)
    certified = int(sol.stats["certified_steps"])
    compared = min(certified, find_horizon(flow, xs, h0, expected))
    residuals = np.asarray(_residuals(flow.cell, xs, h0, sol.states))
    return {
        "obtained by": _describe(sol, solver),
        "steps": int(sol.stats["num_steps"]),
        "certified": certified,
        "residual error": float(np.max(residuals[:certified], initial=0)),
        "difference error": relative_error(
            sol.states[:compared], np.asarray(expected[:compared])
        ),
    }


def _solve(f, xs, h0, solver, max_steps) -> pararnn.Solution:
    @jax.jit
    def run(xs, h0):
        return pararnn.solve(f, xs, h0, solver=solver, max_steps=max_steps, throw=False)

    return run(xs, h0)


@jax.jit(static_argnums=0)
def _residuals(f, xs, h0, states):
    """`|f(h_{t-1}, x_t) - h_t|` relative to `|h_t|`, at each step."""
    before = jnp.concatenate([h0[None], states[:-1]])
    gap = jnp.max(jnp.abs(jax.vmap(f)(before, xs) - states), axis=1)
    return gap / jnp.max(jnp.abs(states), axis=1)


def _describe(sol: pararnn.Solution, solver) -> str:
    if not sol.result == RESULTS.successful:
        return "not converged"
    if sol.stats["sequential"]:
        return "loop"
    if isinstance(solver, pararnn.Ladder):
        return f"rung {int(sol.stats['rung'])}"
    return "converged"


def _measure_observer(flow: Flow, steps: int):
    _, _, followed = make_trajectory(flow, steps)
    h0 = jnp.zeros(3)
    sol = _solve(flow.observe, followed, h0, pararnn.Newton(), 12)
    expected = jax.jit(lambda xs, h0: scan_states(flow.observe, xs, h0))(followed, h0)
    late = slice(-(steps // 8), None)
    return {
        "obtained by": _describe(sol, pararnn.Newton()),
        "steps": int(sol.stats["num_steps"]),
        "difference error": relative_error(sol.states, expected),
        "distance error": relative_error(sol.states[late], followed[late]),
    }


def _measure_words(steps: int):
    rng = np.random.default_rng(0)
    letters = np.stack([rng.permutation(5) for _ in range(steps)])
    word, products = np.eye(5), []
    for letter in letters:
        word = word[letter]
        products.append(word)
    matrices = jnp.asarray(np.eye(5)[letters])
    sol = _solve(lambda h, x: x @ h, matrices, jnp.eye(5), pararnn.Newton(), 12)
    return {
        "obtained by": _describe(sol, pararnn.Newton()),
        "steps": int(sol.stats["num_steps"]),
        "error": relative_error(sol.states, np.stack(products)),
    }


def measure_random(name: str, programs: int, instances: int):
    ratios, steps, good, stuck = [], [], [], []
    for number in range(programs):
        program = draw_program(name, number)
        arguments = draw_instances(program, instances, number)
        states, *rest = program.map(program.solve)(*arguments)
        ratios.append(judge(program, arguments, states))
        for kept, found in zip((steps, good, stuck), rest, strict=True):
            kept.append(np.asarray(found))
    ratio, count, success, unsure = map(np.concatenate, (ratios, steps, good, stuck))
    return {
        "instances": len(ratio),
        "successful": int(success.sum()),
        "not converged": int(unsure.sum()),
        "nonfinite": int((~success & ~unsure).sum()),
        "wrong": int((success & ~(ratio <= 1)).sum()),
        "worst error": float(np.max(ratio[success], initial=0)),
        "median steps": float(np.median(count)),
    }


# States of difficult sizes.


def _in_float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tree)


def _judge_scaled(scaled: Scaled, states) -> float:
    """As `judge`, with the spread from the same cell in float64.

    That includes the loop's own roundings where numbers cancel.
    """
    loop = jax.jit(lambda xs, h0: scan_states(scaled.cell, xs, h0))
    expected = loop(scaled.xs, scaled.h0)
    exact = loop(*_in_float64((scaled.xs, scaled.h0)))
    found, expected, exact = (
        entries(jax.tree.map(lambda v: v[None], tree))
        for tree in (states, expected, exact)
    )
    eps = np.concatenate(
        [
            np.full(h.size, float(jnp.finfo(h.dtype).eps))
            for h in jax.tree.leaves(scaled.h0)
        ]
    )
    # Numbers below the dtype's smallest normal one may be rounded to zero or not.
    spread = np.abs(expected - exact) + 4 * np.finfo(np.float32).tiny
    return float(worst_ratio(found, expected, spread, eps)[0])


def measure_scales(name: str, kind: str, instances: int):
    """Run a solver on states of a kind, every other time with at most 4 steps."""
    ratios, good, free = [], [], []
    for seed in range(instances):
        rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
        steps = int(rng.integers(40, 120))
        scaled, solver = draw_scaled(kind, seed, steps), SOLVERS[name](rng, steps)
        limit = 4 if seed % 2 else None
        sol = _solve(scaled.cell, scaled.xs, scaled.h0, solver, limit)
        ratios.append(_judge_scaled(scaled, sol.states))
        good.append(bool(sol.result == RESULTS.successful))
        free.append(limit is None)
    ratio, success, free = map(np.asarray, (ratios, good, free))
    return {
        "instances": instances,
        "successful": int(success.sum()),
        "false failures": int((free & ~success).sum()),
        "wrong": int((success & ~(ratio <= 1)).sum()),
        "worst error": float(np.max(ratio[success], initial=0)),
    }
