"""Properties of single cells: piecewise linearity, no inputs, convexity, spectra."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import pararnn
from pararnn import RNN, ALRNNCell, ICLRNNCell, Newton, PLRNNCell, QKANLSTMCell
from pararnn.cells._iclrnn import spectral_norm
from tests.helpers import assert_close

IN, WIDTH, T = 3, 5, 40

MAKE = {
    "plrnn": lambda key: PLRNNCell(IN, WIDTH, key=key),
    "alrnn": lambda key: ALRNNCell(IN, WIDTH, rectified=2, key=key),
    "plrnn, autonomous": lambda key: PLRNNCell(0, WIDTH, key=key),
    "alrnn, autonomous": lambda key: ALRNNCell(0, WIDTH, rectified=2, key=key),
    "iclrnn": lambda key: ICLRNNCell(IN, WIDTH, key=key),
    "qkanlstm": lambda key: QKANLSTMCell(IN, WIDTH, layers=1, key=key),
}
each_cell = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "qkanlstm"))
        for name in MAKE
    ],
)
piecewise_linear = pytest.mark.parametrize("name", ["plrnn", "alrnn"])


def instance(name):
    """A cell with weights that matter, inputs, and a state that is not zero."""
    keys = jr.split(jr.key(1), 3)
    cell = MAKE[name](keys[0])
    if "lrnn" in name and "ic" not in name:
        cell = eqx.tree_at(lambda c: c.W, cell, 0.4 * jr.normal(keys[2], cell.W.shape))
    state = jax.tree.map(
        lambda s: jr.normal(keys[1], s.shape, s.dtype), cell.init_state()
    )
    return cell, jr.normal(keys[2], (T, cell.d_input)), state


def loop(cell, xs, state):
    """A loop over the cell's own call."""

    def step(state, x):
        state = cell(state, x)
        return state, cell.output(state)

    state, ys = lax.scan(step, state, xs)
    return ys, state


def loss_of(run):
    def loss(arguments):
        ys, state = run(*arguments)
        weights = jnp.cos(jnp.arange(ys.size)).reshape(ys.shape)
        last = jax.tree.leaves(jax.tree.map(lambda s: jnp.sum(s**2), state))
        return jnp.sum(weights * ys) + sum(last)

    return eqx.filter_jit(eqx.filter_value_and_grad(loss))


@each_cell
def test_newton_and_its_gradient_equal_the_loop(name):
    arguments = instance(name)

    def in_parallel(cell, xs, state):
        return RNN(cell, solver=Newton(segments=16))(xs, state)

    got = loss_of(in_parallel)(arguments)
    wanted = loss_of(loop)(arguments)
    assert_close(got, wanted, 1e-10)


# Piecewise-linear cells


@piecewise_linear
def test_published_initialisation(name):
    n, cls = 200, type(MAKE[name](jr.key(0)))
    options = {"rectified": 3} if name == "alrnn" else {}
    cell = cls(4, n, **options, key=jr.key(0))
    A, W, C = (np.asarray(a) for a in (cell.A, cell.W, cell.C))
    # The eigenvalues of RᵀR/n lie in [0, 4], so A is close to (1 + 1) / (4 + 1).
    assert np.all((A > 0.3) & (A < 0.55)) and len(np.unique(A)) == n
    assert abs(W.std() / 0.01 - 1) < 0.02 and abs(W.mean()) < 2e-4
    assert not np.any(cell.h)
    bound = np.sqrt(6 / (n + 4))
    assert 0.95 * bound < np.abs(C).max() <= bound


@piecewise_linear
def test_jacobian_is_the_linear_map_of_the_region(name):
    cell, xs, z = instance(name)
    rectified = cell.rectified if name == "alrnn" else WIDTH
    slope = np.ones(WIDTH)
    slope[WIDTH - rectified :] = np.asarray(z)[WIDTH - rectified :] > 0
    assert 0 < slope.sum() < WIDTH
    wanted = np.diag(cell.A) + np.asarray(cell.W) * slope
    got = jax.jit(jax.jacfwd(lambda z: cell(z, xs[0])))(z)
    np.testing.assert_allclose(got, wanted, rtol=1e-14)


