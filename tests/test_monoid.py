"""Reductions by a pinned tree: the engine, and the layer with a learned operation."""

import itertools as it
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from linear._monoid import CommutativeMonoid
from pararnn.scan._tree import tree_prefix, tree_reduce, tree_state
from tests.helpers import decoded, in_two_parts, whole
from tests.linear_reference import monoid_prefix
from tests.numpy_reference import parameters, sigmoid

D, T, MAX = 3, 21, 40


def mixed(l, r):
    """Neither associative nor commutative."""
    return np.sin(l + 2 * r) + l * r


def mixed_jax(l, r):
    return jnp.sin(l + 2 * r) + l * r


def by_segments(op, xs, reset):
    """Prefixes of each packed sequence alone."""
    starts = [0, *(t for t in np.flatnonzero(reset) if t), len(xs)]
    parts = [xs[a:b] for a, b in it.pairwise(starts)]
    return np.concatenate([monoid_prefix(op, part) for part in parts])


def resets(*at, steps=T):
    reset = np.zeros(steps, bool)
    reset[list(at)] = True
    return reset


@eqx.filter_jit
def prefixes(elements, state=None, reset=None, max_length=None):
    return tree_prefix(mixed_jax, elements, state, reset=reset, max_length=max_length)


@pytest.mark.parametrize("steps", [*range(1, 18), 33])
def test_prefixes(steps):
    xs = np.random.default_rng(steps).normal(size=(steps, 2))
    wanted = monoid_prefix(mixed, xs)
    got, (blocks, count) = prefixes(xs)
    np.testing.assert_allclose(got, wanted, atol=1e-13)
    assert count == steps and blocks.shape == (steps.bit_length(), 2)
    reduced = jax.jit(lambda xs: tree_reduce(mixed_jax, xs))(xs)
    np.testing.assert_allclose(reduced, wanted[-1], atol=1e-13)


RESETS = [(), (0,), (1,), (0, 1, 2, 3), (4, 11), (7, 8, 16, T - 1)]


@pytest.mark.parametrize("at", RESETS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, T])
def test_prefixes_in_parts_with_resets(at, size):
    """A cut anywhere gives the same prefixes, and bit by bit the same state."""
    xs = np.random.default_rng(0).normal(size=(T, 2))
    reset = resets(*at)
    state = tree_state(jnp.zeros(2), MAX)
    whole, last = prefixes(xs, state, reset)
    parts = []
    for first in range(0, T, size):
        at_once = slice(first, first + size)
        part, state = prefixes(xs[at_once], state, reset[at_once])
        parts.append(part)
    np.testing.assert_allclose(whole, by_segments(mixed, xs, reset), atol=1e-13)
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), state, last)
    used = [bool(int(last[1]) >> level & 1) for level in range(len(last[0]))]
    np.testing.assert_array_equal(np.any(last[0] != 0, 1), used)


def test_elements_are_a_pytree():
    """Strings as intervals, which show any wrong order."""
    steps = 13
    index = jnp.arange(steps, dtype=jnp.int32)
    elements = {"first": index, "last": index, "gaps": jnp.zeros((steps, 1, 2))}

    def join(l, r):
        gap = (r["first"] != l["last"] + 1).astype(float)[:, None, None]
        return {
            "first": l["first"],
            "last": r["last"],
            "gaps": l["gaps"] + r["gaps"] + gap,
        }

    run = jax.jit(lambda e, reset: tree_prefix(join, e, reset=reset))
    got, (blocks, _) = run(elements, resets(5, steps=steps))
    np.testing.assert_array_equal(got["first"], [0] * 5 + [5] * 8)
    np.testing.assert_array_equal(got["last"], index)
    assert not np.any(got["gaps"])
    assert blocks["gaps"].shape == (4, 1, 2) and blocks["first"].dtype == jnp.int32


