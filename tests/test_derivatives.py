"""Derivatives of `solve` against those that JAX finds for a plain `lax.scan`."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from pararnn import Auto, Newton, Sequential, jacobian_structure, solve
from tests.helpers import assert_close
from tests.problems import CELLS, instance, scan, some_resets

# Primes, so that chunks of time have a remainder.
T = 97
LONG = 131

REAL = [name for name, cell in CELLS.items() if cell.dtype == "float64"]
REAL = [name for name in REAL if "holomorphic" not in name]
COMPLEX = ["holomorphic", "nonholomorphic"]
SCHEDULES = [
    *((name, "auto", True) for name in REAL),
    *((name, "parallel", True) for name in ("gru-diagonal", "dict-state", "elman")),
    # A sweep knows no structure.
    *((name, "sweep", True) for name in ("dict-state", "elman", "control-flow")),
    *((name, adjoint, False) for name in ("elman",) for adjoint in ("auto", "sweep")),
]
NEWTON = {"newton": Newton(), "newton-7": Newton(7), "sequential": Sequential()}


def total(states):
    """A number that depends on every state, with unequal weights."""

    def one(s):
        weights = jnp.cos(jnp.arange(s.size, dtype=s.real.dtype)).reshape(s.shape)
        return jnp.sum(weights * (s.real + 0.3 * s.imag))

    return sum(one(s) for s in jax.tree.leaves(states))


def solved(f, xs, h0, reset=None, reset_state=None, **options):
    kwargs = {} if reset is None else {"reset": reset, "reset_state": reset_state}
    return solve(f, xs, h0, **kwargs, **options).states


def loss_of(name, run, with_reset=False, steps=T):
    """`loss(parameters, xs, h0, reset_state)` of a cell of the table, and a point."""
    cell, (parameters, xs, h0) = CELLS[name], instance(name, steps)
    fresh = jax.tree.map(lambda h: 0.5 * h + 0.1, h0)
    reset = some_resets(steps, every=31) if with_reset else None

    def loss(parameters, xs, h0, fresh):
        return total(run(cell.f(parameters), xs, h0, reset, fresh))

    return loss, (parameters, xs, h0, fresh)


def directions(primals, seed=0):
    """Random tangents of all the primals."""
    leaves, tree = jax.tree.flatten(primals)
    keys = jr.split(jr.key(seed + 100), len(leaves))
    tangents = [
        jr.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, tangents)


def gradient_and_tangent(loss, primals):
    """The gradient in all arguments, and the JVP along a random direction."""

    @jax.jit
    def both(primals, tangents):
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))(*primals)
        return gradient, jax.jvp(loss, primals, tangents)[1]

    return both(primals, directions(primals))


@ft.cache
def wanted_gradient(name, with_reset, steps=T):
    return gradient_and_tangent(*loss_of(name, scan, with_reset, steps))


@pytest.mark.parametrize("name, adjoint, with_reset", SCHEDULES)
def test_first_derivatives(name, adjoint, with_reset):
    run = ft.partial(solved, adjoint=adjoint, solver=Newton(7))
    got = gradient_and_tangent(*loss_of(name, run, with_reset))
    assert_close(got, wanted_gradient(name, with_reset), 1e-9)


@pytest.mark.parametrize("adjoint", ["auto", "sweep"])
@pytest.mark.parametrize("name", COMPLEX)
def test_first_derivatives_of_complex_states(name, adjoint):
    run = ft.partial(solved, adjoint=adjoint)
    got = gradient_and_tangent(*loss_of(name, run, with_reset=True))
    assert_close(got, wanted_gradient(name, True), 1e-9)


@pytest.mark.parametrize("adjoint", ["parallel", "sweep"])
def test_reset_at_the_first_step(adjoint):
    """Then `h0` has no effect, and its gradient is zero."""
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    reset = jnp.arange(len(xs)) == 0

    def loss(run, h0, fresh):
        return total(run(cell.f(parameters), xs, h0, reset, fresh))

    run = ft.partial(solved, adjoint=adjoint)
    got = jax.jit(jax.grad(ft.partial(loss, run), (0, 1)))(h0, h0 + 1)
    wanted = jax.jit(jax.grad(ft.partial(loss, scan), (0, 1)))(h0, h0 + 1)
    assert_close(got, wanted, 1e-9)
    assert not np.any(got[0])


# Every kind of derivative with states that are not finite.
LOST = [
    *((name, "auto", Sequential()) for name in REAL),
    *((name, "parallel", Newton(7)) for name in ("gru-diagonal", "dict-state")),
    *((name, "sweep", Sequential()) for name in ("elman", "control-flow")),
    ("elman", "auto", Auto()),
]


def lost_problem(name, run):
    """A loss on all steps after a reset at step 40, and the same on these steps alone.

    The input of the second step is NaN.
    """
    cell, (parameters, xs, h0) = CELLS[name], instance(name, 60)
    spoiled = jax.tree.map(
        lambda x: x.at[1].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        xs,
    )
    reset = jnp.arange(60) == 40

    def late(tree):
        return jax.tree.map(lambda v: v[40:], tree)

    def loss(parameters, xs, h0, fresh):
        states = run(cell.f(parameters), xs, h0, reset, fresh, throw=False)
        return total(late(states)), states

    def alone(parameters, xs, fresh):
        return total(scan(cell.f(parameters), xs, fresh))

    fresh = jax.tree.map(lambda h: 0.5 * h + 0.1, h0)
    return loss, (parameters, spoiled, h0, fresh), alone, (parameters, late(xs), fresh)


@pytest.mark.parametrize("name, adjoint, solver", LOST)
def test_derivatives_do_not_leave_their_sequence(name, adjoint, solver):
    run = ft.partial(solved, adjoint=adjoint, solver=solver)
    loss, given, alone, sequence = lost_problem(name, run)

    @jax.jit
    def everything(given, sequence):
        gradient, states = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*given)
        tangent = jax.jvp(lambda *p: loss(*p)[0], given, directions(given))[1]
        return gradient, tangent, states, jax.grad(alone, (0, 1, 2))(*sequence)

    found, tangent, states, wanted = everything(given, sequence)
    assert any(np.any(np.isnan(leaf[1])) for leaf in jax.tree.leaves(states))
    parameters, xs, h0, fresh = found
    later = jax.tree.map(lambda v: v[40:], xs)
    assert_close((parameters, later, fresh), wanted, 1e-9)
    for leaf in jax.tree.leaves((h0, jax.tree.map(lambda v: v[:40], xs))):
        assert not np.any(leaf)
    assert np.isfinite(tangent)


@pytest.mark.parametrize("adjoint", ["parallel", "sweep"])
def test_a_loss_on_lost_states_has_no_finite_derivative(adjoint):
    """A selection of the finite states would wrongly make it finite."""
    run = ft.partial(solved, adjoint=adjoint, solver=Sequential())
    loss, given, *_ = lost_problem("elman", run)

    @jax.jit
    def both(parameters, xs, h0, fresh):
        def linear(parameters):
            return jnp.sum(loss(parameters, xs, h0, fresh)[1][20])

        tangent = jax.jvp(linear, (parameters,), directions((parameters,)))[1]
        return jax.grad(linear)(parameters), tangent

    gradient, tangent = both(*given)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.isnan(tangent)


def test_second_derivatives_do_not_leave_their_sequence():
    run = ft.partial(solved, solver=Sequential())
    loss, given, alone, sequence = lost_problem("gru-diagonal", run)

    def curvature(loss, primals):
        gradient = jax.grad(lambda p: loss(p, *primals[1:]))
        return jax.jvp(gradient, primals[:1], directions(primals[:1]))[1]

    found = jax.jit(lambda p: curvature(lambda *p: loss(*p)[0], p))(given)
    assert_close(found, jax.jit(lambda p: curvature(alone, p))(sequence), 1e-9)


@pytest.mark.parametrize("solver", NEWTON)
def test_gradient_does_not_depend_on_the_forward_method(solver):
    run = ft.partial(solved, solver=NEWTON[solver])
    got = gradient_and_tangent(*loss_of("lstm-blocks", run, False, LONG))
    assert_close(got, wanted_gradient("lstm-blocks", False, LONG), 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 17])
@pytest.mark.parametrize("adjoint", ["auto", "sweep"])
def test_short_sequences(steps, adjoint):
    run = ft.partial(solved, adjoint=adjoint)
    got = gradient_and_tangent(*loss_of("interleaved", run, True, steps))
    assert_close(got, wanted_gradient("interleaved", True, steps), 1e-9)


def test_no_steps_no_gradient():
    loss, primals = loss_of("tanh-diagonal", solved, steps=0)
    gradient = jax.jit(jax.grad(loss, (0, 2)))(*primals)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("adjoint", ["parallel", "sweep"])
def test_finite_differences(adjoint):
    run = ft.partial(solved, adjoint=adjoint)
    loss, primals = loss_of("gru-dense", run, with_reset=True, steps=17)
    tangents = directions(primals)
    _, slope = gradient_and_tangent(loss, primals)
    at = jax.jit(
        lambda e: loss(*jax.tree.map(lambda p, t: p + e * t, primals, tangents))
    )
    e = 1e-5
    np.testing.assert_allclose((at(e) - at(-e)) / (2 * e), slope, rtol=1e-7)


# Second order

ORDERS = {
    "forward over forward": lambda loss, v: jax.jvp(
        lambda p: jax.jvp(loss, (p,), (v,))[1], (v,), (v,)
    )[1],
    "forward over reverse": lambda loss, v: jax.jvp(jax.grad(loss), (v,), (v,))[1],
    "reverse over forward": lambda loss, v: jax.grad(
        lambda p: jax.jvp(loss, (p,), (v,))[1]
    )(v),
    "reverse over reverse": lambda loss, v: jax.grad(
        lambda p: sum(
            jnp.vdot(g, t)
            for g, t in zip(
                jax.tree.leaves(jax.grad(loss)(p)), jax.tree.leaves(v), strict=True
            )
        )
    )(v),
}


@ft.cache
def wanted_second(name, order):
    loss, primals = loss_of(name, scan, True, 37)
    return jax.jit(lambda v: ORDERS[order](lambda p: loss(*p), v))(primals)


@pytest.mark.parametrize(
    "name, adjoint, order",
    [
        *(("lstm-blocks", "parallel", order) for order in ORDERS),
        *(("elman", "sweep", order) for order in ORDERS),
        ("gru-diagonal", "auto", "reverse over reverse"),
    ],
)
def test_second_derivatives(name, adjoint, order):
    loss, primals = loss_of(
        name, ft.partial(solved, adjoint=adjoint, solver=Newton(7)), True, 37
    )
    got = jax.jit(lambda v: ORDERS[order](lambda p: loss(*p), v))(primals)
    assert_close(got, wanted_second(name, order), 1e-7)


# Under other transformations


@pytest.mark.parametrize("adjoint", ["auto", "sweep"])
def test_gradient_under_vmap(adjoint):
    run = ft.partial(solved, adjoint=adjoint, solver=Newton(7))
    loss, primals = loss_of("elman", run, with_reset=True)
    wanted_loss, _ = loss_of("elman", scan, with_reset=True)
    parameters, xs, h0, fresh = primals
    batch = jnp.stack([xs, 2 * xs, -xs])

    def over_batch(loss):
        one = jax.grad(loss, (0, 1, 2))
        return jax.jit(jax.vmap(one, in_axes=(None, 0, None, None)))(
            parameters, batch, h0, fresh
        )

    assert_close(over_batch(loss), over_batch(wanted_loss), 1e-9)


def test_gradient_of_a_batched_loss():
    """`grad` of a sum over `vmap`: gradients of shared parameters add up."""

    def over_batch(run):
        loss, (parameters, xs, h0, fresh) = loss_of("lstm-blocks", run)
        batch = jnp.stack([xs, 2 * xs, -xs])

        def mean(parameters, batch):
            one = jax.vmap(lambda xs: loss(parameters, xs, h0, fresh))
            return jnp.mean(one(batch))

        return jax.jit(jax.grad(mean, (0, 1)))(parameters, batch)

    assert_close(over_batch(solved), over_batch(scan), 1e-9)


def test_gradient_through_an_equinox_module():
    cell = eqx.nn.GRUCell(3, 5, key=jr.key(0))
    xs = jr.normal(jr.key(1), (T, 3))

    def gradient(run):
        loss = eqx.filter_grad(lambda cell: total(run(cell)))
        return eqx.filter_jit(loss)(cell)

    got = gradient(lambda cell: solve(cell, xs, jnp.zeros(5)).states)
    wanted = gradient(lambda cell: scan(lambda h, x: cell(x, h), xs, jnp.zeros(5)))
    assert_close(eqx.filter(got, eqx.is_array), eqx.filter(wanted, eqx.is_array), 1e-9)


def test_initial_guess_has_no_gradient():
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    f = cell.f(parameters)
    guess = jnp.zeros((len(xs), *h0.shape))

    def loss(guess):
        return total(solve(f, xs, h0, solver=Newton(), initial_guess=guess).states)

    assert not np.any(jax.jit(jax.grad(loss))(guess))


def test_integer_inputs_have_no_gradient_and_hinder_none():
    tokens = jnp.arange(T) % 3
    table = jr.normal(jr.key(0), (3, 4))

    def loss(run, table):
        return total(run(lambda h, i: jnp.tanh(h + table[i]), tokens, jnp.zeros(4)))

    got = jax.jit(jax.grad(ft.partial(loss, solved)))(table)
    assert_close(got, jax.jit(jax.grad(ft.partial(loss, scan)))(table), 1e-9)


def test_half_precision():
    loss, primals = loss_of("bfloat16", solved)
    wanted_loss, _ = loss_of("bfloat16", scan)
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(*primals[:2], primals[2], primals[3])
    wanted = jax.jit(jax.grad(wanted_loss, (0, 1, 2)))(*primals)
    assert_close(got, wanted, 0.05)


# Cells with custom derivative rules


@jax.custom_vjp
def sign_straight_through(x):
    return jnp.sign(x)


sign_straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


def spiking(p, h, x):
    return p["a"] * h + 0.1 * sign_straight_through(h + x)


@pytest.mark.parametrize(
    "solver, adjoint",
    [("newton", "auto"), ("newton-7", "parallel"), ("sequential", "sweep")],
)
def test_straight_through_estimator(solver, adjoint):
    p, xs = {"a": jnp.full(3, 0.7)}, jr.normal(jr.key(0), (41, 3))

    def loss(run, p, xs, h0):
        return total(run(lambda h, x: spiking(p, h, x), xs, h0))

    run = ft.partial(solved, solver=NEWTON[solver], adjoint=adjoint)
    point = (p, xs, jnp.ones(3))
    got = jax.jit(jax.grad(ft.partial(loss, run), (0, 1, 2)))(*point)
    wanted = jax.jit(jax.grad(ft.partial(loss, scan), (0, 1, 2)))(*point)
    assert_close(got, wanted, 1e-9)


@pytest.mark.parametrize("run", [scan, solved])
def test_forward_mode_through_a_custom_vjp_is_refused_as_by_jax(run):
    xs = jnp.ones((5, 3))

    def loss(h0):
        return total(run(lambda h, x: spiking({"a": 0.7}, h, x), xs, h0))

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda h: jax.jvp(loss, (h,), (h,)))(jnp.ones(3))


@jax.custom_jvp
def clipped(x):
    return jnp.tanh(x)


@clipped.defjvp
def _(primals, tangents):
    """Three times the derivative, which the program of tanh does not show."""
    (x,), (t,) = primals, tangents
    return jnp.tanh(x), 3 * (1 - jnp.tanh(x) ** 2) * t


@pytest.mark.parametrize(
    "solver, adjoint",
    [("newton", "auto"), ("newton-7", "parallel"), ("sequential", "sweep")],
)
def test_a_custom_jvp_rule_is_the_derivative(solver, adjoint):
    xs = jr.normal(jr.key(0), (41, 3))

    def loss(run, a, xs):
        return total(run(lambda h, x: clipped(a * h + x), xs, jnp.zeros(3)))

    a = jnp.full(3, 0.2)
    run = ft.partial(solved, solver=NEWTON[solver], adjoint=adjoint)
    got = jax.jit(jax.grad(ft.partial(loss, run), (0, 1)))(a, xs)
    assert_close(got, jax.jit(jax.grad(ft.partial(loss, scan), (0, 1)))(a, xs), 1e-9)


# Memory


def gradient_memory(**options):
    """The bytes of temporaries of the compiled gradient."""
    run = ft.partial(solved, **options)
    loss, primals = loss_of("gru-diagonal", run, steps=1024)
    compiled = jax.jit(jax.grad(loss)).lower(*primals).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_does_not_grow_with_newton_steps():
    few = gradient_memory(solver=Newton(64), max_steps=2)
    many = gradient_memory(solver=Newton(64), max_steps=60)
    assert many <= 1.05 * few


@jax.custom_jvp
def spike(h):
    return jnp.sign(h)


@spike.defjvp
def _(primals, tangents):
    return spike(*primals), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


def test_a_surrogate_rule_counts_in_the_structure():
    # The body of `spike` depends on nothing; its rule couples all channels.
    weights = jr.normal(jr.key(0), (5, 5)) * 0.4
    xs, h0 = jr.normal(jr.key(1), (40, 5)), jnp.zeros(5)

    def cell(h, x):
        return weights @ spike(h) + 0.3 * jnp.tanh(h) + x

    def loop(xs):
        return jax.lax.scan(lambda h, x: (cell(h, x),) * 2, h0, xs)[1]

    def gradient(states):
        return jax.jit(jax.grad(lambda xs: jnp.sum(jnp.sin(states(xs)))))(xs)

    found = gradient(lambda xs: solve(cell, xs, h0).states)
    assert repr(jacobian_structure(cell, xs[0], h0)) == "Dense"
    np.testing.assert_allclose(found, gradient(loop), rtol=1e-10, atol=1e-12)
