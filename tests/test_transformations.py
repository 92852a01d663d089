"""Cells whose `vmap` is another computation, or that communicate: as with `lax.scan`.

JAX batches and differentiates the loops that these tests compare with.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

import pararnn
from pararnn import Auto, Ladder, Newton, Sequential, Windows, solve
from pararnn.recurrence import make_recurrence, precompute_unbatchable
from tests.helpers import assert_close, refusal

T, B, N = 12, 4, 3
W = 0.4 * jr.normal(jr.key(0), (N, N))
H0 = jnp.linspace(0.3, 0.9, N)


def scan(cell, xs, h0, reset=None):
    def step(h, at_t):
        x, reset = at_t
        h = h if reset is None else jnp.where(reset, 0, h)
        h = cell(h, x)
        return h, h

    return lax.scan(step, h0, (xs, reset))[1]


def found(cell, xs, h0, reset=None, *, solver):
    return solve(cell, xs, h0, solver=solver, reset=reset).states


def keys(kind):
    return jr.split(jr.key(1, impl=kind), T)


def drawn(key):
    """A cell whose Jacobian is the number that it draws."""
    return lambda h, x: jnp.tanh(jr.normal(key(x), (N,)) * h + 0.1)


def raw(kind):
    data = jr.key_data(jr.key(2, impl=kind))
    return lambda x: jr.fold_in(jr.wrap_key_data(data, impl=kind), x)


def summed(x):
    """The sum of all entries: for a batch at once it would be another number."""
    return np.full_like(x, np.sum(x))


def called(method):
    def cell(h, x):
        shape = jax.ShapeDtypeStruct((), x.dtype)
        made = jax.pure_callback(summed, shape, x, vmap_method=method)
        return jnp.tanh(0.5 * h + made)

    return cell


@custom_vmap
def twice(x):
    return 2 * x


@twice.def_vmap
def _(size, batched, x):
    del size, batched
    return x + jnp.sum(x), True


NUMBERS = jnp.linspace(-1, 1, T)
BEFORE = {
    "rbg": (drawn(lambda x: x), keys("rbg")),
    "unsafe_rbg": (drawn(lambda x: x), keys("unsafe_rbg")),
    "unsafe_rbg, split": (drawn(lambda x: jr.split(x)[1]), keys("unsafe_rbg")),
    "closed over": (drawn(raw("rbg")), jnp.arange(T)),
    "the same at each step": (
        drawn(lambda x: jr.key(3, impl="rbg")),
        NUMBERS,
    ),
    "bits": (
        lambda h, x: jnp.tanh(
            h + lax.rng_bit_generator(x, (N,))[1].astype(float) / 2**32
        ),
        jr.bits(jr.key(4), (T, 4), jnp.uint32),
    ),
    "in a branch": (
        lambda h, x: lax.cond(
            x[1] > 0, lambda h: h * jr.uniform(x[0]), lambda h: jnp.tanh(h), h
        ),
        (keys("threefry2x32"), NUMBERS),
    ),
    "custom_vmap": (lambda h, x: jnp.tanh(0.5 * h + twice(x)), NUMBERS),
    "callback": (called("expand_dims"), NUMBERS),
    "callback without a rule": (called(None), NUMBERS),
    "callback, one by one": (called("sequential"), NUMBERS),
}


@pytest.mark.parametrize("solver", [Auto(), Newton(4), Newton()], ids=repr)
@pytest.mark.parametrize("name", BEFORE)
def test_what_the_input_draws_is_drawn_once(name, solver):
    cell, xs = BEFORE[name]

    def derive(run):
        return jax.jit(jax.value_and_grad(lambda h: jnp.sum(run(h) ** 2)))(H0)

    got = derive(lambda h: found(cell, xs, h, solver=solver))
    assert_close(got, derive(lambda h: scan(cell, xs, h)))


@pytest.mark.parametrize("solver", [Sequential(), Newton(4)], ids=repr)
def test_a_batch_draws_as_that_of_the_loop(solver):
    """With one key for all, and with one for each, where JAX draws differently."""
    each = jax.vmap(lambda n: jr.split(jr.key(n, impl="rbg"), T))(jnp.arange(B))
    cell = BEFORE["rbg"][0]
    for xs, axis in ((each, 0), (keys("rbg"), None)):

        def derive(run, xs=xs, axis=axis):
            states = jax.vmap(run, (axis, 0))
            loss = lambda h: jnp.sum(states(xs, h) ** 2)  # noqa: E731
            return jax.jit(jax.value_and_grad(loss))(jnp.tile(H0, (B, 1)))

        got = derive(lambda xs, h: found(cell, xs, h, solver=solver))
        assert_close(got, derive(lambda xs, h: scan(cell, xs, h)))


def test_what_is_called_has_its_derivative():
    """It is an input like any other, even if it depends on a parameter."""

    @jax.custom_jvp
    def host(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(np.sin, shape, x, vmap_method="expand_dims")

    host.defjvp(lambda x, dx: (host(*x), jnp.cos(x[0]) * dx[0]))

    def derive(run, f):
        def loss(w, xs):
            return jnp.sum(run(lambda h, x: jnp.tanh(w @ h + f(w[0] * x)), xs, H0))

        return jax.jit(jax.grad(loss, (0, 1)))(W, NUMBERS)

    got = derive(lambda *at: found(*at, solver=Newton(4)), host)
    assert_close(got, derive(scan, jnp.sin))


def test_what_is_read_is_read_once_a_step():
    def cell(h, x):
        shape = jax.ShapeDtypeStruct((), jnp.float64)
        return jnp.tanh(h + io_callback(lambda: read.pop(), shape) + 0 * x)

    wanted = jax.grad(lambda h: jnp.sum(scan(lambda h, x: jnp.tanh(h + x), xs, h)))
    for solver in (Auto(), Newton(4)):
        read, xs = list(np.linspace(1, 0, T)), jnp.linspace(0, 1, T)
        run = lambda h: jnp.sum(found(cell, xs, h, solver=solver))  # noqa: E731
        assert_close(jax.jit(jax.grad(run))(H0), wanted(H0))
        assert not read


def of_state(h, x):
    key = jr.fold_in(x, lax.convert_element_type(8 * h[0], int))
    return jnp.tanh(jr.normal(key, (N,)) * h + 0.1)


ON_STATE = {
    "keys": (of_state, keys("rbg")),
    "custom_vmap": (lambda h, x: jnp.tanh(twice(lax.stop_gradient(h)) + x), NUMBERS),
}


@pytest.mark.parametrize("name", ON_STATE)
def test_what_the_state_draws_is_stepped_through(name):
    cell, xs = ON_STATE[name]

    def derive(run):
        return jax.jit(jax.value_and_grad(lambda h: jnp.sum(run(h) ** 2)))(H0)

    wanted = derive(lambda h: scan(cell, xs, h))
    steps = Auto(), Sequential(), Newton(1), Windows(Auto(), 5)
    for solver in steps:
        assert_close(derive(lambda h: found(cell, xs, h, solver=solver)), wanted)
    for solver in (Newton(4), Ladder((Newton(4),)), Windows(Newton(), 5)):
        with refusal(ValueError, ["solver", "'rbg'", "`custom_vmap`", "Sequential"]):
            found(cell, xs, H0, solver=solver)


def test_what_the_state_reads_has_no_derivative():
    cell = lambda h, x: h + lax.rng_uniform(0.0, 1 + h[0] ** 2, (N,)) * x  # noqa: E731
    assert found(cell, NUMBERS, H0, solver=Auto()).shape == (T, N)
    with refusal(NotImplementedError, ["rng_uniform", "as `xs`"]):
        jax.grad(lambda h: jnp.sum(found(cell, NUMBERS, h, solver=Auto())))(H0)


def test_optimistix_is_not_given_what_it_would_draw_again():
    cell, xs = BEFORE["rbg"]
    problem = pararnn.Problem(cell, xs, H0)
    guess = jnp.zeros((T, N))
    with refusal(ValueError, ["'rbg'", "pararnn.solve"]):
        finder = pararnn.RootFinder(Newton(4))
        optx.root_find(pararnn.residual, finder, guess, args=problem)


def test_usual_cells_are_left_as_they_are():
    """Also random keys of JAX's own kind."""
    xs = keys("threefry2x32")
    recurrence = make_recurrence("test", drawn(lambda x: x), xs, H0)
    settled, (same,) = precompute_unbatchable(recurrence, (xs,))
    assert settled.jaxpr is recurrence.jaxpr and same is xs