def test_nothing_comes_through_a_reset():
    """No values and no derivatives, not even ones that are not finite."""
    xs = np.random.default_rng(0).uniform(1, 2, size=(T, 2))
    xs[:5] = 0
    reset = resets(5)

    def op(l, r):
        # Infinite derivative at zero.
        return jnp.sqrt(l) * jnp.sqrt(r)

    @jax.jit
    def later(xs):
        ys, _ = tree_prefix(op, xs, reset=reset)
        return jnp.sum(ys[5:])

    alone = jax.jit(jax.grad(lambda xs: jnp.sum(tree_prefix(op, xs)[0])))(xs[5:])
    slope = jax.grad(later)(xs)
    np.testing.assert_allclose(slope[5:], alone, rtol=1e-12)
    xs[:5] = np.nan
    assert np.isfinite(later(xs))
    np.testing.assert_allclose(jax.grad(later)(xs)[5:], alone, rtol=1e-12)
    state = jax.tree.map(
        lambda s: jnp.full_like(s, 3 if s.ndim == 0 else np.nan),
        tree_state(jnp.zeros(2), MAX),
    )
    ys, (blocks, _) = prefixes(xs[5:], state, resets(0, steps=T - 5))
    assert np.all(np.isfinite(ys)) and np.all(np.isfinite(blocks))


def test_too_long():
    xs = jnp.ones((8, 1))
    state = tree_state(jnp.zeros(1), 7)
    prefixes(xs[:7], state)[0].block_until_ready()
    prefixes(xs, state, resets(3, steps=8))[0].block_until_ready()
    with pytest.raises(Exception, match="more than `max_length` = 7 elements"):
        prefixes(xs, state)[0].block_until_ready()
    _, state = prefixes(xs[:5], state)
    with pytest.raises(Exception, match="packed sequences without their `reset`"):
        prefixes(xs[:3], state)[0].block_until_ready()
    with pytest.raises(Exception, match="more than `max_length` = 5 elements"):
        prefixes(xs[:1], state, None, 5)[0].block_until_ready()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: tree_prefix(mixed_jax, jnp.ones((0, 2))), ValueError, "empty set"),
        (lambda: tree_reduce(mixed_jax, jnp.ones((0, 2))), ValueError, "empty set"),
        (lambda: tree_reduce(mixed_jax, jnp.ones(())), ValueError, "leading axis"),
        (
            lambda: tree_prefix(mixed_jax, (jnp.ones(3), jnp.ones(2))),
            ValueError,
            "shapes [(3,), (2,)]",
        ),
        (
            lambda: tree_prefix(mixed_jax, jnp.ones(3), reset=jnp.zeros(2, bool)),
            ValueError,
            "`reset` has shape (2,)",
        ),
        (
            lambda: tree_prefix(mixed_jax, jnp.ones(3), reset=jnp.zeros(3)),
            TypeError,
            "expected bool",
        ),
        (
            lambda: tree_prefix(
                mixed_jax, jnp.ones(3), tree_state(jnp.ones(()), 7), max_length=8
            ),
            ValueError,
            "needs 4 levels, and `state` has 3",
        ),
        (lambda: tree_state(jnp.ones(2), 0), ValueError, "`max_length` = 0"),
        (lambda: tree_state(jnp.ones(2), 2**30), ValueError, "between 1 and 2**30"),
    ],
)
def test_engine_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


# The layer.


def make(**arguments):
    return CommutativeMonoid(
        **{"d_model": D, "max_length": MAX, "key": jr.key(0)} | arguments
    )


def gru(p, h, x):
    r = sigmoid(p.W_ir @ x + p.b_ir + p.W_hr @ h + p.b_hr)
    z = sigmoid(p.W_iz @ x + p.b_iz + p.W_hz @ h + p.b_hz)
    n = np.tanh(p.W_in @ x + p.b_in + r * (p.W_hn @ h + p.b_hn))
    return (1 - z) * n + z * h


