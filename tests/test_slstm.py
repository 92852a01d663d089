"""The sLSTM's stabiliser, and its guess for parallel solves."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import tests.numpy_reference as reference
from pararnn import RNN, Newton, SLSTMCell, solve

D, T = 6, 24
FORGET = ("sigmoid", "exponential")
each_forget = pytest.mark.parametrize("forget", FORGET)


def make(dtype=None, recurrence="uniform", **options):
    return SLSTMCell(
        D, heads=2, recurrence=recurrence, dtype=dtype, key=jr.key(0), **options
    )


@eqx.filter_jit
def step_through(cell, state, gates, reset=None):
    """All states, one step after the other."""

    def step(state, at_t):
        values, restart = at_t
        if restart is not None:
            fresh = cell.init_state()
            state = jax.tree.map(ft.partial(jnp.where, restart), fresh, state)
        state = cell.update(state, values)
        return state, state

    return lax.scan(step, state, (gates, reset))[1]


def some_state(seed=5):
    """A state as after a run: n at least 1, h below 1."""
    c, n, m, h = jr.normal(jr.key(seed), (4, D))
    return c, 1 + jnp.abs(n), 3 * m, jnp.tanh(h)


@each_forget
def test_a_fresh_state_holds_nothing(forget):
    """From zeros the paper's own equation gives the same outputs."""
    cell, xs = make(forget=forget), jr.normal(jr.key(1), (T, D))
    zeros = tuple(np.zeros((4, D)))
    wanted, _ = reference.slstm(reference.parameters(cell), np.asarray(xs), zeros)
    got = step_through(cell, cell.init_state(), cell.gates(xs))
    np.testing.assert_allclose(got[3], wanted, rtol=1e-10, atol=1e-12)
    assert np.all(got[1] >= 1)


@each_forget
@pytest.mark.parametrize("size", [50.0, 80.0])
def test_finite_for_extreme_gates(forget, size):
    """Every combination of i and f at plus or minus `size`, each for a few steps."""
    cell = make("float32", forget=forget)
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], size=(2, 200, D))
    i, f = jnp.asarray(size * signs, jnp.float32)
    z, o = jr.normal(jr.key(0), (2, 200, D), jnp.float32)

    c, n, m, h = step_through(cell, cell.init_state(), (i, f, z, o))
    assert all(np.all(np.isfinite(s)) for s in (c, n, m, h))
    assert np.all(n >= 1) and np.all(np.abs(h) <= 1)
    np.testing.assert_allclose(
        h[0], jax.nn.sigmoid(o[0]) * jnp.tanh(z[0]), rtol=1e-5
    )  # the first output depends on the first input alone

    @jax.jit
    @jax.grad
    def gradient(i):
        return jnp.sum(step_through(cell, cell.init_state(), (i, f, z, o))[3] ** 2)

    assert np.all(np.isfinite(gradient(i)))


@each_forget
def test_outputs_do_not_depend_on_the_scale_of_the_state(forget):
    """(c, n, m) and (c e^a, n e^a, m - a) mean the same numbers."""
    cell, xs = make(forget=forget), jr.normal(jr.key(1), (T, D))
    c, n, m, h = some_state()
    a = jr.normal(jr.key(7), (D,))
    moved = c * jnp.exp(a), n * jnp.exp(a), m - a, h
    wanted = step_through(cell, (c, n, m, h), cell.gates(xs))[3]
    got = step_through(cell, moved, cell.gates(xs))[3]
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-13)


@each_forget
@pytest.mark.parametrize("state", ["fresh", "given"])
@pytest.mark.parametrize("starts", [None, (0, 7, 8), (5,)])
@pytest.mark.parametrize("sweeps", ["one, no recurrence", "one a step"])
def test_guess_is_exact_where_it_must_be(forget, state, starts, sweeps):
    """After one sweep if R is zero, or as many sweeps as steps otherwise."""
    alone = sweeps == "one, no recurrence"
    cell = make(
        recurrence="zeros" if alone else "uniform",
        sweeps=1 if alone else T,
        forget=forget,
    )
    start = cell.init_state() if state == "fresh" else some_state()
    gates = cell.gates(jr.normal(jr.key(1), (T, D)))
    reset = None
    if starts is not None:
        reset = jnp.zeros(T, bool).at[jnp.array(starts)].set(True)
    got = eqx.filter_jit(cell.guess)(gates, start, reset)
    wanted = step_through(cell, start, gates, reset)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_guess_has_the_dtypes_of_the_state():
    cell = make("bfloat16")
    gates = cell.gates(jnp.ones((T, D), jnp.bfloat16))
    state = tuple(s.astype(jnp.float64) for s in cell.init_state())
    guess = jax.eval_shape(lambda g: cell.guess(g, state), gates)
    assert {(s.shape, str(s.dtype)) for s in guess} == {((T, D), "float64")}


def test_the_guess_saves_steps():
    """The layer passes it on: after as many sweeps as steps, nothing is left to do."""
    xs = jr.normal(jr.key(1), (T, D))

    @eqx.filter_jit
    def count(cell, guess):
        gates, state = cell.gates(xs), cell.init_state()
        start = cell.guess(gates, state) if guess else None
        sol = solve(cell.update, gates, state, solver=Newton(), initial_guess=start)
        return sol.stats["num_steps"]

    assert count(make(sweeps=T), True) == 1 < count(make(sweeps=1), False)


class Astray(SLSTMCell):
    """A cell whose guess has an impossible shape."""

    def guess(self, gates, state, reset=None):
        return state


def test_the_layer_asks_the_cell_for_its_guess():
    layer = RNN(Astray(D, key=jr.key(0)), solver=Newton(4))
    with pytest.raises(ValueError, match="`initial_guess` is"):
        layer(jr.normal(jr.key(1), (T, D)))


def test_a_state_that_does_not_fit_is_refused_by_name():
    """The refusal comes before the cell is asked for a guess."""
    layer = RNN(make(), solver=Newton(4))
    with pytest.raises((TypeError, ValueError), match="solve: the cell could not"):
        layer(jr.normal(jr.key(1), (T, D)), jnp.zeros(D))


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
def test_forget_biases_follow_the_power_law(depth, heads):
    def biases(**options):
        return SLSTMCell(2, 8, depth=depth, key=jr.key(0), **options).b_f

    size = 8 // heads
    law = [5 - 12 * (j / (size - 1)) ** (0.3 + 1.3 * depth) for j in range(size)]
    np.testing.assert_allclose(biases(heads=heads), law * heads, rtol=1e-12)
    gates = 1 / (1 + np.exp(-np.array(law * heads)))
    exponential = biases(heads=heads, forget="exponential")
    np.testing.assert_allclose(np.exp(exponential), gates, rtol=1e-12)
    # Heads of one unit each are spread like the units of one head.
    np.testing.assert_allclose(biases(heads=8), biases(heads=1))


def test_initial_weights():
    cell = SLSTMCell(400, 100, heads=4, key=jr.key(0))
    for W in (cell.W_i, cell.W_f, cell.W_z, cell.W_o):
        np.testing.assert_allclose(np.std(W), (2 / 2000) ** 0.5, rtol=0.02)
    for zero in (cell.R_i, cell.R_f, cell.R_z, cell.R_o, cell.b_i, cell.b_z, cell.b_o):
        assert not np.any(zero)
    assert cell.R_i.shape == (4, 25, 25)
    mixed = SLSTMCell(400, 100, heads=4, recurrence="uniform", key=jr.key(0))
    for R in (mixed.R_i, mixed.R_f, mixed.R_z, mixed.R_o):
        assert 0.19 < np.abs(R).max() <= 0.2
