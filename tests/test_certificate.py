"""What is certified: every entry of the state, against its own size and dtype."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn import (
    ELK,
    RESULTS,
    Auto,
    DampedNewton,
    Jacobi,
    Ladder,
    Newton,
    Picard,
    QuasiNewton,
    Windows,
    solve,
)
from pararnn.solver._certificate import BIN, REACH, entry_sizes, is_within_tolerance
from tests.problems import scan

SOLVERS = {
    "auto": Auto(),
    "newton": Newton(),
    "newton on segments": Newton(20),
    "quasi-newton": QuasiNewton(10),
    "damped newton": DampedNewton(10),
    "elk": ELK(10),
    "picard": Picard(10),
    "jacobi": Jacobi(10),
    "ladder": Ladder((Jacobi(10), Newton(10)), max_steps=2),
    "windows": Windows(Newton(5), 30),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


class Problem(NamedTuple):
    """A cell, its first state, and how much two programs of a step may differ.

    `roundings` are float32's, of the largest size of each leaf.
    """

    cell: Any
    h0: Any
    roundings: tuple[float, ...]

    def run(self, solver, **options):
        """The solution, and the residual of each leaf at the worst step."""
        xs = jax.random.normal(jax.random.key(0), (60,), jnp.float32)
        h0 = jax.tree.map(jnp.float32, self.h0)

        @jax.jit
        def run(xs, h0):
            sol = solve(self.cell, xs, h0, solver=solver, throw=False, **options)
            before = jax.tree.map(
                lambda h, s: jnp.concatenate([h[None], s[:-1]]), h0, sol.states
            )
            # One step after the other, without the solver.
            ahead = jax.lax.map(lambda at: self.cell(*at), (before, xs))
            gaps = jax.tree.map(lambda a, b: jnp.abs(a - b), ahead, sol.states)
            return sol, jax.tree.map(jnp.max, gaps)

        sol, gaps = run(xs, h0)
        sizes = jax.tree.map(lambda s: np.abs(s).max(), sol.states)
        relative = [
            float(gap) / max(float(size), 1e-30)
            for gap, size in zip(
                jax.tree.leaves(gaps), jax.tree.leaves(sizes), strict=True
            )
        ]
        return sol, np.array(relative) / np.finfo(np.float32).eps


U = 1e-9


def tiny(h, x):
    return U * jnp.tanh(2 * jnp.sin(3 * h / U) + x)


def of_all_sizes(h, x):
    """A clock and a gate; a cancellation; a constant; a zero; and a tiny state."""
    big = jnp.tanh(0.5 * h["big"] + x)
    return {
        "clock": h["clock"] + 1,
        "gate": jnp.tanh(2 * jnp.sin(3 * h["gate"]) + x),
        "small": (3 + 1e-4 * jnp.sin(big)) - 3 + 0.5 * h["small"],
        "big": big,
        "constant": h["constant"],
        "zero": 0 * h["zero"],
        "tiny": tiny(h["tiny"], x),
    }


def chaotic(h, x):
    del x
    return 3.99 * h * (1 - h)


START = {"clock": 1e6, "gate": 0.0, "small": 1e-4, "big": 0.1, "constant": 1e20}
# In the order of the leaves, by name; 3 is 30,000 times as large as what remains of it.
ROUNDINGS = (8.0, 1.0, 0.0, 8.0, 2e4, 8.0, 0.0)
PROBLEMS = {
    "all sizes": Problem(of_all_sizes, START | {"zero": 0.0, "tiny": 0.0}, ROUNDINGS),
    "chaotic": Problem(chaotic, 0.3, (8.0,)),
}
TINY = Problem(tiny, 0.0, (8.0,))


@each_solver
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_every_entry_is_held_to_its_own_size(problem, solver):
    """Without a limit on its steps, every method ends with a certified answer."""
    sol, roundings = problem.run(solver)
    assert sol.result == RESULTS.successful
    assert int(sol.stats["certified_steps"]) == 60
    assert (roundings <= 64 + np.array(problem.roundings)).all()


def test_a_limit_ends_without_a_certificate():
    sol, _ = PROBLEMS["chaotic"].run(Newton(), max_steps=3)
    assert sol.result == RESULTS.not_converged
    assert int(sol.stats["num_steps"]) == 3 and int(sol.stats["certified_steps"]) < 60


@pytest.mark.parametrize("power", [-100, -20, 20, 100])
@pytest.mark.parametrize("name", ["newton on segments", "damped newton", "jacobi"])
def test_units_do_not_matter(name, power):
    """In units of a power of two, every number of the solve is only scaled."""
    units = 2.0**power

    def in_units(h, x):
        return units * jnp.tanh(0.9 * (h / units) + jnp.sin(h / units) + x)

    def run(cell, h0):
        sol, _ = Problem(cell, h0, (0.0,)).run(SOLVERS[name])
        return np.asarray(sol.states, np.float64), sol.stats

    def in_one(h, x):
        return jnp.tanh(0.9 * h + jnp.sin(h) + x)

    states, stats = run(in_one, 0.4)
    scaled, scaled_stats = run(in_units, units * 0.4)
    np.testing.assert_array_equal(scaled, units * states)
    assert int(scaled_stats["num_steps"]) == int(stats["num_steps"])


def test_an_entry_is_held_to_its_dtype(getkey):
    """A coarse leaf does not loosen the tolerance of a fine one."""
    xs = jax.random.normal(getkey(), (200, 3), jnp.float32)
    h0 = jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.float32)

    def cell(h, x):
        coarse, fine = h
        fine = jnp.tanh(0.8 * fine[::-1] + x)
        return jnp.tanh(coarse + fine.astype(jnp.bfloat16)), fine

    sol = solve(cell, xs, h0, solver=Newton(25))
    expected = scan(cell, xs, h0)
    assert float(jnp.max(jnp.abs(sol.states[1] - expected[1]))) < 2e-5


def test_an_absolute_tolerance_is_the_users():
    sol, roundings = TINY.run(Newton(10, atol=1.0), max_steps=1)
    assert sol.result == RESULTS.successful and roundings.max() > 1e3
    sol, _ = TINY.run(Newton(10, atol=1e-12), max_steps=1)
    assert sol.result == RESULTS.not_converged


def test_no_tolerance_at_all_is_reached_by_passes_of_the_cell():
    sol, roundings = PROBLEMS["chaotic"].run(Newton(12, rtol=0.0))
    assert sol.result == RESULTS.successful and float(sol.stats["residual"]) == 0
    assert roundings.max() <= 8


def test_a_sequence_that_fails_is_told_from_those_that_do_not():
    """Under `vmap` each sequence has its own certificate and its own passes."""
    h0 = jnp.asarray([0.3, 0.0, 0.6], jnp.float32)

    @jax.jit
    @jax.vmap
    def run(h0):
        xs = jnp.zeros(60, jnp.float32)
        solver = Newton(30)
        free = solve(chaotic, xs, h0, solver=solver, throw=False)
        held = solve(chaotic, xs, h0, solver=solver, throw=False, max_steps=4)
        return free.result == RESULTS.successful, held.result == RESULTS.successful

    free, held = run(h0)
    assert free.tolist() == [True, True, True]
    assert held.tolist() == [False, True, False]


# The parts


@pytest.mark.parametrize("length", [1, 3, 7, 16, 40])
@pytest.mark.parametrize("count", [1, 5, 31, 200])
def test_sizes_are_of_now_and_a_few_steps_before(count, length, getkey):
    starts = jax.random.normal(getkey(), (count, 2, 3)) * jnp.exp(
        2 * jax.random.normal(getkey(), (count, 1, 1))
    )
    sizes = np.asarray(entry_sizes(starts, length))
    values = np.abs(np.concatenate([jnp.zeros((1, 2, 3)), starts]))
    # Whole blocks before that of the start itself, whose other starts do not count.
    block = max(1, BIN // length)
    least, most = -(-(REACH - BIN) // length), -(-(REACH + BIN) // length)
    for i in range(1, count + 1):
        end = (i - 1) // block * block + 1
        near = values[max(0, end - max(1, least)) : end].max(0)
        far = values[max(0, i - most - 1) : i].max(0)
        assert (np.maximum(values[i], near) <= sizes[i - 1]).all()
        assert (sizes[i - 1] <= np.maximum(values[i], far)).all()


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
def test_what_is_not_finite_excuses_nothing(bad):
    starts = jnp.ones((40, 1)).at[7].set(bad)
    sizes = entry_sizes(starts, 1)
    np.testing.assert_array_equal(sizes, jnp.ones((40, 1)).at[7].set(0))


def test_what_was_before_a_reset_excuses_nothing():
    starts = jnp.ones((64, 1)).at[3].set(1e9)
    cuts = jnp.zeros(64, bool).at[20].set(True)
    sizes = np.asarray(entry_sizes(starts, 1, cuts))[:, 0]
    assert sizes[8] == 1e9 and (sizes[20:] == 1).all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_tolerances_neither_vanish_nor_overflow(size):
    size, rtol = jnp.float32(size), np.array([2.0**-17])
    for factor, expected in ((2.0**-18, True), (2.0**-15, size < 1e-36)):
        residual = (size * jnp.float32(factor)).reshape(1, 1)
        assert (
            bool(is_within_tolerance(residual, size.reshape(1, 1), rtol, 0.0)[0])
            == expected
        )