def wanted_outputs(layer, xs, reset):
    p = parameters(layer)
    elements = np.stack([p.W_x @ x + p.b_x for x in np.asarray(xs, np.float64)])

    def op(l, r):
        return (gru(p, l, r) + gru(p, r, l)) / 2

    return by_segments(op, elements, reset) @ p.W_out.T


each_runner = pytest.mark.parametrize("runner", [whole, decoded, in_two_parts])


@each_runner
@pytest.mark.parametrize("at", RESETS)
@pytest.mark.parametrize("before", [0, 1, 6, 13])
def test_equals_the_equations(runner, at, before):
    """From a fresh state, and from the state after any number of earlier steps."""
    layer = make()
    xs = np.random.default_rng(0).normal(size=(before + T, D))
    reset = np.concatenate([np.zeros(before, bool), resets(*at)])
    state = None
    if before:
        _, state = whole(layer, jnp.asarray(xs[:before]))
    given = jnp.asarray(reset[before:]) if at else None
    ys, (blocks, count) = runner(layer, jnp.asarray(xs[before:]), state, given)
    np.testing.assert_allclose(
        ys, wanted_outputs(layer, xs, reset)[before:], atol=1e-12
    )
    _, (all_blocks, all_count) = whole(layer, jnp.asarray(xs), None, reset)
    assert count == all_count and count.dtype == jnp.int32
    np.testing.assert_allclose(blocks, all_blocks, atol=1e-13)


def test_a_set_at_once():
    layer, xs = make(), jr.normal(jr.key(1), (T, D))
    ys, _ = whole(layer, xs)
    reduce = eqx.filter_jit(lambda layer, xs: layer.reduce(xs))
    for n in (1, 2, 5, 16, T):
        np.testing.assert_allclose(reduce(layer, xs[:n]), ys[n - 1], atol=1e-14)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((0, D), "an empty set"),
        ((D,), "`xs` has shape (3,), expected [T, 3]"),
        ((2, T, D), "use `jax.vmap`"),
        ((T, D + 1), "`d_model` is 3"),
    ],
)
def test_refuses_sets(shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make().reduce(jnp.ones(shape))


def test_the_operation_is_commutative_and_not_associative():
    layer = make()
    a, b, c = jr.normal(jr.key(1), (3, 10, D))
    op = jax.jit(lambda l, r: layer.combine(l, r))
    np.testing.assert_allclose(op(a, b), op(b, a), atol=1e-16)
    assert np.max(np.abs(op(op(a, b), c) - op(a, op(b, c)))) > 1e-3


def test_siblings_may_be_swapped_and_others_not():
    layer, xs = make(), jr.normal(jr.key(1), (8, D))
    reduce = eqx.filter_jit(lambda layer, xs: layer.reduce(xs))
    wanted = reduce(layer, xs)
    siblings = (
        [1, 0, 2, 3, 4, 5, 6, 7],
        [2, 3, 0, 1, 4, 5, 6, 7],
        [4, 5, 6, 7, 0, 1, 2, 3],
        [6, 7, 5, 4, 3, 2, 0, 1],
    )
    for order in siblings:
        got = reduce(layer, xs[jnp.array(order)])
        np.testing.assert_allclose(got, wanted, atol=1e-15)
        prefix = whole(layer, xs[jnp.array(order)])[0][-1]
        np.testing.assert_allclose(prefix, wanted, atol=1e-15)
    for order in ([0, 2, 1, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 0]):
        assert np.max(np.abs(reduce(layer, xs[jnp.array(order)]) - wanted)) > 1e-4


def test_every_parameter_has_a_derivative():
    layer, xs = make(), jr.normal(jr.key(1), (T, D))
    reset = jnp.asarray(resets(9))

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(layer, runner):
        return jnp.sum(runner(layer, xs, None, reset)[0] ** 2)

    by_tree, by_steps = grad(layer, whole), grad(layer, decoded)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(by_tree), jax.tree.leaves(by_steps), strict=True
    ):
        assert np.all(np.isfinite(a)) and np.any(a), jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_derivative_is_that_of_finite_differences():
    layer, xs = make(), jr.normal(jr.key(1), (T, D))
    values, layout = ravel_pytree(eqx.filter(layer, eqx.is_array))
    static = eqx.filter(layer, eqx.is_array, inverse=True)
    direction = jr.normal(jr.key(2), values.shape)

    def loss(t):
        moved = eqx.combine(layout(values + t * direction), static)
        return jnp.sum(jnp.sin(moved(xs)[0]))

    h = 1e-3
    v = jax.jit(jax.vmap(loss))(h * jnp.array([-3.0, -2, -1, 0, 1, 2, 3]))
    v = np.asarray(v)
    wanted = v @ np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h)
    twice = v @ np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h**2)
    slope = jax.grad(loss)
    np.testing.assert_allclose(jax.jit(slope)(0.0), wanted, rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(slope))(0.0), twice, rtol=1e-6)