class Shared(NamedTuple):
    cell: Callable
    coupled: bool
    axes: tuple = ("b",)


COLLECTIVES = {
    "pmean": Shared(lambda h, x: jnp.tanh(W @ h + x + 0.5 * lax.pmean(h, "b")), True),
    "psum of x": Shared(lambda h, x: jnp.tanh(W @ h + lax.psum(x, "b") / B), False),
    "axis_index": Shared(
        lambda h, x: jnp.tanh(
            W @ h * (1 + 0.1 * lax.axis_index("b").astype(float)) + x
        ),
        False,
    ),
    "all_gather": Shared(
        lambda h, x: jnp.tanh(x + W @ lax.all_gather(h, "b").mean(0)), True
    ),
    "ppermute": Shared(
        lambda h, x: jnp.tanh(
            W @ h + x * lax.ppermute(h, "b", [(i, (i + 1) % B) for i in range(B)])
        ),
        True,
    ),
    "with keys": Shared(
        lambda h, x: jnp.tanh(
            W @ h + jr.normal(jr.key(jnp.argmax(x)), (N,)) * lax.pmean(h, "b")
        ),
        True,
    ),
    "two axes": Shared(
        lambda h, x: jnp.tanh(W @ h + x - 0.3 * lax.pmean(h, ("b", "c"))),
        True,
        ("b", "c"),
    ),
    "in a loop": Shared(
        lambda h, x: lax.fori_loop(
            0, 2, lambda _, h: jnp.tanh(W @ h + x - 0.2 * lax.psum(h, "b")), h
        ),
        True,
    ),
}
SHARED = [
    *((name, solver) for name in COLLECTIVES for solver in (Auto(), Newton(4))),
    ("pmean", Newton()),
    ("pmean", Windows(Newton(3), 5)),
    ("pmean", Ladder((Newton(4),), 1)),
    ("pmean", Sequential()),
    ("psum of x", Newton()),
]


