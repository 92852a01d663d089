"""Rotations chosen by the input: the exponential, and the layer that uses it."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.linalg import expm

import tests.linear_reference as reference
from linear.dense._unitary import UnitaryRNN, orthogonal, skew_symmetric
from tests.helpers import decoded, in_two_parts, whole
from tests.numpy_reference import parameters

exponential = jax.jit(orthogonal)
D_MODEL, D_STATE, T = 3, 5, 12


def skew(size, norm, count=4, dtype=np.float64, seed=0):
    """Skew-symmetric matrices of a given 1-norm."""
    a = np.random.default_rng(seed).normal(size=(count, size, size))
    a = a - np.swapaxes(a, 1, 2)
    return (a * norm / np.max(np.sum(np.abs(a), 1), 1)[:, None, None]).astype(dtype)


def departure(q):
    """How far the columns are from orthonormal, summed in float64."""
    q = np.asarray(q, np.float64)
    return np.max(np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(q.shape[-1])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [2, 5, 24])
@pytest.mark.parametrize("norm", [1e-8, 0.1, 0.5, 0.51, 3.0, 100.0, 1e3, 2e3])
def test_orthogonal_to_rounding(size, norm, dtype):
    q = exponential(skew(size, norm, dtype=dtype))
    assert q.dtype == dtype
    assert departure(q) < 12 * np.finfo(dtype).eps
    np.testing.assert_allclose(np.linalg.det(np.asarray(q)), 1, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5, 24])
@pytest.mark.parametrize("norm", [1e-8, 0.1, 0.5, 0.51, 3.0, 100.0, 1e3])
def test_is_the_exponential(size, norm):
    a = skew(size, norm) if size > 1 else np.zeros((4, 1, 1))
    wanted = np.stack([expm(step) for step in a])
    # An angle is known up to the rounding of the matrix, whose norm this is.
    np.testing.assert_allclose(exponential(a), wanted, atol=1e-14 + 2e-15 * norm)


def test_each_matrix_of_a_batch_by_itself():
    norms = np.array([0.0, 0.3, 5.0, 700.0])
    a = skew(4, 1.0) * norms[:, None, None]
    alone = np.stack([exponential(step[None])[0] for step in a])
    np.testing.assert_allclose(exponential(a), alone, atol=1e-14)
    np.testing.assert_allclose(exponential(a[3]), alone[3], atol=1e-14)
    np.testing.assert_allclose(jax.jit(jax.vmap(orthogonal))(a), alone, atol=1e-14)
    np.testing.assert_array_equal(alone[0], np.eye(4))


def test_not_a_number_beyond_the_norm():
    a = np.concatenate([skew(3, 2040.0, 1), skew(3, 2060.0, 1), skew(3, 1e30, 1)])
    a = np.concatenate([a, np.full((1, 3, 3), np.inf), np.full((1, 3, 3), np.nan)])
    q = np.asarray(exponential(a))
    assert np.all(np.isfinite(q[0])) and np.all(np.isnan(q[1:]))


def test_skew_symmetric():
    a = skew_symmetric(jnp.arange(1.0, 7), 4)
    below = [[0, 0, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0], [4, 5, 6, 0]]
    np.testing.assert_array_equal(a, np.array(below) - np.array(below).T)
    assert skew_symmetric(jnp.zeros((7, 0)), 1).shape == (7, 1, 1)


@pytest.mark.parametrize("norm", [0.0, 0.2, 4.0, 60.0])
def test_derivatives_of_the_exponential(norm):
    """First and second, against central differences."""
    rng = np.random.default_rng(1)
    entries, direction = rng.normal(size=(2, 6))
    entries *= norm / 3
    weight = rng.normal(size=(4, 4))

    def along(t):
        q = orthogonal(skew_symmetric(entries + t * direction, 4))
        return jnp.sum(jnp.asarray(weight) * q**2)

    values = jax.jit(jax.vmap(along))
    first, second = jax.jit(
        lambda t: (jax.grad(along)(t), jax.grad(jax.grad(along))(t))
    )(0.0)
    forward = jax.jit(jax.jacfwd(jax.jacfwd(along)))(0.0)
    h = 1e-3
    v = np.asarray(values(h * jnp.arange(-3.0, 4)))
    wanted = v @ np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h)
    twice = v @ np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h**2)
    np.testing.assert_allclose(first, wanted, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(second, twice, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(forward, second, rtol=1e-9, atol=1e-10)


def make(d_model=D_MODEL, d_state=D_STATE, **arguments):
    return UnitaryRNN(d_model, d_state, **{"key": jr.key(0)} | arguments)


def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(T, D_MODEL)), rng.normal(size=D_STATE)


each_runner = pytest.mark.parametrize("runner", [whole, decoded, in_two_parts])


@each_runner
@pytest.mark.parametrize("start", ["fresh", "state", "reset", "reset at the start"])
def test_equals_the_equations(runner, start):
    layer, (xs, state) = make(), problem()
    p, given, reset = parameters(layer), None, None
    if start == "fresh":
        state = p.initial / np.linalg.norm(p.initial)
    else:
        given = jnp.asarray(state)
    if start.startswith("reset"):
        reset = np.zeros(T, bool)
        reset[[5, 6, T - 1] if start == "reset" else 0] = True
    wanted = reference.unitary_rnn(p, xs, state, reset)
    got = runner(
        layer, jnp.asarray(xs), given, None if reset is None else jnp.asarray(reset)
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, slack", [("float32", 3e-6), ("float64", 2e-12)])
def test_keeps_the_norm_of_its_state(dtype, slack):
    """Over 20000 steps, however roundings add up."""
    layer = make(8, 16, dtype=dtype)
    xs = jr.normal(jr.key(1), (20000, 8), dtype)
    _, state = whole(layer, xs)
    size = np.linalg.norm(np.asarray(state, np.float64))
    np.testing.assert_allclose(size, 1, rtol=0, atol=slack)


def test_derivative_over_a_long_distance_keeps_its_norm():
    layer = make()
    xs = jr.normal(jr.key(1), (1000, D_MODEL))
    last = eqx.filter_jit(jax.jacrev(lambda state: layer(xs, state)[1]))
    assert departure(last(layer.init_state())) < 1e-12


def test_every_parameter_has_a_derivative():
    layer, (xs, _) = make(), problem()
    reset = jnp.zeros(T, bool).at[4].set(True)

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(layer, runner):
        return jnp.sum(runner(layer, jnp.asarray(xs), None, reset)[0] ** 2)

    for name in ("W_skew", "initial", "W_out"):
        by_scan, by_steps = (getattr(grad(layer, r), name) for r in (whole, decoded))
        assert np.all(np.isfinite(by_scan)) and np.all(np.asarray(by_scan) != 0)
        np.testing.assert_allclose(by_scan, by_steps, rtol=1e-9, atol=1e-12)


def test_derivative_is_that_of_finite_differences():
    layer, (xs, _) = make(), problem()
    values, layout = ravel_pytree(eqx.filter(layer, eqx.is_array))
    static = eqx.filter(layer, eqx.is_array, inverse=True)
    direction = jr.normal(jr.key(2), values.shape)

    def loss(t):
        moved = eqx.combine(layout(values + t * direction), static)
        return jnp.sum(jnp.sin(moved(jnp.asarray(xs))[0]))

    h = 1e-4
    v = jax.jit(jax.vmap(loss))(h * jnp.array([-2.0, -1, 1, 2]))
    wanted = np.asarray(v) @ np.array([1, -8, 8, -1]) / (12 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), wanted, rtol=1e-8)


@each_runner
def test_batch(runner):
    layer = make()
    xs = jr.normal(jr.key(3), (2, T, D_MODEL))
    ys, state = jax.jit(jax.vmap(ft.partial(runner, layer)))(xs)
    for i in range(2):
        wanted = whole(layer, xs[i])
        np.testing.assert_allclose(ys[i], wanted[0], atol=1e-13)
        np.testing.assert_allclose(state[i], wanted[1], atol=1e-13)


@pytest.mark.parametrize(
    "dtype, state", [("bfloat16", "float32"), ("float32", "float32")]
)
def test_dtypes(dtype, state):
    layer = make(dtype=dtype)
    ys, last = whole(layer, jnp.ones((T, D_MODEL), dtype))
    assert (ys.dtype, last.dtype) == (jnp.dtype(dtype), jnp.dtype(state))
    np.testing.assert_allclose(np.linalg.norm(last), 1, rtol=1e-5)


def test_without_64_bits():
    with jax.enable_x64(False):
        layer = UnitaryRNN(D_MODEL, D_STATE, key=jr.key(0))
        xs = jr.normal(jr.key(1), (T, D_MODEL))
        ys, state = jax.jit(lambda xs: layer(xs))(xs)
    wanted = reference.unitary_rnn(
        parameters(layer), np.asarray(xs, float), np.asarray(layer.init_state(), float)
    )
    assert ys.dtype == jnp.float32
    np.testing.assert_allclose(ys, wanted[0], atol=1e-5)
    np.testing.assert_allclose(state, wanted[1], atol=1e-5)


def test_one_number_stays_as_it_is():
    layer = make(d_state=1)
    ys, state = whole(layer, jnp.asarray(problem()[0]))
    assert abs(state[0]) == 1
    np.testing.assert_array_equal(ys, np.tile(layer.W_out[:, 0] * state, (T, 1)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d_model": 0}, "`d_model` must be a positive integer, got 0"),
        ({"d_state": 2.0}, "computed with `/`"),
        ({"key": 0}, "Pass `key=jax.random.key"),
        ({"dtype": jnp.int32}, "`dtype` must be"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert "UnitaryRNN" in str(error.value)
