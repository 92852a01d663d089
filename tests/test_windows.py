"""Windows of time against a single loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pararnn.scan import in_windows
from tests.helpers import assert_close


def run(h, xs):
    """A loop with two kinds of outputs."""

    def step(h, x):
        h = {"h": jnp.tanh(h["h"] * x["a"] + x["b"])}
        return h, (h["h"] ** 2, jnp.sum(h["h"]))

    return lax.scan(step, h, xs)


def problem(steps):
    rng = np.random.default_rng(steps)
    xs = {name: jnp.asarray(rng.normal(size=(steps, 3))) for name in "ab"}
    return {"h": jnp.asarray(rng.normal(size=3))}, xs


@pytest.mark.parametrize(
    "steps, length, windows",
    [
        (0, 4, []),
        (1, 4, []),
        (6, 4, []),
        (7, 4, []),
        (8, 4, [4]),
        (9, 4, [3]),
        (11, 4, [5, 1]),
        (43, 7, [7, 1]),
        (44, 7, [11]),
        (5, 1, [1]),
    ],
)
def test_equals_one_loop(steps, length, windows):
    """For any division, with at most two programs, or one if the length divides T."""
    seen = []

    def recorded(h, xs):
        seen.append(xs["a"].shape[0])
        return run(h, xs)

    found = jax.jit(lambda h, xs: in_windows(recorded, h, xs, length))(*problem(steps))
    assert_close(found, run(*problem(steps)), 1e-14)
    assert seen == (windows or [steps])

    def loss(run, given):
        h, (squares, sums) = run(*given)
        return jnp.sum(h["h"]) + jnp.sum(squares**2) + jnp.sum(sums)

    def windowed(h, xs):
        return in_windows(run, h, xs, length)

    got, wanted = (
        jax.jit(jax.grad(lambda given, by=by: loss(by, given)))(problem(steps))
        for by in (windowed, run)
    )
    assert_close(got, wanted, 1e-13)