def batch(axes, seed):
    shape = (2, B, T, N)[2 - len(axes) :]
    return jr.normal(jr.key(seed), shape)


def over(axes, run):
    for name in axes:
        run = jax.vmap(run, axis_name=name)
    return run


@pytest.mark.parametrize("name, solver", SHARED)
def test_collectives_along_a_batch(name, solver):
    """Values, gradients and second derivatives, with different resets by sequence."""
    cell, coupled, axes = COLLECTIVES[name]
    xs, h0 = batch(axes, 5), batch(axes, 6)[..., 0, :]
    reset = batch(axes, 7)[..., 0] > 0.8

    def derive(run):
        states = over(axes, run)

        def loss(xs, h0):
            ys = states(xs, h0, reset)
            return jnp.sum(jnp.sin(ys)), ys

        gradient = jax.grad(loss, (0, 1), has_aux=True)
        both = jax.jit(lambda *at: jax.jvp(gradient, at, at, has_aux=True))
        return both(xs, h0)

    def run(xs, h0, reset):
        return found(cell, xs, h0, reset, solver=solver)

    # The tolerance is relative to the state, of each solve.
    assert_close(derive(run), derive(lambda *at: scan(cell, *at)), 1e-9)
    if coupled and solver == Auto():
        # The names no longer exist when the derivative is taken.
        loss = lambda run: lambda h: jnp.sum(run(xs, h, reset))  # noqa: E731
        outside = jax.grad(loss(jax.jit(over(axes, run))))(h0)
        wanted = jax.grad(loss(over(axes, lambda *at: scan(cell, *at))))(h0)
        assert_close(outside, wanted, 1e-9)


def test_a_derivative_from_outside_of_the_named_axis_is_refused():
    cell = COLLECTIVES["pmean"].cell
    states = jax.vmap(lambda x, h: found(cell, x, h, solver=Newton(4)), axis_name="b")
    with refusal(NameError, ["'b'", "jax.jit(jax.grad(jax.vmap", "Sequential"]):
        xs, h0 = batch("b", 5), batch("b", 6)[:, 0]
        jax.grad(lambda h: jnp.sum(jax.jit(states)(xs, h)))(h0)


@pytest.mark.parametrize("solver", [Auto(), Newton(3)], ids=repr)
def test_coupled_sequences_fail_together(solver):
    """A NaN in one sequence reaches the others one step later."""
    cell = COLLECTIVES["pmean"].cell
    xs, h0 = jnp.zeros((B, T, N)).at[1, 4].set(jnp.nan), jnp.zeros((B, N))

    def run(throw):
        one = lambda x, h: solve(cell, x, h, solver=solver, throw=throw)  # noqa: E731
        return jax.jit(jax.vmap(one, axis_name="b"))(xs, h0)

    solution = run(False)
    assert solution.stats["first_nonfinite"].tolist() == [5, 4, 5, 5]
    assert not np.any(solution.result == pararnn.RESULTS.successful)
    with pytest.raises(Exception, match="NaN or an infinity"):
        jax.block_until_ready(run(True))


def test_history_of_coupled_sequences_that_are_stepped():
    cell = COLLECTIVES["pmean"].cell
    xs, h0 = jnp.ones((B, T, N)), jnp.zeros((B, N))
    one = lambda x, h: solve(cell, x, h, solver=Newton(1, history=2)).stats  # noqa: E731
    history = jax.vmap(one, axis_name="b")(xs, h0)["residual_history"]
    assert history.shape == (B, 2)
    assert np.all(np.isnan(history))


def test_sequences_are_not_certified_beside_coupled_ones_that_are_not():
    """One with a small residual has been solved with wrong states of the others."""

    def cell(h, x):
        return jnp.tanh(x * h + 1e-3 * lax.pmean(h, "b"))

    xs = jnp.stack([jnp.zeros((T, N)), jnp.full((T, N), 4.0)])
    one = lambda x, h: solve(cell, x, h, solver=Newton(), max_steps=1, throw=False)  # noqa: E731
    solution = jax.vmap(one, axis_name="b")(xs, jnp.full((2, N), 1e-3))
    assert not np.any(solution.result == pararnn.RESULTS.successful)
