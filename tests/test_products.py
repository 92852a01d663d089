"""Merged products, and derivatives that replay those of the loop.

Compared with JAX's own derivative of a `lax.scan` of the cell as written. Batches of
these sizes would be recomputed, so the limit is set to zero.
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import pararnn
from pararnn import solve
from pararnn.jaxprs import primitives_of
from pararnn.recurrence import (
    _replay,
    count_sequences,
    find_replay,
    make_recurrence,
    merge_products,
)
from pararnn.solver import _solve
from tests.helpers import assert_close
from tests.problems import scan

T, N, D, B = 37, 4, 3, 5


def normal(seed, *shape):
    return 0.5 * jr.normal(jr.key(seed), shape)


class Cell(NamedTuple):
    """A cell, its state, and the shapes of what the loop keeps for each step."""

    f: Callable
    h0: object
    kept: list
    merged: bool = True


class Own(eqx.Module):
    """A cell with weights of its own, so that their derivatives are tested too."""

    weights: list
    step: Callable = eqx.field(static=True)

    def __call__(self, h, x):
        return self.step(*self.weights, h, x)


def own(step, *shapes):
    return Own([normal(seed, *shape) for seed, shape in enumerate(shapes)], step)


def gru_of_matrices(W, U, h, x):
    r = jax.nn.sigmoid(W[0] @ x + U[0] @ h)
    z = jax.nn.sigmoid(W[1] @ x + U[1] @ h)
    n = jnp.tanh(W[2] @ x + r * (U[2] @ h))
    return (1 - z) * n + z * h


def two_layers(U, W, V, h, x):
    """The operand of the second product depends on the first."""
    return jnp.tanh(V @ jax.nn.relu(U @ h + W @ x) + 0.3 * h)


def one_product_read_twice(U, W, h, x):
    p = U @ h
    return jnp.tanh(p + W @ x) + 0.1 * p


def gate_and_its_argument(U, W, h, x):
    s = U @ h + W @ x
    return jnp.tanh(s) * s


def gate_beside_the_state(U, W, h, x):
    """What is kept is a state too, and the operand of a second product."""
    first = jax.nn.sigmoid(U @ h[0] + W @ x)
    return first, jnp.tanh(U @ first + h[1])


def state_is_a_product(U, W, h, x):
    return U @ h + W @ x


def bilinear(W, h, x):
    """Both operands of a product move, so nothing can be merged."""
    return jnp.tanh((W @ x).reshape(N, N) @ h)


def products_of_inputs(V, W, h, x):
    return jnp.tanh(jax.nn.sigmoid(V @ x) * h + 0.1 * jnp.exp(x @ W))


@jax.jit
def jitted(U, W, h, x):
    return jnp.tanh(U @ h + W @ x)


def module(cell, **options):
    return cell(D, N, key=jr.key(0), **options)


class Flipped(eqx.Module):
    """An Equinox cell, which takes the input first."""

    cell: eqx.Module

    def __call__(self, h, x):
        return self.cell(x, h)


ONE, PAIR = jnp.full(N, 0.3), (jnp.full(N, 0.3), jnp.full(N, -0.2))
GATE, W, U = (N,), (N, D), (N, N)
CELLS = {
    "gru of matrices": Cell(own(gru_of_matrices, (3, *W), (3, *U)), ONE, [GATE] * 4),
    "GRUCell": Cell(module(pararnn.GRUCell), ONE, [GATE] * 4),
    "LSTMCell": Cell(module(pararnn.LSTMCell), PAIR, [GATE] * 4),
    "GRUCell, heads": Cell(module(pararnn.GRUCell, heads=2), ONE, [GATE] * 4),
    "eqx LSTM": Cell(Flipped(module(eqx.nn.LSTMCell)), PAIR, [GATE] * 4, False),
    "two layers": Cell(
        own(two_layers, (6, N), (6, D), (N, 6)), ONE, [(6,), GATE], False
    ),
    "read twice": Cell(own(one_product_read_twice, U, W), ONE, [GATE] * 2, False),
    "gate and argument": Cell(own(gate_and_its_argument, U, W), ONE, [GATE], False),
    "gate and state": Cell(own(gate_beside_the_state, U, W), PAIR, [GATE] * 2, False),
    "state is a product": Cell(own(state_is_a_product, U, W), ONE, [GATE], False),
    "bilinear": Cell(own(bilinear, (N * N, D)), ONE, [U, GATE], False),
    "products of inputs": Cell(
        own(products_of_inputs, W, (D, N)), ONE, [GATE] * 2, False
    ),
    "jitted": Cell(own(jitted, U, W), ONE, [GATE], False),
}


@pytest.fixture(autouse=True)
def replay_always(monkeypatch):
    monkeypatch.setattr(_replay, "COST_PER_KEPT", 0)
    monkeypatch.setattr(_solve, "MAX_RECOMPUTED", 0)


@pytest.mark.parametrize("name", CELLS)
def test_what_is_merged_and_kept(name):
    cell = CELLS[name]
    recurrence = make_recurrence("test", cell.f, normal(0, T, D), cell.h0)
    merged = merge_products(recurrence)
    assert (merged is not recurrence) == cell.merged
    if cell.merged:
        before, after = (
            sum(e.primitive.name == "dot_general" for e in r.jaxpr.eqns)
            for r in (recurrence, merged)
        )
        assert "dot_general" in primitives_of(merged.jaxpr)
        assert after <= 2 or after < before
    replay = find_replay(merged)
    kept = [] if replay is None else replay.replayed.x_structs[1:]
    assert sorted(s.shape for s in kept) == sorted(cell.kept)


def losses(f, reset, fresh):
    """The arrays of a cell, and a loss of its states, solved and scanned."""
    arrays, static = eqx.partition(f, eqx.is_inexact_array)

    def loss(run, arrays, xs, h0):
        states = run(eqx.combine(arrays, static), xs, h0)
        return sum(
            jnp.sum(jnp.sin(s + jnp.arange(T, dtype=s.dtype)[:, None]))
            for s in jax.tree.leaves(states)
        )

    def solved(f, xs, h0):
        options = {} if reset is None else {"reset": reset, "reset_state": fresh}
        return solve(f, xs, h0, **options).states

    def scanned(f, xs, h0):
        return scan(f, xs, h0, reset, fresh)

    return arrays, ft.partial(loss, solved), ft.partial(loss, scanned)


TRANSFORMS = {
    "grad": lambda loss, a, xs, h0: jax.grad(loss, (0, 1, 2))(a, xs[0], h0),
    "grad of vmap": lambda loss, a, xs, h0: jax.grad(
        lambda a, xs, h0: jax.vmap(loss, (None, 0, None))(a, xs, h0).sum(), (0, 1, 2)
    )(a, xs, h0),
    "vmap of grad": lambda loss, a, xs, h0: jax.vmap(
        jax.grad(loss, (0, 1, 2)), (None, 0, None)
    )(a, xs, h0),
    "vmap of vmap": lambda loss, a, xs, h0: jax.grad(
        lambda a: jax.vmap(
            jax.vmap(lambda xs, h0: loss(a, xs, h0), (0, None)), (None, 0)
        )(xs, jax.tree.map(lambda h: jnp.stack([h, 2 * h]), h0)).sum()
    )(a),
    "jvp": lambda loss, a, xs, h0: jax.jvp(
        lambda *p: jax.vmap(loss, (None, 0, None))(*p), (a, xs, h0), (a, xs, h0)
    )[1],
    "forward over reverse": lambda loss, a, xs, h0: jax.jvp(
        jax.grad(
            lambda a, h0: jax.vmap(loss, (None, 0, None))(a, xs, h0).sum(), (0, 1)
        ),
        (a, h0),
        (a, h0),
    )[1],
    "reverse over reverse": lambda loss, a, xs, h0: jax.grad(
        lambda a, xs, h0: jnp.sum(
            jax.grad(lambda x: jax.vmap(loss, (None, 0, None))(a, x, h0).sum())(xs) ** 2
        ),
        (0, 1, 2),
    )(a, xs, h0),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CELLS)
def test_derivatives_equal_those_of_a_scan(name, transform):
    cell, run = CELLS[name], TRANSFORMS[transform]
    reset = jnp.arange(T) % 11 == 10 if transform in ("grad", "grad of vmap") else None
    fresh = jax.tree.map(lambda h: 0.5 * h + 0.1, cell.h0)
    arrays, solved, scanned = losses(cell.f, reset, fresh)
    xs = normal(7, 2, T, D)
    found, expected = (
        jax.jit(ft.partial(run, loss))(arrays, xs, cell.h0)
        for loss in (solved, scanned)
    )
    assert_close(found, expected, rtol=1e-9)


def test_kept_values_may_overflow():
    """A gate may be saturated by an infinite sum, while all states are finite."""

    large = jnp.full((N, N), 1e308)

    def cell(h, x):
        return 0.5 * jax.nn.sigmoid(large @ h + x)

    xs, h0 = jnp.ones((T, N)), jnp.ones(N)
    states = solve(cell, xs, h0).states
    assert jnp.all(states == 0.5)
    gradient = jax.grad(lambda xs: jnp.sum(solve(cell, xs, h0).states))(xs)
    expected = jax.grad(lambda xs: jnp.sum(scan(cell, xs, h0)))(xs)
    assert_close(gradient, expected)


def test_derivatives_after_a_reset_do_not_see_what_is_not_finite():
    arrays, static = eqx.partition(module(pararnn.GRUCell), eqx.is_inexact_array)
    xs, reset = normal(0, T, D), jnp.arange(T) == 20

    def loss(arrays, xs):
        cell = eqx.combine(arrays, static)
        states = solve(cell, xs, ONE, reset=reset, throw=False).states
        return jnp.sum(states[20:] ** 2)

    dirty = xs.at[10].set(jnp.nan)
    found, expected = (jax.grad(loss, (0, 1))(arrays, x) for x in (dirty, xs))
    assert_close(found, expected)


def test_all_sequences_are_counted():
    def count(x):
        return jnp.asarray(count_sequences((x, jnp.ones(3))))

    xs = jnp.zeros((2, 3, 5, 7))
    assert count(xs) == 1
    assert jnp.all(jax.vmap(jax.vmap(count))(xs) == 6)
    assert jnp.all(jax.jit(jax.vmap(jax.vmap(count, 1), 2))(xs) == 15)
    # Nothing is counted that is the same for all.
    assert jnp.all(jax.vmap(lambda x: count(xs))(xs) == 1)


def test_a_batch_within_a_loop_within_a_batch():
    """The inner batch is staged before the outer one is known."""
    arrays, solved, scanned = losses(CELLS["GRUCell"].f, None, None)
    xs = normal(3, 2, 3, T, D)

    def descend(loss):
        def one(xs):
            def body(arrays, _):
                def total(arrays):
                    return jax.vmap(lambda x: loss(arrays, x, ONE))(xs).sum()

                gradient = jax.grad(total)(arrays)
                return jax.tree.map(lambda a, g: a - 1e-3 * g, arrays, gradient), None

            return jax.lax.scan(body, arrays, None, length=2)[0]

        return jax.jit(jax.vmap(one))(xs)

    assert_close(descend(solved), descend(scanned), rtol=1e-9)
