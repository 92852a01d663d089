"""Every cell of the registry solved in parallel, against a loop, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

import pararnn
from pararnn import RNN, Newton
from tests.helpers import assert_close

D_INPUT, D_STATE, T = 3, 4, 200
# Beside the registry: forms of a cell with another Jacobian, or another guess.
FORMS = {
    "gru, heads": ("gru", {"heads": 2}),
    "lstm, heads": ("lstm", {"heads": 2}),
    "slstm, mixed": ("slstm", {"recurrence": "uniform"}),
    "slstm, heads": ("slstm", {"recurrence": "uniform", "heads": 2, "sweeps": 1}),
    "slstm, exponential": ("slstm", {"forget": "exponential", "heads": 4}),
    "cfc, timed": ("cfc", {"dt": "input"}),
}
EVERY = {name: (name, {}) for name in pararnn.CELLS} | FORMS


def make(name):
    name, options = EVERY[name]
    return pararnn.make_cell(name, D_INPUT, D_STATE, key=jr.key(0), **options)


def inputs():
    xs = jr.normal(jr.key(1), (T, D_INPUT))
    # The last feature may be a time.
    return xs.at[:, -1].set(jnp.abs(xs[:, -1]))


def loop(cell, xs, reset):
    """The outputs and the last state, by nothing but JAX and the cell itself."""
    fresh = cell.init_state()

    def step(state, at_t):
        x, restart = at_t
        state = jax.tree.map(lambda a, b: jnp.where(restart, a, b), fresh, state)
        state = cell(state, x)
        return state, cell.output(state)

    last, ys = lax.scan(step, fresh, (xs, reset))
    return ys, last


def weighed(run):
    """The gradient, in cell and inputs, of a sum in which every output counts."""

    def value(arguments, reset):
        ys, last = run(*arguments, reset)
        weights = jnp.sin(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape)
        return jnp.sum(weights * ys), (ys, last)

    return eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, segments",
    [*((name, 20) for name in pararnn.CELLS), *((name, None) for name in FORMS)],
)
def test_values_and_gradients_are_those_of_the_loop(name, segments):
    def solved(cell, xs, reset):
        return RNN(cell, solver=Newton(segments))(xs, reset=reset)

    arguments = make(name), inputs()
    reset = jnp.zeros(T, bool).at[jnp.array([33, 120])].set(True)
    (_, got), gradient = weighed(solved)(arguments, reset)
    (_, wanted), expected = weighed(loop)(arguments, reset)
    assert_close(got, wanted, 1e-10)
    # As one vector: some, such as the sLSTM's for b_i, are zero but for rounding.
    assert_close(ravel_pytree(gradient)[0], ravel_pytree(expected)[0], 1e-9)
    assert np.all(np.isfinite(got[0]))
