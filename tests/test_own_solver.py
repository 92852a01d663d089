"""A solver of the user's own: a subclass of `AbstractSolver` that implements `run`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pararnn
from pararnn import RESULTS, AbstractSolver, Newton, Windows, solve
from pararnn.solver import Stats, certify, find_nonfinite

T, N = 40, 3


class FixedPoint(AbstractSolver):
    """Evaluate the cell at all steps at once, a fixed number of times."""

    rounds: int = eqx.field(static=True)

    def run(self, problem, guess, limit):
        steps = problem.steps
        over = problem.segmented(steps)
        inputs = jax.tree.map(lambda x: x[0], over.inputs)
        if guess is None:
            guess = tuple(jnp.broadcast_to(h, (steps, *h.shape)) for h in problem.h0)

        def evaluate(_, states):
            before = (
                jnp.concatenate([h[None], s[:-1]])
                for h, s in zip(problem.h0, states, strict=True)
            )
            return over.step(tuple(before), inputs)

        return certify(problem, lax.fori_loop(0, self.rounds, evaluate, guess))


def cell(h, x):
    return jnp.tanh(0.3 * h[::-1] + x)


def loop(xs, h0, reset=None):
    """The states, step by step in NumPy."""
    states, h = [], np.asarray(h0)
    for t, x in enumerate(np.asarray(xs)):
        h = np.zeros(N) if reset is not None and reset[t] else h
        h = np.tanh(0.3 * h[::-1] + x)
        states.append(h)
    return np.stack(states)


@pytest.fixture
def problem(getkey):
    return jax.random.normal(getkey(), (T, N)), jnp.linspace(-1, 1, N)


def test_it_solves_and_says_so(problem):
    solution = solve(cell, *problem, solver=FixedPoint(T))
    np.testing.assert_allclose(solution.states, loop(*problem), rtol=1e-12)
    assert solution.result == RESULTS.successful
    assert int(solution.stats["certified_steps"]) == T
    assert "FixedPoint" in repr(solution)


def test_it_cannot_claim_what_is_not_so(problem):
    solution = solve(cell, *problem, solver=FixedPoint(3), throw=False)
    assert solution.result == RESULTS.not_converged
    steps = int(solution.stats["certified_steps"])
    assert 3 <= steps < T
    np.testing.assert_allclose(
        solution.states[:steps], loop(*problem)[:steps], rtol=1e-12
    )
    with pytest.raises(Exception, match="did not bring the residual"):
        jax.block_until_ready(solve(cell, *problem, solver=FixedPoint(3)).states)


class Loop(AbstractSolver):
    """Step, and make the statistics by hand."""

    finite: bool = eqx.field(static=True)

    def run(self, problem, guess, limit):
        def step(h, x):
            h = problem.step(h, x)
            return h, h

        states = lax.scan(step, problem.h0, problem.inputs)[1]
        first = True if self.finite else find_nonfinite(states, problem.rank)
        return states, Stats.exact(problem, first)


def test_it_says_which_state_is_not_finite(problem):
    xs, h0 = problem
    solution = solve(cell, xs.at[9].set(jnp.nan), h0, solver=Loop(False), throw=False)
    assert solution.result == RESULTS.nonfinite_inputs
    assert int(solution.stats["first_nonfinite"]) == 9
    with pytest.raises(TypeError, match="`first_nonfinite` is a truth value"):
        solve(cell, xs, h0, solver=Loop(True))


@pytest.mark.parametrize("solver", [FixedPoint(T), Windows(FixedPoint(T), 15)])
def test_derivatives_batches_and_resets_are_not_its_business(problem, solver, getkey):
    xs, h0 = problem
    batch = jnp.stack([xs, xs[::-1], 2 * xs])
    resets = jax.random.bernoulli(getkey(), 0.2, (3, T))

    def total(solver):
        def one(xs, reset):
            states = solve(cell, xs, h0, solver=solver, reset=reset).states
            return jnp.sum(states**2), states

        def mean(batch):
            sums, states = jax.vmap(one)(batch, resets)
            return jnp.mean(sums), states

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(batch)

    ((_, states), gradient), (_, wanted) = total(solver), total(Newton(5))
    loops = [loop(x, h0, r) for x, r in zip(batch, resets, strict=True)]
    np.testing.assert_allclose(states, np.stack(loops), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_it_fits_wherever_a_solver_is_taken(problem):
    layer = pararnn.RNN(cell, solver=FixedPoint(T), init_state=problem[1])
    np.testing.assert_allclose(layer(problem[0])[0], loop(*problem), rtol=1e-12)
