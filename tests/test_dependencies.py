"""Dependencies in cells of many kinds: none is missed, and few are invented."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn
from pararnn import Auto, Implicit, Newton, jacobian_structure, solve
from tests.helpers import assert_close
from tests.problems import scan
from tests.random_cells import (
    OPERATORS,
    draw,
    found_labels,
    outside,
    single,
    true_labels,
    true_pattern,
)

# Operators for which the blocks found are larger than those of the Jacobian. The first
# are sparse because of values that no program shows, the next because of rules that are
# left out. The rule of the last is not read: it is for reverse mode alone.
COARSE = {
    *("custom_vjp", "custom_vjp in a loop", "insert"),
    *("fft", "rfft", "fft2", "cummin", "own update", "add at own index", "switch"),
    *(
        "loop to own end",
        "max pool",
        "sum pool",
        "triangular solve",
        "set at own index",
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator(name):
    random = single(name)
    labels, pattern = found_labels(random), true_pattern(random)
    assert not outside(labels, pattern).any()
    if name not in COARSE:
        assert len(set(labels)) == len(set(true_labels(pattern)))


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_random_cells(first):
    """`python -m tests.random_cells 2000` does the same for many."""
    for random in map(draw, range(first, first + 20)):
        labels, pattern = found_labels(random), true_pattern(random)
        assert not outside(labels, pattern).any(), (random.names, random.how)


@pytest.mark.parametrize("name", OPERATORS)
def test_as_sharp_as_an_independent_finder(name):
    """Blocks are never larger than those of asdex, if it is right and has a rule."""
    asdex = pytest.importorskip("asdex", exc_type=ImportError)
    random = single(name)
    try:
        found = asdex.jacobian_sparsity(random.function, jnp.ones(8))
    except Exception as error:
        pytest.skip(f"asdex: {error}")
    pattern = np.zeros((8, 8), bool)
    pattern[np.asarray(found.rows), np.asarray(found.cols)] = True
    if (true_pattern(random) & ~pattern).any():
        pytest.skip("asdex misses a dependency")
    assert len(set(found_labels(random))) >= len(set(true_labels(pattern)))


# Cells that were silently wrong once, each in a solve and its gradient.


def two_wheres(h, x):
    """JAX has one inner program for two calls of a jitted function."""
    a = jnp.where(jnp.arange(2) < 2, 0.0, h[::-1])
    return jnp.tanh(0.5 * h + a + 0.5 * jnp.where(x > 0, 0.0, h[::-1]))


@jax.jit
def helper(mask, h):
    return jnp.where(mask, 0.0, h[::-1])


def two_calls(h, x):
    return jnp.tanh(0.5 * h + helper(jnp.ones(2, bool), h) + 0.5 * helper(x > 0, h))


def two_takes(h, x):
    own = jnp.take(h, jnp.arange(2), mode="clip")
    other = jnp.take(h, (x > 0).astype(jnp.int32), mode="clip")
    return jnp.tanh(0.5 * own + 0.3 * other + x)


def two_takes_along(h, x):
    own = jnp.take_along_axis(h, jnp.arange(2), 0)
    other = jnp.take_along_axis(h, (x > 0).astype(jnp.int32), 0)
    return jnp.tanh(0.5 * own + 0.3 * other + x)


def two_switches(h, x):
    branches = [lambda h: h, lambda h: h[::-1]]
    own = jax.lax.switch(0, branches, h)
    return jnp.tanh(
        0.5 * own + 0.4 * jax.lax.switch((x[0] > 0).astype(int), branches, h)
    )


def index_from_the_state(h, x):
    return jnp.tanh(0.5 * h[(jnp.abs(h[0]) * 10).astype(int) % 2] + 0.2 * h + x)


def table_look_up(h, x):
    table = jnp.array([0.3, -0.4, 0.8])
    return jnp.tanh(0.5 * h * table[(jnp.abs(h) * 10).astype(int) % 3] + x)


def update_at_an_index_from_the_state(h, x):
    at = (jnp.abs(h[0]) * 10).astype(int) % 2
    return jnp.tanh(
        0.5 * jax.lax.dynamic_update_index_in_dim(h, x[0] * h[1], at, 0) + x
    )


def key_from_literals(h, x):
    key = jax.random.fold_in(jax.random.key(3), (jnp.abs(x[1]) * 10).astype(int))
    kept = jax.random.bernoulli(key, shape=(2,)).astype(h.dtype)
    return jnp.tanh(0.5 * h[::-1] * kept + x)


ONCE_WRONG = {
    f.__name__: f
    for f in (
        *(two_wheres, two_calls, two_takes, two_takes_along, two_switches),
        *(index_from_the_state, table_look_up, update_at_an_index_from_the_state),
        key_from_literals,
    )
}


@pytest.mark.parametrize("solver", [Auto(), Newton(7)], ids=["auto", "newton"])
@pytest.mark.parametrize("name", ONCE_WRONG)
def test_states_and_gradients_of_what_was_wrong_once(name, solver, getkey):
    cell = ONCE_WRONG[name]
    xs, h0 = jax.random.normal(getkey(), (50, 2)), jnp.array([1.0, 0.5])

    def ours(xs, h0):
        states = solve(cell, xs, h0, solver=solver).states
        return jnp.sum(states[9]) + jnp.sum(states[-1] ** 2), states

    def plain(xs, h0):
        states = scan(cell, xs, h0)
        return jnp.sum(states[9]) + jnp.sum(states[-1] ** 2), states

    derive = [jax.jit(jax.grad(f, (0, 1), has_aux=True)) for f in (ours, plain)]
    got, wanted = (f(xs, h0) for f in derive)
    assert_close(got, wanted, 1e-12)


def test_dropout_of_equinox_in_a_cell(getkey):
    drop = eqx.nn.Dropout(0.5)
    xs, h0 = jax.random.normal(getkey(), (20, 4)), jnp.ones(4)

    def cell(h, x):
        return jnp.tanh(drop(h, key=jax.random.key(7)) + x)

    assert repr(jacobian_structure(cell, xs[0], h0)) == "Diagonal"
    got = jax.grad(lambda h: jnp.sum(solve(cell, xs, h, solver=Newton(4)).states))(h0)
    assert_close(got, jax.grad(lambda h: jnp.sum(scan(cell, xs, h)))(h0), 1e-12)


def test_a_declaration_that_the_program_refutes_is_refused():
    xs, h0 = jnp.ones((50, 2)), jnp.ones(2)
    with pytest.raises(ValueError, match="couples the states"):
        solve(two_wheres, xs, h0, structure="diagonal")


def test_an_implicit_equation_with_two_wheres(getkey):
    def F(z, h, x):
        a = jnp.where(jnp.arange(2) < 2, 0.0, z[::-1])
        b = jnp.where(x > 0, 0.0, z[::-1])
        return z - 0.3 * jnp.sin(a + b + z) - jnp.tanh(h + x)

    cell = Implicit(F)
    xs, h0 = jax.random.normal(getkey(), (20, 2)), jnp.zeros(2)

    def plain(h, x):
        """The same by iterating a contraction until nothing changes.

        In a loop: unrolled, XLA took 20 GB to compile it.
        """
        return jax.lax.scan(lambda z, _: (z - F(z, h, x), None), h, length=80)[0]

    def total(step):
        return lambda h: jnp.sum(step(h) ** 2)

    ours = jax.value_and_grad(total(lambda h: solve(cell, xs, h).states))
    wanted = jax.value_and_grad(total(lambda h: scan(plain, xs, h)))
    assert_close(jax.jit(ours)(h0), jax.jit(wanted)(h0), 1e-12)
    assert pararnn.jacobian_structure(cell, xs[0], h0).kind == "dense"
