"""Every cell solved in parallel, against decoding step by step, in float64.

The cells of the registry and of other libraries, each as an `RNN`, from a random state
and with resets: outputs, last state, gradients of all parameters and inputs. The steps
themselves are checked elsewhere, against equations and other libraries.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import pararnn
from pararnn import RNN, Newton
from tests.helpers import assert_close, decoded

D_INPUT, D_STATE, T = 3, 4, 200
# In addition to the registry: forms of a cell with another Jacobian, or another guess.
FORMS = {
    "gru, heads": ("gru", {"heads": 2}),
    "lstm, heads": ("lstm", {"heads": 2}),
    "slstm, mixed": ("slstm", {"recurrence": "uniform"}),
    "slstm, heads": ("slstm", {"recurrence": "uniform", "heads": 2, "sweeps": 1}),
    "slstm, exponential": ("slstm", {"forget": "exponential", "heads": 4}),
    "cfc, timed": ("cfc", {"dt": "input"}),
}
OWN = {name: (name, {}) for name in pararnn.CELLS} | FORMS
FOREIGN = {
    "eqx": ("GRUCell", "LSTMCell"),
    "nnx": ("GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell"),
}
ROWS = [
    *((name, 20) for name in pararnn.CELLS),
    *((name, None) for name in FORMS),
    *((f"{library}.{cell}", 20) for library in FOREIGN for cell in FOREIGN[library]),
    ("function", 20),
]


def make_layer(name, solver):
    if name == "function":
        fresh = jnp.full(D_STATE, 0.1)
        return RNN(
            lambda h, x: jnp.tanh(0.5 * h + x[:1]),
            solver=solver,
            init_state=fresh,
            output=lambda h: jnp.concatenate([h, 2 * h]),
        )
    if name in OWN:
        name, options = OWN[name]
        key = jr.key(0)
        cell = pararnn.make_cell(name, D_INPUT, D_STATE, key=key, **options)
        return RNN(cell, solver=solver)
    library, name = name.split(".")
    if library == "eqx":
        cell = getattr(eqx.nn, name)(D_INPUT, D_STATE, key=jr.key(0))
        return RNN(cell, solver=solver)
    nnx = pytest.importorskip("flax.nnx")
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    cell = getattr(nnx, name)(D_INPUT, D_STATE, rngs=nnx.Rngs(0), **dtypes)
    return RNN(cell, solver=solver)


def weighed(run):
    """The gradient, in layer and inputs, of a weighted sum of all outputs."""

    def value(arguments, state, reset):
        layer, xs = arguments
        ys, last = run(layer, xs, state, reset)
        weights = jnp.sin(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape)
        return jnp.sum(weights * ys), (ys, last)

    return eqx.filter_jit(eqx.filter_value_and_grad(value, has_aux=True))


@pytest.mark.parametrize("name, segments", ROWS)
def test_values_and_gradients_are_those_of_decoding(name, segments):
    layer = make_layer(name, Newton(segments))
    xs = jr.normal(jr.key(1), (T, D_INPUT))
    # The last feature may be a time.
    xs = xs.at[:, -1].set(jnp.abs(xs[:, -1]))
    # Off the fresh state, which may be a parameter: where nothing is stored, some
    # parameters (the sLSTM's b_i) change nothing.
    state = jax.tree.map(lambda s: s + 0.3, layer.init_state())
    reset = jnp.zeros(T, bool).at[jnp.array([0, 33, 34, 120])].set(True)

    def solved(layer, xs, state, reset):
        return layer(xs, state, reset=reset)

    (_, got), gradient = weighed(solved)((layer, xs), state, reset)
    (_, wanted), expected = weighed(decoded)((layer, xs), state, reset)
    assert_close(got, wanted, 1e-10)
    # As one vector: some leaves may be zero except for rounding.
    assert_close(ravel_pytree(gradient)[0], ravel_pytree(expected)[0], 1e-9)
    assert np.all(np.isfinite(got[0]))
    parameters = gradient[0].cell
    if name.startswith("nnx"):
        parameters = parameters.parameters  # Flax has no trainable fresh state.
    leaves = jax.tree_util.tree_leaves_with_path(
        eqx.filter(parameters, eqx.is_inexact_array)
    )
    assert leaves
    for path, leaf in leaves:
        assert np.any(leaf), f"the gradient does not reach {path}"