def test_alrnn_between_linear_and_plrnn():
    key, xs = jr.key(3), jr.normal(jr.key(4), (T, IN))
    run = eqx.filter_jit(lambda cell, xs: RNN(cell)(xs))
    full = run(ALRNNCell(IN, WIDTH, rectified=WIDTH, key=key), xs)
    assert_close(full, run(PLRNNCell(IN, WIDTH, key=key), xs), 0)
    linear = ALRNNCell(IN, WIDTH, rectified=0, key=key)
    twice = jax.tree.map(lambda y: 2 * y, run(linear, xs))
    assert_close(run(linear, 2 * xs), twice, 1e-13)


def test_regions_are_the_signs_of_the_rectified_units():
    cell, xs, state = instance("alrnn")
    zs, _ = RNN(cell)(xs, state)
    regions = cell.region(zs)
    assert regions.shape == (T, 2) and regions.dtype == bool
    np.testing.assert_array_equal(regions, np.asarray(zs)[:, [3, 4]] > 0)
    np.testing.assert_array_equal(cell.region(zs[7]), regions[7])
    assert len(np.unique(regions, axis=0)) > 1
    # Within a region the step is affine.
    z, w = zs[0], jnp.abs(zs[1])
    same = w.at[3:].set(jnp.where(regions[0], w[3:], -w[3:]))
    middle = cell(0.5 * z + 0.5 * same, xs[0])
    assert_close(middle, 0.5 * cell(z, xs[0]) + 0.5 * cell(same, xs[0]), 1e-13)
    assert ALRNNCell(0, 4, rectified=0, key=jr.key(0)).region(zs[:, :4]).shape == (T, 0)


@pytest.mark.parametrize(
    "state, message",
    [
        (jnp.zeros(WIDTH + 1), r"`state` has shape \(6,\), expected \[..., 5\]"),
        (jnp.zeros(()), "units come last"),
        (jnp.zeros(WIDTH, bool), "`state` is bool"),
    ],
)
def test_region_refuses(state, message):
    with pytest.raises(ValueError, match=message):
        MAKE["alrnn"](jr.key(0)).region(state)


@pytest.mark.parametrize("name", ["plrnn, autonomous", "alrnn, autonomous"])
def test_without_inputs(name):
    cell, xs, z = instance(name)
    assert xs.shape == (T, 0) and cell.C.shape == (WIDTH, 0)
    layer = RNN(cell, solver=Newton(4))
    zs, last = layer(xs, z)
    W, A, h = (np.asarray(p) for p in (cell.W, cell.A, cell.h))
    first = getattr(cell, "rectified", WIDTH)
    wanted, current = [], np.asarray(z)
    for _ in range(T):
        phi = current.copy()
        phi[WIDTH - first :] = np.maximum(phi[WIDTH - first :], 0)
        current = A * current + W @ phi + h
        wanted.append(current)
    np.testing.assert_allclose(zs, wanted, rtol=1e-10)
    np.testing.assert_array_equal(last, zs[-1])
    y, _ = layer.step(jnp.zeros(0), z)
    np.testing.assert_allclose(y, zs[0], rtol=1e-12)
    states = pararnn.solve(cell, xs, z, solver=Newton(4)).states
    np.testing.assert_allclose(states, zs, rtol=1e-12)
    with pytest.raises(ValueError, match=r"expected \[..., 0\]"):
        layer(jnp.zeros((T, 1)), z)


# The input convex Lipschitz cell


def pairs(count=200):
    """Pairs of an input and a state, some close to each other and some far."""
    keys = jr.split(jr.key(5), 3)
    scale = 10 ** jr.uniform(keys[2], (count, 1), minval=-2, maxval=1)

    def two(key, size):
        a, d = jr.normal(key, (2, count, size))
        return a, a + scale * d

    return two(keys[0], IN), two(keys[1], WIDTH)


def norm(v):
    return np.linalg.norm(v, axis=-1)


def test_each_step_is_convex_in_input_and_state():
    cell = MAKE["iclrnn"](jr.key(0))
    (x, y), (h, k) = pairs()
    step = jax.jit(jax.vmap(cell))
    for share in (0.1, 0.5, 0.8):
        between = step(share * h + (1 - share) * k, share * x + (1 - share) * y)
        chord = share * step(h, x) + (1 - share) * step(k, y)
        assert np.all(between <= chord + 1e-12)
        assert np.any(between < chord - 1e-3)


