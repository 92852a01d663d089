"""The reservoir of linear units: its equations, its fit, and its reduction.

Multiple superimposed oscillators are the problem of Jaeger & Haas (2004), Wierstra et
al. (2005) and Koryakin et al. (2012), as in section 5 of Stolzenburg et al.
(1802.03308).
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from linear.dense._reservoir import LRNN, _spectral_radius
from tests.helpers import decoded, in_two_parts, whole
from tests.numpy_reference import parameters

D_MODEL, D_STATE, T = 2, 6, 12
FREQUENCIES = np.array([0.2, 0.311, 0.42, 0.51, 0.63, 0.74, 0.85, 0.97])


def make(d_model=D_MODEL, d_state=D_STATE, **arguments):
    return LRNN(d_model, d_state, **{"key": jr.key(0)} | arguments)


def with_output(layer):
    """The layer with a random output matrix, as if it had been fitted."""
    weight = jr.normal(jr.key(7), layer.W_out.shape, layer.W_out.dtype) / 10
    return eqx.tree_at(lambda l: (l.W_out, l.fitted), layer, (weight, True))


def by_loop(p, us, x, reset=None):
    ys = []
    for t, u in enumerate(us):
        x = np.zeros_like(x) if reset is not None and reset[t] else x
        x = p.W_in @ u + p.W_res @ x
        ys.append(p.W_out @ np.concatenate([u, x]))
    return np.stack(ys), x


@pytest.mark.parametrize("runner", [whole, decoded, in_two_parts])
@pytest.mark.parametrize("start", ["fresh", "state", "reset"])
def test_equals_the_equations(runner, start):
    layer, rng = with_output(make()), np.random.default_rng(0)
    xs, state, reset = rng.normal(size=(T, D_MODEL)), rng.normal(size=D_STATE), None
    given = jnp.asarray(state)
    if start == "fresh":
        given, state = None, np.zeros(D_STATE)
    if start == "reset":
        reset = np.zeros(T, bool)
        reset[[0, 5, 6, T - 1]] = True
    wanted = by_loop(parameters(layer), xs, state, reset)
    got = runner(
        layer, jnp.asarray(xs), given, None if reset is None else jnp.asarray(reset)
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_every_parameter_has_a_derivative():
    layer, xs = with_output(make()), jr.normal(jr.key(1), (T, D_MODEL))

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(layer, runner):
        return jnp.sum(runner(layer, xs)[0] ** 2)

    for name in ("W_in", "W_res", "W_out"):
        a, b = (getattr(grad(layer, runner), name) for runner in (whole, decoded))
        assert np.all(np.isfinite(a)) and np.any(a)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_derivative_in_the_output_is_that_of_finite_differences():
    layer, xs = with_output(make()), jr.normal(jr.key(1), (T, D_MODEL))
    direction = jr.normal(jr.key(2), layer.W_res.shape)

    def loss(t):
        moved = eqx.tree_at(lambda l: l.W_res, layer, layer.W_res + t * direction)
        return jnp.sum(jnp.sin(moved(xs)[0]))

    h = 1e-3
    v = jax.jit(jax.vmap(loss))(h * jnp.array([-2.0, -1, 1, 2]))
    wanted = np.asarray(v) @ np.array([1, -8, 8, -1]) / (12 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), wanted, rtol=1e-7)


@pytest.mark.parametrize("radius", [1.0, 0.5])
@pytest.mark.parametrize("size", [1, 2, 5, 50])
def test_starts_with_its_spectral_radius(size, radius):
    layer = make(1, size, spectral_radius=radius)
    got = np.max(np.abs(np.linalg.eigvals(np.asarray(layer.W_res))))
    np.testing.assert_allclose(got, radius, rtol=1e-9)
    assert not np.any(layer.W_out) and not layer.fitted


def test_spectral_radius():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 8, 40):
        a = rng.normal(size=(size, size)) * 10.0 ** rng.integers(-8, 8)
        wanted = np.max(np.abs(np.linalg.eigvals(a)))
        np.testing.assert_allclose(jax.jit(_spectral_radius)(a), wanted, rtol=1e-9)
    jordan = np.array([[0.5, 1], [0, 0.5]])
    np.testing.assert_allclose(jax.jit(_spectral_radius)(jordan), 0.5, rtol=1e-9)
    rotation = np.array([[0.0, -2], [2, 0]])
    np.testing.assert_allclose(jax.jit(_spectral_radius)(rotation), 2, rtol=1e-9)


def features_by_loop(p, us):
    x, rows = np.zeros(len(p.W_res)), []
    for u in us:
        x = p.W_in @ u + p.W_res @ x
        rows.append(np.concatenate([u, x]))
    return np.stack(rows)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
def test_fit_solves_the_normal_equations(ridge):
    rng = np.random.default_rng(0)
    xs, targets = rng.normal(size=(2, 60, D_MODEL))
    layer = make(spectral_radius=0.8)
    fitted = layer.fit(xs, targets, washout=7, ridge=ridge)
    rows = features_by_loop(parameters(layer), xs)[7:]
    gram = rows.T @ rows + ridge * np.eye(rows.shape[1])
    wanted = np.linalg.solve(gram, rows.T @ targets[7:]).T
    np.testing.assert_allclose(fitted.W_out, wanted, rtol=1e-8, atol=1e-10)
    assert fitted.fitted and not layer.fitted and not np.any(layer.W_out)
    following = layer.fit(xs, washout=7, ridge=ridge)
    same = layer.fit(xs[:-1], xs[1:], washout=7, ridge=ridge)
    np.testing.assert_array_equal(following.W_out, same.W_out)


def test_fit_finds_the_smallest_of_all_minimisers():
    """With fewer steps than weights, the smallest weights that meet the targets."""
    rng = np.random.default_rng(0)
    xs, targets = rng.normal(size=(2, 9, 1))
    layer = make(1, 30, spectral_radius=0.9)
    fitted = layer.fit(xs, targets, washout=0)
    rows = features_by_loop(parameters(layer), xs)
    np.testing.assert_allclose(rows @ np.asarray(fitted.W_out).T, targets, atol=1e-9)
    wanted = np.linalg.pinv(rows) @ targets
    np.testing.assert_allclose(fitted.W_out, wanted.T, rtol=1e-6, atol=1e-9)


def test_generates_what_its_outputs_fed_back_are():
    layer, xs = with_output(make()), jr.normal(jr.key(1), (T, D_MODEL))
    got = eqx.filter_jit(lambda layer, xs: layer.generate(xs, 9))(layer, xs)
    p, wanted = parameters(layer), []
    ys, x = by_loop(p, np.asarray(xs), np.zeros(D_STATE))
    u = ys[-1]
    for _ in range(9):
        wanted.append(u)
        ys, x = by_loop(p, u[None], x)
        u = ys[-1]
    np.testing.assert_allclose(got, np.stack(wanted), atol=1e-12)
    # The same from the matrix of the closed network.
    state = np.concatenate([np.asarray(xs[-1]), whole(layer, xs)[1]])
    for y in got:
        state = np.asarray(layer.closed()) @ state
        np.testing.assert_allclose(y, state[:D_MODEL], atol=1e-12)


def oscillators(count, steps):
    t = np.arange(steps)[:, None]
    return np.sum(np.sin(FREQUENCIES[:count] * t), axis=1, keepdims=True)


def nrmse(got, wanted):
    return np.sqrt(np.mean((np.asarray(got) - wanted) ** 2) / np.var(wanted))


# The largest errors over keys 0 to 3 were, in this order, 4e-13, 2e-11, 4e-10 and 2e-7,
# and those of the reduced predictor 2e-12, 3e-11, 6e-10 and 3e-7.
@pytest.mark.parametrize("count, error", [(1, 1e-10), (2, 1e-9), (4, 1e-7), (8, 1e-5)])
def test_multiple_superimposed_oscillators(count, error):
    """Given 400 steps, predict the next 300; reduced to two units per oscillator."""
    series = oscillators(count, 700)
    given, following = series[:400], series[400:]
    layer = make(1, 100).fit(given)
    assert nrmse(layer.generate(jnp.asarray(given), 300), following) < error
    reduced = layer.reduced(given)
    assert reduced.size == 2 * count
    values = np.asarray(reduced.eigenvalues)
    np.testing.assert_allclose(
        np.sort(np.angle(values)), FREQUENCIES[:count], rtol=0, atol=error / 10
    )
    np.testing.assert_allclose(np.abs(values), 1, rtol=0, atol=error / 10)
    assert nrmse(reduced.generate(300), following) < error
    assert reduced.error < error
    # Each has an amplitude of 1 at the last step given.
    amplitudes = np.abs(np.asarray(reduced.readout)[0] * np.asarray(reduced.state))
    np.testing.assert_allclose(amplitudes, 1, atol=10 * error)


def test_noise_is_left_out():
    clean = oscillators(2, 900)
    noise = np.random.default_rng(0).normal(size=(600, 1)) * 0.01
    given = clean[:600] + noise
    layer = make(1, 150, spectral_radius=0.99).fit(given, ridge=1e-4)
    reduced = layer.reduced(given, tolerance=0.05)
    assert reduced.size == 4
    angles = np.sort(np.angle(np.asarray(reduced.eigenvalues)))
    np.testing.assert_allclose(angles, FREQUENCIES[:2], atol=1e-3)
    # The noise of each step is 0.01, and cannot be predicted.
    assert nrmse(reduced.generate(300), clean[600:]) < 0.03


EXPONENTIALS = {
    "constant": (lambda t: np.full_like(t, 3.0), 1),
    "decay": (lambda t: 0.98**t + 1, 2),
    "growth": (lambda t: 1.01**t * np.sin(0.4 * t), 2),
    "alternating": (lambda t: (-1.0) ** t + np.cos(t), 3),
}


@pytest.mark.parametrize("name", EXPONENTIALS)
def test_other_exponentials(name):
    """Real, damped, growing and negative eigenvalues."""
    formula, size = EXPONENTIALS[name]
    series = formula(np.arange(350.0))[:, None]
    layer = make(1, 40, spectral_radius=0.8).fit(series[:300])
    reduced = layer.reduced(series[:300], tolerance=1e-4)
    assert reduced.size == size
    scale = np.max(np.abs(series))
    np.testing.assert_allclose(reduced.generate(50), series[300:], atol=1e-3 * scale)
    got = layer.generate(jnp.asarray(series[:300]), 50)
    np.testing.assert_allclose(got, series[300:], atol=1e-6 * scale)


def test_several_variables_share_their_eigenvalues():
    t = np.arange(330.0)
    series = np.stack([np.sin(0.3 * t), 2 * np.cos(0.3 * t) + 1, np.zeros(330)], 1)
    layer = make(3, 40, spectral_radius=0.8).fit(series[:300])
    reduced = layer.reduced(series[:300])
    assert reduced.size == 3 and reduced.readout.shape == (3, 2)
    np.testing.assert_allclose(reduced.generate(30), series[300:], atol=1e-8)


def test_zeros():
    layer = make(1, 10).fit(np.zeros((200, 1)))
    reduced = layer.reduced(np.zeros((200, 1)))
    assert reduced.error == 0
    np.testing.assert_array_equal(reduced.generate(5), np.zeros((5, 1)))


def test_float32():
    series = oscillators(2, 500).astype(np.float32)
    layer = make(1, 40, spectral_radius=0.9, dtype=jnp.float32).fit(series[:400])
    assert layer.W_out.dtype == jnp.float32
    got = layer.generate(jnp.asarray(series[:400]), 100)
    assert got.dtype == jnp.float32
    assert nrmse(got, series[400:]) < 1e-2
    reduced = layer.reduced(series[:400], tolerance=0.05)
    assert reduced.size == 4


def test_without_64_bits():
    series = oscillators(1, 500)
    with jax.enable_x64(False):
        layer = make(1, 30, spectral_radius=0.9).fit(series[:400])
        got = layer.generate(jnp.asarray(series[:400]), 100)
        reduced = layer.reduced(series[:400])
        assert reduced.size == 2 and reduced.state.dtype == jnp.complex64
        short = reduced.generate(100)
    np.testing.assert_allclose(got, series[400:], atol=1e-3)
    np.testing.assert_allclose(short, series[400:], atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    layer = make(dtype=jnp.dtype(dtype))
    ys, state = whole(layer, jnp.ones((T, D_MODEL), dtype))
    assert (ys.dtype, state.dtype) == (jnp.dtype(dtype), jnp.float32)
    layer = layer.fit(jnp.ones((T, D_MODEL), dtype), washout=2, ridge=1e-3)
    assert layer.W_out.dtype == jnp.dtype(dtype)
    assert layer.closed().dtype == jnp.float32


XS = np.random.default_rng(0).normal(size=(150, D_MODEL))
BAD = XS.copy()
BAD[33] = np.nan
BAD_CALLS = {
    "one variable": (lambda f: f.fit(XS[:, 0]), "write `xs[:, None]`"),
    "batch": (lambda f: f.fit(XS[None]), "fit them one by one"),
    "width": (lambda f: f.fit(XS[:, :1]), "`d_model` is 2"),
    "integers": (lambda f: f.fit(XS.astype(int)), "`xs` is int64"),
    "complex": (lambda f: f.fit(XS + 0j), "`xs` is complex128"),
    "not finite": (lambda f: f.fit(BAD), "not finite, first at step 33"),
    "targets": (lambda f: f.fit(XS, XS[1:]), "leave `targets` out"),
    "targets' width": (lambda f: f.fit(XS, XS[:, :1]), "`targets` has shape"),
    "too short": (lambda f: f.fit(XS[:100]), "99 steps, less the first 100"),
    "just too short": (lambda f: f.fit(XS[:101]), "leave 0, and at least 1"),
    "washout": (lambda f: f.fit(XS, washout=-1), "`washout` is -1; expected"),
    "share": (lambda f: f.fit(XS, washout=0.5), "`washout` is 0.5; expected"),
    "ridge": (lambda f: f.fit(XS, ridge=-1.0), "`ridge` must be at least 0"),
    "text as ridge": (lambda f: f.fit(XS, ridge="a"), "`ridge` must be a real number"),
    "text as tolerance": (
        lambda f: f.fit(XS).reduced(XS, tolerance="a"),
        "`tolerance` must be a real number",
    ),
    "traced": (
        lambda f: jax.jit(lambda xs: f.fit(xs).W_out)(XS),
        "outside `jax.jit`",
    ),
    "generate before": (lambda f: f.generate(XS, 3), "has not been fitted"),
    "closed before": (lambda f: f.closed(), "`layer = layer.fit(xs)`"),
    "reduced before": (lambda f: f.reduced(XS), "LRNN.reduced: the layer has not"),
    "no series": (lambda f: with_output(f).generate(XS[:0], 3), "nothing to predict"),
    "no steps": (
        lambda f: with_output(f).generate(XS, 0),
        "`steps` must be a positive",
    ),
    "noise": (lambda f: f.fit(XS).reduced(XS), "noise, of which at least this much"),
    "tolerance": (lambda f: f.fit(XS).reduced(XS, tolerance=0), "got 0"),
    "too short to reduce": (
        lambda f: f.fit(XS).reduced(XS[:101]),
        "leave 1, and at least 2",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_calls(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(make(spectral_radius=0.9))
    assert "LRNN" in str(error.value)


def test_refuses_a_reservoir_that_overflows():
    with pytest.raises(ValueError, match="a spectral radius above 1"):
        make(spectral_radius=1e4).fit(XS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d_model": 0}, "`d_model` must be a positive integer, got 0"),
        ({"d_state": 2.0}, "computed with `/`"),
        ({"spectral_radius": 0.0}, "`spectral_radius` must be positive"),
        ({"spectral_radius": np.nan}, "got nan"),
        ({"key": 0}, "Pass `key=jax.random.key"),
        ({"dtype": jnp.int32}, "`dtype` must be"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert "LRNN" in str(error.value)
