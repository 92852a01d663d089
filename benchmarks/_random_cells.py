"""Random cells with random solvers, and how wrong the answers are.

A cell is made from a tuple of weights, and takes a tuple of as many inputs as it has
gates.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import sigmoid

import pararnn
from pararnn import RESULTS

from ._problems import dense_gru, diagonal_gru, elman


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

    **Arguments:** each of `gates` weights is a matrix if `dense`, else a vector. Their
    scale is drawn from `gains`: the standard deviation, or the spectral radius of a
    matrix if `radius`. The state has as many `leaves`.
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
        entries(loop(*arguments, jnp.asarray(size * signs, program.dtype)))
        for size in (0, 2 * eps)
    )
    return worst_ratio(entries(states), expected, np.abs(moved - expected), eps)


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


def entries(states) -> np.ndarray:
    """All entries of states `[count, T, ...]`, as float64 `[count, T, n]`."""
    leaves = [np.asarray(v, np.float64) for v in jax.tree.leaves(states)]
    return np.concatenate([v.reshape(*v.shape[:2], -1) for v in leaves], axis=-1)