def test_the_outputs_are_convex_in_all_inputs():
    layer = RNN(MAKE["iclrnn"](jr.key(0)))
    run = eqx.filter_jit(lambda xs: layer(xs)[0])
    x, y = jr.normal(jr.key(6), (2, T, IN))
    gap = 0.5 * run(x) + 0.5 * run(y) - run(0.5 * x + 0.5 * y)
    assert np.all(gap >= -1e-12) and np.any(gap > 1e-3)


def test_no_step_expands():
    cell = MAKE["iclrnn"](jr.key(0))
    (x, y), (h, k) = pairs()
    step = jax.jit(jax.vmap(cell))
    moved = norm(step(h, x) - step(k, y))
    assert np.all(moved <= norm(x - y) + norm(h - k))
    assert np.all(norm(step(h, x) - step(k, x)) <= norm(h - k))
    assert np.all(norm(step(h, x) - step(h, y)) <= norm(x - y))


def test_the_norms_are_all_but_reached():
    """The divisor is the norm, not something much larger: some direction is kept."""
    cell = MAKE["iclrnn"](jr.key(0))
    cell = eqx.tree_at(lambda c: c.b, cell, jnp.full(WIDTH, 10.0))  # Linear.
    for argument in (0, 1):
        jacobian = jax.jacfwd(cell, argument)(jnp.ones(WIDTH), jnp.ones(IN))
        assert 0.998 < np.linalg.norm(jacobian, 2) <= 1 + 1e-14


MATRICES = {
    "tall": jr.normal(jr.key(0), (7, 3)),
    "wide": jr.normal(jr.key(1), (3, 7)),
    "equal singular values": jnp.eye(6),
    "rank one": jnp.ones((4, 5)),
    "tiny": 1e-30 * jr.normal(jr.key(2), (4, 4), jnp.float32),
    "huge": 1e30 * jr.normal(jr.key(2), (4, 4), jnp.float32),
    "one number": jnp.full((1, 1), -3.0),
    "1024 equal": jnp.eye(1024, dtype=jnp.float32),
}


@pytest.mark.parametrize("name", MATRICES)
def test_spectral_norm_from_above(name):
    matrix = MATRICES[name]
    got = float(jax.jit(spectral_norm)(matrix))
    wanted = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    assert wanted * (1 - 1e-6) <= got < 1.002 * wanted


@pytest.mark.parametrize("name", ["tall", "wide", "rank one", "tiny"])
def test_derivative_of_the_spectral_norm(name):
    """It is that of the largest singular value: the outer product of its vectors."""
    matrix = MATRICES[name]
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64))
    got = jax.jit(jax.grad(spectral_norm))(matrix)
    np.testing.assert_allclose(got, np.outer(left[:, 0], right[0]), atol=2e-3)


def test_zero_weights_have_finite_derivatives():
    cell = jax.tree.map(
        lambda p: jnp.zeros_like(p) if eqx.is_array(p) else p, MAKE["iclrnn"](jr.key(0))
    )
    xs = jnp.ones((4, IN))
    value, gradient = loss_of(loop)((cell, xs, jnp.ones(WIDTH)))
    assert value == 0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


# QKAN-LSTM


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_circuit_is_a_trigonometric_polynomial_of_its_layers(layers):
    cell = QKANLSTMCell(1, layers=layers, key=jr.key(0))
    samples = 32
    turn = jnp.linspace(0, 2 * jnp.pi, samples, endpoint=False)
    for values in cell.gates(turn[:, None]):
        assert np.all(np.abs(values) <= 1)
        spectrum = np.abs(np.fft.rfft(values[:, 0])) / samples
        assert spectrum[layers] > 1e-6
        assert np.all(spectrum[layers + 1 :] < 1e-14)


def test_initial_angles_and_frequencies():
    n, layers = 60, 3
    cell = QKANLSTMCell(20, n, layers=layers, key=jr.key(0))
    for maps, d_from in ((cell.of_x, 20), (cell.of_h, n)):
        variance = (layers + 1) * (d_from + n)
        for theta in (maps.theta_z, maps.theta_y):
            assert theta.shape == (layers + 1, 4, n, d_from)
            assert np.all(abs(np.var(theta, axis=(0, 2, 3)) * variance - 1) < 0.1)
        assert np.all(maps.w == 1) and not np.any(maps.b)
    angles = np.concatenate([np.ravel(m.theta_z) for m in (cell.of_x, cell.of_h)])
    assert len(np.unique(angles)) == angles.size
