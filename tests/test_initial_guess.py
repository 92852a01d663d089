"""Initial guesses of methods: the states that a cell reaches from h0 in some steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn import Newton, solve
from pararnn.solver import _segments
from pararnn.solver._segments import guess_ends
from tests.problems import scan

WIDTH, BATCH = 3, 2


def cell(h, x):
    """A cell that forgets slowly, so that its start shows."""
    return 0.9 * jnp.sin(h) + x


def by_hand(h, xs):
    for x in xs:
        h = 0.9 * np.sin(h) + x
    return h


def problem(steps):
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps, BATCH, WIDTH)), rng.normal(size=(BATCH, WIDTH))


@pytest.mark.parametrize("length, taken", [(2, 2), (5, 3), (20, 10), (300, 64)])
def test_steps_before_each_segment(length, taken):
    xs, h0 = problem(4 * length)
    inputs = np.swapaxes(xs.reshape(4, length, BATCH, WIDTH), 0, 1)
    found = jax.jit(lambda h0, x: guess_ends(cell, h0, x, 1))(h0, inputs)
    for i in range(4):
        before = xs[(i + 1) * length - taken : (i + 1) * length]
        np.testing.assert_allclose(found[i], by_hand(h0, before), rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 63, 64, 97, 200])
def test_every_step_a_segment(steps):
    """Start from h0 before the block of steps that precedes that of each step."""
    xs, h0 = problem(steps)
    found = jax.jit(lambda h0, x: guess_ends(cell, h0, x[None], 1))(h0, xs)
    for t in range(steps):
        if steps < 2 * _segments.COARSE_SEGMENT:
            first = max(0, t + 1 - _segments.MIN_STEPS)
        else:
            # Blocks as `split_time` cuts them: of one length, except for the last.
            length = -(-steps // -(-steps // _segments.COARSE_SEGMENT))
            first = max(0, t // length * length - length)
        wanted = by_hand(h0, xs[first : t + 1])
        np.testing.assert_allclose(found[t], wanted, rtol=1e-12, err_msg=str(t))


def test_a_cell_that_forgets_takes_one_step():
    """From a guess of 3 steps from h0 it would take 3."""

    def forgetful(h, x):
        return jnp.tanh(0.5 * h + x)

    xs, h0 = (v[..., 0, :] for v in problem(1000))
    for segments in (None, 16):
        sol = jax.jit(
            lambda xs, s=segments: solve(forgetful, xs, h0, solver=Newton(s))
        )(xs)
        assert sol.stats["num_steps"] == 1
        wanted = jax.jit(lambda xs: scan(forgetful, xs, h0))(xs)
        np.testing.assert_allclose(sol.states, wanted, rtol=1e-12)
