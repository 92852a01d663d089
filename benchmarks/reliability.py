"""Whether an answer that is reported as successful is ever wrong."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import sigmoid

import pararnn
from pararnn import RESULTS

from ._case import Case, Settings
from ._flows import FLOWS, Flow, find_exponent, find_horizon, make_trajectory
from ._peers import scan_states
from ._problems import dense_gru, diagonal_gru, elman
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


# Random cells. A cell is made from a tuple of weights, and takes a tuple of as many
# inputs as it has gates.


def relu(weights):
    (w,) = weights
    return lambda h, x: jax.nn.relu(w @ h + x[0])


def linear(weights):
    (w,) = weights
    return lambda h, x: w @ h + x[0]


def lstm(weights):
    w_f, w_i, w_o, w_c = weights

    def step(state, x):
        c, h = state
        x_f, x_i, x_o, x_c = x
        c = sigmoid(w_f @ h + x_f) * c + sigmoid(w_i @ h + x_i) * jnp.tanh(
            w_c @ h + x_c
        )
        return c, sigmoid(w_o @ h + x_o) * jnp.tanh(c)

    return step


def sine(weights):
    """The sine map, coupled to a neighbour: chaotic for large weights."""
    (a,) = weights
    return lambda h, x: a * jnp.sin(h + 0.1 * jnp.roll(h, 1)) + 0.1 * x[0]


def tent(weights):
    """Two slopes and a kink."""
    (a,) = weights
    return lambda h, x: 1 - jnp.abs(a * h) + 0.02 * jnp.roll(h, 1) + 0.02 * x[0]


def switch(weights):
    """Two branches that do not meet."""
    a, b = weights
    return lambda h, x: jnp.where(h > x[0], jnp.tanh(a * h) - 0.3, b * h + x[1])


class Kind(NamedTuple):
    """A family of random cells.

    **Arguments:** `shape` of each of `gates` weights, by the width; their scale is
    drawn from `gains`: the standard deviation, or the spectral radius of a matrix if
    `radius`.
    """

    cell: Callable[[Any], Callable]
    gates: int
    dense: bool
    gains: tuple[float, float]
    radius: bool = False
    leaves: int = 1

    def draw(self, rng, width: int):
        gain = rng.uniform(*self.gains)
        shape = (width,) * (1 + self.dense)
        weights = rng.standard_normal((self.gates, *shape))
        if self.radius:
            size = np.abs(np.linalg.eigvals(weights)).max(-1)
            return tuple(gain * weights / size[:, None, None])
        return tuple(gain * weights / (width**0.5 if self.dense else 1))


KINDS = (
    Kind(diagonal_gru, 3, False, (0.1, 3.0)),
    Kind(dense_gru, 3, True, (0.1, 3.0)),
    Kind(elman, 1, True, (0.1, 4.0)),
    Kind(relu, 1, True, (0.1, 2.0)),
    Kind(lstm, 4, True, (0.1, 3.0), leaves=2),
    Kind(linear, 1, True, (0.5, 1.02), radius=True),
    Kind(sine, 1, False, (0.5, 3.0)),
    Kind(tent, 1, False, (0.3, 1.2)),
    Kind(switch, 2, False, (0.3, 0.9)),
)


def _some(rng, steps: int) -> int | None:
    """A random number of segments, or `None` for one segment a step."""
    return None if rng.random() < 0.4 else int(rng.integers(2, max(3, steps)))


# `(rng, number of steps) -> solver`.
SOLVERS: dict[str, Callable[[Any, int], pararnn.AbstractSolver]] = {
    "Auto()": lambda rng, t: pararnn.Auto(),
    "Newton()": lambda rng, t: pararnn.Newton(),
    "Newton(s)": lambda rng, t: pararnn.Newton(int(rng.integers(2, max(3, t)))),
    "QuasiNewton": lambda rng, t: pararnn.QuasiNewton(_some(rng, t)),
    "QuasiNewton(probes=2)": lambda rng, t: pararnn.QuasiNewton(
        _some(rng, t), probes=2
    ),
    "DampedNewton": lambda rng, t: pararnn.DampedNewton(_some(rng, t)),
    "ELK": lambda rng, t: pararnn.ELK(_some(rng, t)),
    "ELK(diagonal=True)": lambda rng, t: pararnn.ELK(_some(rng, t), diagonal=True),
    "Picard": lambda rng, t: pararnn.Picard(_some(rng, t)),
    "Jacobi": lambda rng, t: pararnn.Jacobi(_some(rng, t)),
    "Ladder": lambda rng, t: pararnn.Ladder(
        (pararnn.Jacobi(_some(rng, t)), pararnn.Newton(_some(rng, t))),
        max_steps=int(rng.integers(2, 10)),
    ),
    "Windows(Newton)": lambda rng, t: pararnn.Windows(
        pararnn.Newton(_some(rng, t)), int(rng.integers(1, t + 1))
    ),
    "Windows(Ladder)": lambda rng, t: pararnn.Windows(
        pararnn.Ladder((pararnn.Newton(_some(rng, t)),), max_steps=4),
        int(rng.integers(1, t + 1)),
    ),
}


class Program(NamedTuple):
    """One compilation, for many draws of parameters and inputs."""

    kind: Kind
    width: int
    steps: int
    dtype: Any
    solver: pararnn.AbstractSolver
    max_steps: int | None
    batched: bool
    resets: bool

    def __str__(self) -> str:
        return (
            f"{self.kind.cell.__name__} {self.width}, T {self.steps}, "
            f"{np.dtype(self.dtype)}, {self.solver!r}, max_steps={self.max_steps}"
            + ", batched" * self.batched
            + ", resets" * self.resets
        )

    def map(self, fn):
        """`fn` of one instance over the leading axis of all arguments."""
        if self.batched:
            return jax.jit(jax.vmap(fn))
        one = jax.jit(fn)

        def each(*args):
            count = jax.tree.leaves(args)[0].shape[0]
            found = [one(*jax.tree.map(lambda v: v[i], args)) for i in range(count)]
            return jax.tree.map(lambda *leaves: np.stack(leaves), *found)

        return each

    def solve(self, weights, xs, h0, fresh, reset):
        """Return states, steps taken, whether successful, and whether finite."""
        resets = {"reset": reset, "reset_state": fresh} if self.resets else {}
        sol = pararnn.solve(
            self.kind.cell(weights),
            xs,
            h0,
            solver=self.solver,
            max_steps=self.max_steps,
            throw=False,
            **resets,
        )
        good = sol.result == RESULTS.successful
        stuck = sol.result == RESULTS.not_converged
        return sol.states, sol.stats["num_steps"], good, stuck

    def loop(self, weights, xs, h0, fresh, reset, kicks):
        """Compute the states one after the other, each multiplied by 1 + its kick."""
        f = self.kind.cell(weights)

        def step(h, at_t):
            x, again, kick = at_t
            h = jax.tree.map(lambda a, b: jnp.where(again, a, b), fresh, h)
            h = jax.tree.map(lambda v: v * (1 + kick), f(h, x))
            return h, h

        return lax.scan(step, h0, (xs, reset, kicks))[1]


def draw_program(name: str, number: int) -> Program:
    rng = np.random.default_rng([zlib.crc32(name.encode()), number])
    # On a CPU, `Auto()` solves in parallel only a long sequence of single numbers.
    long = name == "Auto()" and number % 2 == 0
    kind = KINDS[rng.integers(len(KINDS))]
    if long and kind.leaves > 1:
        kind = KINDS[0]
    steps = int(rng.integers(4096, 5000) if long else rng.integers(2, 301))
    return Program(
        kind=kind,
        width=1 if long else int(rng.integers(1, 9)),
        steps=steps,
        dtype=(np.float32, np.float64)[rng.integers(2)],
        solver=SOLVERS[name](rng, steps),
        max_steps=None if rng.random() < 0.5 else int(rng.integers(1, 13)),
        batched=not long and rng.random() < 0.3,
        resets=bool(rng.random() < 0.3),
    )


def draw_instances(program: Program, count: int, seed: int):
    """Return arguments of `Program.solve`, each with a leading axis of instances."""
    rng = np.random.default_rng(seed)
    kind, steps, width = program.kind, program.steps, program.width

    def state():
        leaves = tuple(0.5 * rng.standard_normal((kind.leaves, width)))
        return leaves if kind.leaves > 1 else leaves[0]

    def one():
        xs = tuple(rng.standard_normal((kind.gates, steps, width)))
        if rng.random() < 0.15:
            where = slice(None) if rng.random() < 0.5 else rng.integers(width)
            xs[0][rng.integers(steps), where] = np.nan
        reset = program.resets & (rng.random(steps) < 0.05)
        return kind.draw(rng, width), xs, state(), state(), reset

    def stack(*leaves):
        leaves = np.stack(leaves)
        return jnp.asarray(leaves, bool if leaves.dtype == bool else program.dtype)

    return jax.tree.map(stack, *(one() for _ in range(count)))


def judge(program: Program, arguments, states) -> np.ndarray:
    """Return the error of each instance's states, relative to what is allowed."""
    loop = program.map(program.loop)
    eps = np.finfo(program.dtype).eps
    signs = np.random.default_rng(0).choice((-1.0, 1.0), arguments[-1].shape)
    expected, moved = (
        _entries(loop(*arguments, jnp.asarray(size * signs, program.dtype)))
        for size in (0, 2 * eps)
    )
    return worst_ratio(_entries(states), expected, np.abs(moved - expected), eps)


def worst_ratio(found, expected, spread, eps) -> np.ndarray:
    """Return the largest error relative to what is allowed, `[count]`.

    Arrays are `[count, T, n]`. Each entry is allowed 100 tolerances at its own size
    along the sequence, plus 100 times the spread of loops up to that step.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        size = np.nanmax(np.abs(expected), axis=1, keepdims=True, initial=0)
        spread = np.maximum.accumulate(np.where(np.isnan(spread), np.inf, spread), 1)
        error = np.abs(found - expected)
        ratio = np.where(error == 0, 0, error / (100 * (64 * eps * size + spread)))
        return np.where(np.isnan(ratio), np.inf, ratio).max((1, 2), initial=0)


def _entries(states) -> np.ndarray:
    """All entries of states `[count, T, ...]`, as float64 `[count, T, n]`."""
    leaves = [np.asarray(v, np.float64) for v in jax.tree.leaves(states)]
    return np.concatenate([v.reshape(*v.shape[:2], -1) for v in leaves], axis=-1)


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
        _entries(jax.tree.map(lambda v: v[None], tree))
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