def test_batch():
    layer, xs = make(), jr.normal(jr.key(3), (2, T, D))
    ys, state = jax.jit(jax.vmap(layer))(xs)
    for i in range(2):
        one, last = whole(layer, xs[i])
        np.testing.assert_allclose(ys[i], one, atol=1e-14)
        np.testing.assert_allclose(state[0][i], last[0], atol=1e-14)


def test_reversed():
    layer, xs = make(), jr.normal(jr.key(3), (T, D))
    ys, _ = eqx.filter_jit(lambda layer, xs: layer(xs, reverse=True))(layer, xs)
    wanted = wanted_outputs(layer, xs[::-1], resets())
    np.testing.assert_allclose(ys, wanted[::-1], atol=1e-12)


def test_dtypes():
    layer = make(dtype=jnp.bfloat16)
    ys, (blocks, count) = whole(layer, jnp.ones((T, D), jnp.bfloat16))
    assert ys.dtype == jnp.bfloat16
    assert (blocks.dtype, count.dtype) == (jnp.float32, jnp.int32)
    layer = make(dtype=jnp.float32)
    xs = jr.normal(jr.key(3), (T, D), jnp.float32)
    ys, _ = whole(layer, xs)
    np.testing.assert_allclose(ys, wanted_outputs(layer, xs, resets()), atol=2e-6)


def test_without_64_bits():
    with jax.enable_x64(False):
        layer = CommutativeMonoid(D, key=jr.key(0))
        xs = jr.normal(jr.key(1), (T, D))
        ys, (blocks, count) = jax.jit(lambda xs: layer(xs))(xs)
    assert (ys.dtype, blocks.dtype, count.dtype) == (*2 * [jnp.float32], jnp.int32)
    np.testing.assert_allclose(ys, wanted_outputs(layer, xs, resets()), atol=2e-6)


def test_a_longer_sequence_than_planned_for_is_an_error():
    layer, xs = make(max_length=10), jnp.ones((11, D))
    assert layer.init_state()[0].shape == (4, D)
    _, state = whole(layer, xs[:10])
    for runner in (whole, decoded):
        with pytest.raises(Exception, match="more than `max_length` = 10 elements"):
            jax.block_until_ready(runner(layer, xs))
        with pytest.raises(Exception, match="more than `max_length` = 10 elements"):
            jax.block_until_ready(runner(layer, xs[:1], state))
        reset = jnp.ones(1, bool)
        assert runner(layer, xs[:1], state, reset)[1][1] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d_model": 0}, "`d_model` must be a positive integer, got 0"),
        ({"max_length": 0}, "`max_length` must be a positive integer"),
        ({"max_length": 2**30}, "so that int32 can count"),
        ({"key": 0}, "Pass `key=jax.random.key"),
        ({"dtype": jnp.int32}, "`dtype` must be"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert "CommutativeMonoid" in str(error.value)
